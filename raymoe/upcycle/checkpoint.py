"""The Hugging Face boundary: sparse models as stock transformers classes, written shard by shard.

`materialize` writes the upcycled start of a dense folder by copying its bytes, without loading a model, or
expert by expert where they are no plain copies.
`write_model` writes a trained model whose tensors arrive one by one. LAYOUTS says which standard class holds
which dense model and gating.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from raymoe.config import Dense, Experts, InputError
from raymoe.models.moe import FFN, ExpertStart

SHARD_BYTES = 5_000_000_000
"""Size of a shard of weights unless another is asked for; a larger tensor gets a shard of its own."""

COPIED_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "chat_template.*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What goes along with the weights, as glob patterns: tokenizer, generation defaults, the licence."""

SHARED_SETTINGS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id",
    "eos_token_id", "dtype",
)  # fmt: skip
"""Settings that mean the same in every dense and sparse class."""


# Which standard class holds what


@dataclass(frozen=True)
class Layout:
    """A standard sparse class: its name, how it calls its tensors on disk, and its own settings."""

    model_type: str
    architecture: str
    block: str
    """The sparse block's name inside a decoder layer."""
    projections: Mapping[str, str]
    """Names of an expert's gate_proj, up_proj and down_proj."""
    settings: Callable[[Any, Experts], dict[str, Any]]
    """From the dense config and the method; raises InputError for a dense model that the class can't hold."""

    def expert(self, layer: int | str, expert: int, projection: str) -> str:
        """Name of one expert's weight: `projection` is gate_proj, up_proj or down_proj."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.projections[projection]}.weight"

    def router(self, layer: int | str) -> str:
        """Name of a layer's router rows."""
        return f"model.layers.{layer}.{self.block}.gate.weight"


def _mixtral_settings(dense: Any, method: Experts) -> dict[str, Any]:
    _refuse_attention_bias(dense)
    return {
        "intermediate_size": dense.intermediate_size,
        "num_local_experts": method.num_experts,
        "head_dim": dense.head_dim,
        "sliding_window": getattr(dense, "sliding_window", None),
    }


def _qwen2_moe_settings(dense: Any, method: Experts) -> dict[str, Any]:
    _refuse_attention_bias(dense)
    derived_head_dim = dense.hidden_size // dense.num_attention_heads
    head_dim = getattr(dense, "head_dim", None) or derived_head_dim
    return {
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": dense.intermediate_size,
        "num_experts": method.num_experts,
        "norm_topk_prob": method.gating != "softmax",
        "shared_expert_intermediate_size": 0,
        "qkv_bias": True,  # servers assume it, so models without get zero biases
        **_windows(dense),
        **({"head_dim": head_dim} if head_dim != derived_head_dim else {}),
    }


def _qwen3_moe_settings(dense: Any, method: Experts) -> dict[str, Any]:
    windows = _windows(dense)
    if len(set(windows.pop("layer_types"))) > 1:
        raise InputError("model: Qwen3-MoE can't hold a sliding window in some layers only")
    return {
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": dense.intermediate_size,
        "num_experts": method.num_experts,
        "norm_topk_prob": method.gating != "softmax",
        "head_dim": dense.head_dim,
        "attention_bias": dense.attention_bias,
        "use_sliding_window": windows["use_sliding_window"],
        "sliding_window": windows["sliding_window"],
    }


def _refuse_attention_bias(dense: Any) -> None:
    if getattr(dense, "attention_bias", False):
        raise InputError("model: no standard sparse class holds its attention biases (attention_bias)")


def _windows(dense: Any) -> dict[str, Any]:
    """Which layers attend within a sliding window, in Qwen's terms; Mistral has one in all layers or none."""
    window = getattr(dense, "sliding_window", None)
    everywhere = "sliding_attention" if window else "full_attention"
    layer_types = getattr(dense, "layer_types", None) or [everywhere] * dense.num_hidden_layers
    used = "sliding_attention" in layer_types
    return {
        "use_sliding_window": used,
        "sliding_window": window if used else None,
        "layer_types": layer_types,
    }


_QWEN_PROJECTIONS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
MIXTRAL = Layout(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    _mixtral_settings,
)
QWEN2_MOE = Layout("qwen2_moe", "Qwen2MoeForCausalLM", "mlp", _QWEN_PROJECTIONS, _qwen2_moe_settings)
QWEN3_MOE = Layout("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", _QWEN_PROJECTIONS, _qwen3_moe_settings)

