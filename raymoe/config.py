"""Configuration: what decides a result (`Run`) and how it is computed (`Execution`).

    load(RunFile, Path("my-run.yaml"), {"method.num_experts": 4})

Precedence: default < YAML file < command line. Every part is frozen and refuses unknown keys; `load` reports all
errors at once, one line each, naming the key, the value and what was expected. `raymoe train --help` is generated
from these types and their docstrings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from raymoe.keys import error_line, full_key, read_yaml, with_value
from raymoe.methods import METHODS, Method, SparseUpcycling
from raymoe.schema import Config, InputError


class LocalModel(Config):
    """Shape and training of the tiny Llama that stands in for a dense model when `model.name` is `local`."""

    vocab_size: int = Field(2048, ge=320)
    """Tokens of the byte-level BPE vocabulary trained with it."""
    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream."""
    intermediate_size: int = Field(384, ge=8)
    """Width of the FFNs."""
    num_layers: int = Field(4, ge=1)
    """Decoder layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; `hidden_size` is a multiple of twice as many."""
    num_steps: int = Field(200, ge=1)
    """Optimizer steps of its pre-training on the embedded corpus."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak learning rate of its pre-training."""

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
    """The model that `local` stands for."""

    @property
    def is_embedded(self) -> bool:
        """True for the tiny model that raymoe trains itself, before and after."""
        return self.name in ("local", "initial")

    """The model that `local` stands for."""


class Source(Config):
    """One source of a mixture: where its rows are, how its columns are named and its rows labelled."""

    name: str = Field(min_length=1)
    """JSONL or parquet file, folder of them, Hugging Face id, or `local` for the embedded corpus."""
    revision: str | None = None
    """Commit or tag of a Hugging Face id."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face id that has several."""
    domain: str | None = None
    """Domain of all its rows; by default each row's own, else its file's name (Hugging Face ids: `all`)."""
    task: str | None = None
    """Task of all its rows; by default each row's own, else its domain."""
    task_column: str | None = None
    """Column that holds each row's task, if it is not called `task`."""
    max_examples: int | None = Field(None, ge=1)
    """Keep a seeded sample of at most this many of its training examples."""
    prompt: str | None = None
    """Column of the prompt, if it has none of the names that raymoe knows; give `completion` too."""
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
    """Parse names and mappings into sources; a single plain name, or None, is returned as it is."""
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
    share of its rows."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of a source held out where it has no split of its own."""
    revision: str | None = None
    """Commit or tag of a single Hugging Face id; in a list, each source has its own."""
    max_length: int = Field(512, ge=8)
    """Tokens of a packed sequence; whole examples are packed into it."""
    max_examples: int | None = Field(None, ge=1)
    """Keep a seeded sample of at most this many training examples, all sources together."""
    chat_template: Literal["tokenizer", "plain"] = "tokenizer"
    """`tokenizer`: the tokenizer's own template, if it has one; `plain`: raymoe's."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a malformed, empty or overlong row; skipped rows are counted and reported."""

    _as_sources = field_validator("train", "validation", mode="before")(_sources)

    @model_validator(mode="after")
    def _revision_has_its_source(self) -> Data:
        if self.revision and not isinstance(self.train, str) and not isinstance(self.validation, str):
            raise ValueError("revision is of a single source: of a list give each its own")
        return self

    def sources(self, split: Literal["train", "validation"]) -> tuple[Source, ...]:
        """Return the sources given for `split`."""
        given = self.train if split == "train" else self.validation
        return (Source(name=given, revision=self.revision),) if isinstance(given, str) else given or ()

    @property
    def uses_local_corpus(self) -> bool:
        """True if the embedded corpus is one of the sources."""
        return any(source.name == "local" for source in (*self.sources("train"), *self.sources("validation")))


class Optimization(Config):
    """AdamW over all parameters."""

    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to zero after warmup, if at all."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Term added to the denominator for numerical stability."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    batch_size: int = Field(8, ge=1)
    """Packed sequences per optimizer step, over all workers."""
    num_epochs: float = Field(1.0, gt=0)
    """Passes over the training data; a fraction stops midway."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, even if the epochs are not over."""


