"""The path of a run as stages: what each one reads, what its output depends on, how it is made.

    corpus -> initial -> (training) dense          only for the embedded defaults
    instructions -> perplexity -> representations -> clusters -> upcycle -> train      SU, TRSU, CRSU
    instructions -> prompts -> train                                                   SIMoE

A stage's identity holds only what determines its output, so runs share whatever they have in common: a sweep over
`load_balance_alpha` scores, extracts and clusters once. Nothing is computed, and nothing heavy imported, until
`build` is called, so that planning a hundred trials takes a moment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from raymoe.config import Data, Evaluation, Execution, Model, Optimization, Run
from raymoe.methods import (
    ContextRepresentations,
    Dense,
    Experts,
    SparseInterpolation,
    TaskRepresentations,
    methods_with,
    seam,
)
from raymoe.schema import InputError
from raymoe.storage.location import Location, delete, local, writing
from raymoe.storage.store import Output, Store, digest

REVISIONS = {
    "corpus": 1,
    "initial": 1,
    "instructions": 2,
    "perplexity": 1,
    "representations": 1,
    "prompts": 1,
    "clusters": 1,
    "upcycle": 1,
    "train": 1,
}
"""Stage -> revision, incremented when a change of its code changes its output."""


@dataclass(frozen=True)
class Stage:
    """One step of a run: its name, what determines its output, the stages it needs, and how it is made."""

    name: str
    identity: Mapping[str, Any]
    needs: tuple[Stage, ...]
    build: Callable[[Any, Context], Mapping[str, Any]]
    """Writes the output to a location (a folder, or an address if the store is remote) and returns its info."""
    run: Run
    """The run that needs it; the first one if several share the stage."""
    trains: str | None = None
    """Name of its checkpoint folder; None for stages that do not train."""

    @property
    def key(self) -> str:
        """Name and hash: its folder name in the store."""
        return f"{self.name}-{digest(self.identity)}"

    def find(self, store: Store) -> Output | None:
        """Return its finished output, or None."""
        return store.find(self.name, self.identity)

    def path(self, store: Store) -> Location:
        """Return where its output is; raise LookupError if that is unknown until it is made."""
        return store.path(self.name, self.identity)


@dataclass(frozen=True)
class Context:
    """Where and how to compute stages."""

    store: Store
    execution: Execution
    say: Callable[[str], None] = print
    lease: str | None = None
    """Id of the lease under which training runs (raymoe.storage.lease)."""


def make(stage: Stage, context: Context) -> Output:
    """Return the output of `stage`; make it and the stages it needs unless it is in the store."""
    if found := stage.find(context.store):
        return found
    for need in stage.needs:
        make(need, context)
    with _alone(stage, context) as alone:
        if found := stage.find(context.store) if stage.trains else None:  # made by the process we waited for
            return found
        context.say(f"{stage.key}: started")
        with redirect_stdout(sys.stderr):  # what libraries print is not a result
            output = context.store.make(stage.name, stage.identity, lambda out: stage.build(out, alone))
    if stage.trains:
        delete(context.store.checkpoints / stage.trains)  # no longer needed: the model is in the store
    context.say(f"{stage.key}: done in {output.marker['seconds']:.0f} s{_summary(output.info)}")
    return output


@contextmanager
def _alone(stage: Stage, context: Context) -> Iterator[Context]:
    """Keep others from training the same run within the block, so that its checkpoints have one writer."""
    if stage.trains is None:
        yield context
        return
    from raymoe.storage.lease import held

    def say(text: str) -> None:
        context.say(f"{stage.key}: {text}")

    with held(
        context.store.checkpoints / stage.trains, lambda: stage.find(context.store) is not None, say
    ) as lease:
        yield replace(context, lease=lease)


WITHOUT_RAY = ("corpus", "initial", "instructions")


def prepare(stages: Iterable[Stage], context: Context) -> None:
    """Make those upstream stages that need no cluster, so that bad input is reported before one starts.

    Raises:
        InputError: a bad row, a model or data that can't be used, a task that is no domain of the data, or a
            dense model that no stock class holds as the method's Mixture-of-Experts.
    """
    wanted = list(stages)
    for stage in [*upstream(wanted), *wanted]:
        if stage.name in WITHOUT_RAY and all(n.name in WITHOUT_RAY for n in upstream([stage])):
            make(stage, context)
    for stage in wanted:
        _check_tasks(stage.run, context)
    _check_upcycling([stage.run for stage in wanted], context)


def _check_upcycling(runs: Iterable[Run], context: Context) -> None:
    """Raise InputError if no stock class holds what a run makes of the user's dense model."""
    upcycled = [r for r in runs if "upcycle" in seam(r.method).stages and not r.model.is_embedded]
    for run in {(r.model, cast(Experts, r.method).gating): r for r in upcycled}.values():
        from raymoe.models.dense import check_upcycling

        check_upcycling(local(_dense(run).path(context.store)), cast(Experts, run.method))