LAYOUTS: dict[tuple[str, str], Layout] = {
    # Mixtral renormalizes, which is also the function that a straight_through model computes.
    ("llama", "renormalized"): MIXTRAL,
    ("llama", "straight_through"): MIXTRAL,
    ("llama", "softmax"): QWEN2_MOE,
    ("mistral", "renormalized"): MIXTRAL,
    ("mistral", "straight_through"): MIXTRAL,
    ("mistral", "softmax"): QWEN2_MOE,
    ("qwen2", "renormalized"): QWEN2_MOE,
    ("qwen2", "straight_through"): QWEN2_MOE,
    ("qwen2", "softmax"): QWEN2_MOE,
    ("qwen3", "renormalized"): QWEN3_MOE,
    ("qwen3", "straight_through"): QWEN3_MOE,
    ("qwen3", "softmax"): QWEN3_MOE,
}
"""(dense model type, gating) -> the standard class that computes the same function."""


def sparse_config(dense: PreTrainedConfig, method: Experts) -> PreTrainedConfig:
    """The stock transformers config of the upcycled model.

    `router_aux_loss_coef` is load_balance_alpha / top_k, because transformers' loss is top_k when balanced
    and raymoe's is 1.

    Raises:
        InputError: no standard class computes what this dense model and gating do.
    """
    layout = _layout(dense, method)
    settings = {name: getattr(dense, name) for name in SHARED_SETTINGS} | layout.settings(dense, method)
    config = AutoConfig.for_model(
        layout.model_type,
        **settings,
        num_experts_per_tok=method.top_k,
        router_aux_loss_coef=method.load_balance_alpha / method.top_k,
    )
    config.architectures = [layout.architecture]
    return config


def _layout(dense: Any, method: Experts) -> Layout:
    if getattr(dense, "mlp_bias", False):
        raise InputError("model: its FFN has biases (mlp_bias), which no standard sparse class has")
    if getattr(dense, "quantization_config", None):
        raise InputError("model: quantized weights can't be upcycled; start from the unquantized model")
    try:
        return LAYOUTS[dense.model_type, method.gating]
    except KeyError:
        known = ", ".join(sorted({model_type for model_type, _ in LAYOUTS}))
        raise InputError(f"model: can't upcycle {dense.model_type!r}, only {known}") from None


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
    for file in (dense / "config.json", *([index] if index.is_file() else []), *_weight_files(dense)):
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


@dataclass(frozen=True)
class Slot:
    """Room for one tensor: its safetensors dtype, its shape, and whether it stays zero."""

    dtype: str
    shape: tuple[int, ...]
    zero: bool = False

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]

    @classmethod
    def of(cls, dtype: torch.dtype, *shape: int) -> Slot:
        """Room for a tensor of torch's `dtype`."""
        return cls(_NAMES[dtype], shape)


def total_bytes(plan: Mapping[str, Slot]) -> int:
    """Size of all tensors of `plan` on disk."""
    return sum(slot.num_bytes for slot in plan.values())


@dataclass(frozen=True)
class Span(Slot):
    """A tensor's bytes in a safetensors file, from `start` on."""

    file: Path = Path()
    start: int = 0


def _sparse_plan(
    config: Any, spans: Mapping[str, Span], method: Experts, router: Tensor | None = None
) -> dict[str, Slot]:
    """Every tensor of the upcycled model on disk, layer by layer."""
    layout = _layout(config, method)
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
    layout = _layout(config, method)
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


