"""Every setting of a run says which stages it decides, and a new one can't make stored results stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from raymoe.config import Run, replace, validate
from raymoe.methods import METHODS
from raymoe.schema import Config, added, is_added
from raymoe.stages import Stage, training, upstream


def fields(kind: type[BaseModel], method: str, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a run with `method`."""
    for name, field in kind.model_fields.items():
        annotation = METHODS[method] if prefix + name == "method" else field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from fields(annotation, method, f"{prefix}{name}.")
        elif prefix + name != "method.name":  # which is the type
            yield prefix + name


def field_of(method: str, path: str) -> Any:
    kind: Any = Run
    *parents, leaf = path.split(".")
    for parent in parents:
        kind = METHODS[method] if parent == "method" else kind.model_fields[parent].annotation
    return kind.model_fields[leaf]


OTHER: dict[str, Any] = {
    "data.max_examples": 7,
    "data.train": [{"name": "local", "max_examples": 7}],
    "data.validation": "local",
    "data.revision": "v1",
    "model.revision": "v1",
    "method.tasks": ["text"],
    "method.num_experts": 4,
    "method.top_k": 2,
    "method.router_hidden_size": 8,
    "method.delta_learning_rate": 1e-3,
    "method.mask_learning_rate": 1e-3,
    "method.router_learning_rate": 1e-3,
    "evaluation.generation_domains": ["code"],
    "evaluation.milestones": [1.0],
    "optimization.max_steps": 7,
    "model.name": "somebody/else",
    "model.local.hidden_size": 64,
}
"""Another value than the default, where none follows from the type."""
HUB: dict[str, Any] = {"model.name": "somebody/something", "data.train": "somebody/something"}
"""What else a run needs for a setting to count: revisions are of Hugging Face ids."""
NEEDS = {"model.name": HUB, "model.revision": HUB, "data.revision": HUB}


