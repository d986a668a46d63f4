"""What a run will cost before it starts: parameters, memory per GPU, FLOPs, hours, and what to run it with.

    raymoe plan my-run.yaml --gpu h100 --gpus 8 --mfu 0.4

Arithmetic on the meta device: no weights are read or downloaded, only a model's config.json. `Activations` and
`Setting` say what the estimate of memory is made of; benchmarks/plan_memory.py compares it with what training
allocates. Time is model FLOPs over an assumed share (MFU) of the vendor's peak; prices are the user's or `PRICES`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from raymoe.analysis.size import WEIGHT_BYTES, Counts, count, on_meta, training_state
from raymoe.config import Experts, InputError, Job, Run, SparseInterpolation
from raymoe.models.moe import upcycle_model
from raymoe.models.packed_attention import LOGITS_PER_CHUNK
from raymoe.models.seed import check_supported, local_config
from raymoe.models.simoe import gate_layout
from raymoe.train.flops import PEAK_BFLOAT16, PEAK_FLOAT32, training_flops_per_token

GPUS = {  # name: (key in the tables of peaks, GB of memory)
    "a10g": ("A10G", 24), "l4": ("L4", 24), "l40s": ("L40S", 48), "v100-16gb": ("V100", 16),
    "a100-40gb": ("A100", 40), "a100-80gb": ("A100", 80), "h100": ("H100", 80), "h200": ("H200", 141),
}  # fmt: skip
INSTANCES = {  # of AWS: (GPU, how many, dollars an hour)
    "g5.xlarge": ("a10g", 1, 1.01), "g5.12xlarge": ("a10g", 4, 5.67), "g5.48xlarge": ("a10g", 8, 16.29),
    "g6.xlarge": ("l4", 1, 0.80), "g6.12xlarge": ("l4", 4, 4.60), "g6.48xlarge": ("l4", 8, 13.35),
    "g6e.xlarge": ("l40s", 1, 1.86), "g6e.12xlarge": ("l40s", 4, 10.49), "g6e.48xlarge": ("l40s", 8, 30.13),
    "p4d.24xlarge": ("a100-40gb", 8, 21.96), "p4de.24xlarge": ("a100-80gb", 8, 27.45),
    "p5.48xlarge": ("h100", 8, 55.04), "p5en.48xlarge": ("h200", 8, 63.30),
}  # fmt: skip
"""Prices are examples: on demand, us-west-2, roughly those of late 2025 and not looked up. Spot is often 30% to 70%
of that."""
CLUSTER_INSTANCE = "g6e.12xlarge"
"""The workers of cluster.yaml."""
USABLE = 0.9
"""Share of a GPU's memory that a plan fills: the rest is for CUDA's context, NCCL and fragmentation."""
BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements: gradients on their way, allocated whole for any model."""
LIVE = 1_000_000_000
"""DeepSpeed's defaults under ZeRO-3, in elements: weights gathered at one time (`stage3_max_live_parameters`) and
updated at one time (`sub_group_size`)."""
TOKENS_PER_DOCUMENT = 256
"""Assumed where SIMoE's coefficients, one row per document, are counted."""


