"""What a run will cost before it starts: parameters, memory per GPU, FLOPs, hours, and what to run it with.

    raymoe plan my-run.yaml --gpu h100 --gpus 8 --mfu 0.4

Arithmetic on the meta device: no weights are read or downloaded, only a model's config.json. `Activations` and
`Setting` say what the estimate of memory is made of; benchmarks/plan_memory.py compares it with what training
allocates. Time is model FLOPs over an assumed share (MFU) of the vendor's peak; prices are the user's or `PRICES`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from raymoe.analysis.size import Counts, count, on_meta
from raymoe.config import Run, RunFile
from raymoe.methods import Experts
from raymoe.models.dense import check_supported, local_config
from raymoe.models.moe import upcycle_model
from raymoe.plan.memory import USABLE, Setting, recommended, settings
from raymoe.schema import InputError
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


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of the planner beside the run."""

    gpu: str | None = None
    gpus: int = 1
    mfu: float = 0.4
    tokens: int | None = None
    price_per_gpu_hour: float | None = None


def model_config(job: RunFile) -> PretrainedConfig:
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


# ---- time


def flops_per_token(model: PreTrainedModel, method: object, length: int) -> float:
    """As `system/mfu` counts them (raymoe.train.flops); of SIMoE the dense model's. `model` is not changed."""
    if not isinstance(method, Experts):
        return training_flops_per_token(model, length, 1)
    c = model.config
    sparse = on_meta(c)
    rows = torch.empty(c.num_hidden_layers, method.num_experts, c.hidden_size, device="meta")
    return training_flops_per_token(upcycle_model(sparse, rows, method), length, method.top_k)


def steps(job: RunFile, tokens: int | None) -> tuple[int | None, str]:
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


def _stored_steps(job: RunFile) -> tuple[int | None, str]:
    from raymoe import stages
    from raymoe.data.instructions import Encoded
    from raymoe.storage.store import Store
    from raymoe.train.order import Order

    try:
        run: Run = job.run()
        found = stages.instructions(run).find(Store(job.execution.storage))
    except InputError as error:  # a folder with config.json alone has no tokenizer, and so no data
        return None, str(error).splitlines()[0]
    if found is None:
        return None, "the instructions are not in the store yet"
    encoded = Encoded.load(found.fetch() / "train")
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
    gpu: str, job: RunFile, options: PlanOptions, flops: float, num_tokens: int | None
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


def plan_sweep(jobs: Mapping[str, RunFile], options: PlanOptions) -> dict[str, Any]:
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


def _trial(name: str, job: RunFile, options: PlanOptions) -> dict[str, Any]:
    from raymoe import stages
    from raymoe.storage.store import Store

    made = plan(job, options)
    on = made["on"][0]
    found = stages.training(job.run()).find(Store(job.execution.storage)) is not None
    cost = {key: 0.0 if found else on[key] for key in ("hours", "price")}
    return {"trial": name, "in_store": found, **made["parameters"], **cost, "recommended": on["recommended"]}


# ---- all of it


def plan(job: RunFile, options: PlanOptions) -> dict[str, Any]:
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
    job: RunFile,
    options: PlanOptions,
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


def _micro_batch(job: RunFile, workers: int) -> int:
    from raymoe.train.order import micro_batches

    return micro_batches(job.optimization.batch_size, workers, job.execution.micro_batch)[0]


def _check(job: RunFile, options: PlanOptions) -> None:
    if options.gpu is not None and options.gpu not in GPUS:
        raise InputError(f"--gpu: unknown GPU {options.gpu!r}: choose from {', '.join(GPUS)}")
    if not (0 < options.mfu <= 1 and math.isfinite(options.mfu)):
        raise InputError(f"--mfu: expected a share in (0, 1] (got {options.mfu:g})")
    if job.optimization.batch_size % options.gpus and not isinstance(job.execution.workers, tuple):
        raise InputError(
            f"--gpus: {options.gpus} can't share optimization.batch_size {job.optimization.batch_size} evenly"
        )


def parsed(texts: Mapping[str, Any], job: RunFile) -> PlanOptions:
    """PlanOptions as they are typed; GPUs by default as many as `execution.workers` at most, else one.

    Raises:
        InputError: not a number, or one that can't be.
    """
    gpu = texts.get("gpu")
    return PlanOptions(
        gpu=gpu.lower() if gpu else None,
        gpus=_whole("gpus", texts) or job.execution.most_workers or 1,
        mfu=_positive("mfu", texts) or PlanOptions.mfu,
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