def another(method: str, path: str) -> Any:
    field = field_of(method, path)
    default = field.get_default(call_default_factory=True)
    if path in OTHER:
        return OTHER[path]
    if get_origin(field.annotation) is Literal:
        return next(option for option in get_args(field.annotation) if option != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return 2 * default or 1
    return 0.9 * default or 0.1


def stages_of(run: Run) -> dict[str, Stage]:
    last = training(run)
    return {f"{i}-{s.name}": s for i, s in enumerate([*upstream([last]), last])}


def readers(method: str, path: str) -> set[str]:
    """Stages that `path` changes although nothing that they are made from changes."""
    base = replace(validate(Run, {"method": {"name": method}}), NEEDS.get(path, {}))
    before, after = stages_of(base), stages_of(replace(base, {path: another(method, path)}))
    assert before.keys() == after.keys()
    old = {stage.key for stage in before.values()}
    return {
        stage.name
        for stage in after.values()
        if stage.key not in old and all(need.key in old for need in stage.needs)
    }


INSTRUCTIONS, INITIAL, DENSE, TRAIN = {"instructions"}, {"initial"}, {"dense"}, {"train"}
PROMPTS, REPRESENTATIONS, CLUSTERS, UPCYCLE = {"prompts"}, {"representations"}, {"clusters"}, {"upcycle"}
READ_BY: dict[str, set[str] | dict[str, set[str]]] = {
    # The user's own model is no stage: what reads it first changes.
    "model.name": {"dense simoe trsu crsu": INSTRUCTIONS, "su drop": INSTRUCTIONS | UPCYCLE},
    "model.revision": {"dense simoe trsu crsu": INSTRUCTIONS, "su drop": INSTRUCTIONS | UPCYCLE},
    "model.local.vocab_size": INITIAL,
    "model.local.hidden_size": INITIAL,
    "model.local.intermediate_size": INITIAL,
    "model.local.num_layers": INITIAL,
    "model.local.num_heads": INITIAL,
    "model.local.num_steps": DENSE,
    "model.local.learning_rate": DENSE,
    "data.train": INSTRUCTIONS,
    "data.validation": INSTRUCTIONS,
    "data.validation_fraction": INSTRUCTIONS,
    "data.revision": INSTRUCTIONS,
    "data.max_length": INSTRUCTIONS,
    "data.max_examples": INSTRUCTIONS,
    "data.chat_template": INSTRUCTIONS,
    "data.on_bad_row": INSTRUCTIONS,
    "method.num_experts": {"su drop": UPCYCLE, "trsu crsu": CLUSTERS, "simoe": TRAIN},
    "method.top_k": UPCYCLE,
    "method.gating": UPCYCLE,
    "method.load_balance_alpha": TRAIN,
    "method.router_std": UPCYCLE,
    "method.drop_ratio": UPCYCLE,
    "method.variant": UPCYCLE,
    "method.settings": REPRESENTATIONS,
    "method.representation": REPRESENTATIONS,
    "method.max_tokens": REPRESENTATIONS,
    "method.tasks": REPRESENTATIONS,
    "method.perplexity_top_fraction": REPRESENTATIONS,
    "method.token_fraction": REPRESENTATIONS,
    "method.router_rows": CLUSTERS,
    "method.router_confidence": CLUSTERS,
    "method.spherical": CLUSTERS,
    "method.kmeans_starts": CLUSTERS,
    "method.prompt_representation": PROMPTS,
    "method.sparsity_target": TRAIN,
    "method.sparsity_scope": TRAIN,
    "method.sparsity_warmup": TRAIN,
    "method.sparsity_rate": TRAIN,
    "method.sparsity_penalty": TRAIN,
    "method.orthogonality": TRAIN,
    "method.delta_learning_rate": TRAIN,
    "method.mask_learning_rate": TRAIN,
    "method.router_learning_rate": TRAIN,
    "method.router_hidden_size": TRAIN,
    "method.log_alpha_mean": TRAIN,
    "method.log_alpha_std": TRAIN,
    "optimization.learning_rate": TRAIN,
    "optimization.schedule": TRAIN,
    "optimization.warmup_fraction": TRAIN,
    "optimization.weight_decay": TRAIN,
    "optimization.beta1": TRAIN,
    "optimization.beta2": TRAIN,
    "optimization.epsilon": TRAIN,
    "optimization.max_grad_norm": TRAIN,
    "optimization.batch_size": TRAIN,
    "optimization.num_epochs": TRAIN,
    "optimization.max_steps": TRAIN,
    "evaluation.milestones": TRAIN,
    "evaluation.max_examples_per_domain": TRAIN,
    "evaluation.generation_domains": TRAIN,
    "evaluation.generation_examples": TRAIN,
    "evaluation.max_new_tokens": TRAIN,
    "precision": {
        "dense su drop": TRAIN,
        "trsu": {"perplexity"},
        "crsu": REPRESENTATIONS,
        "simoe": PROMPTS,
    },
    "seed": {"dense simoe": TRAIN, "su drop": UPCYCLE, "trsu crsu": REPRESENTATIONS},
}
"""Every setting -> the first stages that read it, for all methods or by method; those after them change, too."""
ADDED: set[str] = set()
"""Settings of READ_BY that were added after results without them were stored."""


@pytest.mark.parametrize(
    ("method", "path"), [(method, path) for method in METHODS for path in fields(Run, method)]
)
def test_a_setting_is_read_by_the_stages_it_belongs_to(method: str, path: str) -> None:
    assert path in READ_BY, f"{path} is new: say here which stages read it, and add it to ADDED"
    expected = READ_BY[path]
    if isinstance(expected, dict):
        (expected,) = (stages for names, stages in expected.items() if method in names.split())
    assert readers(method, path) == expected


def test_every_field_but_the_first_ones_is_marked_as_added() -> None:
    """Without the mark, results stored before the field existed would be made again, or taken for stale."""
    paths = {(method, path) for method in METHODS for path in fields(Run, method)}
    assert {path for method, path in paths if is_added(field_of(method, path))} == ADDED
    assert set(READ_BY) == {path for _, path in paths}


class _Before(Config):
    rate: float = 0.5


class _Now(Config):
    rate: float = 0.5
    balance: str = added("sequence", min_length=1)
    """A field with the meaning that the code had before."""
    before: _Before = _Before()


def test_a_field_that_is_added_leaves_the_identity_until_it_is_set() -> None:
    assert _Now().identity(exclude={"before"}) == _Before().identity() == {"rate": 0.5}
    assert _Now(balance="sequence").identity(exclude={"before"}) == _Before().identity()
    assert _Now(balance="global_batch").identity() == {
        "rate": 0.5,
        "balance": "global_batch",
        "before": {"rate": 0.5},
    }
    with pytest.raises(ValidationError):
        _Now(balance="")


@pytest.mark.parametrize("method", METHODS)
def test_the_identity_of_a_run_is_all_of_its_values(method: str) -> None:
    run = validate(Run, {"method": {"name": method}, "data": {"train": ["local", "x.jsonl"]}})
    assert run.identity() == run.model_dump(mode="json")
