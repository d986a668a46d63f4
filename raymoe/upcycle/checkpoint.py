"""The Hugging Face boundary: sparse models as stock transformers classes, written shard by shard.

`materialize` writes the upcycled start of a dense folder by copying its bytes, without loading a model, or
expert by expert where they are no plain copies.
`write_model` writes a trained model whose tensors arrive one by one. LAYOUTS says which standard class holds
which dense model and gating.
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

from raymoe.methods import Dense, Experts
from raymoe.models.families import QWEN2_MOE, Layout, layout_of, sparse_config
from raymoe.models.moe import FFN, ExpertStart
from raymoe.schema import InputError
from raymoe.upcycle.shards import (
    _NAMES,
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
"""What goes along with the weights, as glob patterns: tokenizer, generation defaults, the licence."""


# Writing folders


def materialize(
    dense: Path,
    router: Tensor,
    method: Experts,
    out: Path,
    max_shard_bytes: int = SHARD_BYTES,
    start: ExpertStart | None = None,
) -> None:
    """Write the upcycled start of the dense model in folder `dense` as a Hugging Face folder `out`.

    The dense tensors' bytes are copied from file to file, once per expert; nothing but `router` [L, N, D] is
    held in memory. `start` makes the experts instead of copying them, one in memory at a time. `out` appears
    whole or not at all.

    Raises:
        InputError: `out` is not empty, the disk is full, the folder is no dense model that can be upcycled,
            or the router does not fit it.
    """
    spans = dense_tensors(dense)
    config = read_config(dense)
    plan = _sparse_plan(config, spans, method, router)
    with new_folder(out, total_bytes(plan)) as folder:
        write_companions(folder, dense, sparse_config(config, method))
        with ShardWriter(folder, plan, max_shard_bytes) as writer:
            for name, source in _sparse_tensors(config, spans, method, router, start):
                writer.write(name, source)


def write_model(
    out: Path,
    dense: Path,
    method: Experts | Dense,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a trained model as the Hugging Face folder `out`, in `dtype`.

    `tensors` come in any order under the names that they have in memory (`named_parameters` of the model that
    `upcycle_model` or, for `Dense`, transformers made) and are let go one by one. Config, tokenizer and
    shapes come from the folder `dense` that training started from.

    Raises:
        InputError: `out` is not empty, or the disk is full.
        ValueError: a tensor is missing, unknown or of another shape.
    """
    spans, config = dense_tensors(dense), read_config(dense)
    plan = _trained_plan(config, spans, method, dtype)
    exported = sparse_config(config, method) if isinstance(method, Experts) else config
    exported.dtype = dtype
    with new_folder(out, total_bytes(plan)) as folder:
        write_companions(folder, dense, exported)
        with ShardWriter(folder, plan, max_shard_bytes) as writer:
            for name, tensor in tensors:
                for exported_name, part in _exported(name, tensor, config, method, plan):
                    writer.write(exported_name, part)


def copy_model(model: Path, out: Path) -> None:
    """Copy a finished model folder to `out`, whole or not at all.

    Raises:
        InputError: `out` is there already, or can't be written.
    """
    with new_folder(out, total_bytes(dense_tensors(model))) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)


def copy_dense(dense: Path, folder: Path) -> None:
    """Copy a dense model into the new `folder`: what loading needs, its licence, and nothing else of its folder."""
    folder.mkdir()
    index = dense / "model.safetensors.index.json"
    for file in (dense / "config.json", *([index] if index.is_file() else []), *weight_files(dense)):
        shutil.copyfile(file, folder / file.name)
    _copy_companions(folder, dense)


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A hidden sibling of `out` that becomes `out` at the end, and vanishes if anything goes wrong.

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
    """Config and everything else but the weights."""
    config.save_pretrained(folder)
    _copy_companions(folder, dense)


