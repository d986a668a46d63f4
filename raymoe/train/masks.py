"""Training extension of SIMoE: gates, prompt router and sparsity constraint, beside the engine.

Gates and router are small, replicated on all workers and kept in fp32 whatever the model's precision, so they have
optimizers of their own instead of DeepSpeed's. A step samples the gates once; all micro batches share that sample,
and its gradient is summed over the workers once. The sample depends on (seed, step) alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raymoe.analysis.masks import describe, describe_gates, headline, mean_weights
from raymoe.analysis.size import sizes
from raymoe.data.packing import Batch
from raymoe.methods import SparseInterpolation
from raymoe.models.collectives import summed
from raymoe.models.gates import (
    Gates,
    PromptRouter,
    expected_sparsity,
    live_columns,
    mean_overlap,
    orthogonality,
    sparsity,
)
from raymoe.models.interpolated import Form
from raymoe.models.simoe import interpolate
from raymoe.storage.location import local
from raymoe.train.extension import Extension, Setting
from raymoe.train.gate_optimizer import GateDescent
from raymoe.train.spec import FIRST_STEPS
from raymoe.upcycle.simoe import Masks, write_simoe

STATE = "masks.safetensors"
ROUTER_TRAVEL = 8.0
"""Steps * width * the router's default learning rate: how far its logits move if all gradients agree."""
DELTA_RATE = 8.0
"""The delta's default learning rate, as a multiple of `optimization.learning_rate`."""
PROMPTS_PER_DOMAIN = 10_000
"""Largest number of training prompts over which a domain's expert weights are averaged."""
MASK_TRAVEL = 22.0
"""Steps * the gates' default learning rate: enough to cross their range well before the end."""


