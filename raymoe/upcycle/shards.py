"""Safetensors shards, written as a stream; the bytes of dense tensors are copied without loading them."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from raymoe.schema import InputError

SHARD_BYTES = 5_000_000_000
"""Size of a shard of weights unless another is asked for; a larger tensor gets a shard of its own."""


@dataclass(frozen=True)
class Slot:
    """Room for one tensor."""

    dtype: str
    """Safetensors' name of the dtype."""
    shape: tuple[int, ...]
    zero: bool = False
    """Left as zeros: nothing is written to it."""
    parts: int = 1
    """Number of equal parts along the leading dimensions, written one by one: the experts of a stacked tensor."""

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one part: the tensor's own, or a matrix."""
        if self.parts == 1:
            return self.shape
        *leading, columns = self.shape
        return (math.prod(leading) // self.parts, columns)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch dtype."""
        return _DTYPES[self.dtype]

    @classmethod
    def of(cls, dtype: torch.dtype, *shape: int, parts: int = 1) -> Slot:
        """Return room for a tensor of torch's `dtype`."""
        return cls(_NAMES[dtype], shape, parts=parts)


def total_bytes(plan: Mapping[str, Slot]) -> int:
    """Return the size of all tensors of `plan` on disk."""
    return sum(slot.num_bytes for slot in plan.values())


@dataclass(frozen=True)
class Span(Slot):
    """A tensor's bytes in a safetensors file, from `start` on."""

    file: Path = Path()
    start: int = 0


def load_tensor(spans: Mapping[str, Span], name: str) -> Tensor:
    """Load a tensor that `dense_tensors` found."""
    with safe_open(spans[name].file, framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


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
    """Return where the bytes of every tensor in the folder `dense` are, in the order of its files.

    Raises:
        InputError: no safetensors, a damaged file, or a tensor that is not floating point.
    """
    spans: dict[str, Span] = {}
    for file in weight_files(dense):
        spans |= _spans(file)
    # Old Llama checkpoints carry this buffer, which transformers computes and ignores on loading.
    return {name: span for name, span in spans.items() if not name.endswith("rotary_emb.inv_freq")}


def weight_files(dense: Path) -> list[Path]:
    """Return the safetensors files of a model folder; without an index `model.safetensors`, which may not exist.

    Raises:
        InputError: an index that is damaged or names files outside of the folder.
    """
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
    span = Span(dtype, tuple(shape), file=file, start=data + start)
    if start < 0 or end - start != span.num_bytes:
        raise ValueError(f"offsets {data_offsets} do not fit {dtype} {shape}")
    return span


class ShardWriter:
    """Writes planned tensors, in any order, into the safetensors shards of a Hugging Face folder.

    Every shard's header and length are written first, so each tensor's place is known before it arrives and
    no tensor is held. Use it as a context; on a clean exit every tensor must have been written.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, Slot],
        max_shard_bytes: float = SHARD_BYTES,
        stem: str = "model",
    ) -> None:
        """Create the files, whose names start with `stem`."""
        self.plan = plan
        self.missing = {(name, i) for name, slot in plan.items() if not slot.zero for i in range(slot.parts)}
        """(name, part) pairs that are still to be written."""
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
            names = sorted({name for name, _ in self.missing})
            raise ValueError(f"{len(names)} tensors were never written, such as {names[0]}")

    def _open(self, file: Path, names: list[str]) -> None:
        """Create one shard: its header, and a hole of its length (holes read as zeros)."""
        header, position = _header({name: self.plan[name] for name in names})
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.files.append(descriptor)
        _write_bytes(descriptor, 0, memoryview(header))
        for name in names:
            self.places[name] = (descriptor, position)
            position += self.plan[name].num_bytes
        os.ftruncate(descriptor, position)

    def write(self, name: str, source: Tensor | Span, part: int = 0) -> None:
        """Write a tensor, or one part of it, in its place: converted from memory, or as bytes of another file.

        Raises:
            ValueError: the tensor is not in the plan, or of another shape.
        """
        slot = self.plan.get(name)
        if slot is None or tuple(source.shape) != slot.part_shape:
            planned = slot and slot.part_shape
            raise ValueError(f"{name} has shape {tuple(source.shape)}, the model on disk {planned}")
        descriptor, position = self.places[name]
        size = slot.num_bytes // slot.parts
        position += part * size
        if isinstance(source, Span):
            _copy(self._source(source.file), source.start, descriptor, position, size)
        else:
            _write_bytes(descriptor, position, _bytes(source, slot.torch_dtype))
        self.missing.discard((name, part))

    def _source(self, file: Path) -> int:
        if file not in self.sources:
            self.sources[file] = os.open(file, os.O_RDONLY)
        return self.sources[file]


def _shards(plan: Mapping[str, Slot], max_shard_bytes: float) -> list[list[str]]:
    """Return the names of the tensors of each shard, in the plan's order."""
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
    """Return a shard's first bytes, and the position at which its first tensor starts."""
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
    except AttributeError:  # not available on this system
        pass
    except OSError as error:
        if error.errno not in _NO_COPY_IN_KERNEL:
            raise
    data = memoryview(os.pread(source, min(length, 1 << 23), start))
    _write_bytes(target, position, data)
    return len(data)