def _copy_companions(folder: Path, dense: Path) -> None:
    for pattern in COPIED_FILES:
        for file in dense.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def read_config(dense: Path) -> PreTrainedConfig:
    """The config of the model in folder `dense`; InputError if there is none."""
    if not (dense / "config.json").is_file():
        raise InputError(f"{dense}: no model here (config.json is missing)")
    try:
        return AutoConfig.from_pretrained(dense, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{dense}: not a model's config: {str(error).splitlines()[0]}") from None


# What is written under which name

_FFN_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
_EXPERTS_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


def _sparse_plan(
    config: Any, spans: Mapping[str, Span], method: Experts, router: Tensor | None = None
) -> dict[str, Slot]:
    """Every tensor of the upcycled model on disk, layer by layer."""
    layout = layout_of(config, method)
    _check_layers(config, spans, method, router)
    plan: dict[str, Slot] = {}
    for name, span in spans.items():
        slot = Slot(span.dtype, span.shape)
        match = _FFN_WEIGHT.fullmatch(name)
        if match is None:
            plan[name] = slot
        else:
            plan |= {layout.expert(match[1], expert, match[2]): slot for expert in range(method.num_experts)}
    for layer in range(config.num_hidden_layers):
        plan |= _added(layout, config, method, layer, spans)
    return plan


def _check_layers(config: Any, spans: Mapping[str, Span], method: Experts, router: Tensor | None) -> None:
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        if name not in spans:
            raise InputError(f"model: its weights lack {name}")
    expected = (config.num_hidden_layers, method.num_experts, config.hidden_size)
    if router is not None and tuple(router.shape) != expected:
        raise InputError(
            f"router: rows of shape {tuple(router.shape)} do not fit (layers, experts, width) {expected}"
        )


def _added(
    layout: Layout, config: Any, method: Experts, layer: int, spans: Mapping[str, Span]
) -> dict[str, Slot]:
    """What a layer has that its dense one has not: the router, and zeros that Qwen2-MoE insists on.

    The weights of its shared expert of width 0 are left out: transformers needs no bytes to fill them (it
    lists them as missing), and servers that make no such module refuse them.
    """
    prefix = f"model.layers.{layer}"
    dtype = spans[f"{prefix}.mlp.gate_proj.weight"].dtype
    added = {layout.router(layer): Slot(dtype, (method.num_experts, config.hidden_size))}
    if layout is QWEN2_MOE:
        added[f"{prefix}.mlp.shared_expert_gate.weight"] = Slot(dtype, (1, config.hidden_size), zero=True)
        for projection in ("q_proj", "k_proj", "v_proj"):
            weight = spans[f"{prefix}.self_attn.{projection}.weight"]
            if (bias := f"{prefix}.self_attn.{projection}.bias") not in spans:
                added[bias] = Slot(weight.dtype, weight.shape[:1], zero=True)
    return added


def _sparse_tensors(
    config: Any, spans: Mapping[str, Span], method: Experts, router: Tensor, start: ExpertStart | None
) -> Iterator[tuple[str, Span | Tensor]]:
    """The upcycled start under its names on disk: where its bytes are, or what is new."""
    layout = layout_of(config, method)
    for name, span in spans.items():
        match = _FFN_WEIGHT.fullmatch(name)
        if match is None:
            yield name, span
        elif start is None:
            for expert in range(method.num_experts):
                yield layout.expert(match[1], expert, match[2]), span
    for layer, rows_ND in enumerate(router):
        yield layout.router(layer), rows_ND
        if start is not None:
            dense = FFN(*(load_tensor(spans, f"model.layers.{layer}.mlp.{p}.weight") for p in FFN._fields))
            for expert in range(method.num_experts):
                for projection, weight in start(dense, layer, expert)._asdict().items():
                    yield layout.expert(layer, expert, projection), weight


def _trained_plan(
    config: Any, spans: Mapping[str, Span], method: Experts | Dense, dtype: torch.dtype
) -> dict[str, Slot]:
    """Every tensor of the trained model on disk, all of one dtype."""
    plan = _sparse_plan(config, spans, method) if isinstance(method, Experts) else spans
    return {name: Slot(_NAMES[dtype], slot.shape, slot.zero) for name, slot in plan.items()}


def _exported(
    name: str, tensor: Tensor, config: Any, method: Experts | Dense, plan: Mapping[str, Slot]
) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the model in memory as the tensors that it is on disk."""
    if isinstance(method, Experts) and (match := _EXPERTS_WEIGHT.fullmatch(name)):
        yield from _experts(layout_of(config, method), match[1], match[2], tensor)
    elif isinstance(method, Experts) and (match := _ROUTER_WEIGHT.fullmatch(name)):
        yield layout_of(config, method).router(match[1]), tensor
    elif name in plan or not (config.tie_word_embeddings and name == "lm_head.weight"):
        yield name, tensor
    if config.tie_word_embeddings and name == "model.embed_tokens.weight" and "lm_head.weight" in plan:
        yield "lm_head.weight", tensor  # one tensor in memory, two in the dense folder


def _experts(layout: Layout, layer: str, stacked: str, tensor_N: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stacked parameter [N, ...] as one tensor per expert and projection."""
    for expert, weight in enumerate(tensor_N):
        if stacked == "gate_up_proj":
            gate_FD, up_FD = weight.chunk(2)
            yield layout.expert(layer, expert, "gate_proj"), gate_FD
            yield layout.expert(layer, expert, "up_proj"), up_FD
        else:
            yield layout.expert(layer, expert, "down_proj"), weight
