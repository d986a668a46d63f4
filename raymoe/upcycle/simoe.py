"""SIMoE models on disk: write what training adds to a dense model, load it back, merge plain models from it.

A SIMoE folder is `simoe.json` (method, layers, expert weights of the domains, and where the dense model is) and
`simoe.safetensors` (the prompt router and, for every layer, its live columns: those that are open in any expert).
It has no config.json of its own, so that nothing loads it as if it were its dense model.

    write_simoe(out, dense, masks, model.named_parameters(), torch.bfloat16)
    simoe = load_simoe(out, torch.bfloat16)
    simoe.interpolated.set(simoe.coefficients(prompts), documents, num_tokens)    # then simoe.model(...)
    texts = generate_simoe(simoe, tokenizer, prompts, max_new_tokens=96)
    merge(out, plain, simoe.config.domains["math"])         # for stock transformers and every server
    export_simoe(out, elsewhere)                            # with the dense model inside

Shapes: S prompts, M experts, G gates, I inputs, O outputs and J live columns of a layer, N tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raymoe.config import Data, validate
from raymoe.data.columns import Instruction
from raymoe.data.instructions import encode
from raymoe.methods import SparseInterpolation
from raymoe.models.gates import GateLayout, GateSpan, PromptRouter, gate_layout
from raymoe.models.interpolated import InterpolatedLayer, InterpolatedLinear, kept_share, merged_columns
from raymoe.models.simoe import Interpolated, interpolate
from raymoe.schema import InputError
from raymoe.storage.location import Location, local, location
from raymoe.upcycle.checkpoint import copy_dense, new_folder, read_config, write_companions
from raymoe.upcycle.shards import ShardWriter, Slot, Span, dense_tensors, load_tensor, total_bytes

FORMAT = 1
"""Version of the format, incremented when earlier versions of raymoe would misread a folder."""
INDEX, WEIGHTS = "simoe.json", "simoe.safetensors"
EXPORTED_DENSE = "dense"
"""Folder of the dense model within an exported SIMoE folder."""
DIGESTED_BYTES = 4096
"""Bytes of every dense tensor that are hashed, to tell one dense model from another."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- simoe.json


@dataclass(frozen=True)
class Masks:
    """Everything SIMoE learns besides the delta."""

    method: SparseInterpolation
    gates_MG: Tensor
    """Evaluation gates, with exact zeros."""
    router: Mapping[str, Tensor]
    """State dict of the `PromptRouter`."""
    domains: Mapping[str, Sequence[float]]
    """Domain -> mean expert weights [M] of its prompts."""
    chat_template: str = "tokenizer"
    """`data.chat_template` of the training, with which prompts are rendered."""


