"""Drop-Upcycling (Nakamura et al., arXiv 2502.19261): every expert re-initialises another part of the dense FFN."""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.methods import DropUpcycling
from raymoe.models.moe import FFN


def expert(method: DropUpcycling, dense: FFN, generator: torch.Generator) -> FFN:
    """Return the dense FFN with floor(r F) of its F columns redrawn, from N(mean, std) of the entries they replace.

    `paper` (section 3.2): the same columns in all three matrices. `official`: as in the authors' conversion, the
    columns are permuted, alike in all three matrices, and each matrix then chooses its own columns.
    """
    width = len(dense.gate_proj)
    count = int(method.drop_ratio * width)

    def dropped_F() -> Tensor:
        return torch.randperm(width, generator=generator) < count

    paper = method.variant == "paper"
    order_F = torch.arange(width) if paper else torch.randperm(width, generator=generator)
    shared_F = dropped_F() if paper else None
    gate, up, down = (
        _redrawn(
            weight_FD[order_F.to(weight_FD.device)], dropped_F() if shared_F is None else shared_F, generator
        )
        for weight_FD in _by_column(dense)
    )
    return FFN(gate, up, down.T.contiguous())


def _by_column(ffn: FFN) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three matrices as [F, D]; a row holds the weights of one FFN column."""
    return ffn.gate_proj, ffn.up_proj, ffn.down_proj.T


def _redrawn(weight_FD: Tensor, dropped_F: Tensor, generator: torch.Generator) -> Tensor:
    """Return `weight_FD` with its dropped rows drawn from the normal distribution of their entries."""
    dropped_F = dropped_F.to(weight_FD.device)
    lost = weight_FD[dropped_F].float()
    drawn_FD = torch.randn(weight_FD.shape, generator=generator) * lost.std() + lost.mean()
    return torch.where(dropped_F[:, None], drawn_FD.to(weight_FD), weight_FD)
