"""The stages of the path before training, each with all that it needs.

    raymoe score my-run.yaml
    raymoe represent my-run.yaml
    raymoe cluster my-run.yaml
    raymoe upcycle my-run.yaml --materialize folder

What the store has is not made again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.cli.command import Command
from raymoe.console import say, to_json
from raymoe.methods import seam
from raymoe.schema import InputError

if TYPE_CHECKING:
    from raymoe.config import Run
    from raymoe.stages import Stage
    from raymoe.storage.store import Output


def stage_verb(
    stage_of: Callable[[Run], Stage], show: Callable[[Command, Output], None]
) -> Callable[[Command], int]:
    """Return the function of a verb that makes one stage, with all that it needs, and shows its output."""

    def verb(command: Command) -> int:
        stage = stage_of(command.run_file.run())
        if command.dry_run:
            print_stages(stage, command)
            return 0
        output = make_stage(stage, command)
        if command.json:
            print(to_json({"path": str(output.location), **output.info}))
        else:
            show(command, output)
        return 0

    return verb


def print_stages(stage: Stage, command: Command) -> None:
    """List `stage` and all that it needs, and which of them are in the store."""
    from raymoe.stages import upstream
    from raymoe.storage.store import Store

    store = Store(command.run_file.execution.storage)
    for each in [*upstream([stage]), stage]:
        print(f"{'in the store' if each.find(store) else 'to do':<13} {each.key}")


def make_stage(stage: Stage, command: Command) -> Output:
    """Return the output of `stage`: what the store has, else made, on a Ray cluster if it takes one."""
    from raymoe.cluster.address import check as check_address
    from raymoe.cluster.connection import check_shared, check_storage, connected
    from raymoe.stages import WITHOUT_RAY, Context, make, prepare
    from raymoe.storage.store import Store

    execution = command.run_file.execution
    store = Store(execution.storage)
    if found := stage.find(store):
        say(f"{stage.name}: already in {found.location}")
        return found
    check_storage(execution.storage)
    store.check_writable()
    context = Context(store, execution, say)
    if stage.name in WITHOUT_RAY:
        prepare([stage], context)
        return make(stage, context)
    check_address(execution)
    prepare([stage], context)
    with connected(execution):
        check_shared(execution.storage)
        return make(stage, context)


def scores_stage(run: Run) -> Stage:
    """Return the perplexity stage of `run`."""
    from raymoe.stages import perplexity

    return perplexity(run)


def show_scores(command: Command, output: Output) -> None:
    """Print the distribution of perplexities in each task."""
    import pyarrow.parquet as pq

    from raymoe.console import print_rows
    from raymoe.routers.perplexity import SCORES, summarize

    fraction = getattr(command.run_file.method, "perplexity_top_fraction", 0.05)
    title = f"completion perplexity per task; kept: the top {fraction:.0%}"
    print_rows(title, summarize(pq.read_table(output.fetch() / SCORES), fraction))
    print(f"every example: {output.location / SCORES}")


def represent_stage(run: Run) -> Stage:
    """Return the stage of what routers are made from, or what SIMoE's router reads."""
    from raymoe.stages import prompts, representations

    return prompts(run) if "prompts" in seam(run.method).stages else representations(run)


def cluster_stage(run: Run) -> Stage:
    """Return the clusters stage of `run`."""
    from raymoe.stages import clusters

    return clusters(run)


def _upcycle_stage(run: Run) -> Stage:
    from raymoe.stages import upcycle

    return upcycle(run)


def show_clusters(command: Command, output: Output) -> None:
    """Print how the router rows of each layer compare with the clusters."""
    from raymoe.console import print_rows

    rows = [
        {
            "layer": i,
            "router = cluster": layer["agreement"],
            "top probability": layer["mean_top_probability"],
            "load at step 0": " ".join(f"{share:.2f}" for share in layer["load"]),
        }
        for i, layer in enumerate(output.info["layers"])
    ]
    print_rows("router rows per layer, measured on the clustered tokens", rows)
    print(output.location)


def show_info(command: Command, output: Output) -> None:
    """Print what the stage recorded, and where its output is."""
    for name, value in output.info.items():
        print(f"{name}: {value}")
    print(output.location)


def upcycle(command: Command) -> int:
    """Write the recipe; with `--materialize`, the untrained Mixture-of-Experts too."""
    target = command.options.get("materialize")
    check_new("--materialize", target)
    code = stage_verb(_upcycle_stage, show_info)(command)
    if code or command.dry_run or not target:
        return code
    _materialize(command, Path(target))
    (say if command.json else print)(f"loads with transformers: {target}")
    return 0


def _materialize(command: Command, target: Path) -> None:
    """Write the untrained Mixture-of-Experts of a finished recipe."""
    from raymoe import stages
    from raymoe.storage.location import local
    from raymoe.storage.store import Store
    from raymoe.upcycle import expert_start, load_recipe
    from raymoe.upcycle.checkpoint import materialize

    run, store = command.run_file.run(), Store(command.run_file.execution.storage)
    recipe, router = load_recipe(local(stages.upcycle(run).path(store)))
    start = expert_start(recipe.method, recipe.seed)
    materialize(local(stages.dense(run).path(store)), router, recipe.method, target, start=start)


def check_new(option: str, folder: str | None) -> None:
    """Refuse a folder that a model can't be written to, before anything is computed for it.

    Raises:
        InputError: it is a file, or it is not empty.
    """
    if folder and (path := Path(folder)).exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{option}: {folder} exists already and is not an empty folder")
