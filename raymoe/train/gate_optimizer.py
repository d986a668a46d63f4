"""The optimizer of SIMoE's gates: its steps keep the gradient's proportions within a layer.

Adam normalises every gate by its own second moment, so all gates move at the same pace however useful they are,
sink together and end barely open. Plain SGD keeps the proportions, but needs a new learning rate for every model
size. Here each layer has one second moment, as in Adam-mini (Zhang et al. 2024, arXiv 2406.16793).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.5
"""Low, because momentum would carry gates past the sparsity target."""
SQUARES_DECAY = 0.9
LARGEST_STEP = 5.0
"""In learning rates; keeps a gate with an outlying gradient from jumping across its range."""


class GateDescent(torch.optim.Optimizer):
    """Gradient descent on one [M, G] matrix whose columns are grouped into layers of `widths`."""

    def __init__(self, log_alpha: nn.Parameter, widths: Sequence[int], lr: float) -> None:
        super().__init__([log_alpha], {"lr": lr})
        self.widths = torch.tensor(widths, device=log_alpha.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """m <- .5 m + .5 g; v_l <- .9 v_l + .1 mean of g^2 over layer l; log_alpha <- log_alpha - lr m / sqrt(v_l).

        The first step initialises m to g and v to the mean of g^2.
        """
        (group,) = self.param_groups
        (log_alpha,) = group["params"]
        state: dict[str, Any] = self.state[log_alpha]
        gradient = log_alpha.grad
        squares = self._mean_squares(gradient)
        if not state:
            state["momentum"], state["squares"] = gradient.clone(), squares
        else:
            state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            state["squares"].lerp_(squares, 1 - SQUARES_DECAY)
        scale_G = (
            state["squares"]
            .sqrt()
            .clamp(min=1e-30)
            .repeat_interleave(self.widths, output_size=log_alpha.shape[1])
        )
        step = (state["momentum"] / scale_G).clamp(-LARGEST_STEP, LARGEST_STEP)
        log_alpha.sub_(group["lr"] * step)

    def _mean_squares(self, gradient_MG: Tensor) -> Tensor:
        """Return the mean squared gradient of each layer over all experts [layers]."""
        mean_G = gradient_MG.square().mean(0)
        return torch.segment_reduce(
            mean_G, "mean", lengths=self.widths, unsafe=True
        )  # the checks would wait for the GPU
