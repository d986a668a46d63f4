"""`raymoe evaluate`: held-out metrics of a trained run or of any model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.cli.command import Command
from raymoe.cli.stages import make_stage, print_stages
from raymoe.console import to_json
from raymoe.schema import InputError

if TYPE_CHECKING:
    pass


def evaluate(command: Command) -> int:
    """Measure the run's trained model or `--model-folder`."""
    from raymoe import stages
    from raymoe.storage.store import Store

    run, store = command.job.run(), Store(command.job.execution.storage)
    folder, data = command.options.get("model_folder"), stages.instructions(run)
    stage = stages.training(run)
    if folder and not ((Path(folder) / "config.json").is_file() or is_simoe_folder(folder)):
        raise InputError(f"--model-folder: no model in {folder} (no config.json)")
    if command.dry_run:
        print_stages(data if folder else stage, command)
        return 0
    if not folder and stage.find(store) is None:
        raise InputError("evaluate: this run is not trained yet: `raymoe train` it, or give --model-folder")
    if folder:
        _check_tokenizer(_tokenizer_folder(Path(folder)), command)
    encoded = make_stage(data, command).fetch()
    from raymoe.evaluate.folder import evaluate_folder
    from raymoe.storage.location import local

    model = Path(folder) if folder else local(stage.path(store) / "model")
    metrics = evaluate_folder(model, encoded, run)
    print(to_json(metrics) if command.json else "\n".join(f"{k:<32} {v:.4f}" for k, v in metrics.items()))
    return 0


def _check_tokenizer(model: Path, command: Command) -> None:
    """Raises InputError where the run's data are other token ids than those of `model`."""
    from raymoe import stages
    from raymoe.evaluate.folder import check_tokenizer
    from raymoe.storage.location import local
    from raymoe.storage.store import Store

    run, store = command.job.run(), Store(command.job.execution.storage)
    # The embedded dense model has its tokenizer from the start, before it is trained.
    source = stages.dense(stages.local_seed(run) if run.model.name == "local" else run)
    if source.stage and source.stage.find(store) is None:
        make_stage(source.stage, command)
    check_tokenizer(model, local(source.path(store)))


def is_simoe_folder(folder: str | Path) -> bool:
    """As `raymoe.upcycle.simoe.is_simoe`, without what it takes to import that."""
    return (Path(folder) / "simoe.json").is_file()


def _tokenizer_folder(model: Path) -> Path:
    """A SIMoE folder's tokenizer is that of its dense model."""
    from raymoe.upcycle.simoe import simoe_config

    return simoe_config(model).dense if is_simoe_folder(model) else model
