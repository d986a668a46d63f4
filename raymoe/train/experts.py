"""Training extension of sparse models: the load-balance loss and the routing metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from raymoe.methods import Experts
from raymoe.models.causal_loss import LOAD_BALANCE, LossOutput
from raymoe.storage.location import local
from raymoe.train.extension import Extension, Setting
from raymoe.upcycle.checkpoint import write_model

LOAD, ENTROPY = "routing/load", "routing/entropy"


class SparseExperts(Extension):
    """Adds the load-balance loss with the method's alpha; logs tokens per expert and router entropy at every step."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        method = setting.run.method
        assert isinstance(method, Experts)
        self.method = method
        self.penalty_weights = {LOAD_BALANCE: method.load_balance_alpha}

    def sums(self, output: LossOutput, share: float, counts: float) -> dict[str, Tensor]:
        """Return the router entropy, a mean over layers and tokens, and the tokens per expert [L, N]."""
        load, entropy = output.statistics["load"], output.statistics["entropy"]
        return {ENTROPY: entropy.mean() * share, LOAD: counts * load.float()}

    def named(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sums by name, tokens per expert as shares averaged over layers."""
        named = super().named({name: value for name, value in sums.items() if name != LOAD})
        load_LN = sums[LOAD] / sums[LOAD].sum(-1, keepdim=True)
        named |= {f"{LOAD}/{i}": float(share) for i, share in enumerate(load_LN.mean(0))}
        named["routing/max_load"] = float(load_LN.max(-1).values.mean())
        return named

    def write(self, out: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Write the model as the stock sparse class that computes the same function."""
        write_model(out / "model", local(self.setting.spec.dense), self.method, tensors, dtype)
