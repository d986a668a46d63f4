"""Model families: everything raymoe knows about one kind of dense model, in one record each.

`FAMILIES` is read by upcycling, representations, SIMoE, the planner and export. To add a family, add a record here
and a tiny model of it to tests/support/models.py; docs/models.md says what to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from raymoe.methods import Experts
from raymoe.schema import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARED_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "dtype",
)  # fmt: skip
"""Config settings with the same meaning in every dense and sparse class that has them."""


# ---- sparse classes


class Place(NamedTuple):
    """One expert's projection on disk: a tensor, or one of a tensor's equal parts."""

    name: str
    part: int = 0


Shape = tuple[int, ...]


def _nothing(shapes: Mapping[str, Shape], num_experts: int) -> dict[str, Shape]:
    return {}


@dataclass(frozen=True)
class Layout:
    """A stock sparse class of transformers: name, tensors on disk, settings."""

    model_type: str
    architecture: str
    block: str
    """Name of the sparse block within a decoder layer."""
    projections: Mapping[str, str]
    """gate_proj, up_proj and down_proj -> tensor name within the block; `{}` stands for the expert's index. Without
    it one tensor holds all experts in order, each with those of its projections that share the name."""
    settings: Callable[[Any, Experts], dict[str, Any]]
    """Returns the settings beyond SHARED_SETTINGS, given the dense config and the method.

    Raises InputError for a dense model that the class can't hold."""
    router_name: str = "gate.weight"
    """Name of the router's rows [N, D] within the block."""
    router_in_fp32: bool = False
    """True if the class computes router logits, and keeps router weights, in fp32 whatever the model's dtype."""
    zeros: Callable[[Mapping[str, Shape], int], dict[str, Shape]] = _nothing
    """Returns the tensors of a layer that the class has, the dense model lacks and zero leaves without effect, given
    the shapes of the dense layer's tensors and N. Names are relative to the layer."""

    def expert(self, layer: int | str, expert: int, projection: str) -> Place:
        """Return the place of one expert's weight; `projection` is gate_proj, up_proj or down_proj."""
        template = self.projections[projection]
        name = f"model.layers.{layer}.{self.block}.{template.format(expert)}"
        if "{}" in template:
            return Place(name)
        sharing = self._sharing(projection)
        return Place(name, expert * len(sharing) + sharing.index(projection))

    def stacked(self, projection: str) -> int:
        """Return how many of an expert's projections share this one's tensor; 0 if tensors hold one expert each."""
        return 0 if "{}" in self.projections[projection] else len(self._sharing(projection))

    def router(self, layer: int | str) -> str:
        """Return the name of a layer's router rows."""
        return f"model.layers.{layer}.{self.block}.{self.router_name}"

    def _sharing(self, projection: str) -> list[str]:
        return [p for p, template in self.projections.items() if template == self.projections[projection]]


def _mixtral_settings(dense: Any, method: Experts) -> dict[str, Any]:
    return {
        "num_local_experts": method.num_experts,
        "head_dim": dense.head_dim,
        "sliding_window": getattr(dense, "sliding_window", None),
    }


def _qwen2_moe_settings(dense: Any, method: Experts) -> dict[str, Any]:
    return {
        "moe_intermediate_size": dense.intermediate_size,
        "num_experts": method.num_experts,
        "norm_topk_prob": method.gating != "softmax",
        "shared_expert_intermediate_size": 0,
        "qkv_bias": True,  # servers assume biases, so models without them get zeros
        **_windows(dense),
        **_head_dim(dense),
    }


def _qwen2_moe_zeros(shapes: Mapping[str, Shape], num_experts: int) -> dict[str, Shape]:
    """Return the gate of the shared expert, and biases of query, key and value.

    The weights of its shared expert of width 0 are left out: transformers needs no bytes for them (it lists
    them as missing), and servers that create no such module refuse them.
    """
    weights = {name: shapes[f"self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")}
    biases = {f"self_attn.{name}.bias": shape[:1] for name, shape in weights.items()}
    width = shapes["mlp.gate_proj.weight"][1]
    return {"mlp.shared_expert_gate.weight": (1, width), **biases}


def _qwen3_moe_settings(dense: Any, method: Experts) -> dict[str, Any]:
    windows = _windows(dense)
    if len(set(windows.pop("layer_types"))) > 1:
        raise InputError("model: Qwen3-MoE can't hold a sliding window in some layers only")
    return {
        "moe_intermediate_size": dense.intermediate_size,
        "num_experts": method.num_experts,
        "norm_topk_prob": method.gating != "softmax",
        "head_dim": dense.head_dim,
        "attention_bias": dense.attention_bias,
        "use_sliding_window": windows["use_sliding_window"],
        "sliding_window": windows["sliding_window"],
    }


def _flex_olmo_settings(dense: Any, method: Experts) -> dict[str, Any]:
    return {
        "num_experts": method.num_experts,
        "norm_topk_prob": method.gating != "softmax",
        "attention_bias": dense.attention_bias,
        **_head_dim(dense),
    }