@dataclass(frozen=True)
class SIMoEConfig:
    """Contents of `simoe.json`."""

    method: SparseInterpolation
    dense_at: Location
    """Absolute location of the dense model."""
    dense_digest: str
    dtype: torch.dtype
    """Dtype of the delta, in which the model was trained."""
    layout: GateLayout
    live: tuple[int, ...]
    """Number of live columns of every layer of `layout`."""
    parameters: Mapping[str, int]
    """Parameter counts: `dense`, `delta` and `gates` (live columns only), `router`."""
    domains: Mapping[str, tuple[float, ...]]
    """Domain -> mean expert weights [M] of its prompts."""
    chat_template: str
    """`data.chat_template` of the training, with which prompts are rendered."""

    @property
    def dense(self) -> Path:
        """Return the dense model's folder."""
        return local(self.dense_at)

    def plan(self, router: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
        """Return every tensor of `simoe.safetensors`. `router`: the shapes of the router's parameters."""
        plan = {_router_name(name): Slot.of(torch.float32, *shape) for name, shape in router.items()}
        for span, live in zip(self.layout.spans, self.live, strict=True):
            plan[f"{span.name}.columns"] = Slot.of(torch.int32, live)
            plan[f"{span.name}.gates"] = Slot.of(torch.float32, self.method.num_experts, live)
            plan[f"{span.name}.delta"] = Slot.of(self.dtype, *_rows_shape(span, live))
        return plan


def is_simoe(folder: Path) -> bool:
    """True if `folder` holds a SIMoE model."""
    return (folder / INDEX).is_file()


def simoe_config(folder: Path) -> SIMoEConfig:
    """Read the config of the SIMoE model in `folder`.

    Raises:
        InputError: not a SIMoE folder, a damaged one, or one of another version.
    """
    file = folder / INDEX
    try:
        values = json.loads(file.read_text())
        version = values["format"]
        config = _parsed(values, folder) if version == FORMAT else None
    except OSError as error:
        raise InputError(f"{folder}: no SIMoE model here ({INDEX}: {error.strerror})") from None
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{file}: damaged ({reason})") from None
    if config is None:
        raise InputError(f"{file}: format {version!r}, but this version of raymoe reads only {FORMAT}")
    return config


def _parsed(values: Mapping[str, Any], folder: Path) -> SIMoEConfig:
    layers = [dict(layer) for layer in values["layers"]]
    live = tuple(int(layer.pop("live")) for layer in layers)
    method = validate(SparseInterpolation, values["method"])
    domains = {name: tuple(map(float, weights)) for name, weights in values["domains"].items()}
    if wrong := [name for name, weights in domains.items() if len(weights) != method.num_experts]:
        raise ValueError(f"{wrong[0]} has not one weight per expert")
    return SIMoEConfig(
        method=method,
        dense_at=_dense_location(folder, values["dense"]),
        dense_digest=values["dense_digest"],
        dtype=DTYPES[values["dtype"]],
        layout=GateLayout(tuple(GateSpan(**layer) for layer in layers)),
        live=live,
        parameters={name: int(number) for name, number in values["parameters"].items()},
        domains=domains,
        chat_template=values["chat_template"],
    )


def _dense_location(folder: Path, text: str) -> Location:
    return location(text) if "://" in text else folder.absolute() / text


def _as_json(config: SIMoEConfig) -> dict[str, Any]:
    spans = zip(config.layout.spans, config.live, strict=True)
    return {
        "format": FORMAT,
        "method": config.method.model_dump(mode="json"),
        "dense": str(config.dense_at),
        "dense_digest": config.dense_digest,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == config.dtype),
        "parameters": dict(config.parameters),
        "domains": {name: list(weights) for name, weights in config.domains.items()},
        "chat_template": config.chat_template,
        "layers": [{**asdict(span), "live": live} for span, live in spans],
    }


def _digest(spans: Mapping[str, Span]) -> str:
    """Return a hash that identifies a dense model: of name, dtype, shape and first bytes of every tensor."""
    digest = hashlib.sha256()
    for name, span in sorted(spans.items()):
        digest.update(f"{name}\0{span.dtype}\0{span.shape}\0".encode())
        with span.file.open("rb") as file:
            digest.update(os.pread(file.fileno(), min(span.num_bytes, DIGESTED_BYTES), span.start))
    return digest.hexdigest()


def _dense_tensors(folder: Path, config: SIMoEConfig) -> dict[str, Span]:
    """Return the tensors of the dense model that the SIMoE model in `folder` was made from.

    Raises:
        InputError: the dense model is gone, or it is another one.
    """
    if not config.dense.is_dir():
        raise InputError(
            f"{folder}: its dense model is no longer in {config.dense}: "
            f"put it back there, or write its new location into {INDEX}"
        )
    spans = dense_tensors(config.dense)
    for layer in config.layout.spans:
        found = getattr(spans.get(f"{layer.name}.weight"), "shape", None)
        if found != _dense_shape(layer):
            raise InputError(
                f"{folder}: made for a dense model whose {layer.name}.weight is {list(_dense_shape(layer))}; "
                f"in {config.dense} it is {found and list(found)}"
            )
    if _digest(spans) != config.dense_digest:
        raise InputError(f"{folder}: made for other weights, or another dtype, than those in {config.dense}")
    return spans


def _dense_shape(span: GateSpan) -> tuple[int, ...]:
    return (span.width,) if span.kind == "norm" else (span.owned, span.width)


def _rows_shape(span: GateSpan, rows: int) -> tuple[int, ...]:
    """Return the shape of the delta's parameters of `rows` columns: [J, O]; [J] for a norm."""
    return (rows,) if span.kind == "norm" else (rows, span.owned)


def _router_name(name: str) -> str:
    return f"router.{name}"


# ---- writing


