"""The gates' optimizer against its formulas written out, and the properties it was made for."""

from __future__ import annotations

import torch

from raymoe.train.gate_optimizer import GateDescent

WIDTHS = [3, 5, 2]


def _descended(gradients: list[torch.Tensor], lr: float = 0.1) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.zeros(2, 10))
    optimizer = GateDescent(parameter, WIDTHS, lr)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def _gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 10, generator=generator) for _ in range(4)]


def test_steps_follow_the_formulas() -> None:
    x, m, v = torch.zeros(2, 10), None, None
    for g in _gradients():
        m = g if m is None else 0.5 * m + 0.5 * g
        now = [float(part.square().mean()) for part in g.split(WIDTHS, dim=1)]
        v = now if v is None else [0.9 * a + 0.1 * b for a, b in zip(v, now, strict=True)]
        columns = [a for a, width in zip(v, WIDTHS, strict=True) for _ in range(width)]
        x = x - 0.1 * (m / torch.tensor(columns).sqrt()).clamp(-5, 5)
    torch.testing.assert_close(_descended(_gradients()), x)


def test_a_layer_moves_the_same_whatever_the_scale_of_its_gradient() -> None:
    scaled = [g * torch.tensor([1e-9] * 3 + [1.0] * 5 + [1e6] * 2) for g in _gradients()]
    torch.testing.assert_close(_descended(scaled), _descended(_gradients()))


def test_within_a_layer_steps_keep_the_gradients_proportions() -> None:
    gradient = torch.zeros(2, 10)
    gradient[0, :2] = torch.tensor([1.0, -2.0])
    moved = _descended([gradient])
    torch.testing.assert_close(moved[0, 1], -2 * moved[0, 0])
    assert (moved[:, 2:] == 0).all()  # Adam would move them as far with a gradient of 1e-7


def test_an_outlier_moves_five_learning_rates_at_most() -> None:
    gradient = torch.full((2, 10), 1e-3)
    gradient[1, 4] = 1e9
    moved = _descended([gradient])
    assert moved.abs().max() <= 0.5 + 1e-6
