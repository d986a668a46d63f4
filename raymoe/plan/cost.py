"""Time and money: model FLOPs over an assumed share (MFU) of the vendor's peak, at the user's or an example price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from raymoe.analysis.size import on_meta
from raymoe.methods import Experts, MethodConfig
from raymoe.models.moe import upcycle_model
from raymoe.train.flops import PEAK_BFLOAT16, PEAK_FLOAT32, training_flops_per_token

GPUS = {  # name: (key in the tables of peaks, GB of memory)
    "a10g": ("A10G", 24), "l4": ("L4", 24), "l40s": ("L40S", 48), "v100-16gb": ("V100", 16),
    "a100-40gb": ("A100", 40), "a100-80gb": ("A100", 80), "h100": ("H100", 80), "h200": ("H200", 141),
}  # fmt: skip
INSTANCES = {  # of AWS: (GPU, how many, dollars an hour)
    "g5.xlarge": ("a10g", 1, 1.01), "g5.12xlarge": ("a10g", 4, 5.67), "g5.48xlarge": ("a10g", 8, 16.29),
    "g6.xlarge": ("l4", 1, 0.80), "g6.12xlarge": ("l4", 4, 4.60), "g6.48xlarge": ("l4", 8, 13.35),
    "g6e.xlarge": ("l40s", 1, 1.86), "g6e.12xlarge": ("l40s", 4, 10.49), "g6e.48xlarge": ("l40s", 8, 30.13),
    "p4d.24xlarge": ("a100-40gb", 8, 21.96), "p4de.24xlarge": ("a100-80gb", 8, 27.45),
    "p5.48xlarge": ("h100", 8, 55.04), "p5en.48xlarge": ("h200", 8, 63.30),
}  # fmt: skip
"""Prices are examples: on demand, us-west-2, roughly those of late 2025 and not looked up. Spot is often 30% to 70%
of that."""
CLUSTER_INSTANCE = "g6e.12xlarge"
"""The workers of cluster.yaml."""


@dataclass(frozen=True)
class Cost:
    """What training takes on GPUs of one kind; None where it can't be told."""

    tokens_per_second: float | None
    """Over all GPUs; None without a peak for the precision."""
    hours: float | None
    """None, too, without a number of tokens."""
    price: float | None
    """Of all GPUs for `hours`."""


@dataclass(frozen=True)
class Rate:
    """GPUs of one kind, how well they are used and what one costs."""

    gpu: str
    gpus: int
    mfu: float
    price_per_gpu_hour: float | None
    """None for the example price, if there is one."""

    def cost(self, precision: str, flops_per_token: float, num_tokens: int | None) -> Cost:
        """Return the cost of `num_tokens` tokens of `flops_per_token` each."""
        flops_per_second = peak(self.gpu, precision)
        speed = self.mfu * self.gpus * flops_per_second / flops_per_token if flops_per_second else None
        hours = num_tokens / speed / 3600 if speed and num_tokens else None
        each = self.price_per_gpu_hour or example_price(self.gpu, self.gpus)
        price = hours * self.gpus * each if hours is not None and each is not None else None
        return Cost(speed, hours, price)


def peak(gpu: str, precision: str) -> float | None:
    """Return the FLOP/s of one GPU; None if the tables have none for the precision."""
    tera = (PEAK_BFLOAT16 if precision == "bfloat16" else PEAK_FLOAT32).get(GPUS[gpu][0])
    return tera * 1e12 if tera else None


def example_price(gpu: str, gpus: int) -> float | None:
    """Return the dollars an hour of one GPU, in the instance with exactly `gpus` of them, else in the cheapest."""
    some = [(n, dollars / n) for kind, n, dollars in INSTANCES.values() if kind == gpu]
    return min((each for n, each in some if n == gpus), default=min((each for _, each in some), default=None))


def instances(gpu: str, gpus: int) -> tuple[str, ...]:
    """Return the AWS instances that have exactly `gpus` of `gpu`."""
    return tuple(name for name, (kind, n, _) in INSTANCES.items() if kind == gpu and n == gpus)


def flops_per_token(model: PreTrainedModel, method: MethodConfig, length: int) -> float:
    """Count FLOPs as `system/mfu` does (raymoe.train.flops); for SIMoE, the dense model's. `model` is not changed."""
    if method.ffns_per_layer == 1:
        return training_flops_per_token(model, length, 1)
    config = model.config
    sparse = on_meta(config)
    experts = cast(Experts, method)
    rows = torch.empty(config.num_hidden_layers, experts.num_experts, config.hidden_size, device="meta")
    return training_flops_per_token(upcycle_model(sparse, rows, experts), length, experts.top_k)
