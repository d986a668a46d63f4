"""The plan of a run or of a sweep: parameters, memory per GPU, FLOPs, hours, price, and the settings to use.

    raymoe plan my-run.yaml --gpu h100 --gpus 8 --mfu 0.4

Arithmetic on the meta device: no weights are read or downloaded, only a model's config.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from raymoe.analysis.size import Counts, count, on_meta
from raymoe.config import RunFile
from raymoe.models.dense import check_supported, local_config
from raymoe.plan.cost import CLUSTER_INSTANCE, GPUS, INSTANCES, Cost, Rate, flops_per_token, instances
from raymoe.plan.memory import USABLE, Setting, recommended, settings
from raymoe.plan.options import PlanOptions
from raymoe.plan.plans import GpuPlan, Plan, SweepPlan, TrialPlan
from raymoe.schema import InputError

# ---- a run


def plan(run_file: RunFile, options: PlanOptions) -> Plan:
    """Plan one run, on `options.gpu` or on every known kind of GPU.

    Raises:
        InputError: no configuration of the model, an unknown GPU, or workers that can't share the batch.
    """
    options.check(run_file)
    method, length = run_file.method, run_file.data.max_length
    model = on_meta(model_config(run_file))
    counts, flops = count(model, method), flops_per_token(model, method, length)
    steps, steps_from = _steps(run_file, options.tokens)
    num_tokens = steps * run_file.optimization.batch_size * length if steps else None
    on = tuple(
        _gpu_plan(rate, model, run_file, counts, rate.cost(run_file.precision, flops, num_tokens))
        for rate in _rates(options)
    )
    return Plan(
        model=run_file.model.name,
        method=method.name,
        precision=run_file.precision,
        counts=counts,
        gpus=options.gpus,
        memory=tuple(settings(model, run_file, options.gpus, _micro_batch(run_file, options.gpus), counts)),
        steps=steps,
        steps_from=steps_from,
        tokens=num_tokens,
        flops_per_token=flops,
        mfu=options.mfu,
        prices=_prices(options),
        on=on,
    )


def _rates(options: PlanOptions) -> list[Rate]:
    names = [options.gpu] if options.gpu else list(GPUS)
    return [Rate(name, options.gpus, options.mfu, options.price_per_gpu_hour) for name in names]


def _prices(options: PlanOptions) -> str:
    return "given" if options.price_per_gpu_hour else "examples"


def _gpu_plan(rate: Rate, model: PreTrainedModel, run_file: RunFile, counts: Counts, cost: Cost) -> GpuPlan:
    memory = GPUS[rate.gpu][1] * 1e9
    best = recommended(model, run_file, rate.gpus, memory, counts)
    return GpuPlan(rate.gpu, int(memory), cost, instances(rate.gpu, rate.gpus), best, _reason(best, rate.gpu))


def _reason(best: Setting | None, gpu: str) -> str:
    """Say why `best` is recommended on a `gpu`."""
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


def _micro_batch(run_file: RunFile, workers: int) -> int:
    from raymoe.train.order import micro_batches

    return micro_batches(run_file.optimization.batch_size, workers, run_file.execution.micro_batch)[0]


# ---- its model and its steps


def model_config(run_file: RunFile) -> PretrainedConfig:
    """Return the dense model's configuration: of `local`, a folder (config.json is enough) or Hugging Face's cache.

    Raises:
        InputError: there is none, it can't be read, or raymoe doesn't upcycle such a model.
    """
    model = run_file.model
    if model.name == "local":
        return local_config(model.local)
    folder = _config_folder(model.name, model.revision)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model.name: the config.json in {folder} can't be read: {reason}") from None
    check_supported(config)
    return config


def _config_folder(name: str, revision: str | None) -> Path:
    """Return the folder, of the user or of Hugging Face's cache, that has the model's config.json."""
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


def _steps(run_file: RunFile, tokens: int | None) -> tuple[int | None, str]:
    """Return the optimizer steps of the run, and where that is known from or what is missing to know it."""
    per_step = run_file.optimization.batch_size * run_file.data.max_length
    if tokens is not None:
        return max(1, tokens // per_step), "--tokens"
    found, reason = _stored_steps(run_file)
    if found is not None:
        return found, reason
    if run_file.optimization.max_steps:
        return run_file.optimization.max_steps, "optimization.max_steps; the data may have fewer"
    return None, f"unknown: {reason}; give --tokens N"


def _stored_steps(run_file: RunFile) -> tuple[int | None, str]:
    """Return the steps that training takes over the encoded instructions, if the store has them, else why not."""
    from raymoe import stages
    from raymoe.data.instructions import Encoded
    from raymoe.storage.store import Store
    from raymoe.train.order import Order

    try:
        run = run_file.run()
        found = stages.instructions(run).find(Store(run_file.execution.storage))
    except InputError as error:  # a folder with config.json alone has no tokenizer, and so no data
        return None, str(error).splitlines()[0]
    if found is None:
        return None, "the instructions are not in the store yet"
    encoded = Encoded.load(found.fetch() / "train")
    order = Order(encoded, run.data.max_length, run.optimization, run.seed)
    return order.total_steps, "the instructions in the store"


# ---- a sweep


def plan_sweep(trials: Mapping[str, RunFile], options: PlanOptions) -> SweepPlan:
    """Plan every trial, by its name, on `options.gpu`, by default the GPU of cluster.yaml.

    Raises:
        InputError: as `plan`.
    """
    gpu = options.gpu or INSTANCES[CLUSTER_INSTANCE][0]
    each = [_trial_plan(name, run_file, replace(options, gpu=gpu)) for name, run_file in trials.items()]
    return SweepPlan(gpu, options.gpus, options.mfu, tuple(each), _prices(options))


def _trial_plan(name: str, run_file: RunFile, options: PlanOptions) -> TrialPlan:
    from raymoe import stages
    from raymoe.storage.store import Store

    made = plan(run_file, options)
    (on,) = made.on
    in_store = stages.training(run_file.run()).find(Store(run_file.execution.storage)) is not None
    hours, price = (0.0, 0.0) if in_store else (on.cost.hours, on.cost.price)
    return TrialPlan(name, in_store, made.counts, hours, price, on.recommended)
