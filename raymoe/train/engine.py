"""DeepSpeed: the engine around a model, its optimizer and its checkpoints. The only module that imports deepspeed."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from raymoe.config import Execution, Optimization
from raymoe.models.moe import SparseMoE
from raymoe.storage.location import scratch

# DeepSpeed would compile collectives of its own for CPUs on first use: 80 s, and it needs g++.
__compatible_ops__["deepspeed_shm_comm"] = False

TAG = "state"
IN_PROCESS = 2**30
"""Checkpoint size in bytes above which conversion runs in separate processes, which take seconds to start."""


def deepspeed_config(
    precision: str, optimization: Optimization, execution: Execution, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run.

    With bf16 below stage 2 DeepSpeed uses other optimizers, which accumulate gradients in bf16, so that results
    would depend on the micro batch size. Such runs use stage 2, with gradients in float32.
    """
    bfloat16 = precision == "bfloat16"
    zero: dict[str, Any] = {"stage": max(execution.zero_stage, 2 if bfloat16 else 0)}
    if execution.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if execution.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimization.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: no compiler needed
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def start(
    model: nn.Module, config: Mapping[str, Any], optimization: Optimization
) -> deepspeed.DeepSpeedEngine:
    """Return the engine for `model`. Every worker calls this, inside an initialised process group."""
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [SparseMoE], raise_if_not_found=False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=optimization.learning_rate,
        betas=(optimization.beta1, optimization.beta2),
        eps=optimization.epsilon,
        weight_decay=optimization.weight_decay,
        fused=True,
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    _put_back(engine.module, buffers)
    return engine


def _put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore the buffers that DeepSpeed cast to bf16: rotary frequencies of 8 bits misplace every token."""
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, buffer.to(getattr(module, leaf).device))


def partition(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Partition the parameters of `module` over the workers at once (ZeRO-3), before the next module is made."""
    deepspeed.zero.Init(module=module, config_dict_or_path=dict(config))


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, value: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def step(engine: deepspeed.DeepSpeedEngine) -> Tensor | None:
    """Count a micro batch and, after the last one of a step, update the parameters.

    Returns:
        The global gradient norm before clipping after the last micro batch of a step, else None.
    """
    last = engine.is_gradient_accumulation_boundary()
    norm = None
    if last and not engine.zero_optimization():  # without ZeRO, DeepSpeed clips but keeps the norm to itself
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in engine.module.parameters() if p.grad is not None]
        )
    engine.step()
    if last and norm is None:
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=engine.device)
    return norm


def finite(module: nn.Module) -> bool:
    """True if all parameters of all workers are finite. Every worker calls this; all get the same answer."""
    own = [_own_share(p).detach() for p in module.parameters()]
    bad = torch.stack([(~torch.isfinite(p)).any() for p in own]).any().float()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(bad)
    return not bool(bad)


def _own_share(parameter: Any) -> Tensor:
    """Return this worker's share of a parameter; under ZeRO-3 without its padding, which is uninitialised memory."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter  # type: ignore[no-any-return]
    share: Tensor = parameter.ds_tensor.flatten()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return share[: max(0, parameter.ds_numel - rank * share.numel())]


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Write this worker's share of the checkpoint below `folder`. Every worker calls this.

    Frozen parameters are left out: they are in the dense model's folder.
    """
    client_state = {"raymoe": dict(state)}
    engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state, exclude_frozen_parameters=True)


def restore(engine: deepspeed.DeepSpeedEngine, folder: Path, workers: int) -> dict[str, Any]:
    """Load a checkpoint that `workers` workers saved and return its state. Every worker calls this.

    For another number of workers, one worker per node first converts it to DeepSpeed's universal format. Without
    ZeRO everything is in one file, which any number of workers can read.
    """
    if workers == engine.world_size or not engine.zero_optimization():
        return _load(engine, folder)
    with _universal(folder) as converted:
        engine._config.load_universal_checkpoint = True
        try:
            return _load(engine, converted)
        finally:
            engine._config.load_universal_checkpoint = False


def _load(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    path, client_state = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not frozen)
    if path is None:
        raise RuntimeError(f"{folder}: no DeepSpeed checkpoint {TAG!r} here")
    return dict(client_state["raymoe"])


@contextmanager
def _universal(folder: Path) -> Iterator[Path]:
    """Yield the checkpoint in DeepSpeed's universal format, in this node's scratch folder.

    Converting takes up to 24 bytes of disk per trained parameter. The first worker of a node converts for all of
    its workers; the copy is removed after the last of them has read it.
    """
    with ExitStack() as stack:
        mine = None
        if int(os.environ["LOCAL_RANK"]) == 0:
            mine = str(stack.enter_context(scratch()))
            _convert(folder / TAG, Path(mine) / TAG)
        yield Path(_of_this_node(mine))
        _of_this_node(mine)  # all have read it


def _of_this_node(mine: str | None) -> str:
    """Return the path that the first worker of this node passes in; a barrier over all workers."""
    node = f"{socket.gethostname()}/{os.environ.get('NODE_RANK', '')}"
    given = [(node, mine)]
    if torch.distributed.is_initialized():
        given *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(given, (node, mine))
    return next(path for where, path in given if where == node and path)


def _convert(source: Path, target: Path) -> None:
    """Run DeepSpeed's own converter: in this process for small checkpoints, else in several processes."""
    if sum(file.stat().st_size for file in source.iterdir()) < IN_PROCESS:
        arguments = Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
        return
    command = [sys.executable, "-m", ds_to_universal.__name__, "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{source}: can't be converted: {why}")


def gathered_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full value of every parameter of `module`; under ZeRO-3 each is gathered while it is used.

    All workers must iterate together.
    """
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()
        else:
            yield name, parameter.detach()
