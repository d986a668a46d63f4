"""The command line: one verb per stage, in the order of the path.

    raymoe <verb> [config.yaml] [--key value ...] [--dry-run] [--json] [--help]

Keys are those of `raymoe.config.Job`, dotted (`--method.num-experts 4`) or alone where only one part has them
(`--num-experts 4`). Nothing heavy is imported before the configuration is known to be right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raymoe import __version__
from raymoe.cli.command import Verb, guarded, option_lines, parse
from raymoe.cli.evaluate import evaluate
from raymoe.cli.export import export
from raymoe.cli.options import help_text
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

if TYPE_CHECKING:
    pass


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
    name, rest = arguments[0], arguments[1:]
    if name == "sweep":
        return sweep_file(rest)
    if name not in VERBS:
        raise InputError(f"unknown verb {name!r}: choose from {', '.join([*VERBS, 'sweep'])}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(
            f"raymoe {name} [config.yaml] [--key value ...]\n\n{verb.about}\n\n{option_lines(verb.options)}"
        )
        print(help_text())
        return 0
    return verb.function(parse(rest, verb.options))


def _usage() -> str:
    verbs = {**{n: v.about for n, v in VERBS.items()}, "sweep": "Run every trial of a sweep file."}
    lines = [f"  {name:<10} {about.splitlines()[0]}" for name, about in verbs.items()]
    return (
        "raymoe <verb> [config.yaml] [--key value ...]\n\n"
        + "\n".join(lines)
        + "\n\nraymoe <verb> --help: options"
    )


VERBS: dict[str, Verb] = {
    "plan": Verb(
        "Say what a run will cost: parameters, memory per GPU, hours, and the setting to run it with.",
        plan,
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
        "Score the perplexity of every training example under the dense model.",
        stage_verb(scores_stage, show_scores),
        {},
    ),
    "represent": Verb(
        "Extract the token representations that the routers are made from (trsu, crsu) or router inputs (simoe).",
        stage_verb(represent_stage, show_info),
        {},
    ),
    "cluster": Verb(
        "Cluster the representations and make router rows of the centroids (trsu, crsu) or router inputs (simoe).",
        stage_verb(cluster_stage, show_clusters),
        {},
    ),
    "upcycle": Verb(
        "Make the recipe of a Mixture-of-Experts, and with --materialize the model itself.",
        upcycle,
        {"materialize": "FOLDER to write the untrained Mixture-of-Experts to, for stock transformers"},
    ),
    "train": Verb("Train one run: dense baseline or Mixture-of-Experts.", train, {}),
    "evaluate": Verb(
        "Measure a trained run, or any model folder, on the run's held-out data.",
        evaluate,
        {"model_folder": "FOLDER to measure instead of the run's own model"},
    ),
    "export": Verb(
        "Copy the model of a trained run to a folder of its own; of simoe, merge a plain dense model.",
        export,
        {
            "out": "FOLDER to write to",
            "merge": 'PROMPT (simoe): write the dense model that it is for "this message of a user"',
            "merge_domain": "NAME (simoe): likewise, for the mean over a domain's prompts",
            "model_folder": "FOLDER of a SIMoE model to export instead of the run's own",
        },
    ),
    "report": Verb("Print the tables of the sweeps in MLflow.", report, {"sweep": "NAME of one sweep only"}),
}