def _granitemoe_settings(dense: Any, method: Experts) -> dict[str, Any]:
    multipliers = {name: getattr(dense, name) for name in GRANITE_MULTIPLIERS}
    return {
        "num_local_experts": method.num_experts,
        "attention_bias": dense.attention_bias,
        **multipliers,
        **_head_dim(dense),
    }


def _ernie4_5_moe_settings(dense: Any, method: Experts) -> dict[str, Any]:
    return {
        "moe_num_experts": method.num_experts,
        "moe_intermediate_size": dense.intermediate_size,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,  # the default leaves the first layer dense
        **_head_dim(dense),
    }


def _ernie4_5_moe_zeros(shapes: Mapping[str, Shape], num_experts: int) -> dict[str, Shape]:
    """Return the bias that balances Ernie's own experts: it is added when experts are chosen, not when weighted."""
    return {"mlp.moe_statics.e_score_correction_bias": (1, num_experts)}


def _head_dim(dense: Any) -> dict[str, int]:
    """Return `head_dim` if it is not D / heads, for classes whose config need not have the setting."""
    derived = dense.hidden_size // dense.num_attention_heads
    head_dim = getattr(dense, "head_dim", None) or derived
    return {"head_dim": head_dim} if head_dim != derived else {}


def _windows(dense: Any) -> dict[str, Any]:
    """Return the sliding-window settings in Qwen's terms; Mistral has a window in all layers or none."""
    window = getattr(dense, "sliding_window", None)
    everywhere = "sliding_attention" if window else "full_attention"
    layer_types = getattr(dense, "layer_types", None) or [everywhere] * dense.num_hidden_layers
    used = "sliding_attention" in layer_types
    return {
        "use_sliding_window": used,
        "sliding_window": window if used else None,
        "layer_types": layer_types,
    }


GRANITE_MULTIPLIERS = (
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling",
)  # fmt: skip

_SEPARATE = {p: f"experts.{{}}.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_STACKED = {
    "gate_proj": "input_linear.weight",
    "up_proj": "input_linear.weight",
    "down_proj": "output_linear.weight",
}

MIXTRAL = Layout(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe",
    {p: f"experts.{{}}.{name}.weight" for p, name in _MIXTRAL.items()},
    _mixtral_settings,
)
QWEN2_MOE = Layout(
    "qwen2_moe", "Qwen2MoeForCausalLM", "mlp", _SEPARATE, _qwen2_moe_settings, zeros=_qwen2_moe_zeros
)
QWEN3_MOE = Layout("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", _SEPARATE, _qwen3_moe_settings)
FLEX_OLMO = Layout("flex_olmo", "FlexOlmoForCausalLM", "mlp", _SEPARATE, _flex_olmo_settings)
GRANITE_MOE = Layout(
    "granitemoe",
    "GraniteMoeForCausalLM",
    "block_sparse_moe",
    _STACKED,
    _granitemoe_settings,
    router_name="router.layer.weight",
)
ERNIE4_5_MOE = Layout(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    "mlp",
    _SEPARATE,
    _ernie4_5_moe_settings,
    router_in_fp32=True,
    zeros=_ernie4_5_moe_zeros,
)


# ---- dense families


class Point(NamedTuple):
    """The input or output of a module of a decoder layer."""

    module: str
    side: Literal["input", "output"]


PRE_NORM = {
    "ffn_input": Point("mlp", "input"),
    "attention_output": Point("self_attn.o_proj", "output"),
    "attention_residual": Point("post_attention_layernorm", "input"),
}
"""Where representations are read if norms precede attention and FFN."""
POST_NORM = {**PRE_NORM, "attention_residual": Point("mlp", "input")}
"""Likewise if norms follow attention and FFN: the input of FFN and router is the residual stream itself."""

_FFN_BIAS = "its FFN has biases, which no standard sparse class has"
_ATTENTION_BIAS = "no standard sparse class holds its attention biases"


@dataclass(frozen=True)
class Family:
    """Everything raymoe knows about one `model_type` of dense models."""

    model_type: str
    about: str
    """How it differs from others and what that means for its experts, for docs/models.md."""
    sparse: Mapping[str, Layout | str]
    """Gating -> the stock class that computes the same function, or the reason there is none."""
    points: Mapping[str, Point] = field(default_factory=lambda: PRE_NORM)
    """Representation -> where it is read in a decoder layer."""
    query_key_norms: bool = False
    """True if queries and keys are normalised too, per head or over the whole width."""
    norms_scale_in_fp32: bool = False
    """True if norms round to the model's dtype after scaling by their weight, not before."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Setting of the config that must be false or absent -> the reason."""

    def refusal(self, config: Any) -> tuple[str, str] | None:
        """Return the first refused setting of `config` (or of a config.json's values) and the reason, or None."""
        values = config if isinstance(config, Mapping) else config.to_dict()
        return next(((name, reason) for name, reason in self.refused.items() if values.get(name)), None)