def _check_tasks(run: Run, context: Context) -> None:
    found = _instructions(run).find(context.store)
    if found is None:
        return
    domains = found.info["train_domains"]
    if unknown := [task for task in run.method.domains if task not in domains]:
        raise InputError(f"method.tasks: {', '.join(unknown)} is no domain of the data: {', '.join(domains)}")


def upstream(stages: Iterable[Stage]) -> list[Stage]:
    """Return all stages that `stages` need, each once, in an order in which they can be made."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        for need in stage.needs:
            visit(need)
            ordered.setdefault(need.key, need)

    for stage in stages:
        visit(stage)
    return list(ordered.values())


def training(run: Run) -> Stage:
    """Return the last stage of `run`, which needs all the others.

    Raises:
        InputError: the model or the data can't be used.
    """
    dense, data = _dense(run), _instructions(run)
    reads = seam(run.method).stages
    recipe = upcycle(run) if "upcycle" in reads else None
    router_inputs = prompts(run) if "prompts" in reads else None
    identity = {
        **_head("train"),
        "dense": dense.identity,
        "instructions": data.identity,
        "recipe": recipe.identity if recipe else None,
        "run": run.identity(exclude={"model", "data"}),
        **({"prompts": router_inputs.identity} if router_inputs else {}),
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.cluster.capacity import uses_gpu
        from raymoe.train.launch import fit
        from raymoe.train.spec import WorkerSpec

        # reading metrics synchronises with the device: on a GPU once per ten steps
        spec = WorkerSpec(
            run=run,
            execution=context.execution,
            dense=dense.path(context.store),
            recipe=recipe.path(context.store) if recipe else None,
            data=data.path(context.store),
            out=out,
            prompts=router_inputs.path(context.store) if router_inputs else None,
            log_every=10 if uses_gpu(context.execution) else 1,
        )
        return fit(spec, name=name, storage=context.store.checkpoints, lease=context.lease)

    name = f"train-{digest(identity)}"
    return Stage("train", identity, _needs(dense, data, recipe, router_inputs), build, run, trains=name)


def perplexity(run: Run) -> Stage:
    """Return the stage that computes every training example's perplexity under the dense model."""
    dense, data = _dense(run), _instructions(run)
    identity = {
        **_head("perplexity"),
        "dense": dense.identity,
        "instructions": data.identity,
        "precision": run.precision,
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.routers.perplexity import score_all

        return score_all(
            data.path(context.store) / "train", dense.path(context.store), out, **_forward(context, run)
        )

    return Stage("perplexity", identity, _needs(dense, data), build, run)


def representations(run: Run) -> Stage:
    """Return the stage that extracts the token representations from which the routers are made."""
    method = _representation_method(run)
    dense, data = _dense(run), _instructions(run)
    scores = perplexity(run) if "perplexity" in seam(method).stages else None
    fields = {"representation", "max_tokens", "tasks", "perplexity_top_fraction", "token_fraction"}
    identity = {
        **_head("representations"),
        "dense": dense.identity,
        "instructions": data.identity,
        "perplexity": scores.identity if scores else None,
        "method": method.identity(include=fields),
        "precision": run.precision,
        "seed": run.seed,
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.routers.representations import extract_all

        return extract_all(
            data.path(context.store) / "train",
            dense.path(context.store),
            out,
            method,
            scores=scores.path(context.store) / "scores.parquet" if scores else None,
            seed=run.seed,
            **_forward(context, run),
        )

    return Stage("representations", identity, _needs(dense, data, scores), build, run)


def prompts(run: Run) -> Stage:
    """Return the stage that computes the prompt representations for SIMoE's router, held-out ones included.

    Raises:
        InputError: the run's method has no prompt router.
    """
    if "prompts" not in seam(run.method).stages:
        raise InputError(
            f"method.name: {run.method.name} has no prompt router, only {methods_with('prompts')} has"
        )
    dense, data = _dense(run), _instructions(run)
    kind = cast(SparseInterpolation, run.method).prompt_representation
    identity = {
        **_head("prompts"),
        "dense": dense.identity,
        "instructions": data.identity,
        "kind": kind,
        "precision": run.precision,
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.routers.prompts import represent_all

        return represent_all(
            data.path(context.store),
            dense.path(context.store),
            out,
            kind=kind,
            **_forward(context, run),
        )

    return Stage("prompts", identity, _needs(dense, data), build, run)


def clusters(run: Run) -> Stage:
    """Return the stage that clusters the representations and makes router rows of the centroids."""
    method, source = _representation_method(run), representations(run)
    fields = {"num_experts", "router_rows", "router_confidence", "spherical", "kmeans_starts"}
    identity = {
        **_head("clusters"),
        "representations": source.identity,
        "method": method.identity(include=fields),
        "seed": run.seed,
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.routers.clusters import cluster

        result = cluster(local(source.path(context.store)), method, seed=run.seed)
        with writing(out) as folder:
            result.save(folder)
        return result.measurements()

    return Stage("clusters", identity, (source,), build, run)


def upcycle(run: Run) -> Stage:
    """Return the stage that writes the recipe of the run's MoE: dense model by reference, router rows, method.

    Raises:
        InputError: the run's method has no recipe.
    """
    if "upcycle" not in seam(run.method).stages:
        choice = methods_with("upcycle")
        raise InputError(
            f"method.name: {run.method.name} has nothing to upcycle beforehand: choose from {choice}"
        )
    method, dense = cast(Experts, run.method), _dense(run)
    source = clusters(run) if "clusters" in seam(method).stages else None
    identity = {
        **_head("upcycle"),
        "dense": dense.identity,
        "clusters": source.identity if source else None,
        "method": method.identity(exclude={"load_balance_alpha"}),
        "seed": run.seed,
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.models.dense import dimensions
        from raymoe.upcycle import router, write_recipe

        model = dense.path(context.store)
        layers, width = dimensions(local(model))
        rows = router(
            method,
            num_layers=layers,
            width=width,
            clusters=local(source.path(context.store)) if source else None,
            seed=run.seed,
        )
        with writing(out) as folder:
            write_recipe(folder, str(model), method, rows, run.seed)
        return {"layers": layers, "width": width, "experts": method.num_experts}

    return Stage("upcycle", identity, _needs(dense, source), build, run)


def instructions(run: Run) -> Stage:
    """Return the stage that tokenises the run's instructions."""
    return _instructions(run)


@dataclass(frozen=True)
class DenseModel:
    """The dense model of a run: a stage's output, or the user's folder or Hugging Face id."""

    identity: Mapping[str, Any]
    model: Model
    stage: Stage | None = None

    def path(self, store: Store) -> Location:
        """Return its Hugging Face folder; download a hub model that is not cached yet."""
        if self.stage:
            folder = self.stage.path(store)
            return folder / "model" if self.stage.name == "dense" else folder
        from raymoe.models.dense import resolve

        return resolve(self.model)


def dense(run: Run) -> DenseModel:
    """Return the dense model that `run` starts from."""
    return _dense(run)


def local_seed(run: Run) -> Run:
    """Return the run that trains the embedded dense model, on the same path as every other run.

    It always trains on the whole local corpus, in float32, whatever the data and precision of `run`.
    """
    shape = run.model.local
    return Run(
        model=Model(name="initial", local=shape),
        data=Data(train="local"),
        method=Dense(),
        optimization=Optimization(
            learning_rate=shape.learning_rate, batch_size=8, num_epochs=100, max_steps=shape.num_steps
        ),
        evaluation=Evaluation(milestones=(1.0,), generation_examples=0),
    )


def _dense(run: Run) -> DenseModel:
    if run.model.name == "local":
        stage = replace(training(local_seed(run)), name="dense")
        return DenseModel({"stage": stage.key}, run.model, stage)
    if run.model.name == "initial":
        stage = _initial(run)
        return DenseModel({"stage": stage.key}, run.model, stage)
    from raymoe.models.dense import identity

    return DenseModel(identity(run.model), run.model)


def _corpus(run: Run) -> Stage:
    from raymoe.data import local_corpus

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        with writing(out) as folder:
            return local_corpus.write(folder)

    return Stage("corpus", {**_head("corpus"), **_corpus_identity()}, (), build, run)


@cache
def _corpus_identity() -> Mapping[str, Any]:
    """Return the corpus's identity, cached: every stage asks, and it lists this Python's standard library."""
    from raymoe.data import local_corpus

    return local_corpus.identity()


def _initial(run: Run) -> Stage:
    """Return the stage that makes the embedded dense model's tokenizer and random weights."""
    corpus, shape = _corpus(run), run.model.local
    fields = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"}
    identity = {
        **_head("initial"),
        "corpus": corpus.identity,
        "shape": shape.identity(include=fields),
        "max_length": run.data.max_length,
        "seed": run.seed,
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.models.dense import write_initial

        texts = local(corpus.path(context.store) / "seed")
        with writing(out) as folder:
            write_initial(folder, texts, shape, run.data.max_length, run.seed)
        return {}

    return Stage("initial", identity, (corpus,), build, run)


def _instructions(run: Run) -> Stage:
    data = run.data
    # The embedded dense model's tokenizer exists before training: encode with that.
    tokenizer = _dense(run if run.model.name != "local" else local_seed(run))
    corpus = _corpus(run) if data.uses_local_corpus else None
    part = "seed" if run.model.name == "initial" else "instruct"
    identity = {
        **_head("instructions"),
        "tokenizer": tokenizer.identity,
        "data": data.identity(),
        "corpus": [corpus.identity, part] if corpus else None,
        "files": _file_identity(data),
        "seed": run.seed if data.max_examples else None,  # the seed draws the sample and nothing else
    }

    def build(out: Location, context: Context) -> Mapping[str, Any]:
        from raymoe.data.instructions import prepare

        with writing(out) as folder:
            return prepare(
                data,
                local(tokenizer.path(context.store)),
                folder,
                corpus=local(corpus.path(context.store) / part) if corpus else None,
                seed=run.seed,
            )

    return Stage("instructions", identity, _needs(tokenizer, corpus), build, run)


def _representation_method(run: Run) -> TaskRepresentations | ContextRepresentations:
    if "representations" not in seam(run.method).stages:
        choice = methods_with("representations")
        raise InputError(f"method.name: {run.method.name} uses no representations: choose from {choice}")
    return cast(TaskRepresentations | ContextRepresentations, run.method)


def _forward(context: Context, run: Run) -> dict[str, Any]:
    """Return the options for running the dense model over the data."""
    from raymoe.cluster.capacity import uses_gpu

    execution = context.execution
    return {
        "dtype": run.precision,
        "actors": execution.scoring_actors,
        "gpu": uses_gpu(execution),
        "tokens_per_batch": execution.tokens_per_batch,
    }


def _needs(*parts: Stage | DenseModel | None) -> tuple[Stage, ...]:
    stages = [part.stage if isinstance(part, DenseModel) else part for part in parts]
    return tuple(stage for stage in stages if stage)


def _head(stage: str) -> dict[str, Any]:
    return {"stage": stage, "revision": REVISIONS[stage]}


def _file_identity(data: Data) -> list[list[Any]]:
    """Return path, size and modification time of the user's data files, so that a changed file makes new stages."""
    files: list[Path] = []
    named = [(f"data.{key}", s.name) for key in ("train", "validation") for s in data.sources(key)]
    for key, name in named:
        path = Path(name).expanduser()
        names_file = path.suffix in (".jsonl", ".parquet") or name.startswith((".", "/", "~"))
        if names_file and not path.exists():
            raise InputError(f"{key}: {path} does not exist")
        files += (
            sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] * path.is_file()
        )
    return [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _summary(info: Mapping[str, Any]) -> str:
    """Return the integers of a stage's info, for its progress line."""
    shown = [f"{name} {value:,}" for name, value in info.items() if isinstance(value, int)]
    return f" ({', '.join(shown)})" if shown else ""