class MaskTrainer(Extension):
    """Trains the gates and the router of one run, with the constraint's multiplier."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        run, spec = setting.run, setting.spec
        method = run.method
        assert isinstance(method, SparseInterpolation)
        if spec.prompts is None:
            raise ValueError("SIMoE's router needs the prompts' representations")
        self.method, self.seed, self.total_steps = method, run.seed, setting.total_steps
        self.device, self.world_size = setting.device, setting.world_size
        self.form: Form | None = None if spec.execution.simoe_form == "auto" else spec.execution.simoe_form
        self.delta_rate = method.delta_learning_rate or DELTA_RATE * run.optimization.learning_rate
        self.interpolated = interpolated = interpolate(setting.model, setting.partition)
        total_steps, seed, device = self.total_steps, self.seed, self.device
        prompts = local(spec.prompts)
        self.prompts, self.held_out_prompts = (
            np.load(prompts / f"{split}.npy", mmap_mode="r", allow_pickle=False)
            for split in ("train", "validation")
        )
        self.gates = Gates(method, interpolated.layout, seed).to(device)
        self.router = PromptRouter(method, self.prompts.shape[1], seed).to(device)
        self.owned_G = interpolated.layout.owned(device)
        self.router_rate = method.router_learning_rate or ROUTER_TRAVEL / (
            total_steps * self.prompts.shape[1]
        )
        self.mask_rate = method.mask_learning_rate or MASK_TRAVEL / total_steps
        self.gate_optimizer = GateDescent(self.gates.log_alpha, interpolated.layout.widths, self.mask_rate)
        self.router_optimizer = torch.optim.Adam(self.router.parameters(), betas=(0.9, 0.95))
        rows = method.num_experts if method.sparsity_scope == "per_expert" else 1
        self.multiplier, self.unit = torch.zeros(rows, device=device), torch.zeros((), device=device)
        self.sample = self.gates.log_alpha.detach()
        self.live: list[Tensor | None] = []
        self.trained: tuple[Tensor, list[Tensor | None]] | None = None
        """Gates without noise and their live columns; set from an evaluation until the next step."""
        self.saturated_start = float(_saturated(self.gates.evaluated()))
        self.saturated_early = 0.0
        """Growth of the share of gates at 0 or 1 in the first steps, as far as metrics were read."""

    def learning_rate(self, rate: float, schedule: float) -> float:
        """Return the delta's learning rate."""
        return schedule * self.delta_rate

    def begin(self, step: int) -> None:
        """Draw the gates of `step`: the same on all workers and for all micro batches."""
        self.trained = None
        noise = self._noise(step)
        with torch.no_grad():
            self.sample = self.gates.sampled(noise)
        self.live = live_columns(self.sample, self.interpolated.layout)
        self.sample.requires_grad_()

    def _noise(self, step: int) -> Tensor:
        """Return uniform noise [M, G] in (0, 1), determined by (seed, step)."""
        number = int(np.random.default_rng([self.seed, step]).integers(2**62))
        generator = torch.Generator(self.device).manual_seed(number)
        noise = torch.rand(self.gates.log_alpha.shape, generator=generator, device=self.device)
        return noise.clamp_(1e-6, 1 - 1e-6)

    def apply(self, batch: Batch) -> None:
        """Set the coefficients of the batch's prompts in the model, until the next call."""
        c_SG = self.router(self._rows(self.prompts, batch.examples)) @ self.sample
        self.interpolated.set(c_SG, batch.documents, batch.input_ids.numel(), self.live, self.form)

    @contextmanager
    def held_out(self, examples: Sequence[int], batch: Batch | None) -> Iterator[None]:
        """Within the block, set the coefficients of held-out `examples`: packed in `batch`, else one per row."""
        with torch.no_grad():
            if self.trained is None:
                gates = self.gates.evaluated()
                self.trained = gates, live_columns(gates, self.interpolated.layout)
            c_SG = self.router(self._rows(self.held_out_prompts, examples)) @ self.trained[0]
        where = (batch.documents, batch.input_ids.numel()) if batch else ()
        options = {"live": self.trained[1], "form": self.form if batch else None}
        with self.interpolated.applied(c_SG, *where, **options):
            yield

    def _rows(self, prompts: NDArray[np.float32], examples: Sequence[int]) -> Tensor:
        rows = torch.from_numpy(prompts[list(examples)])
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows

    def target(self, step: int) -> float:
        """Return the sparsity target after `step` (0-based)."""
        warmup = self.method.sparsity_warmup * self.total_steps
        return self.method.sparsity_target * min(1.0, (step + 1) / max(1.0, warmup))

    def known(self, step: int) -> dict[str, float]:
        """Return the sparsity target."""
        return {"masks/target": self.target(step)}

    def end(self, step: int, schedule: float) -> dict[str, Tensor]:
        """Update gates, router and multiplier. Gates take the schedule's root, so that they settle after the weights.

        The micro batches of all workers have left their loss's gradient in the sample and the router. Added here,
        once: the orthogonality of the sampled masks, and the constraint as an augmented Lagrangian,
        unit * (multiplier + penalty * missing) * (target - expected sparsity). The missing sparsity is measured on
        the gates without noise: with noise a union of experts is never as sparse as it will be.

        Returns:
            Metrics, each divided by the number of workers, over which they are summed.
        """
        learnt_MG = self._learnt_gradient(step)
        expected_K = expected_sparsity(self.gates.log_alpha, self.owned_G, self.method.sparsity_scope)
        (sparser_MG,) = torch.autograd.grad(expected_K.sum(), self.gates.log_alpha)
        self._measure_unit(learnt_MG, sparser_MG)
        missing_K = self.target(step) - self._reached(self.gates.evaluated())
        price_K = self.unit * (self.multiplier + self.method.sparsity_penalty * missing_K)
        self.gates.log_alpha.grad = learnt_MG - price_K[:, None] * sparser_MG
        self.gate_optimizer.param_groups[0]["lr"] = self.mask_rate * schedule**0.5
        self.router_optimizer.param_groups[0]["lr"] = self.router_rate * schedule
        for optimizer in (self.gate_optimizer, self.router_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        self.gates.clamp_()
        return self._after(step)

    def _learnt_gradient(self, step: int) -> Tensor:
        """Return the gradient of log_alpha [M, G] from the workers' losses and the sampled masks' orthogonality."""
        gradient = self._summed_gradients()
        sample = self.gates.sampled(self._noise(step))
        common = self.method.orthogonality * orthogonality(sample)
        log_alpha = self.gates.log_alpha
        (learnt_MG,) = torch.autograd.grad([sample, common], log_alpha, [gradient, torch.ones_like(common)])
        return learnt_MG

    def _measure_unit(self, learnt_MG: Tensor, sparser_MG: Tensor) -> None:
        """Update the unit, in nats: a multiplier of 1 pulls as strongly, in mean square, as what the gates learn."""
        now = learnt_MG.square().mean().sqrt() / sparser_MG.square().mean().sqrt()
        self.unit = torch.where(self.unit == 0, now, torch.lerp(self.unit, now, 0.1))

    def _summed_gradients(self) -> Tensor:
        """Return the sample's gradient, summed over the workers like the router's, in one all-reduce."""
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(p)
            for p in [self.sample, *self.router.parameters()]
        ]
        flat = summed(torch.cat([g.flatten() for g in gradients])) / self.world_size
        parts = [
            part.view_as(g)
            for part, g in zip(torch.split(flat, [g.numel() for g in gradients]), gradients, strict=True)
        ]
        for parameter, part in zip(self.router.parameters(), parts[1:], strict=True):
            parameter.grad = part
        return parts[0]

    @torch.no_grad()
    def _reached(self, gates: Tensor) -> Tensor:
        """Return the sparsity of the trained model with these `gates`, [1] or [M]."""
        return sparsity(gates, self.owned_G, self.method.sparsity_scope)

    @torch.no_grad()
    def _after(self, step: int) -> dict[str, Tensor]:
        """Move the multiplier towards the target, from 0 again where the sparsity crosses it (dual restart)."""
        gates = self.gates.evaluated()
        reached_K = self._reached(gates)
        missing_K = self.target(step) - reached_K
        crossed_K = missing_K * self.multiplier < 0
        growth_K = self.method.sparsity_rate / self.total_steps * missing_K
        self.multiplier = torch.where(crossed_K, 0.0, self.multiplier) + growth_K
        metrics = {
            "masks/sparsity": reached_K.mean(),
            "masks/multiplier": self.multiplier.mean(),
            "masks/unit": self.unit,
            "masks/overlap": mean_overlap(gates),
            "masks/saturated": _saturated(gates),
        }
        if self.method.sparsity_scope == "per_expert":
            metrics |= {f"masks/multiplier/{m}": value for m, value in enumerate(self.multiplier)}
        return {name: value / self.world_size for name, value in metrics.items()}

    def measure(self) -> dict[str, float]:
        """Return a milestone's metrics of the masks, and the model's size without dead columns."""
        description = describe_gates(
            self.gates.evaluated(), self.interpolated.layout, self.method.sparsity_scope
        )
        size = float(self._sizes(description)["simoe"]["total"])
        return {
            **headline(description),
            "masks/saturated_early": self.saturated_early,
            "masks/learning_rate": self.mask_rate,
            "model/parameters": size,
            "model/active_parameters": size,
        }

    def _sizes(self, description: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        config = self.interpolated.model.config
        live = {name: description[name] for name in ("live_parameters", "live_gates")}
        return sizes(config, self.method, **live, precision=self.setting.run.precision)

    def read(self, step: int, metrics: Mapping[str, float]) -> None:
        """Track how far the gates saturate in the first steps, from the metrics of a finished `step`."""
        if step <= max(3, FIRST_STEPS * self.total_steps):
            growth = metrics["masks/saturated"] - self.saturated_start
            self.saturated_early = max(self.saturated_early, growth)

    def finite(self) -> bool:
        """True if gates and router are finite on all workers; all get the same answer."""
        own = [torch.isfinite(p).all() for p in [self.gates.log_alpha, *self.router.parameters()]]
        return not bool(summed((~torch.stack(own)).any().float()))

    # ---- checkpoints

    def _states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Yield (name, parameter, its optimizer state) for gates and router."""
        yield "log_alpha", self.gates.log_alpha, self.gate_optimizer.state[self.gates.log_alpha]
        for name, parameter in self.router.named_parameters():
            yield f"router.{name}", parameter, self.router_optimizer.state[parameter]

    def save(self, folder: Path) -> None:
        """Write gates, router, their optimizer states and the multiplier to `folder`."""
        tensors = {
            "multiplier": self.multiplier,
            "unit": self.unit,
            "saturated_early": torch.tensor(self.saturated_early, dtype=torch.float64),
        }
        for name, parameter, state in self._states():
            tensors[name] = parameter.detach()
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, exactly."""
        tensors = load_file(folder / STATE)
        self.multiplier, self.unit = (tensors[name].to(self.device) for name in ("multiplier", "unit"))
        self.saturated_early = float(tensors["saturated_early"])
        for name, parameter, state in self._states():
            parameter.data.copy_(tensors[name])
            kept = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{name}/")}
            # Adam counts its steps on the host
            state.update({key: t if key == "step" else t.to(self.device) for key, t in kept.items()})

    # ---- the end

    def write(self, out: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Write the SIMoE folder and the description of its masks."""
        masks, description = self.finished()
        write_simoe(out / "model", self.setting.spec.dense, masks, tensors, dtype)
        (out / "masks.json").write_text(json.dumps(description, indent=1))

    @torch.no_grad()
    def finished(self) -> tuple[Masks, dict[str, Any]]:
        """Return masks, router and domains' mean expert weights, as written with the model; and their description."""
        encoded, held_out = self.setting.train, self.setting.held_out
        gates = self.gates.evaluated().cpu()
        router = {name: p.detach().cpu() for name, p in self.router.state_dict().items()}
        some = _some(encoded.domains, PROMPTS_PER_DOMAIN)
        weights = self._weights(self.prompts[some]).double().numpy()
        means = mean_weights(weights, [encoded.domains[i] for i in some])
        domains = {domain: of_domain["weights"] for domain, of_domain in means.items()}
        description = describe(
            gates,
            self.interpolated.layout,
            self._weights(self.held_out_prompts),
            held_out.tasks,
            held_out.domains,
            self.method.sparsity_scope,
        )
        description["sizes"] = self._sizes(description)
        return Masks(self.method, gates, router, domains, self.setting.run.data.chat_template), description

    def _weights(self, prompts: NDArray[np.float32]) -> Tensor:
        """Return the expert weights a [n, M] of all prompts."""
        some = [
            self.router(torch.from_numpy(np.array(prompts[i : i + 4096])).to(self.device))
            for i in range(0, len(prompts), 4096)
        ]
        return torch.cat(some).cpu()


def _some(domains: Sequence[str], limit: int) -> NDArray[np.int64]:
    """Return the sorted indices of at most `limit` examples per domain, evenly spread over the domain."""
    labels = np.asarray(domains)
    members = [np.flatnonzero(labels == domain) for domain in np.unique(labels)]
    return np.sort(
        np.concatenate([m[np.linspace(0, len(m) - 1, min(limit, len(m))).astype(int)] for m in members])
    )


def _saturated(gates_MG: Tensor) -> Tensor:
    """Return the share of gates at 0 or 1."""
    return ((gates_MG == 0) | (gates_MG == 1)).float().mean()