@dataclass(frozen=True)
class Options:
    """What is asked of the planner beside the run."""

    gpu: str | None = None
    gpus: int = 1
    mfu: float = 0.4
    tokens: int | None = None
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch by raymoe's forward and backward (A = heads x head width, K likewise of key-value
    heads, b bytes of the precision, k = top_k, V = vocabulary; per token, all of which count as completion).

    kept, for the backward pass, of every layer; with checkpointing only its input, b D:
        norm: 4 D (its input in fp32) + 2 b D (normalised; scaled). Two in a layer; of qwen3 also of query and key.
        attention: b (3 A + 2 K): query, key, value, output, output in the order of tokens; no score matrices.
        FFN: 4 b F: gate, its activation, up, their product. Experts: k times that, 2 k b D for what is dispatched and
            what comes back, 12 N for the router. SIMoE's linears keep what dense ones do; its coefficients are
            8 G per document (with their gradients).
    passing, the larger of what exists beside it
        at the loss: the last norm and what of it the head sees, and 12 V (fp32 log-probabilities, their gradient and
            the logits'), of LOGITS_PER_CHUNK logits at most;
        in the first layer that goes backward: b (2 F + D), gradients inside its FFN, and that of its
            largest weight; with checkpointing also the layer, computed again.
    """

    kept: int
    passing: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.kept + self.passing


@dataclass(frozen=True)
class Setting:
    """One way to run it, and what one GPU holds then, in bytes.

    The most is held either in the backward pass (buffers and activations) or in the update.
    """

    zero_stage: int
    offload: str
    activation_checkpointing: bool
    micro_batch: int
    state: int
    """Weights, gradients, optimizer."""
    buffers: int
    """DeepSpeed's bucket of gradients; under ZeRO-3 weights gathered from other GPUs."""
    activations: int
    update: int
    """Copies that the optimizer's step makes of its gradients."""

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return self.state + max(self.buffers + self.activations, self.update)


def model_config(job: Job) -> PretrainedConfig:
    """The dense model's configuration: of `local`, a folder (config.json alone is enough) or Hugging Face's cache.

    Raises:
        InputError: there is none, it can't be read, or raymoe doesn't upcycle such a model.
    """
    if job.model.name == "local":
        return local_config(job.model.local)
    folder = _config_folder(job.model.name, job.model.revision)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model.name: the config.json in {folder} can't be read: {reason}") from None
    check_supported(config)
    return config


def _config_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.name: {folder} has no config.json")
        return folder
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise InputError(f"model.name: {name!r} is neither a folder nor a Hugging Face id") from None
    if not isinstance(found, str):
        raise InputError(
            f"model.name: {name!r} is not in Hugging Face's cache and plan downloads nothing: give a folder with "
            "its config.json"
        )
    return Path(os.path.dirname(found))


# ---- memory


def activations(
    model: PreTrainedModel,
    method: object,
    precision: str,
    tokens: int,
    checkpointing: bool = False,
) -> Activations:
    """Of one micro batch of `tokens` tokens of the dense `model` (on any device) under `method`."""
    c, b = model.config, WEIGHT_BYTES[precision]
    layer = tokens * _layer_bytes(model, method, b)
    kept = c.num_hidden_layers * (tokens * b * c.hidden_size if checkpointing else layer)
    if isinstance(method, SparseInterpolation):
        kept += -(-tokens // TOKENS_PER_DOCUMENT) * gate_layout(model).size * 8
    chunks = -(-tokens * c.vocab_size // LOGITS_PER_CHUNK)
    head = tokens * (4 + 3 * b) * c.hidden_size + 12 * -(-tokens * c.vocab_size // chunks)
    experts, times = (method.num_experts, method.top_k) if isinstance(method, Experts) else (1, 1)
    backward = tokens * b * (2 * times * c.intermediate_size + c.hidden_size)
    backward += 2 * experts * c.intermediate_size * c.hidden_size * b // (1 if experts > 1 else 2)
    return Activations(kept, max(head, backward + (layer if checkpointing else 0)))


def _layer_bytes(model: PreTrainedModel, method: object, b: int) -> int:
    """What one decoder layer keeps of a token."""
    c = model.config
    width, ffn = c.hidden_size, c.intermediate_size
    head_width = getattr(c, "head_dim", None) or width // c.num_attention_heads
    a, k = c.num_attention_heads * head_width, c.num_key_value_heads * head_width
    norms = 2 * (4 + 2 * b) * width + ((4 + b) * (a + k) if c.model_type == "qwen3" else 0)
    attention = b * (3 * a + 2 * k)
    if isinstance(method, Experts):
        ffn_bytes = method.top_k * b * (4 * ffn + 2 * width) + 12 * method.num_experts
    else:
        ffn_bytes = 4 * b * ffn
    return int(norms + attention + ffn_bytes)


def settings(
    model: PreTrainedModel, job: Job, workers: int, micro_batch: int, counts: Counts
) -> Iterator[Setting]:
    """Every ZeRO stage with each offload that it allows, with and without activation checkpointing."""
    tokens = micro_batch * job.data.max_length
    kept = {c: activations(model, job.method, job.precision, tokens, c).total for c in (False, True)}
    for stage, offload in product(range(4), ("none", "optimizer", "parameters")):
        if (offload == "optimizer" and stage == 0) or (offload == "parameters" and stage < 3):
            continue
        # bfloat16 below ZeRO-2 runs as ZeRO-2 (raymoe.train.engine)
        runs_as = max(stage, 2) if job.precision == "bfloat16" else stage
        state = _state(counts, job.precision, workers, runs_as, offload)
        buffers = _buffers(counts, job.precision, workers, runs_as)
        update = _update(counts, job.precision, workers, runs_as) if offload == "none" else 0
        for on in (False, True):
            yield Setting(stage, offload, on, micro_batch, state, buffers, kept[on], update)


def _state(counts: Counts, precision: str, workers: int, stage: int, offload: str) -> int:
    """Weights, gradients and optimizer; with ZeRO, float32 has a second copy of the weights there too."""
    state = training_state(counts, precision, workers, stage)
    if stage and precision == "float32":
        state["optimizer"] += -(-counts.trained * WEIGHT_BYTES[precision] // workers)
    away = {"none": (), "optimizer": ("optimizer", "gradients")}.get(
        offload, ("optimizer", "gradients", "weights", "frozen")
    )
    return sum(size for name, size in state.items() if name not in away)


def _buffers(counts: Counts, precision: str, workers: int, stage: int) -> int:
    """The bucket of gradients and, under ZeRO-3, its copy and weights that other workers keep."""
    weight = WEIGHT_BYTES[precision]
    gathered = min(LIVE, counts.trained + counts.frozen) * weight if stage == 3 and workers > 1 else 0
    # reduce_scatter copies a full bucket; one that takes all gradients is flushed when activations are gone
    copied = BUCKET * weight if stage == 3 and counts.trained > BUCKET else 0
    return (BUCKET * weight if stage else 0) + copied + gathered


def _update(counts: Counts, precision: str, workers: int, stage: int) -> int:
    """fp32 copies of gradients: flattened to be summed (ZeRO-0) or applied, scaled (ZeRO-3)."""
    if stage == 0:
        return min(BUCKET, counts.trained) * 4 if workers > 1 else 0
    own = -(-counts.trained // workers)
    if stage == 3:
        return min(LIVE, own) * 4
    return own * 4 if precision == "float32" else 0


def recommended(
    model: PreTrainedModel, job: Job, workers: int, memory: float, counts: Counts
) -> Setting | None:
    """The setting that costs least time among those that fit USABLE of `memory` bytes, with its largest micro batch.

    Communication (ZeRO-3) is taken to cost less than computing activations again, that less than offloading.
    """
    share = math.ceil(job.optimization.batch_size / workers)
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    first = 2 if job.precision == "bfloat16" else (1 if workers > 1 else 0)
    fits = [
        s
        for n in sizes
        for s in settings(model, job, workers, n, counts)
        if s.zero_stage >= first and s.total <= USABLE * memory
    ]
    places = ("none", "optimizer", "parameters")
    return min(
        fits,
        key=lambda s: (places.index(s.offload), s.activation_checkpointing, s.zero_stage, -s.micro_batch),
        default=None,
    )


# ---- time


def flops_per_token(model: PreTrainedModel, method: object, length: int) -> float:
    """As `system/mfu` counts them (raymoe.train.flops); of SIMoE the dense model's. `model` is not changed."""
    if not isinstance(method, Experts):
        return training_flops_per_token(model, length, 1)
    c = model.config
    sparse = on_meta(c)
    rows = torch.empty(c.num_hidden_layers, method.num_experts, c.hidden_size, device="meta")
    return training_flops_per_token(upcycle_model(sparse, rows, method), length, method.top_k)


def steps(job: Job, tokens: int | None) -> tuple[int | None, str]:
    """Optimizer steps of the run, and where that is known from or what is missing."""
    per_step = job.optimization.batch_size * job.data.max_length
    if tokens is not None:
        return max(1, tokens // per_step), "--tokens"
    found, reason = _stored_steps(job)
    if found is not None:
        return found, reason
    if job.optimization.max_steps:
        return job.optimization.max_steps, "optimization.max_steps; the data may have fewer"
    return None, f"unknown: {reason}; give --tokens N"


def _stored_steps(job: Job) -> tuple[int | None, str]:
    from raymoe import stages
    from raymoe.data.instructions import Encoded
    from raymoe.store import Store
    from raymoe.train.order import Order

    try:
        run: Run = job.run()
        found = stages.instructions(run).find(Store(job.execution.storage))
    except InputError as error:  # a folder with config.json alone has no tokenizer, and so no data
        return None, str(error).splitlines()[0]
    if found is None:
        return None, "the instructions are not in the store yet"
    encoded = Encoded.load(found.path / "train")
    order = Order(encoded, run.data.max_length, run.optimization, run.seed)
    return order.total_steps, "the instructions in the store"


def peak(gpu: str, precision: str) -> float | None:
    """FLOP/s of one GPU, None if the tables have none for the precision."""
    tera = (PEAK_BFLOAT16 if precision == "bfloat16" else PEAK_FLOAT32).get(GPUS[gpu][0])
    return tera * 1e12 if tera else None


def example_price(gpu: str, gpus: int) -> float | None:
    """Dollars of one GPU for an hour, in the instance that has just `gpus` of them, else in the cheapest."""
    some = [(n, dollars / n) for kind, n, dollars in INSTANCES.values() if kind == gpu]
    return min((each for n, each in some if n == gpus), default=min((each for _, each in some), default=None))


def _cost(
    gpu: str, job: Job, options: Options, flops: float, num_tokens: int | None
) -> dict[str, float | None]:
    """Tokens per second, hours and price on `options.gpus` of `gpu`."""
    flops_per_second = peak(gpu, job.precision)
    rate = options.mfu * options.gpus * flops_per_second / flops if flops_per_second else None
    hours = num_tokens / rate / 3600 if rate and num_tokens else None
    price = options.price_per_gpu_hour or example_price(gpu, options.gpus)
    return {
        "tokens_per_second": rate,
        "hours": hours,
        "price": hours * options.gpus * price if hours is not None and price is not None else None,
    }


# ---- a sweep


def plan_sweep(jobs: Mapping[str, Job], options: Options) -> dict[str, Any]:
    """Every trial (name: run) on `options.gpu`, by default the one of cluster.yaml; hours and price of all together.

    Trials that `execution.storage` has already cost nothing. Shared stages (data, clusters) are not in it.

    Raises:
        InputError: as `plan`.
    """
    gpu = options.gpu or INSTANCES[CLUSTER_INSTANCE][0]
    rows = [_trial(name, job, replace(options, gpu=gpu)) for name, job in jobs.items()]
    hours, price = ([row[key] for row in rows] for key in ("hours", "price"))
    return {
        "gpu": gpu,
        "gpus": options.gpus,
        "mfu": options.mfu,
        "trials": rows,
        "hours": None if None in hours else sum(hours),
        "price": None if None in price else sum(price),
        "prices": "given" if options.price_per_gpu_hour else "examples",
    }


def _trial(name: str, job: Job, options: Options) -> dict[str, Any]:
    from raymoe import stages
    from raymoe.store import Store

    made = plan(job, options)
    on = made["on"][0]
    found = stages.training(job.run()).find(Store(job.execution.storage)) is not None
    cost = {key: 0.0 if found else on[key] for key in ("hours", "price")}
    return {"trial": name, "in_store": found, **made["parameters"], **cost, "recommended": on["recommended"]}


def show_sweep(made: Mapping[str, Any]) -> None:
    """Print the plan of a sweep for people."""
    from raymoe.report import print_rows

    title = f"on {made['gpus']} x {made['gpu']} each, at an assumed MFU of {made['mfu']:g}"
    print_rows(title, [_trial_row(row) for row in made["trials"]])
    if made["hours"] is None:
        print(
            "hours and price are unknown until the instructions are in the store; "
            "`raymoe plan --tokens N` takes a number"
        )
        return
    money = f", {made['price']:,.2f}" if made["price"] is not None else ""
    print(f"all trials: {made['hours']:,.2f} h{money} (prices: {made['prices']})")


def _trial_row(row: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: f"{row[name]:,.2f}" if row[name] is not None else "unknown" for name in ("hours", "price")}
    counts = {name: f"{row[name]:,}" for name in ("total", "active")}
    setting = "in the store" if row["in_store"] else _flags(row["recommended"])
    return {"trial": row["trial"], **counts, **known, "recommended": setting}


# ---- all of it


def plan(job: Job, options: Options) -> dict[str, Any]:
    """All that there is to say about `job`, as plain values; bytes, tokens, hours.

    Raises:
        InputError: no configuration of the model, an unknown GPU, or workers that can't share the batch.
    """
    _check(job, options)
    model = on_meta(model_config(job))
    counts = count(model, job.method)
    number, source = steps(job, options.tokens)
    num_tokens = number * job.optimization.batch_size * job.data.max_length if number else None
    flops = flops_per_token(model, job.method, job.data.max_length)
    names = [options.gpu] if options.gpu else list(GPUS)
    each = settings(model, job, options.gpus, _micro_batch(job, options.gpus), counts)
    return {
        "model": job.model.name,
        "method": job.method.name,
        "precision": job.precision,
        "parameters": {"total": counts.total, "active": counts.active, "trained": counts.trained},
        "gpus": options.gpus,
        "memory": [{**asdict(s), "total": s.total} for s in each],
        "steps": number,
        "steps_from": source,
        "tokens": num_tokens,
        "flops_per_token": flops,
        "mfu": options.mfu,
        "prices": "given" if options.price_per_gpu_hour else "examples",
        "on": [
            _on(name, model, job, options, counts, _cost(name, job, options, flops, num_tokens))
            for name in names
        ],
    }


def _on(
    gpu: str,
    model: PreTrainedModel,
    job: Job,
    options: Options,
    counts: Counts,
    cost: Mapping[str, float | None],
) -> dict[str, Any]:
    """One kind of GPU: cost, and the setting for it."""
    memory = GPUS[gpu][1] * 1e9
    best = recommended(model, job, options.gpus, memory, counts)
    return {
        "gpu": gpu,
        "memory": int(memory),
        **cost,
        "instances": [name for name, (kind, n, _) in INSTANCES.items() if kind == gpu and n == options.gpus],
        "recommended": {**asdict(best), "total": best.total} if best else None,
        "why": _why(best, gpu),
    }


def _why(best: Setting | None, gpu: str) -> str:
    if best is None:
        return f"no setting fits {USABLE:.0%} of a {gpu}: take more or larger GPUs, or a smaller max_length"
    words = [f"micro batch {best.micro_batch} needs {best.total / 1e9:.1f} GB of {GPUS[gpu][1]}"]
    if best.offload != "none":
        words.append(f"nothing fits without offloading {best.offload}")
    elif best.activation_checkpointing:
        words.append("nothing fits while all activations are kept")
    elif best.zero_stage == 3:
        words.append("the weights don't fit unless they are spread")
    return "; ".join(words)


def _micro_batch(job: Job, workers: int) -> int:
    from raymoe.train.order import micro_batches

    return micro_batches(job.optimization.batch_size, workers, job.execution.micro_batch)[0]


def _check(job: Job, options: Options) -> None:
    if options.gpu is not None and options.gpu not in GPUS:
        raise InputError(f"--gpu: unknown GPU {options.gpu!r}: choose from {', '.join(GPUS)}")
    if not (0 < options.mfu <= 1 and math.isfinite(options.mfu)):
        raise InputError(f"--mfu: expected a share in (0, 1] (got {options.mfu:g})")
    if job.optimization.batch_size % options.gpus and not isinstance(job.execution.workers, tuple):
        raise InputError(
            f"--gpus: {options.gpus} can't share optimization.batch_size {job.optimization.batch_size} evenly"
        )


def parsed(texts: Mapping[str, Any], job: Job) -> Options:
    """Options as they are typed; GPUs by default as many as `execution.workers` at most, else one.

    Raises:
        InputError: not a number, or one that can't be.
    """
    gpu = texts.get("gpu")
    return Options(
        gpu=gpu.lower() if gpu else None,
        gpus=_whole("gpus", texts) or job.execution.most_workers or 1,
        mfu=_positive("mfu", texts) or Options.mfu,
        tokens=_whole("tokens", texts),
        price_per_gpu_hour=_positive("price_per_gpu_hour", texts),
    )


def _positive(name: str, texts: Mapping[str, Any]) -> float | None:
    if name not in texts:
        return None
    try:
        value = float(texts[name])
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        option = f"--{name.replace('_', '-')}"
        raise InputError(f"{option}: expected a number above 0 (got {texts[name]!r})")
    return value


def _whole(name: str, texts: Mapping[str, Any]) -> int | None:
    value = _positive(name, texts)
    if value is not None and value != int(value):
        raise InputError(f"--{name}: expected a whole number (got {texts[name]!r})")
    return None if value is None else int(value)


def show(made: Mapping[str, Any]) -> None:
    """Print a plan for people."""
    from raymoe.report import print_rows

    parameters = made["parameters"]
    print(
        f"{made['model']}, {made['method']}, {made['precision']}: {parameters['total']:,} parameters, ",
        end="",
    )
    print(f"{parameters['active']:,} active, {parameters['trained']:,} trained")
    print(f"model FLOPs per token: {made['flops_per_token']:.4g}")
    print(f"steps: {made['steps'] or ''} ({made['steps_from']}), tokens: {made['tokens'] or 'unknown'}")
    print_rows(f"GB per GPU, estimated, {made['gpus']} GPUs", [_memory_row(s) for s in made["memory"]])
    print_rows(f"{made['gpus']} GPUs at an assumed MFU of {made['mfu']:g}", [_gpu_row(g) for g in made["on"]])
    if made["prices"] == "examples":
        print("prices: example dollars on AWS, on demand; --price-per-gpu-hour takes yours")
    for each in made["on"]:
        print(f"{each['gpu']}: {each['why']}")


def _memory_row(s: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ZeRO": s["zero_stage"],
        "offload": s["offload"],
        "checkpointing": "yes" if s["activation_checkpointing"] else "no",
        **{name: f"{s[name] / 1e9:.2f}" for name in ("state", "buffers", "activations", "update", "total")},
    }


def _gpu_row(g: Mapping[str, Any]) -> dict[str, Any]:
    cost = {
        name: f"{g[name]:,.{digits}f}" if g[name] is not None else "unknown"
        for name, digits in {"tokens_per_second": 0, "hours": 2}.items()
    }
    price = {"price": f"{g['price']:,.2f}" if g["price"] is not None else "unknown"}
    setting = _flags(g["recommended"])
    return {"GPU": g["gpu"], **cost, **price, "recommended": setting, "AWS": " ".join(g["instances"])}


def _flags(best: Mapping[str, Any] | None) -> str:
    """A setting as options of the command line."""
    if best is None:
        return "does not fit"
    words = [f"--zero-stage {best['zero_stage']} --micro-batch {best['micro_batch']}"]
    words += [f"--offload {best['offload']}"] if best["offload"] != "none" else []
    return " ".join(words + ["--activation-checkpointing"] * best["activation_checkpointing"])