def _by_gating(renormalized: Layout, softmax: Layout | str) -> dict[str, Layout | str]:
    """Return the classes by gating; straight_through computes what renormalized does, with another gradient."""
    return {"straight_through": renormalized, "renormalized": renormalized, "softmax": softmax}


_RECORDS = (
    Family(
        "llama",
        "Norms before attention and FFN. Mixtral renormalizes; the plain probabilities of `softmax` need Qwen2-MoE, "
        "with zero biases and a shared expert of width 0.",
        _by_gating(MIXTRAL, QWEN2_MOE),
        refused={"attention_bias": _ATTENTION_BIAS, "mlp_bias": _FFN_BIAS},
    ),
    Family(
        "mistral",
        "Llama with an optional sliding window, which both sparse classes hold.",
        _by_gating(MIXTRAL, QWEN2_MOE),
        refused={"attention_bias": _ATTENTION_BIAS, "mlp_bias": _FFN_BIAS},
    ),
    Family(
        "qwen2",
        "Llama with biases of query, key and value, and sliding windows layer by layer.",
        _by_gating(QWEN2_MOE, QWEN2_MOE),
        refused={"attention_bias": _ATTENTION_BIAS, "mlp_bias": _FFN_BIAS},
    ),
    Family(
        "qwen3",
        "Norms of each head's query and key. Qwen3-MoE has one sliding window for all layers or none.",
        _by_gating(QWEN3_MOE, QWEN3_MOE),
        query_key_norms=True,
        refused={"mlp_bias": _FFN_BIAS},
    ),
    Family(
        "olmo2",
        "Norms after attention and FFN, and of query and key over their whole width. The router sees the residual "
        "stream, unnormalised. The norm after the experts divides out the scale of their sum: with `top_k` 1 the "
        "language-model loss sends the router no gradient under any gating, so take 2 or more.",
        _by_gating(FLEX_OLMO, FLEX_OLMO),
        POST_NORM,
        query_key_norms=True,
        norms_scale_in_fp32=True,
        refused={"mlp_bias": _FFN_BIAS},
    ),
    Family(
        "granite",
        "Llama with four multipliers (embedding, attention scores, residual branches, logits), which GraniteMoE has "
        "too. On disk one tensor holds all experts of a layer.",
        _by_gating(
            GRANITE_MOE,
            "GraniteMoE always renormalizes, and no other class has Granite's multipliers",
        ),
        refused={"mlp_bias": _FFN_BIAS},
    ),
    Family(
        "ernie4_5",
        "Llama with interleaved rotary positions. Ernie 4.5 MoE routes in fp32 and chooses with a correction bias, "
        "which is written as zero.",
        _by_gating(
            ERNIE4_5_MOE,
            "Ernie 4.5 MoE always renormalizes, and no other class has its interleaved rotary positions",
        ),
        refused={"use_bias": _FFN_BIAS, "mlp_bias": _FFN_BIAS},
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _RECORDS}
"""`model_type` of a dense model -> its record."""


def family_of(config: Any) -> Family:
    """Return the record of a dense model's `config`.

    Raises:
        InputError: an unknown family, or a setting that its record refuses.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise InputError(f"model: can't upcycle {model_type!r}, only {', '.join(sorted(FAMILIES))}")
    if refusal := family.refusal(config):
        setting, reason = refusal
        raise InputError(f"model: {reason} ({setting})")
    return family


def layout_of(dense: Any, method: Experts) -> Layout:
    """Return the layout of the stock class that holds the upcycled model; raise InputError if there is none."""
    if getattr(dense, "quantization_config", None):
        raise InputError("model: quantized weights can't be upcycled; start from the unquantized model")
    family = family_of(dense)
    layout = family.sparse[method.gating]
    if isinstance(layout, str):
        others = ", ".join(g for g, sparse in family.sparse.items() if isinstance(sparse, Layout))
        raise InputError(
            f"method.gating: {method.gating} is not possible with {family.model_type}: {layout}; choose from {others}"
        )
    return layout


def sparse_config(dense: PreTrainedConfig, method: Experts) -> PreTrainedConfig:
    """Return the stock transformers config of the upcycled model.

    `router_aux_loss_coef` is load_balance_alpha / top_k, because transformers' loss is top_k when balanced
    and raymoe's is 1.

    Raises:
        InputError: no stock class computes what this dense model and gating do.
    """
    from transformers import AutoConfig

    layout = layout_of(dense, method)
    shared = {name: deepcopy(getattr(dense, name)) for name in SHARED_SETTINGS if hasattr(dense, name)}
    config = AutoConfig.for_model(
        layout.model_type,
        **shared,
        **layout.settings(dense, method),
        num_experts_per_tok=method.top_k,
        router_aux_loss_coef=method.load_balance_alpha / method.top_k,
    )
    config.architectures = [layout.architecture]
    return config


def logits_divisor(config: Any) -> float:
    """Return the divisor of the LM head's output of a model, dense or sparse: 1 except for Granite."""
    return float(getattr(config, "logits_scaling", None) or 1)
