"""The trained model as a folder of its own; a SIMoE model also merged into a dense one.

    raymoe export my-run.yaml --out model
    raymoe export my-run.yaml --method simoe --out model --merge "Write a function that adds two numbers."
    raymoe export --model-folder some/simoe --out model --merge-domain math

A run has to be trained first; `--model-folder` needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymoe.cli.command import Command
from raymoe.cli.evaluate import is_simoe_folder
from raymoe.cli.stages import check_new, print_stages
from raymoe.console import say, to_json
from raymoe.schema import InputError

ENOUGH_KEPT = 0.95
"""Share of the delta below which the user is warned about a merged model."""


def export(command: Command) -> int:
    """Copy or merge the trained model into `--out`."""
    out, folder = command.options.get("out"), command.options.get("model_folder")
    _check_merge(command)
    if folder and not is_simoe_folder(folder):
        raise InputError(f"--model-folder: no SIMoE model in {folder} (no simoe.json)")
    if command.dry_run:
        _print_export(command)
        return 0
    if not out:
        raise InputError("export: --out FOLDER says where to")
    model = Path(folder) if folder else _trained_model(command)
    check_new("--out", out)
    result = _write(model, Path(out), command)
    if command.json:
        print(to_json({"path": out, **result}))
        return 0
    for name, value in result.items():
        print(f"{name}: {value}")
    loader = "raymoe.upcycle.simoe.load_simoe" if is_simoe_folder(out) else "transformers"
    print(f"loads with {loader}: {out}")
    return 0


def _check_merge(command: Command) -> None:
    """Refuse two ways of merging at once, and any of a method that has none."""
    given = [f"--{n.replace('_', '-')}" for n in ("merge", "merge_domain") if n in command.options]
    if len(given) > 1:
        raise InputError(f"{', '.join(given)}: give one of them: a prompt or a domain")
    method = command.run_file.method.name
    if given and method != "simoe" and "model_folder" not in command.options:
        raise InputError(f"{given[0]}: method.name is {method}, which has no masks to merge: only simoe has")


def _print_export(command: Command) -> None:
    if folder := command.options.get("model_folder"):
        print(f"{'to do':<13} export {folder}")
        return
    from raymoe import stages

    print_stages(stages.training(command.run_file.run()), command)


def _trained_model(command: Command) -> Path:
    """Return the folder of the run's trained model.

    Raises:
        InputError: the run is not trained yet.
    """
    from raymoe import stages
    from raymoe.storage.location import local
    from raymoe.storage.store import Store

    stage, store = stages.training(command.run_file.run()), Store(command.run_file.execution.storage)
    if stage.find(store) is None:
        raise InputError("export: this run is not trained yet: `raymoe train` it first")
    return local(stage.path(store) / "model")


def _write(model: Path, out: Path, command: Command) -> dict[str, Any]:
    """Write `model`, or the dense model merged from it, to `out`; return the merge's measurements."""
    if not is_simoe_folder(model):
        from raymoe.upcycle.checkpoint import copy_model

        copy_model(model, out)
        return {}
    from raymoe.upcycle.simoe import export_simoe, merge

    weights = _expert_weights(model, command)
    if weights is None:
        export_simoe(model, out)
        return {}
    share = merge(model, out, weights)
    if share < ENOUGH_KEPT:
        say(
            f"warning: rounding to the dense model's dtype kept {share:.1%} of the delta: the merged model is "
            "not quite the trained one; measure it before you use it"
        )
    return {"expert_weights": [round(weight, 6) for weight in weights], "kept_share": round(share, 6)}


def _expert_weights(model: Path, command: Command) -> list[float] | None:
    """Return the experts' weights for the prompt or domain asked for; None if neither is."""
    from raymoe.upcycle.simoe import route, simoe_config

    prompt, domain = command.options.get("merge"), command.options.get("merge_domain")
    if prompt is not None:
        return route(model, prompt)
    if domain is None:
        return None
    known = simoe_config(model).domains
    if domain not in known:
        raise InputError(f"--merge-domain: unknown domain {domain!r}: choose from {', '.join(sorted(known))}")
    return list(known[domain])
