from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymoe.methods import SparseUpcycling
from raymoe.models.moe import upcycle_model
from raymoe.train.flops import _measured, active_parameters, peak_flops, training_flops_per_token

# the shape of the pico models
V, D, F, L, HEADS, KV_HEADS = 264, 32, 48, 2, 4, 2
LENGTH = 64


def dense(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def sparse(folder: Path, num_experts: int = 4, top_k: int = 1) -> PreTrainedModel:
    rows = torch.randn(L, num_experts, D, generator=torch.Generator().manual_seed(0))
    method = SparseUpcycling(num_experts=num_experts, top_k=top_k)
    return upcycle_model(dense(folder), rows, method, "eager")


def formula(head_dim: int, experts: int = 1, router: int = 0, extra: int = 0) -> int:
    """Count the parameters of attention, `experts` FFNs, router rows, norms and LM head."""
    attention = 2 * D * HEADS * head_dim + 2 * D * KV_HEADS * head_dim
    layer = attention + experts * 3 * D * F + router * D + 2 * D + extra
    return L * layer + D + V * D


def test_active_parameters_of_dense_models(dense_models: dict[str, Path]) -> None:
    def active(family: str) -> int:
        return active_parameters(dense(dense_models[family]), 1)

    assert active("llama") == formula(8)
    assert active("mistral") == formula(8)
    assert active("qwen2") == formula(8, extra=HEADS * 8 + 2 * KV_HEADS * 8)  # biases of q, k and v
    assert active("qwen3") == formula(16, extra=2 * 16)  # norms of q and k; its tied embedding is the LM head


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (3, 3)])
def test_active_parameters_of_upcycled_models(pico: Path, num_experts: int, top_k: int) -> None:
    model = sparse(pico, num_experts, top_k)
    assert active_parameters(model, top_k) == formula(8, experts=top_k, router=num_experts)
    total = sum(p.numel() for p in model.parameters())
    assert total == formula(8, experts=num_experts, router=num_experts) + V * D


def counted(model: PreTrainedModel) -> int:
    """Return PyTorch's own count of the FLOPs of a forward pass over one sequence."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(LENGTH)[None], use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize(("num_experts", "top_k"), [(0, 1), (4, 1), (4, 2)])
def test_three_times_what_pytorch_counts_forward(pico: Path, num_experts: int, top_k: int) -> None:
    """Except for two differences: PyTorch ignores the causal mask, so it counts attention twice, and raymoe counts
    the norms' parameters as if they were multiplied."""
    model = sparse(pico, num_experts, top_k) if num_experts else dense(pico)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    causal = L * 4 * LENGTH * LENGTH * (HEADS * 8) / 2
    forward = counted(model) - causal + 2 * norms * LENGTH
    assert training_flops_per_token(model, LENGTH, top_k) * LENGTH == 3 * forward


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [  # dense TFLOP/s of the vendor's data sheets (half of what they print "with sparsity")
        ("NVIDIA H100 80GB HBM3", 989, 494),
        ("NVIDIA H200", 989, 494),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L40", 181, 90),
        ("NVIDIA L4", 121, 60),
    ],
)
def test_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, bfloat16: int, float32: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert peak_flops(device, "bfloat16") == bfloat16 * 1e12
    assert peak_flops(device, "float32") == float32 * 1e12


def test_an_unknown_device_is_measured_by_its_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 3, 3, 5, 5, 5.5, 5.5, 8, *range(10, 18)])
    monkeypatch.setattr("raymoe.train.flops.time.perf_counter", lambda: next(ticks))
    assert _measured("cpu", torch.float32, size=16) == 2 * 16**3 / 0.5
