"""Configuration: what decides a result (`Run`) and how it is computed (`Execution`).

Precedence: default < YAML file < command line. Every part is frozen and refuses unknown keys;
`load` reports all errors at once, one line each, naming the key, the value and what was expected.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from raymoe.methods import METHODS, Method, SparseUpcycling
from raymoe.schema import Config, InputError


class LocalModel(Config):
    """Shape and training of the tiny Llama that stands in for a dense model when `model.name` is `local`."""

    vocab_size: int = Field(2048, ge=320)
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(384, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_steps: int = Field(200, ge=1)
    """Optimizer steps of its pre-training on the local corpus."""
    learning_rate: float = Field(3e-3, gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> LocalModel:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads {self.num_heads}"
            )
        return self


class Model(Config):
    """The dense model that everything starts from."""

    name: str = "local"
    """A Hugging Face id, a folder, or `local` for the tiny model that raymoe trains itself."""
    revision: str | None = None
    """Commit or tag of a Hugging Face id."""
    local: LocalModel = LocalModel()


class Source(Config):
    """One source of a mixture: where its rows are, what its columns are called, how its rows are labelled."""

    name: str = Field(min_length=1)
    """JSONL or parquet file, folder of them, Hugging Face id, or `local` for the embedded corpus."""
    revision: str | None = None
    """Commit or tag of a Hugging Face id."""
    subset: str | None = None
    """Configuration of a Hugging Face id that has several."""
    domain: str | None = None
    """Domain of all its rows; by default each row's own, else its file's name (Hugging Face ids: `all`)."""
    task: str | None = None
    """Task of all its rows; by default each row's own, else its domain."""
    task_column: str | None = None
    """Column of the rows' tasks, where it is not called `task`."""
    max_examples: int | None = Field(None, ge=1)
    """Keep at most this many of its training examples (a seeded sample)."""
    prompt: str | None = None
    """Column of the prompt, where it is none that raymoe knows; `completion` is given with it."""
    completion: str | None = None
    """Column of the completion."""
    system: str | None = None
    """Column of the system prompt; by default `system` or `system_prompt` where a row has one."""

    @model_validator(mode="after")
    def _columns_are_a_pair(self) -> Source:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError(f"{self.name}: prompt and completion name two columns: give both or neither")
        if self.task is not None and self.task_column is not None:
            raise ValueError(f"{self.name}: give task, the same for all rows, or task_column")
        return self


def _sources(value: Any) -> Any:
    """Names and mappings as sources; one plain name, or none, as it is."""
    given = [value] if isinstance(value, str | Mapping | Source) else value
    if value is None or (isinstance(given, list | tuple) and len(given) == 1 and isinstance(given[0], str)):
        return value if value is None else given[0]
    if not isinstance(given, list | tuple) or not given:
        raise ValueError("expected a name, or a list of names and of sources with a name")
    return TypeAdapter(tuple[Source, ...]).validate_python(
        [{"name": each} if isinstance(each, str) else each for each in given]
    )


class Data(Config):
    """Instructions to train on, and the held-out ones to measure with."""

    train: str | tuple[Source, ...] = "local"
    """JSONL or parquet file, folder of them, Hugging Face id, or `local` for the embedded corpus; or a list
    of them or of sources (name, revision, subset, domain, task, max_examples, prompt, completion, system)."""
    validation: str | tuple[Source, ...] | None = None
    """Held-out instructions, given as `train` is; by default each source's own dev/validation split, else a
    share of it."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of a source held out where it has no split of its own."""
    revision: str | None = None
    """Commit or tag of a single Hugging Face id; of a list every source has its own."""
    max_length: int = Field(512, ge=8)
    """Tokens of a training sequence, into which whole examples are packed."""
    max_examples: int | None = Field(None, ge=1)
    """Keep at most this many training examples of all sources together (a seeded sample)."""
    chat_template: Literal["tokenizer", "plain"] = "tokenizer"
    """`tokenizer`: the tokenizer's own template where it has one; `plain`: raymoe's."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a malformed, empty or too long row; skipped ones are counted and reported."""

    _as_sources = field_validator("train", "validation", mode="before")(_sources)

    @model_validator(mode="after")
    def _revision_has_its_source(self) -> Data:
        if self.revision and not isinstance(self.train, str) and not isinstance(self.validation, str):
            raise ValueError("revision is of a single source: of a list give each its own")
        return self

    def sources(self, split: Literal["train", "validation"]) -> tuple[Source, ...]:
        """The sources that are given for `split`."""
        given = self.train if split == "train" else self.validation
        return (Source(name=given, revision=self.revision),) if isinstance(given, str) else given or ()

    @property
    def uses_local_corpus(self) -> bool:
        """Whether `local` is among the sources."""
        return any(source.name == "local" for source in (*self.sources("train"), *self.sources("validation")))


