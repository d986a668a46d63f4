"""Model-FLOPs utilisation: training FLOPs per token, and the peak FLOP/s of a device."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PEAK_BFLOAT16 = {  # dense TFLOP/s as stated by the vendor
    "H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121,
    "A10G": 70, "A10": 125, "RTX 4090": 165, "V100": 125,
}  # fmt: skip
PEAK_FLOAT32 = {
    "H200": 494,
    "H100": 494,
    "H800": 494,
    "A100": 156,
    "A800": 156,
    "L40S": 183,
    "L40": 90,
    "L4": 60,
}
"""TF32 tensor cores, which float32 matrix products use at torch's matmul precision `high`."""


def training_flops_per_token(model: PreTrainedModel, length: int, top_k: int) -> float:
    """Return the FLOPs of forward and backward for one token of a sequence of `length` tokens.

    6 per active parameter (`top_k` experts, no embedding look-up), and 12 L D T / 2 for causal
    attention (PaLM, appendix B). An upper bound for attention, because packed examples are shorter than `length`.
    """
    config = model.config
    attention: float = 6 * config.num_hidden_layers * length * _attention_width(config)
    return 6.0 * active_parameters(model, top_k) + attention


def active_parameters(model: PreTrainedModel, top_k: int) -> int:
    """Count the parameters that a token is multiplied with: attention, head, router and `top_k` experts."""
    embedding = model.get_input_embeddings()
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is embedding.weight
    )
    total = 0
    for name, parameter in model.named_parameters():
        size = num_parameters(parameter)
        if parameter is embedding.weight and not tied:
            continue
        total += size * top_k // _experts(model, name) if ".experts." in name else size
    return total


def stored_and_active(model: PreTrainedModel, top_k: int) -> tuple[int, int]:
    """Count the parameters of `model`, and those active per token, the embedding look-up included."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    active = active_parameters(model, top_k) + (0 if tied else num_parameters(embeddings))
    return sum(num_parameters(p) for p in model.parameters()), active


def _experts(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name.rsplit(".", 1)[0])
    return int(module.num_experts)  # type: ignore[arg-type]


def num_parameters(parameter: Tensor) -> int:
    """Return the size of a parameter; for a partitioned one (ZeRO-3) that of the whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _attention_width(config: object) -> int:
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    return int(heads * head_dim)


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the peak FLOP/s of `device`: the vendor's figure for a known GPU, else as measured."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        table = PEAK_BFLOAT16 if dtype is torch.bfloat16 else PEAK_FLOAT32
        name = torch.cuda.get_device_name(device)
        for known, tera in table.items():
            if known in name:
                return tera * 1e12
    return _measured(str(device), dtype)


@cache
def _measured(device: str, dtype: torch.dtype, size: int = 1024, rounds: int = 8) -> float:
    """Return the best FLOP/s of a [size, size] matrix product over several rounds."""
    x = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        x @ x
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