def load_tensor(spans: Mapping[str, Span], name: str) -> Tensor:
    """One of the tensors that `dense_tensors` found."""
    with safe_open(spans[name].file, framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


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
        yield from _experts(_layout(config, method), match[1], match[2], tensor)
    elif isinstance(method, Experts) and (match := _ROUTER_WEIGHT.fullmatch(name)):
        yield _layout(config, method).router(match[1]), tensor
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


# safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}
_WIDTHS = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dense_tensors(dense: Path) -> dict[str, Span]:
    """Where the bytes of every tensor in the folder `dense` are, in the order of its files.

    Raises:
        InputError: no safetensors, a damaged file, or a tensor that is not floating point.
    """
    spans: dict[str, Span] = {}
    for file in _weight_files(dense):
        spans |= _spans(file)
    # Old Llama checkpoints carry this buffer, which transformers computes and ignores on loading.
    return {name: span for name, span in spans.items() if not name.endswith("rotary_emb.inv_freq")}


def _weight_files(dense: Path) -> list[Path]:
    index = dense / "model.safetensors.index.json"
    if not index.is_file():
        return [dense / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights: {error}") from None
    if any(Path(name).name != name for name in names):  # never read outside of the folder
        raise InputError(f"{index}: names files outside of its folder")
    return [dense / name for name in names]


def _spans(file: Path) -> dict[str, Span]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > os.fstat(stream.fileno()).st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        spans = {name: _span(file, 8 + length, **entry) for name, entry in header.items()}
        if max((s.start + s.num_bytes for s in spans.values()), default=0) > file.stat().st_size:
            raise ValueError("it is shorter than its header says")
        return spans
    except OSError as error:
        raise InputError(f"{file}: {error.strerror} (only safetensors weights are read)") from None
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise InputError(f"{file}: not a safetensors file of float weights: {error}") from None


def _span(file: Path, data: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Span:
    start, end = data_offsets
    if not _DTYPES[dtype].is_floating_point:
        raise ValueError(f"it has a tensor of {dtype}")
    span = Span(dtype, tuple(shape), False, file, data + start)
    if start < 0 or end - start != span.num_bytes:
        raise ValueError(f"offsets {data_offsets} do not fit {dtype} {shape}")
    return span


class ShardWriter:
    """Writes planned tensors, in any order, into the safetensors shards of a Hugging Face folder.

    Every shard's header and length are written first, so each tensor's place is known before it arrives and
    no tensor is held. Used as a context; on a clean exit every tensor must have been written.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, Slot],
        max_shard_bytes: float = SHARD_BYTES,
        stem: str = "model",
    ) -> None:
        """`stem`: what the files' names start with."""
        self.plan = plan
        self.missing = {name for name, slot in plan.items() if not slot.zero}
        self.places: dict[str, tuple[int, int]] = {}
        """Name -> (file descriptor, position)."""
        self.files: list[int] = []
        self.sources: dict[Path, int] = {}
        shards = _shards(plan, max_shard_bytes)
        for number, names in enumerate(shards, 1):
            self._open(folder / _shard_name(stem, number, len(shards)), names)
        if len(shards) > 1:
            _write_index(folder, stem, plan, shards)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in (*self.files, *self.sources.values()):
            os.close(descriptor)
        if kind is None and self.missing:
            raise ValueError(f"{len(self.missing)} tensors were never written, such as {min(self.missing)}")

    def _open(self, file: Path, names: list[str]) -> None:
        """Make one shard: its header, and a hole of its length (holes read as zeros)."""
        header, position = _header({name: self.plan[name] for name in names})
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.files.append(descriptor)
        _write_bytes(descriptor, 0, memoryview(header))
        for name in names:
            self.places[name] = (descriptor, position)
            position += self.plan[name].num_bytes
        os.ftruncate(descriptor, position)

    def write(self, name: str, source: Tensor | Span) -> None:
        """Put a tensor in its place: converted from memory, or as bytes of another file.

        Raises:
            ValueError: the tensor is not in the plan, or of another shape.
        """
        slot = self.plan.get(name)
        if slot is None or tuple(source.shape) != slot.shape:
            planned = slot and slot.shape
            raise ValueError(f"{name} has shape {tuple(source.shape)}, the model on disk {planned}")
        descriptor, position = self.places[name]
        if isinstance(source, Span):
            _copy(self._source(source.file), source.start, descriptor, position, slot.num_bytes)
        else:
            _write_bytes(descriptor, position, _bytes(source, _DTYPES[slot.dtype]))
        self.missing.discard(name)

    def _source(self, file: Path) -> int:
        if file not in self.sources:
            self.sources[file] = os.open(file, os.O_RDONLY)
        return self.sources[file]


def _shards(plan: Mapping[str, Slot], max_shard_bytes: float) -> list[list[str]]:
    """Names of the tensors of each shard, in the plan's order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, slot in plan.items():
        if shards[-1] and size + slot.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += slot.num_bytes
    return shards


def _shard_name(stem: str, number: int, total: int) -> str:
    return f"{stem}.safetensors" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def _write_index(folder: Path, stem: str, plan: Mapping[str, Slot], shards: list[list[str]]) -> None:
    files = {name: _shard_name(stem, i, len(shards)) for i, names in enumerate(shards, 1) for name in names}
    index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": files}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _header(slots: Mapping[str, Slot]) -> tuple[bytes, int]:
    """A shard's first bytes, and the position at which its first tensor starts."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, slot in slots.items():
        end = position + slot.num_bytes
        entries[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return struct.pack("<Q", len(text)) + text, 8 + len(text)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    flat = tensor.detach().to("cpu", dtype).contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _write_bytes(target: int, position: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(target, data, position)
        data, position = data[written:], position + written


_NO_COPY_IN_KERNEL = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}


def _copy(source: int, start: int, target: int, position: int, length: int) -> None:
    """Copy bytes between files, within the kernel where it can."""
    while length:
        copied = _copy_some(source, start, target, position, length)
        if not copied:
            raise OSError(errno.EIO, "a file of the dense model ended early")
        start, position, length = start + copied, position + copied, length - copied


def _copy_some(source: int, start: int, target: int, position: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, length, start, position)
    except AttributeError:  # not on this system
        pass
    except OSError as error:
        if error.errno not in _NO_COPY_IN_KERNEL:
            raise
    data = memoryview(os.pread(source, min(length, 1 << 23), start))
    _write_bytes(target, position, data)
    return len(data)