class Optimization(Config):
    """AdamW over all parameters."""

    learning_rate: float = Field(5e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    """Packed sequences of `data.max_length` tokens per optimizer step, over all workers."""
    num_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps even if the epochs are not over."""


class Evaluation(Config):
    """What is measured while training."""

    milestones: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of training after which the model is evaluated (RSU paper, Table 5)."""
    max_examples_per_domain: int = Field(100, ge=1)
    """Held-out examples per domain for loss and perplexity."""
    generation_domains: tuple[str, ...] = ("math",)
    """Domains whose final answer is compared after greedy generation."""
    generation_examples: int = Field(32, ge=0)
    max_new_tokens: int = Field(96, ge=1)

    @model_validator(mode="after")
    def _milestones_rise(self) -> Evaluation:
        if any(not 0 <= m <= 1 for m in self.milestones) or list(self.milestones) != sorted(
            set(self.milestones)
        ):
            raise ValueError(f"milestones {list(self.milestones)} must rise within [0, 1]")
        if not self.milestones or self.milestones[-1] != 1:
            raise ValueError(f"milestones {list(self.milestones)}: the last must be 1.0, the end of training")
        return self


class Run(Config):
    """Everything that decides a result; its hash is the trial's identity."""

    model: Model = Model()
    data: Data = Data()
    method: Method = SparseUpcycling()
    optimization: Optimization = Optimization()
    evaluation: Evaluation = Evaluation()
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, values: Any) -> Any:
        method = values.get("method") if isinstance(values, Mapping) else None
        if isinstance(method, Mapping) and "name" not in method:
            return {**values, "method": {"name": SparseUpcycling().name, **method}}
        return values