class Evaluation(Config):
    """What is measured while training."""

    milestones: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of training after which the model is evaluated (RSU paper, Table 5)."""
    max_examples_per_domain: int = Field(100, ge=1)
    """Held-out examples per domain for loss and perplexity."""
    generation_domains: tuple[str, ...] = ("math",)
    """Domains measured by exact match too: the final answer of a greedy generation."""
    generation_examples: int = Field(32, ge=0)
    """Held-out examples per such domain whose answers are generated; 0: none."""
    max_new_tokens: int = Field(96, ge=1)
    """Tokens after which a generated answer is cut."""

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
    """The dense model."""
    data: Data = Data()
    """What it is trained and measured on."""
    method: Method = SparseUpcycling()
    """How it becomes a Mixture-of-Experts."""
    optimization: Optimization = Optimization()
    """How that is trained."""
    evaluation: Evaluation = Evaluation()
    """What is measured while it trains."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and activations in training."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: samples, order of the data, routers, K-means."""

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
    """Folder, or s3:// or gs:// prefix, of stages, checkpoints and sweeps, which all nodes must reach;
    $RAYMOE_STORAGE if that is set."""
    address: str | None = None
    """Address of the Ray cluster; by default that of the Ray job it runs in, else a local Ray is started."""
    workers: int | tuple[int, int] | None = None
    """Training workers of one trial; by default one per GPU of a node, on CPUs two where batch and machine allow.
    Two numbers are the fewest and the most: as many as there is room for while nodes come and go."""
    resize_interval: float = Field(60.0, gt=0)
    """Seconds between checks for room for more workers, which go on from the last checkpoint."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs of one training worker; by default 1 beside a GPU, else an equal share of the node's."""
    gpu: bool | None = None
    """Train on GPUs; by default if the cluster has any or its autoscaler may add some."""
    micro_batch: int = Field(8, ge=1)
    """Packed sequences in one forward pass; gradients are accumulated up to `batch_size`."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: partition optimizer state (1), gradients too (2), weights too (3) over the workers."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer state, under ZeRO-3 parameters too, in host memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    experts_implementation: Literal["grouped_mm", "batched_mm", "eager"] = "grouped_mm"
    """transformers' kernel for the experts, among those that need nothing else installed: `batched_mm` gathers the
    weights of every token's experts (memory!), `eager` loops over the experts."""
    simoe_form: Literal["auto", "factored", "merged"] = "auto"
    """How SIMoE computes a linear while it trains: `factored` takes two products a token, `merged` one with weights
    merged per sample (in bfloat16 it rounds small deltas away), `auto` the faster that loses nothing."""
    tokens_per_batch: int = Field(2048, ge=1)
    """Tokens of one packed forward pass when scoring and extracting representations."""
    scoring_actors: int | None = Field(None, ge=1)
    """Model copies that score and extract in parallel; by default one per GPU, else one."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints, beside those at milestones and every `checkpoint_minutes`."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes of training without a checkpoint after which one is written."""
    max_failures: int = Field(2, ge=-1)
    """Worker crashes that a trial survives, each time from its last checkpoint; -1: any number."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials that run at the same time; by default as many as the cluster has room for."""

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
        """Number of workers; of elastic ones, the most."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @model_validator(mode="after")
    def _offload_fits(self) -> Execution:
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload parameters needs zero_stage 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3")
        return self


class RunFile(Run):
    """A run as a YAML file or a command line gives it: `Run` and how to execute it."""

    execution: Execution = Execution()
    """How the run is computed."""

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> RunFile:
        batch, workers = self.optimization.batch_size, self.execution.workers
        if isinstance(workers, int) and batch % workers:
            raise ValueError(
                f"optimization.batch_size {batch} is not a multiple of execution.workers {workers}"
            )
        return self

    def run(self) -> Run:
        """Return the part that decides the result, its paths absolute: workers have other working folders."""
        parts = {name: getattr(self, name) for name in Run.model_fields}
        model, data = self.model, self.data
        parts["model"] = model.model_copy(update={"name": _absolute(model.name)})
        parts["data"] = data.model_copy(
            update={split: _absolute_sources(getattr(data, split)) for split in ("train", "validation")}
        )
        return Run(**parts)


def _absolute(name: str) -> str:
    """Return the absolute path of an existing file or folder, any other name as it is."""
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
    values = read_yaml(file) if file else {}
    given = {full_key(kind, key): value for key, value in (overrides or {}).items()}
    for key in sorted(given, key=lambda k: k != "method.name"):  # first: it drops another method's settings
        values = with_value(values, key.split("."), given[key])
    return validate(kind, values)


def replace(config: C, changes: Mapping[str, Any]) -> C:
    """Return `config` with the values of dotted keys changed, validated.

    If `method.name` changes, settings that were given (not the defaults) are kept where the new method has them.

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
        values = with_value(values, key.split("."), value)
    return validate(type(config), values)


def validate(kind: type[C], values: Mapping[str, Any]) -> C:
    """Build `kind` from plain values.

    Raises:
        InputError: every unknown key and wrong value, one line each.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(error_line(kind, values, one) for one in error.errors())) from None
