"""Model families: which stock transformers class holds which dense model as a Mixture-of-Experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from raymoe.methods import Experts
from raymoe.schema import InputError

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
    layout = layout_of(dense, method)
    settings = {name: getattr(dense, name) for name in SHARED_SETTINGS} | layout.settings(dense, method)
    config = AutoConfig.for_model(
        layout.model_type,
        **settings,
        num_experts_per_tok=method.top_k,
        router_aux_loss_coef=method.load_balance_alpha / method.top_k,
    )
    config.architectures = [layout.architecture]
    return config


def layout_of(dense: Any, method: Experts) -> Layout:
    """The layout of the standard class that holds the upcycled model; raises InputError if there is none."""
    if getattr(dense, "mlp_bias", False):
        raise InputError("model: its FFN has biases (mlp_bias), which no standard sparse class has")
    if getattr(dense, "quantization_config", None):
        raise InputError("model: quantized weights can't be upcycled; start from the unquantized model")
    try:
        return LAYOUTS[dense.model_type, method.gating]
    except KeyError:
        known = ", ".join(sorted({model_type for model_type, _ in LAYOUTS}))
        raise InputError(f"model: can't upcycle {dense.model_type!r}, only {known}") from None