class Execution(Config):
    """How a run is computed. Nothing here enters a hash or changes a result beyond rounding."""

    storage: str = Field(default_factory=lambda: os.environ.get("RAYMOE_STORAGE", "runs"))
    """Folder or s3://bucket/prefix for stages, checkpoints and sweeps; all nodes must reach it. $RAYMOE_STORAGE."""
    address: str | None = None
    """Ray cluster to use; by default the one of the job, else a local one."""
    workers: int | tuple[int, int] | None = None
    """Training workers of one trial: by default one per GPU of a node; on CPUs two, if the batch allows and the
    machine has them. Two numbers, the fewest and the most: as many as there is room for, while nodes come and go."""
    resize_interval: float = Field(60.0, gt=0)
    """Seconds between looks whether there is room for more workers. They go on from the last checkpoint."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs of one training worker; by default 1 beside a GPU, else a node's CPUs divided by the workers."""
    gpu: bool | None = None
    """Train on GPUs; by default if the cluster has any, or its autoscaler may add some."""
    micro_batch: int = Field(8, ge=1)
    """Packed sequences in one forward pass; gradients are accumulated up to `batch_size`."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: what is partitioned over the workers."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer state, or parameters too (ZeRO-3), in host memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    experts_implementation: Literal["grouped_mm", "batched_mm", "eager"] = "grouped_mm"
    """transformers' kernel for the experts, of those that need nothing else installed: `batched_mm` gathers the
    weights of every token's experts (memory!), `eager` loops over the experts."""
    simoe_form: Literal["auto", "factored", "merged"] = "auto"
    """How SIMoE computes a linear while it trains: two products a token (`factored`), one with weights merged per
    sample (`merged`; in bfloat16 it rounds small deltas away), or the faster that loses nothing."""
    tokens_per_batch: int = Field(2048, ge=1)
    """Tokens of one packed forward pass in scoring and extraction."""
    scoring_actors: int | None = Field(None, ge=1)
    """Model copies that score in parallel; by default one per GPU, else one."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints, besides those at the milestones and every `checkpoint_minutes`."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes of training after which a checkpoint is written if none was."""
    max_failures: int = Field(2, ge=-1)
    """Worker crashes a trial survives, each time going on from its last checkpoint; -1: any number."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at the same time; by default as many as the cluster has room for."""

    @field_validator("workers", mode="before")
    @classmethod
    def _one_or_two_numbers(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [1 if value is None else value]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
        if not whole or len(numbers) not in (1, 2) or sorted(numbers) != list(numbers):
            raise ValueError("expected a number from 1 on, or two: the fewest and the most workers")
        if len(numbers) == 2:
            return tuple(numbers)
        return value if value is None else numbers[0]

    @property
    def most_workers(self) -> int | None:
        """`workers`, of elastic ones the most."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @model_validator(mode="after")
    def _offload_fits(self) -> Execution:
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload parameters needs zero_stage 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3")
        return self


class RunFile(Run):
    """A complete run as a YAML file or a command line gives it: `Run` and how to execute it."""

    execution: Execution = Execution()

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> RunFile:
        batch, workers = self.optimization.batch_size, self.execution.workers
        if isinstance(workers, int) and batch % workers:
            raise ValueError(
                f"optimization.batch_size {batch} is not a multiple of execution.workers {workers}"
            )
        return self

    def run(self) -> Run:
        """The part that decides the result, with absolute paths: workers have other working folders."""
        parts = {name: getattr(self, name) for name in Run.model_fields}
        model, data = self.model, self.data
        parts["model"] = model.model_copy(update={"name": _absolute(model.name)})
        parts["data"] = data.model_copy(
            update={split: _absolute_sources(getattr(data, split)) for split in ("train", "validation")}
        )
        return Run(**parts)


def _absolute(name: str) -> str:
    """A file's or folder's absolute path; a Hugging Face id, `local` and what is not there as they are."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in ("local", "initial") and path.exists() else name


def _absolute_sources(given: str | tuple[Source, ...] | None) -> str | tuple[Source, ...] | None:
    if given is None or isinstance(given, str):
        return given and _absolute(given)
    return tuple(source.model_copy(update={"name": _absolute(source.name)}) for source in given)


C = TypeVar("C", bound=Config)


def load(kind: type[C], file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """Read `file` (YAML), lay `overrides` (dotted keys to values) over it and validate.

    Raises:
        InputError: unreadable file, unknown key or wrong value; one line per problem.
    """
    values = _read_yaml(file) if file else {}
    given = {_qualified(kind, key): value for key, value in (overrides or {}).items()}
    for key in sorted(given, key=lambda k: k != "method.name"):  # first: it drops another method's settings
        values = _with(values, key.split("."), given[key])
    return validate(kind, values)


def replace(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with dotted keys changed, validated.

    Of another `method.name`, the settings given before (not the defaults) are kept where the new method has them.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    values = config.model_dump(exclude_unset=True)
    method = values.get("method", {})
    if isinstance(config, Run):  # a method made in code has its name unset: it is the type's
        values["method"] = {"name": config.method.name, **method}
    if (name := changes.get("method.name")) in METHODS:
        kept = {k: v for k, v in method.items() if k in METHODS[name].model_fields and k != "name"}
        values["method"] = {"name": name, **kept}
    for key, value in changes.items():
        values = _with(values, key.split("."), value)
    return validate(type(config), values)


def validate(kind: type[C], values: Mapping[str, Any]) -> C:
    """Build `kind` from plain values; raises InputError naming every wrong key, one line each."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_line(kind, values, one) for one in error.errors())) from None


def _qualified(kind: type[BaseModel], key: str) -> str:
    """The full key of `num_experts`, say, where exactly one part of `kind` has such a field."""
    if key == "method":
        return "method.name"
    if "." in key or key in kind.model_fields:
        return key
    found = _leaves_called(kind, key)
    return found[0] if len(found) == 1 else key


def _leaves_called(kind: type[BaseModel], key: str) -> list[str]:
    return sorted(name for name in all_settings(kind) if name.rsplit(".", 1)[-1] == key)


def all_settings(kind: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting of `kind` under its dotted name; `method` stands for all methods."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        if name == "method":
            for method in METHODS.values():
                leaves |= all_settings(method, "method.")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            leaves |= all_settings(field.annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = field
    return leaves


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected keys and values, found {type(values).__name__}")
    return values


def _with(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """`values` with `value` at `path`; naming another method drops the settings of the one before."""
    if len(path) == 1:
        return {**values, path[0]: value}
    below = values.get(path[0]) or {}
    named = below.get("name", SparseUpcycling().name) if isinstance(below, Mapping) else None
    if path == ["method", "name"] and named not in (None, value):
        below = {}
    if not isinstance(below, Mapping):
        raise InputError(f"{'.'.join(path)}: {path[0]} is {below!r}, not a group of keys")
    return {**values, path[0]: _with(below, path[1:], value)}


def _line(kind: type[BaseModel], values: Mapping[str, Any], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    if location[:1] == ["method"] and location[1:2] and location[1] in METHODS:
        del location[1]  # pydantic names the type of the method there
    key = ".".join(location) or kind.__name__.lower()
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, values, location[:-1])
        if len(location) == 1 and issubclass(kind, Run):
            if elsewhere := _leaves_called(kind, key):
                problem = "ambiguous" if len(elsewhere) > 1 else "unknown key"
                return f"{key}: {problem}, choose from {', '.join(elsewhere)}"
            known += [leaf.rsplit(".", 1)[-1] for leaf in all_settings(kind)]
        users = [name for name, method in METHODS.items() if location[-1] in method.model_fields]
        if location[:-1] == ["method"] and users:
            owner = (values.get("method") or {}).get("name", SparseUpcycling().name)
            have = "has" if len(users) == 1 else "have"
            return f"{key}: {owner} has no {location[-1]} ({', '.join(users)} {have})"
        near = difflib.get_close_matches(location[-1], known, n=1)
        return f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        return f"{key}.name: {error['ctx']['tag']!r} is not a method: choose from {', '.join(METHODS)}"
    given = error.get("input")
    shown = "" if error["type"] == "value_error" and isinstance(given, Mapping) else f" (got {given!r})"
    return f"{key}: {message}{shown}"


def _known_keys(kind: type[BaseModel], values: Mapping[str, Any], path: Sequence[str]) -> list[str]:
    """Field names of the part of `kind` at `path`."""
    fields = kind.model_fields
    for name in path:
        if name == "method":
            fields = METHODS[(values.get("method") or {}).get("name", "su")].model_fields
        elif name in fields and isinstance(fields[name].annotation, type):
            fields = fields[name].annotation.model_fields  # type: ignore[union-attr]
    return list(fields)
