"""The command line: one verb per stage, in the order of the path.

    raymoe <verb> [config.yaml] [--key value ...] [--dry-run] [--json] [--help]

Keys are those of `raymoe.config.Job`, dotted (`--method.num-experts 4`) or alone where only one part has them
(`--num-experts 4`). Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe import __version__
from raymoe.config import InputError, Job, SparseInterpolation, help_text, load, parse_overrides
from raymoe.report import to_json

if TYPE_CHECKING:
    from raymoe.stages import Stage
    from raymoe.sweep import Sweep


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    job: Job
    options: Mapping[str, Any]

    @property
    def dry_run(self) -> bool:
        """Print what would be done, and stop."""
        return bool(self.options.get("dry_run"))

    @property
    def json(self) -> bool:
        """Print results as JSON."""
        return bool(self.options.get("json"))


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, its own options (name: help) and its function, which returns the exit code."""

    about: str
    function: Callable[[Command], int]
    options: Mapping[str, str]


FLAGS = ("dry_run", "json", "asha", "submit")
COMMON = {
    "dry_run": "print what would be done and what is in the store, then stop",
    "json": "results as JSON",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `raymoe`."""
    sys.exit(_guarded(lambda: _dispatch(list(sys.argv[1:] if arguments is None else arguments))))


def run_sweep(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Entry point of a sweep file: `python sweeps/x.py [config.yaml] [--key value ...]`."""
    return _guarded(lambda: _sweep(sweep, list(arguments), Path(sys.argv[0])))


def _guarded(work: Callable[[], int]) -> int:
    """Run `work`; the user's mistakes become lines on stderr, an interrupt becomes exit code 130."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `raymoe train --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print("\n".join(f"raymoe: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("raymoe: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "sweep":
        return _sweep_file(rest)
    if name not in VERBS:
        raise InputError(f"unknown verb {name!r}: choose from {', '.join([*VERBS, 'sweep'])}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(
            f"raymoe {name} [config.yaml] [--key value ...]\n\n{verb.about}\n\n{_option_lines(verb.options)}"
        )
        print(help_text())
        return 0
    return verb.function(_parse(rest, verb.options))


def _parse(arguments: list[str], options: Mapping[str, str]) -> Command:
    file = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("--") else None
    known = {**COMMON, **options}
    texts, rest = _texts(arguments, [name for name in known if name not in FLAGS])
    overrides = parse_overrides(rest)
    flags = {name: _flag(name, overrides.pop(name)) for name in FLAGS if name in known and name in overrides}
    return Command(load(Job, file, overrides), {**texts, **flags})


def _texts(arguments: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The options `names` with their values as they were typed, whatever YAML makes of them, and all else."""
    texts: dict[str, str] = {}
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        option, separator, inline = arguments[position].partition("=")
        start = position = position + 1
        if not option.startswith("--") or (name := option[2:].replace("-", "_")) not in names:
            rest.append(arguments[position - 1])
            continue
        while not separator and position < len(arguments) and not arguments[position].startswith("--"):
            position += 1
        texts[name] = _text(option, [inline] if separator else arguments[start:position])
    return texts, rest


def _text(option: str, words: Sequence[str]) -> str:
    if not "".join(words):
        raise InputError(f"{option}: expected a value")
    if len(words) > 1:
        raise InputError(f"{option}: takes one value, got {len(words)}; put it in quotes")
    return words[0]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        option = f"--{name.replace('_', '-')}"
        raise InputError(f"{option}: takes no value (got {value!r}); a configuration file comes before it")
    return value


def _sweep_file(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print("raymoe sweep sweeps/<file>.py [config.yaml] [--key value ...]\n")
        print(
            "Run every trial of a sweep; what they share is made once, what is in the store is not made again.\n"
        )
        print(f"{_option_lines(SWEEP_OPTIONS)}\n{help_text()}")
        return 0
    from raymoe.sweep import load as load_sweep

    return _sweep(load_sweep(Path(arguments[0])), arguments[1:], Path(arguments[0]))


SWEEP_OPTIONS = {
    "asha": "stop trials early that do worse than others at the same step",
    "submit": "run as a job of the Ray cluster whose dashboard is at --execution.address, and follow its log",
}


def _sweep(sweep: Sweep, arguments: list[str], file: Path) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(f"{sweep.name}: {sweep.question}\n\n{_option_lines(SWEEP_OPTIONS)}\n{help_text()}")
        return 0
    from raymoe.sweep import Options, execute

    command = _parse(list(arguments), SWEEP_OPTIONS)
    if command.options.get("submit"):
        from raymoe.jobs import submit

        return submit(sweep, file, arguments, command.job, command.dry_run)
    asha = bool(command.options.get("asha"))
    return execute(sweep, command.job, Options(command.dry_run, command.json, asha))


def _usage() -> str:
    verbs = {**{n: v.about for n, v in VERBS.items()}, "sweep": "Run every trial of a sweep file."}
    lines = [f"  {name:<10} {about.splitlines()[0]}" for name, about in verbs.items()]
    return (
        "raymoe <verb> [config.yaml] [--key value ...]\n\n"
        + "\n".join(lines)
        + "\n\nraymoe <verb> --help: options"
    )


def _option_lines(options: Mapping[str, str]) -> str:
    shown = {**options, **COMMON, "help": "this text"}
    return "\n".join(f"  --{name.replace('_', '-'):<38} {text}" for name, text in shown.items()) + "\n"


# ---- verbs


def _stage_verb(
    make_stage: Callable[[Any], Stage], show: Callable[[Command, Any], None]
) -> Callable[[Command], int]:
    """A verb that makes one stage, with all that it needs, and shows what came out."""

    def verb(command: Command) -> int:
        stage = make_stage(command.job.run())
        if command.dry_run:
            _print_stages(stage, command)
            return 0
        output = _make(stage, command)
        if command.json:
            print(to_json({"path": str(output.location), **output.info}))
        else:
            show(command, output)
        return 0

    return verb


def _print_stages(stage: Stage, command: Command) -> None:
    from raymoe.stages import upstream
    from raymoe.store import Store

    store = Store(command.job.execution.storage)
    for each in [*upstream([stage]), stage]:
        print(f"{'in the store' if each.find(store) else 'to do':<13} {each.key}")


def _make(stage: Stage, command: Command) -> Any:
    from raymoe.address import check as check_address
    from raymoe.jobs import check_storage
    from raymoe.stages import WITHOUT_RAY, Context, make, prepare
    from raymoe.store import Store

    store = Store(command.job.execution.storage)
    if found := stage.find(store):
        _say(f"{stage.name}: already in {found.location}")
        return found
    check_storage(command.job.execution.storage)
    store.check_writable()
    if stage.name not in WITHOUT_RAY:
        check_address(command.job.execution)
    context = Context(store, command.job.execution, _say)
    prepare([stage], context)
    if stage.name in WITHOUT_RAY:
        return make(stage, context)
    from raymoe.cluster import check_shared, connected

    with connected(command.job.execution):
        check_shared(command.job.execution.storage)
        return make(stage, context)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _filter_stage(run: Any) -> Stage:
    from raymoe.stages import perplexity

    return perplexity(run)


def _show_scores(command: Command, output: Any) -> None:
    import pyarrow.parquet as pq

    from raymoe.data.perplexity import SCORES, summarize
    from raymoe.report import print_rows

    fraction = getattr(command.job.method, "perplexity_top_fraction", 0.05)
    title = f"completion perplexity per task; kept: the top {fraction:.0%}"
    print_rows(title, summarize(pq.read_table(output.path / SCORES), fraction))
    print(f"every instance: {output.location / SCORES}")


def _represent_stage(run: Any) -> Stage:
    from raymoe.stages import prompts, representations

    return prompts(run) if isinstance(run.method, SparseInterpolation) else representations(run)


def _cluster_stage(run: Any) -> Stage:
    from raymoe.stages import clusters

    return clusters(run)


def _upcycle_stage(run: Any) -> Stage:
    from raymoe.stages import upcycle

    return upcycle(run)


def _show_clusters(command: Command, output: Any) -> None:
    from raymoe.report import print_rows

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


def _show_info(command: Command, output: Any) -> None:
    for name, value in output.info.items():
        print(f"{name}: {value}")
    print(output.location)


def _upcycle(command: Command) -> int:
    target = command.options.get("materialize")
    _check_new("--materialize", target)
    code = _stage_verb(_upcycle_stage, _show_info)(command)
    if code or command.dry_run or not target:
        return code
    from raymoe import stages
    from raymoe.storage import local
    from raymoe.store import Store
    from raymoe.upcycle import expert_start, load_recipe
    from raymoe.upcycle.checkpoint import materialize

    run, store = command.job.run(), Store(command.job.execution.storage)
    recipe, router = load_recipe(local(stages.upcycle(run).path(store)))
    start = expert_start(recipe.method, recipe.seed)
    materialize(local(stages.dense(run).path(store)), router, recipe.method, Path(target), start=start)
    (_say if command.json else print)(f"loads with transformers: {target}")
    return 0


def _check_new(option: str, folder: str | None) -> None:
    """Raises InputError where a model can't be written to `folder`, before anything is computed for it."""
    if folder and (path := Path(folder)).exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{option}: {folder} exists already and is not an empty folder")


def _train(command: Command) -> int:
    """A sweep of one run."""
    from raymoe.sweep import Options, Sweep, execute

    method = command.job.method
    point = {
        "method": method.name,
        **({"num_experts": method.num_experts} if hasattr(method, "num_experts") else {}),
    }
    sweep = Sweep("train", "one run", [point], lambda base, _: base)
    return execute(sweep, command.job, Options(command.dry_run, command.json))


def _evaluate(command: Command) -> int:
    from raymoe import stages
    from raymoe.store import Store

    run, store = command.job.run(), Store(command.job.execution.storage)
    folder, data = command.options.get("model_folder"), stages.instructions(run)
    stage = stages.training(run)
    if folder and not ((Path(folder) / "config.json").is_file() or _is_simoe(folder)):
        raise InputError(f"--model-folder: no model in {folder} (no config.json)")
    if command.dry_run:
        _print_stages(data if folder else stage, command)
        return 0
    if not folder and stage.find(store) is None:
        raise InputError("evaluate: this run is not trained yet: `raymoe train` it, or give --model-folder")
    if folder:
        _check_tokenizer(_tokenizer_folder(Path(folder)), command)
    encoded = _make(data, command).path
    from raymoe.evaluate import evaluate_folder
    from raymoe.storage import local

    model = Path(folder) if folder else local(stage.path(store) / "model")
    metrics = evaluate_folder(model, encoded, run)
    print(to_json(metrics) if command.json else "\n".join(f"{k:<32} {v:.4f}" for k, v in metrics.items()))
    return 0


def _check_tokenizer(model: Path, command: Command) -> None:
    """Raises InputError where the run's data are other token ids than those of `model`."""
    from raymoe import stages
    from raymoe.evaluate import check_tokenizer
    from raymoe.storage import local
    from raymoe.store import Store

    run, store = command.job.run(), Store(command.job.execution.storage)
    # The embedded dense model has its tokenizer from the start, before it is trained.
    source = stages.dense(stages.local_seed(run) if run.model.name == "local" else run)
    if source.stage and source.stage.find(store) is None:
        _make(source.stage, command)
    check_tokenizer(model, local(source.path(store)))


def _is_simoe(folder: str | Path) -> bool:
    """As `raymoe.upcycle.simoe.is_simoe`, without what it takes to import that."""
    return (Path(folder) / "simoe.json").is_file()


def _tokenizer_folder(model: Path) -> Path:
    """A SIMoE folder's tokenizer is that of its dense model."""
    from raymoe.upcycle.simoe import simoe_config

    return simoe_config(model).dense if _is_simoe(model) else model


def _export(command: Command) -> int:
    out, folder = command.options.get("out"), command.options.get("model_folder")
    _check_merge(command)
    if folder and not _is_simoe(folder):
        raise InputError(f"--model-folder: no SIMoE model in {folder} (no simoe.json)")
    if command.dry_run:
        _print_export(command)
        return 0
    if not out:
        raise InputError("export: --out FOLDER says where to")
    model = Path(folder) if folder else _trained_model(command)
    _check_new("--out", out)
    result = _written(model, Path(out), command)
    if command.json:
        print(to_json({"path": out, **result}))
        return 0
    for name, value in result.items():
        print(f"{name}: {value}")
    loads = _is_simoe(out)
    print(f"loads with {'raymoe.upcycle.simoe.load_simoe' if loads else 'transformers'}: {out}")
    return 0


def _check_merge(command: Command) -> None:
    given = [f"--{n.replace('_', '-')}" for n in ("merge", "merge_domain") if n in command.options]
    if len(given) > 1:
        raise InputError(f"{', '.join(given)}: give one of them: a prompt or a domain")
    method = command.job.method.name
    if given and method != "simoe" and "model_folder" not in command.options:
        raise InputError(f"{given[0]}: method.name is {method}, which has no masks to merge: only simoe has")


def _print_export(command: Command) -> None:
    if folder := command.options.get("model_folder"):
        print(f"{'to do':<13} export {folder}")
        return
    from raymoe import stages

    _print_stages(stages.training(command.job.run()), command)


def _trained_model(command: Command) -> Path:
    """The folder of the run's trained model; InputError if there is none yet."""
    from raymoe import stages
    from raymoe.storage import local
    from raymoe.store import Store

    stage, store = stages.training(command.job.run()), Store(command.job.execution.storage)
    if stage.find(store) is None:
        raise InputError("export: this run is not trained yet: `raymoe train` it first")
    return local(stage.path(store) / "model")


def _written(model: Path, out: Path, command: Command) -> dict[str, Any]:
    """Write `model`, or what is merged from it, to `out`; returns what there is to say about that."""
    if not _is_simoe(model):
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
        _say(
            f"warning: rounding to the dense model's dtype kept {share:.1%} of the delta: the merged model is "
            "not quite the trained one; measure it before you use it"
        )
    return {"expert_weights": [round(weight, 6) for weight in weights], "kept_share": round(share, 6)}


ENOUGH_KEPT = 0.95
"""Share of the delta below which a merged model is warned about."""


def _expert_weights(model: Path, command: Command) -> list[float] | None:
    """Of the prompt or domain that is asked for; None if neither is."""
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


def _report(command: Command) -> int:
    from raymoe.report import averages, print_table
    from raymoe.tracking import read_sweeps

    sweeps = read_sweeps(command.options.get("sweep"))
    if command.json:
        parts: list[dict[str, Any]] = []
        for s in sweeps:
            parts.append({"sweep": s.name, "question": s.question, "rows": [row.as_json() for row in s.rows]})
            if s.average_over:
                made = averages(s.rows, s.average_over, "eval/loss", "min")
                parts[-1]["averages"] = [average.as_json() for average in made]
        print(to_json(parts))
        return 0
    for s in sweeps:
        print_table(s.name, s.question, s.rows, "eval/loss", "min", s.average_over)
    return 0


def _plan(command: Command) -> int:
    from raymoe.plan import parsed, plan, plan_sweep, show, show_sweep

    options, file = parsed(command.options, command.job), command.options.get("sweep")
    made = plan_sweep(_trial_jobs(file, command.job), options) if file else plan(command.job, options)
    if command.json:
        print(to_json(made))
    else:
        (show_sweep if file else show)(made)
    return 0


def _trial_jobs(file: str, job: Job) -> dict[str, Job]:
    """The runs of a sweep file, by the names of its trials."""
    from raymoe.sweep import jobs_of, load, trials_of

    return jobs_of(trials_of(load(Path(file)), job.run()), job.execution)


VERBS: dict[str, Verb] = {
    "plan": Verb(
        "Say what a run will cost: parameters, memory per GPU, hours, and the setting to run it with.",
        _plan,
        {
            "gpu": "NAME to plan for (a10g, l4, l40s, a100-80gb, h100, ...); by default all that are known",
            "gpus": "N of them, one worker each (default: execution.workers, else 1)",
            "mfu": "SHARE of the vendor's peak that is assumed to be reached (default: 0.4)",
            "tokens": "N to train on, where the data are not in the store",
            "price_per_gpu_hour": "PRICE in your currency (default: rough examples, dollars on AWS)",
            "sweep": "FILE of a sweep, to plan all of its trials",
        },
    ),
    "filter": Verb(
        "Score the perplexity of every training instance under the dense model.",
        _stage_verb(_filter_stage, _show_scores),
        {},
    ),
    "represent": Verb(
        "Extract the token representations that the routers are made from (trsu, crsu) or router inputs (simoe).",
        _stage_verb(_represent_stage, _show_info),
        {},
    ),
    "cluster": Verb(
        "Cluster the representations and make router rows of the centroids (trsu, crsu) or router inputs (simoe).",
        _stage_verb(_cluster_stage, _show_clusters),
        {},
    ),
    "upcycle": Verb(
        "Make the recipe of a Mixture-of-Experts, and with --materialize the model itself.",
        _upcycle,
        {"materialize": "FOLDER to write the untrained Mixture-of-Experts to, for stock transformers"},
    ),
    "train": Verb("Train one run: dense baseline or Mixture-of-Experts.", _train, {}),
    "evaluate": Verb(
        "Measure a trained run, or any model folder, on the run's held-out data.",
        _evaluate,
        {"model_folder": "FOLDER to measure instead of the run's own model"},
    ),
    "export": Verb(
        "Copy the model of a trained run to a folder of its own; of simoe, merge a plain dense model.",
        _export,
        {
            "out": "FOLDER to write to",
            "merge": 'PROMPT (simoe): write the dense model that it is for "this message of a user"',
            "merge_domain": "NAME (simoe): likewise, for the mean over a domain's prompts",
            "model_folder": "FOLDER of a SIMoE model to export instead of the run's own",
        },
    ),
    "report": Verb("Print the tables of the sweeps in MLflow.", _report, {"sweep": "NAME of one sweep only"}),
}


if __name__ == "__main__":
    main()
