"""The Hugging Face boundary: sparse models as stock transformers classes, written shard by shard.

`materialize` writes the untrained upcycled model of a dense folder by copying bytes, without loading a model, or
expert by expert if experts are not plain copies. `write_model` writes a trained model whose tensors arrive one
by one. `raymoe.models.families` says which class holds which dense model and gating.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from raymoe.methods import Experts
from raymoe.models.families import Layout, Place, layout_of, sparse_config
from raymoe.models.moe import FFN, ExpertStart
from raymoe.schema import InputError
from raymoe.upcycle.shards import (
    SHARD_BYTES,
    ShardWriter,
    Slot,
    Span,
    dense_tensors,
    load_tensor,
    total_bytes,
    weight_files,
)

COPIED_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "chat_template.*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Glob patterns of the files copied along with the weights: tokenizer, generation defaults, licence."""


# Writing folders


def materialize(
    dense: Path,
    router: Tensor,
    method: Experts,
    out: Path,
    max_shard_bytes: int = SHARD_BYTES,
    start: ExpertStart | None = None,
) -> None:
    """Write the untrained upcycled model of the dense folder `dense` as a Hugging Face folder `out`.

    The dense tensors' bytes are copied from file to file, once per expert; nothing but `router` [L, N, D] is
    held in memory. If `start` is given it makes the experts, one in memory at a time. `out` appears
    whole or not at all.

    Raises:
        InputError: `out` is not empty, the disk is full, the folder is not a dense model that can be upcycled,
            or the router does not fit it.
    """
    spans = dense_tensors(dense)
    config = read_config(dense)
    plan = _sparse_plan(config, spans, method, router)
    with new_folder(out, total_bytes(plan)) as folder:
        write_companions(folder, dense, sparse_config(config, method))
        with ShardWriter(folder, plan, max_shard_bytes) as writer:
            for place, source in _sparse_tensors(config, spans, method, router, start):
                writer.write(place.name, source, place.part)


def write_model(
    out: Path,
    dense: Path,
    method: Experts | None,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a trained model as the Hugging Face folder `out`, in `dtype`.

    `tensors` come in any order under their names in memory (`named_parameters` of the model that `upcycle_model`
    or, if `method` is None, transformers made) and are released one by one. Config, tokenizer and
    shapes come from the folder `dense` that training started from.

    Raises:
        InputError: `out` is not empty, or the disk is full.
        ValueError: a tensor is missing, unknown or of another shape.
    """
    spans, config = dense_tensors(dense), read_config(dense)
    plan = _trained_plan(config, spans, method, dtype)
    exported = sparse_config(config, method) if method else config
    exported.dtype = dtype
    with new_folder(out, total_bytes(plan)) as folder:
        write_companions(folder, dense, exported)
        with ShardWriter(folder, plan, max_shard_bytes) as writer:
            for name, tensor in tensors:
                for place, source in _exported(name, tensor, config, method, plan):
                    writer.write(place.name, source, place.part)


def copy_model(model: Path, out: Path) -> None:
    """Copy a finished model folder to `out`, whole or not at all.

    Raises:
        InputError: `out` is not empty, or can't be written.
    """
    with new_folder(out, total_bytes(dense_tensors(model))) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)


def copy_dense(dense: Path, folder: Path) -> None:
    """Copy a dense model into the new `folder`: the files that loading needs, its licence, and nothing else."""
    folder.mkdir()
    index = dense / "model.safetensors.index.json"
    for file in (dense / "config.json", *([index] if index.is_file() else []), *weight_files(dense)):
        shutil.copyfile(file, folder / file.name)
    _copy_companions(folder, dense)


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a hidden sibling of `out` that is renamed to `out` at the end, or removed if anything goes wrong.

    Raises:
        InputError: `out` is not empty, can't be written, or the disk has no room for `num_bytes`.
    """
    partial = out.parent / f".partial-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: exists already and is not an empty folder")
        partial.mkdir(parents=True)
        _check_room(out, num_bytes)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out}: can't write the model: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(
            f"{out}: the model needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left"
        )


def write_companions(folder: Path, dense: Path, config: PreTrainedConfig) -> None:
    """Write the config, and copy the other files of `dense` that go along with the weights."""
    config.save_pretrained(folder)
    _copy_companions(folder, dense)