def write_simoe(
    out: Path, dense: Location, masks: Masks, deltas: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write a trained SIMoE model as the folder `out`, its delta in `dtype`, the dense model by reference.

    `deltas` are the `named_parameters` of the interpolated model (or its wrapper), in any order, released one by
    one; those whose names don't end in `.delta` are skipped. `out` appears whole or not at all.

    Raises:
        InputError: `out` is not empty, or the disk is full.
        ValueError: masks that don't fit the dense model; a delta that is missing, unknown or of another shape.
    """
    layout, num_dense = _outline(local(dense))
    gates_MG = masks.gates_MG.detach().float().cpu()
    if gates_MG.shape != (masks.method.num_experts, layout.size):
        raise ValueError(f"gates {list(gates_MG.shape)} for [{masks.method.num_experts}, {layout.size}]")
    columns = _live(gates_MG, layout)
    config = _described(dense, masks, layout, [len(c) for c in columns.values()], num_dense, dtype)
    plan = config.plan({name: tuple(tensor.shape) for name, tensor in masks.router.items()})
    with new_folder(out, total_bytes(plan)) as folder:
        (folder / INDEX).write_text(json.dumps(_as_json(config), indent=1))
        with ShardWriter(folder, plan, math.inf, Path(WEIGHTS).stem) as writer:
            for name, tensor in _mask_tensors(masks, gates_MG, layout, columns):
                writer.write(name, tensor)
            for name, delta in deltas:
                if name.endswith(".delta"):
                    writer.write(name, _live_rows(name, delta, columns))


def _outline(dense: Path) -> tuple[GateLayout, int]:
    """Return the gate layout and parameter count of the dense model in a folder, without loading its weights."""
    config = read_config(dense)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return gate_layout(model), sum(p.numel() for p in model.parameters())


def _live(gates_MG: Tensor, layout: GateLayout) -> dict[str, Tensor]:
    """Return, by layer, the columns that are open in any expert, ascending."""
    alive = torch.split((gates_MG != 0).any(0), layout.widths)
    return {span.name: some.nonzero()[:, 0] for span, some in zip(layout.spans, alive, strict=True)}


def _described(
    dense: Location, masks: Masks, layout: GateLayout, live: Sequence[int], num_dense: int, dtype: torch.dtype
) -> SIMoEConfig:
    parameters = {
        "dense": num_dense,
        "delta": sum(math.prod(_rows_shape(s, n)) for s, n in zip(layout.spans, live, strict=True)),
        "gates": masks.method.num_experts * sum(live),
        "router": sum(tensor.numel() for tensor in masks.router.values()),
    }
    domains = {name: tuple(map(float, weights)) for name, weights in masks.domains.items()}
    where, digest = location(dense), _digest(dense_tensors(local(dense)))
    return SIMoEConfig(
        masks.method, where, digest, dtype, layout, tuple(live), parameters, domains, masks.chat_template
    )


def _mask_tensors(
    masks: Masks, gates_MG: Tensor, layout: GateLayout, columns: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor but the delta's."""
    for name, tensor in masks.router.items():
        yield _router_name(name), tensor
    for span, gates in zip(layout.spans, torch.split(gates_MG, layout.widths, 1), strict=True):
        yield f"{span.name}.columns", columns[span.name]
        yield f"{span.name}.gates", gates[:, columns[span.name]]


def _live_rows(name: str, delta: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    live_J = columns.get(name.removesuffix(".delta"))
    if live_J is None:
        raise ValueError(f"{name} is no delta of this model")
    return delta.detach().index_select(0, live_J.to(delta.device))


def export_simoe(folder: Path, out: Path) -> None:
    """Copy the SIMoE model in `folder` to `out` together with its dense model, so that `out` is self-contained.

    Raises:
        InputError: not a SIMoE folder; its dense model is gone or another; `out` is not empty; the disk is full.
    """
    config = simoe_config(folder)
    num_bytes = total_bytes(_dense_tensors(folder, config))
    with _opened(folder):
        num_bytes += (folder / WEIGHTS).stat().st_size
    with new_folder(out, num_bytes) as new:
        (new / INDEX).write_text(json.dumps({**_as_json(config), "dense": EXPORTED_DENSE}, indent=1))
        shutil.copyfile(folder / WEIGHTS, new / WEIGHTS)
        copy_dense(config.dense, new / EXPORTED_DENSE)


# ---- reading


@dataclass(frozen=True)
class LivePart:
    """The live columns of one layer."""

    columns_J: Tensor
    """Column indices, ascending, int64."""
    gates_MJ: Tensor
    delta: Tensor
    """[J, O]; [J] for a norm."""


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """Open `simoe.safetensors` in `folder`; raise InputError if it, or a tensor read in the block, is unreadable."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{folder}: {WEIGHTS} is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: damaged: {error}") from None


def _read(file: Any, name: str, *shape: int) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tuple(tensor.shape) != shape:
        raise SafetensorError(f"{name} is {list(tensor.shape)}, {INDEX} says {list(shape)}")
    return tensor


def _part(file: Any, span: GateSpan, live: int, num_experts: int) -> LivePart:
    columns_J = _read(file, f"{span.name}.columns", live).long()
    if (columns_J.diff(prepend=columns_J.new_tensor([-1])) < 1).any() or (columns_J >= span.width).any():
        raise SafetensorError(f"{span.name}.columns do not rise from 0 to {span.width - 1}")
    gates_MJ = _read(file, f"{span.name}.gates", num_experts, live)
    return LivePart(columns_J, gates_MJ, _read(file, f"{span.name}.delta", *_rows_shape(span, live)))


def _parts(file: Any, config: SIMoEConfig) -> Iterator[tuple[GateSpan, LivePart]]:
    for span, live in zip(config.layout.spans, config.live, strict=True):
        yield span, _part(file, span, live, config.method.num_experts)


@dataclass(frozen=True)
class SIMoE:
    """A trained SIMoE model in memory, which holds live columns only."""

    interpolated: Interpolated
    router: PromptRouter
    gates_MG: Tensor
    config: SIMoEConfig

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model: computes the dense function unless `interpolated` has coefficients set."""
        return self.interpolated.model

    @torch.no_grad()
    def expert_weights(self, prompts: Sequence[NDArray[np.int32]]) -> Tensor:
        """Return a [S, M] for tokenised prompts, rendered as in training; rows add up to 1."""
        from raymoe.routers.prompts import represent

        kind = self.config.method.prompt_representation
        with _dense_again(self.interpolated):
            prompts_SD = represent(self.model, prompts, kind)
        a_SM: Tensor = self.router(prompts_SD.to(self.gates_MG.device))
        return a_SM

    def coefficients(self, prompts: Sequence[NDArray[np.int32]]) -> Tensor:
        """Return c = a Z [S, G] for tokenised prompts."""
        return self.expert_weights(prompts) @ self.gates_MG


@contextmanager
def _dense_again(interpolated: Interpolated) -> Iterator[None]:
    """Make the model the dense one within the block, whatever is set or merged around it."""
    blend, merged = interpolated.blend, [layer.merged for layer in interpolated.layers]
    interpolated.clear()
    for layer in interpolated.layers:
        layer.merged = None
    try:
        yield
    finally:
        interpolated.blend = blend
        for layer, weight in zip(interpolated.layers, merged, strict=True):
            layer.merged = weight


def load_simoe(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> SIMoE:
    """Load the SIMoE model in `folder` in evaluation mode, its weights in `dtype`, gates and router in fp32.

    Raises:
        InputError: not a SIMoE folder, a damaged one, one of another version, or one whose dense model is gone
            or another.
    """
    config = simoe_config(folder)
    _dense_tensors(folder, config)
    model = _dense_model(config.dense, dtype, attn_implementation)
    interpolated = interpolate(model, _without_deltas)
    if interpolated.layout != config.layout:
        raise InputError(f"{folder}: its layers are not those of the dense model in {config.dense}")
    gates_MG = torch.zeros(config.method.num_experts, config.layout.size)
    with _opened(folder) as file:
        router = _router(file, config, model.config.hidden_size)
        for layer, (span, part) in zip(interpolated.layers, _parts(file, config), strict=True):
            gates_MG[:, span.start + part.columns_J] = part.gates_MJ
            _load_delta(layer, part, dtype)
    model.to(device).eval()
    return SIMoE(interpolated, router.to(device), gates_MG.to(device), config)


def _dense_model(dense: Path, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            dense, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{dense}: can't be loaded: {str(error).splitlines()[0]}") from None


def _without_deltas(module: nn.Module) -> None:
    """Free the initial zero deltas of the layers in `module`, so that they never exist for the whole model."""
    for layer in module.modules():
        if isinstance(layer, InterpolatedLayer):
            layer.delta = nn.Parameter(layer.delta.to("meta"), requires_grad=False)


def _load_delta(layer: InterpolatedLayer, part: LivePart, dtype: torch.dtype) -> None:
    if isinstance(layer, InterpolatedLinear):
        layer.compact(part.delta.to(dtype), part.columns_J)
    else:
        delta = torch.zeros_like(layer.weight).index_copy_(0, part.columns_J, part.delta.to(dtype))
        layer.delta = nn.Parameter(delta, requires_grad=False)


def _router(file: Any, config: SIMoEConfig, width: int) -> PromptRouter:
    router = PromptRouter(config.method, width)
    state = router.state_dict()
    router.load_state_dict({n: _read(file, _router_name(n), *t.shape) for n, t in state.items()})
    return router.requires_grad_(False).eval()


# ---- one plain model per prompt


def generate_simoe(
    simoe: SIMoE,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> list[str]:
    """Return greedy completions of tokenised prompts; equal prompts are routed, merged and decoded once."""
    distinct = {prompt.tobytes(): prompt for prompt in prompts}
    c_SG = simoe.coefficients(list(distinct.values()))
    texts = generate_merged(
        simoe.interpolated, c_SG, tokenizer, list(distinct.values()), max_new_tokens, stop=stop
    )
    by_prompt = dict(zip(distinct, texts, strict=True))
    return [by_prompt[prompt.tobytes()] for prompt in prompts]


def generate_merged(
    interpolated: Interpolated,
    coefficients_SG: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> list[str]:
    """Return greedy completions, with the weights merged once per distinct row of `coefficients_SG`.

    Decoding costs as much as with the dense model; prompts with the same row are decoded together. Works only if
    this worker has the full weights (not under ZeRO-3). `stop` as in `raymoe.models.generate.generate`.
    """
    from raymoe.models.generate import generate

    rows, group_S = torch.unique(coefficients_SG, dim=0, return_inverse=True)
    texts = [""] * len(prompts)
    for group, c_G in enumerate(rows):
        members = (group_S == group).nonzero()[:, 0].tolist()
        with interpolated.merged(c_G):
            some = [prompts[i] for i in members]
            completions = generate(interpolated.model, tokenizer, some, max_new_tokens, stop=stop)
        for i, text in zip(members, completions, strict=True):
            texts[i] = text
    return texts


def merge(folder: Path, out: Path, expert_weights_M: Sequence[float] | Tensor) -> float:
    """Write the plain dense model into which the SIMoE model in `folder` merges under one vector of expert weights.

    It has the dense model's architecture and dtypes: merged in fp32, rounded once. Tensors are merged one by one;
    those without gates are copied byte for byte. `out` appears whole or not at all.

    Returns:
        The share of the delta that survived that rounding: 1 if all of it did.

    Raises:
        InputError: as `load_simoe`; `out` is not empty; the disk is full.
        ValueError: not one weight per expert.
    """
    config = simoe_config(folder)
    weights_M = torch.as_tensor(expert_weights_M, dtype=torch.float32).cpu()
    if weights_M.shape != (config.method.num_experts,):
        raise ValueError(f"{list(weights_M.shape)} expert weights for {config.method.num_experts} experts")
    spans = _dense_tensors(folder, config)
    untouched = spans.keys() - {f"{span.name}.weight" for span in config.layout.spans}
    survived = wanted = 0.0
    with _opened(folder) as file, new_folder(out, total_bytes(spans)) as new:
        write_companions(new, config.dense, read_config(config.dense))
        with ShardWriter(new, spans) as writer:
            for name in untouched:
                writer.write(name, spans[name])
            for span, part in _parts(file, config):
                weight, c_J = load_tensor(spans, f"{span.name}.weight"), weights_M @ part.gates_MJ
                writer.write(f"{span.name}.weight", merged_columns(weight, part.delta, part.columns_J, c_J))
                live = weight.index_select(-1, part.columns_J)
                shares = kept_share(live, part.delta, c_J, weight.dtype)
                survived, wanted = survived + shares[0], wanted + shares[1]
    return survived / wanted if wanted else 1.0


def route(folder: Path, text: str) -> list[float]:
    """Return the expert weights [M] of the SIMoE model in `folder` for a user's message, rendered as in its training.

    Raises:
        InputError: as `load_simoe` and `prompt_tokens`.
    """
    config = simoe_config(folder)
    simoe = load_simoe(folder, config.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(config.dense, local_files_only=True)
    data = validate(Data, {"chat_template": config.chat_template})
    weights_1M = simoe.expert_weights([prompt_tokens(text, tokenizer, data)])
    return weights_1M[0].tolist()


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase, data: Data) -> NDArray[np.int32]:
    """Tokenise `text` as a user's message, rendered as the prompts of `data`.

    Raises:
        InputError: the tokenizer's chat template can't render it.
    """
    one = Instruction("", "", "", (("user", text),), "-", "prompt")
    settings = {"max_length": 10**9, "on_bad_row": "error"}
    return encode([one], tokenizer, data.model_copy(update=settings)).prompt(0)
