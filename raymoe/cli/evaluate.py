"""Held-out metrics of a trained run or of any model folder.

    raymoe evaluate my-run.yaml
    raymoe evaluate my-run.yaml --model-folder some/model

What is measured, and on which data, is the run's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.cli.command import Command
from raymoe.cli.stages import make_stage, print_stages
from raymoe.console import to_json
from raymoe.schema import InputError

if TYPE_CHECKING:
    from raymoe.stages import Stage


def evaluate(command: Command) -> int:
    """Measure the run's trained model or `--model-folder`."""
    from raymoe import stages

    run, folder = command.run_file.run(), command.options.get("model_folder")
    data, training = stages.instructions(run), stages.training(run)
    if folder and not ((Path(folder) / "config.json").is_file() or is_simoe_folder(folder)):
        raise InputError(f"--model-folder: no model in {folder} (no config.json)")
    if command.dry_run:
        print_stages(data if folder else training, command)
        return 0
    model = _checked_model(Path(folder), command) if folder else _trained_model(training, command)
    encoded = make_stage(data, command).fetch()
    from raymoe.evaluate.folder import evaluate_folder

    metrics = evaluate_folder(model, encoded, run)
    print(to_json(metrics) if command.json else "\n".join(f"{k:<32} {v:.4f}" for k, v in metrics.items()))
    return 0


def _trained_model(training: Stage, command: Command) -> Path:
    """Return the folder of the run's trained model.

    Raises:
        InputError: the run is not trained yet.
    """
    from raymoe.storage.location import local
    from raymoe.storage.store import Store

    store = Store(command.run_file.execution.storage)
    if training.find(store) is None:
        raise InputError("evaluate: this run is not trained yet: `raymoe train` it, or give --model-folder")
    return local(training.path(store) / "model")


def _checked_model(folder: Path, command: Command) -> Path:
    """Return `folder`, whose model has the tokenizer that the run's data are encoded with.

    Raises:
        InputError: it has another one.
    """
    from raymoe import stages
    from raymoe.evaluate.folder import check_tokenizer
    from raymoe.storage.location import local
    from raymoe.storage.store import Store

    run, store = command.run_file.run(), Store(command.run_file.execution.storage)
    # The embedded dense model has its tokenizer from the start, before it is trained.
    source = stages.dense(stages.local_seed(run) if run.model.name == "local" else run)
    if source.stage and source.stage.find(store) is None:
        make_stage(source.stage, command)
    check_tokenizer(_tokenizer_folder(folder), local(source.path(store)))
    return folder


def is_simoe_folder(folder: str | Path) -> bool:
    """Return what `raymoe.upcycle.simoe.is_simoe` does, without what it takes to import that."""
    return (Path(folder) / "simoe.json").is_file()


def _tokenizer_folder(model: Path) -> Path:
    """Return the folder of the model's tokenizer: of a SIMoE model, its dense model's."""
    from raymoe.upcycle.simoe import simoe_config

    return simoe_config(model).dense if is_simoe_folder(model) else model