def _copy_companions(folder: Path, dense: Path) -> None:
    for pattern in COPIED_FILES:
        for file in dense.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def read_config(dense: Path) -> PreTrainedConfig:
    """Return the config of the model in folder `dense`; raise InputError if there is none."""
    if not (dense / "config.json").is_file():
        raise InputError(f"{dense}: no model here (config.json is missing)")
    try:
        return AutoConfig.from_pretrained(dense, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{dense}: not a model's config: {str(error).splitlines()[0]}") from None


# Names and shapes on disk

_FFN_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
_EXPERTS_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


def _sparse_plan(
    config: Any, dense: Mapping[str, Slot], method: Experts, router: Tensor | None = None
) -> dict[str, Slot]:
    """Return every tensor of the upcycled model on disk, in the dtypes of `dense`."""
    layout = layout_of(config, method)
    _check_layers(config, dense, method, router)
    plan: dict[str, Slot] = {}
    for name, slot in dense.items():
        if match := _FFN_WEIGHT.fullmatch(name):
            plan |= _expert_slots(layout, method.num_experts, match[1], match[2], slot)
        else:
            plan[name] = Slot(slot.dtype, slot.shape)
    for layer in range(config.num_hidden_layers):
        plan |= _added(layout, config, method, layer, dense)
    return plan


def _check_layers(config: Any, dense: Mapping[str, Slot], method: Experts, router: Tensor | None) -> None:
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        if name not in dense:
            raise InputError(f"model: its weights lack {name}")
    expected = (config.num_hidden_layers, method.num_experts, config.hidden_size)
    if router is not None and tuple(router.shape) != expected:
        raise InputError(
            f"router: rows of shape {tuple(router.shape)} do not fit (layers, experts, width) {expected}"
        )


def _expert_slots(
    layout: Layout, num_experts: int, layer: str, projection: str, dense: Slot
) -> dict[str, Slot]:
    """Return one projection of all experts of a layer on disk: a tensor each, or one that stacks them."""
    names = [layout.expert(layer, expert, projection).name for expert in range(num_experts)]
    stacked = layout.stacked(projection)
    if not stacked:
        return dict.fromkeys(names, Slot(dense.dtype, dense.shape))
    rows, columns = dense.shape
    shape = (num_experts, stacked * rows, columns)
    return {names[0]: Slot(dense.dtype, shape, parts=num_experts * stacked)}


def _added(
    layout: Layout, config: Any, method: Experts, layer: int, dense: Mapping[str, Slot]
) -> dict[str, Slot]:
    """Return the tensors a sparse layer has and a dense one lacks: the router, and zeros its class requires."""
    prefix = f"model.layers.{layer}."
    shapes = {name.removeprefix(prefix): s.shape for name, s in dense.items() if name.startswith(prefix)}
    dtype = "F32" if layout.router_in_fp32 else dense[f"{prefix}mlp.gate_proj.weight"].dtype
    zeros = layout.zeros(shapes, method.num_experts)
    return {
        layout.router(layer): Slot(dtype, (method.num_experts, config.hidden_size)),
        **{prefix + n: Slot(dtype, shape, zero=True) for n, shape in zeros.items() if n not in shapes},
    }


def _sparse_tensors(
    config: Any, spans: Mapping[str, Span], method: Experts, router: Tensor, start: ExpertStart | None
) -> Iterator[tuple[Place, Span | Tensor]]:
    """Yield the tensors of the untrained upcycled model: new ones, or where in the dense files their bytes are."""
    layout = layout_of(config, method)
    for name, span in spans.items():
        match = _FFN_WEIGHT.fullmatch(name)
        if match is None:
            yield Place(name), span
        elif start is None:
            for expert in range(method.num_experts):
                yield layout.expert(match[1], expert, match[2]), span
    for layer, rows_ND in enumerate(router):
        names = [f"model.layers.{layer}.mlp.{projection}.weight" for projection in FFN._fields]
        # rounded as in memory, even if the class keeps it in fp32
        yield Place(layout.router(layer)), rows_ND.to(spans[names[0]].torch_dtype)
        if start is not None:
            dense = FFN(*(load_tensor(spans, name) for name in names))
            for expert in range(method.num_experts):
                for projection, weight in start(dense, layer, expert)._asdict().items():
                    yield layout.expert(layer, expert, projection), weight


def _trained_plan(
    config: Any, spans: Mapping[str, Span], method: Experts | None, dtype: torch.dtype
) -> dict[str, Slot]:
    """Return every tensor of the trained model on disk, in `dtype` but for what its class keeps in fp32."""
    dense = {name: Slot.of(dtype, *span.shape) for name, span in spans.items()}
    return _sparse_plan(config, dense, method) if method else dense


def _exported(
    name: str, tensor: Tensor, config: Any, method: Experts | None, plan: Mapping[str, Slot]
) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors on disk that one tensor in memory becomes."""
    if method and (match := _EXPERTS_WEIGHT.fullmatch(name)):
        yield from _experts(layout_of(config, method), match[1], match[2], tensor)
    elif method and (match := _ROUTER_WEIGHT.fullmatch(name)):
        yield Place(layout_of(config, method).router(match[1])), tensor
    elif name in plan or not (config.tie_word_embeddings and name == "lm_head.weight"):
        yield Place(name), tensor
    if config.tie_word_embeddings and name == "model.embed_tokens.weight" and "lm_head.weight" in plan:
        yield Place("lm_head.weight"), tensor  # one tensor in memory, two in the dense folder


def _experts(layout: Layout, layer: str, stacked: str, tensor_N: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Yield a stacked parameter [N, ...] as one tensor per expert and projection."""
    for expert, weight in enumerate(tensor_N):
        if stacked == "gate_up_proj":
            gate_FD, up_FD = weight.chunk(2)
            yield layout.expert(layer, expert, "gate_proj"), gate_FD
            yield layout.expert(layer, expert, "up_proj"), up_FD
        else:
            yield layout.expert(layer, expert, "down_proj"), weight
