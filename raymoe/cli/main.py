"""The command line: one verb per stage of the path, and those that plan, sweep and report.

    raymoe <verb> [config.yaml] [--key value ...] [--dry-run] [--json] [--help]

Keys are those of `raymoe.config.RunFile`, dotted (`--method.num-experts 4`) or alone where only one part has them
(`--num-experts 4`). Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from raymoe import __version__
from raymoe.cli.command import Verb, guarded, parse, verb_help
from raymoe.cli.evaluate import evaluate
from raymoe.cli.export import export
from raymoe.cli.options import entries
from raymoe.cli.plan import plan
from raymoe.cli.report import report
from raymoe.cli.stages import (
    cluster_stage,
    represent_stage,
    scores_stage,
    show_clusters,
    show_info,
    show_scores,
    stage_verb,
    upcycle,
)
from raymoe.cli.sweep import sweep_file, train
from raymoe.schema import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `raymoe`."""
    sys.exit(guarded(lambda: _dispatch(list(sys.argv[1:] if arguments is None else arguments))))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = ALIASES.get(arguments[0], arguments[0]), arguments[1:]
    if name == "sweep":
        return sweep_file(rest)
    if name not in VERBS:
        raise InputError(f"unknown verb {name!r}: choose from {', '.join([*VERBS, 'sweep'])}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(verb_help(f"raymoe {name}", _about(name), verb.options, rest))
        return 0
    return verb.function(parse(rest, verb.options))


def _about(name: str) -> str:
    """Return what a verb does, in one line, with its aliases."""
    aliases = ", ".join(alias for alias, verb in ALIASES.items() if verb == name)
    about = VERBS[name].about
    return f"{about.removesuffix('.')} (alias: {aliases})." if aliases else about


def _usage() -> str:
    abouts = {**{name: _about(name) for name in VERBS}, "sweep": "Run every trial of a sweep file."}
    groups = [(title, {name: abouts[name] for name in names}) for title, names in USAGE.items()]
    return "\n\n".join(
        [
            "From a dense language model to the Mixture-of-Experts that suits your data and budget.",
            "usage: raymoe <verb> [config.yaml] [--key value ...]",
            *(f"{title}:\n{entries(verbs, indent=13)}" for title, verbs in groups),
            "raymoe <verb> --help    its options and every key of the configuration\n"
            "raymoe --version        the version",
        ]
    )


ALIASES = {"filter": "score"}
"""Other name of a verb -> the verb."""

USAGE = {
    "the stages of one run; each first makes what it needs and the store does not have": (
        "score",
        "represent",
        "cluster",
        "upcycle",
        "train",
        "evaluate",
        "export",
    ),
    "before, beside and after": ("plan", "sweep", "report"),
}
"""Verbs as `raymoe --help` groups them."""

VERBS: dict[str, Verb] = {
    "plan": Verb(
        "Estimate what a run will take: parameters, memory per GPU, hours, price, settings.",
        plan,
        {
            "gpu": "NAME of the GPU to plan for (a10g, l4, l40s, a100-80gb, h100, ...); by default all known.",
            "gpus": "N of them, one worker each (default: execution.workers, else 1).",
            "mfu": "SHARE of the vendor's peak FLOP/s assumed to be reached (default: 0.4).",
            "tokens": "N to train on; needed while the instructions are not in the store.",
            "price_per_gpu_hour": "PRICE in your currency (default: rough example prices, dollars on AWS).",
            "sweep": "FILE of a sweep, to plan all of its trials.",
        },
    ),
    "score": Verb(
        "Score every training example by its perplexity under the dense model.",
        stage_verb(scores_stage, show_scores),
    ),
    "represent": Verb(
        "Extract the representations that routers are made from (trsu, crsu) or read (simoe).",
        stage_verb(represent_stage, show_info),
    ),
    "cluster": Verb(
        "Cluster the representations and make router rows of the centroids (trsu, crsu).",
        stage_verb(cluster_stage, show_clusters),
    ),
    "upcycle": Verb(
        "Write the recipe of a Mixture-of-Experts and, with --materialize, the model itself.",
        upcycle,
        {"materialize": "FOLDER to write the untrained Mixture-of-Experts to, for stock transformers."},
    ),
    "train": Verb("Train one run: a dense baseline or a Mixture-of-Experts.", train),
    "evaluate": Verb(
        "Measure a trained run, or any model folder, on the run's held-out data.",
        evaluate,
        {"model_folder": "FOLDER to measure instead of the run's own model."},
    ),
    "export": Verb(
        "Copy the trained model to a folder of its own, or merge a SIMoE model into a dense one.",
        export,
        {
            "out": "FOLDER to write to.",
            "merge": 'PROMPT (simoe): write the dense model that serves this prompt, "a message of a user".',
            "merge_domain": "NAME (simoe): likewise, for the mean over the prompts of a domain.",
            "model_folder": "FOLDER of a SIMoE model to export instead of the run's own.",
        },
    ),
    "report": Verb(
        "Print the tables of the sweeps in MLflow.", report, {"sweep": "NAME of the only sweep to print."}
    ),
}
