"""One training worker: build the model, step through the data, evaluate at milestones, write the result.

The same loop trains the dense baseline, every sparse method and the embedded dense model. It knows nothing of
Ray: `launch` gives it a `Session`, tests give it a local one.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raymoe.config import Dense, Experts, Run, SparseInterpolation
from raymoe.data.instructions import Batch, Encoded, collate
from raymoe.evaluate import Evaluator, summed
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.models.simoe import interpolate
from raymoe.train import engine as deepspeed_engine
from raymoe.train.flops import active_parameters, num_parameters, peak_flops, training_flops_per_token
from raymoe.train.job import STOPPED_EARLY, TrainingFailed, TrainJob
from raymoe.train.masks import MaskTrainer
from raymoe.train.order import Order, learning_rate, micro_batches, milestone_steps
from raymoe.upcycle import expand, load_recipe
from raymoe.upcycle.checkpoint import write_model
from raymoe.upcycle.simoe import write_simoe

LAYOUT = "layout.json"


class Session(Protocol):
    """What surrounds a worker: its place among the others, where to report, what to go on from."""

    rank: int
    world_size: int
    device: torch.device

    def checkpoint(self) -> Path | None:
        """Folder of the checkpoint to go on from."""

    def resumed(self, step: int) -> None:
        """Training goes on after `step`, from the checkpoint."""

    def stop_requested(self) -> bool:
        """Whether the run is to end at this milestone."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; rank 0 only, never waits."""

    def report(self, metrics: Mapping[str, float], save: Any | None) -> None:
        """A barrier over the workers; `save(folder)` writes a checkpoint where it is not None."""


@dataclass
class State:
    """All that a checkpoint holds besides model and optimizer."""

    step: int = 0
    tokens: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)


def train(job: TrainJob, session: Session) -> list[dict[str, float]]:
    """Train to the end and write `job.out`; returns the evaluations at the milestones.

    Raises:
        TrainingFailed: the loss is not a number; names the step. The last checkpoint stays as it is.
    """
    trainer = Trainer(job, session)
    trainer.restore()
    while trainer.state.step < trainer.order.total_steps:
        trainer.milestone()
        trainer.step()
    trainer.milestone()
    trainer.finish()
    return trainer.state.evaluations


class Trainer:
    """Model, engine, data and state of one worker."""

    def __init__(self, job: TrainJob, session: Session) -> None:
        self.job, self.session, self.run = job, session, job.run
        torch.manual_seed(self.run.seed)  # for models with dropout
        self.encoded = Encoded.load(job.data / "train")
        self.order = Order(self.encoded, self.run.data.max_length, self.run.optimization, self.run.seed)
        self.milestones = set(milestone_steps(self.run.evaluation.milestones, self.order.total_steps))
        self.micro_batch, self.accumulation = micro_batches(
            self.run.optimization.batch_size, session.world_size, job.execution.micro_batch
        )
        self.state = State()
        self.pending: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        """Of every step whose metrics are still on the device: what the host knows, and those."""
        self._build()
        self.clock = time.perf_counter()

    def _build(self) -> None:
        run, execution = self.run, self.job.execution
        config = deepspeed_engine.deepspeed_config(
            run.precision, run.optimization, execution, self.micro_batch, self.accumulation
        )
        partition = config if config["zero_optimization"]["stage"] == 3 else None
        model = load_model(self.job, partition)
        if execution.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.flops_per_token = training_flops_per_token(model, self.run.data.max_length, _top_k(run))
        self.peak_flops = peak_flops(self.session.device, run.precision) * self.session.world_size
        self.masks = self._interpolated(model, partition)
        self.engine = deepspeed_engine.start(
            CausalLoss(model).to(self.session.device), config, run.optimization
        )
        self.evaluator = Evaluator(
            run.evaluation,
            Encoded.load(self.job.data / "validation"),
            AutoTokenizer.from_pretrained(self.job.dense),
            rank=self.session.rank,
            world_size=self.session.world_size,
            max_length=run.data.max_length,
            synced=partition is not None and self.session.world_size > 1,
            applied=self.masks.held_out if self.masks else None,
        )

    def _interpolated(
        self, model: PreTrainedModel, partition: Mapping[str, Any] | None
    ) -> MaskTrainer | None:
        """Make `model` SIMoE's if that is the method; returns what trains beside the engine."""
        method, job = self.run.method, self.job
        if not isinstance(method, SparseInterpolation):
            return None
        if job.prompts is None:
            raise ValueError("SIMoE's router needs the prompts' representations")
        return MaskTrainer(
            method,
            interpolate(model, (lambda m: deepspeed_engine.partition(m, partition)) if partition else None),
            job.prompts,
            seed=self.run.seed,
            total_steps=self.order.total_steps,
            device=self.session.device,
            world_size=self.session.world_size,
            learning_rate=self.run.optimization.learning_rate,
            precision=self.run.precision,
            chat_template=self.run.data.chat_template,
            form=None if job.execution.simoe_form == "auto" else job.execution.simoe_form,
        )

    def restore(self) -> None:
        """Go on from the session's checkpoint, if there is one."""
        if folder := self.session.checkpoint():
            self._check_layout(folder)
            self.state = State(**deepspeed_engine.restore(self.engine, folder))
            if self.masks:
                self.masks.load(folder)
            self.session.resumed(self.state.step)

    def _layout(self) -> dict[str, int]:
        """How the checkpoints of this run are spread over files."""
        return {"zero_stage": self.engine.zero_optimization_stage(), "workers": self.session.world_size}

    def _check_layout(self, folder: Path) -> None:
        """Raises TrainingFailed if the checkpoint was written at another ZeRO stage or number of workers."""
        written = json.loads((folder / LAYOUT).read_text())
        if written != self._layout():
            raise TrainingFailed(
                f"its checkpoint was written with {written}, this run has {self._layout()}: "
                "go on with the same execution.zero_stage and execution.workers"
            )

    def step(self) -> None:
        """One optimizer step over the global batch of `state.step`."""
        windows = self.order.windows(self.state.step)
        rate = learning_rate(self.state.step, self.order.total_steps, self.run.optimization)
        scheduled = rate / self.run.optimization.learning_rate
        if self.masks:
            rate = scheduled * self.masks.delta_rate
        deepspeed_engine.set_learning_rate(self.engine, rate)
        completion, real = _token_counts(self.encoded, windows)
        mine = windows[self.session.rank :: self.session.world_size]
        total: dict[str, Tensor] = {}
        if self.masks:
            self.masks.begin(self.state.step)
        for start in range(0, len(mine), self.micro_batch):
            batch = collate(
                self.encoded, mine[start : start + self.micro_batch], self.run.data.max_length
            ).to(self.session.device)
            _add(total, self._forward_backward(batch, completion, real))
        if self.masks:
            total |= self.masks.end(self.state.step, scheduled)
        self.state.step += 1
        self.state.tokens += real
        self._log(total, rate, real)
        if self._checkpoint_due():
            self.flush()
            self._check_parameters()
            self.session.report({"step": self.state.step}, self._save)
            self.clock = time.perf_counter()

    def _forward_backward(self, batch: Batch, completion: int, real: int) -> dict[str, Tensor]:
        """Gradients of one micro batch, as its share of the loss over the global batch.

        Loss = sum of completion nll / completion tokens of the global batch
             + alpha * load-balance loss, every sequence weighted by its share of the global batch's tokens.
        DeepSpeed averages gradients over workers, hence the factor world_size.
        """
        if self.masks:
            self.masks.set(batch)
        nll, balance, load, entropy = self.engine(batch)
        share = batch.num_tokens / real
        loss = nll.sum() / completion + _alpha(self.run) * balance * share
        self.engine.backward(loss * self.session.world_size, scale_wrt_gas=False)
        norm = deepspeed_engine.step(self.engine)
        metrics = {"train/loss": nll.detach().sum() / completion}
        if norm is not None:  # every worker has the whole norm, and metrics are summed over workers
            metrics["train/grad_norm"] = norm / self.session.world_size
        if load.numel():
            metrics |= {
                "train/load_balance_loss": balance.detach() * share,
                "routing/entropy": entropy.mean() * share,
                "routing/load": load.float(),
            }
        return metrics

    def _log(self, metrics: dict[str, Tensor], rate: float, tokens: int) -> None:
        known = {
            "step": float(self.state.step),
            "step_tokens": float(tokens),
            "train/learning_rate": rate,
            "train/tokens": float(self.state.tokens),
            "train/progress": self.state.step / self.order.total_steps,
            **({"masks/target": self.masks.target(self.state.step - 1)} if self.masks else {}),
        }
        self.pending.append((known, metrics))
        if len(self.pending) >= self.job.log_every:
            self.flush()

    def flush(self) -> None:
        """Reduce the pending metrics over the workers, read them (one synchronisation) and log them.

        Raises:
            TrainingFailed: a loss that is not a number.
        """
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        host = _reduced([metrics for _, metrics in pending])
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / len(pending), now
        for metrics, (known, _) in zip(host, pending, strict=True):
            step, rate = int(known.pop("step")), known.pop("step_tokens") / seconds
            named = {
                **_named(metrics),
                **known,
                "system/tokens_per_second": rate,
                "system/mfu": rate * self.flops_per_token / self.peak_flops,
                "system/peak_memory_bytes": peak_memory(self.session.device),
            }
            if self.masks:
                self.masks.read(step, named)
            if self.session.rank == 0:
                self.session.log(step, named)
            if not math.isfinite(named["train/loss"]):
                raise TrainingFailed(f"the loss is {named['train/loss']} at step {step}")

    def milestone(self) -> None:
        """Evaluate, report and checkpoint if a share of training named in the configuration is reached."""
        done = {int(e["step"]) for e in self.state.evaluations}
        if self.state.step not in self.milestones - done:
            return
        self.flush()
        self._check_stop()
        self._check_parameters()
        metrics = self.evaluator.measure(self.engine, self.engine.module.model) | self._sizes()
        row = {"step": float(self.state.step), "train/tokens": float(self.state.tokens), **metrics}
        self.state.evaluations.append(row)
        if self.session.rank == 0:
            self.session.log(self.state.step, metrics)
        self.session.report(row, self._save if self.state.step else None)
        self.clock = time.perf_counter()

    def _sizes(self) -> dict[str, float]:
        """Memory, and parameters that are stored and that one token meets (SIMoE: unmerged, no dead columns)."""
        model = self.engine.module.model
        memory = {"system/peak_memory_bytes": peak_memory(self.session.device)}
        if self.masks:
            return memory | self.masks.measure()
        embeddings = model.get_input_embeddings().weight
        tied = embeddings is model.get_output_embeddings().weight
        active = active_parameters(model, _top_k(self.run)) + (0 if tied else num_parameters(embeddings))
        total = sum(num_parameters(p) for p in model.parameters())
        return memory | {"model/parameters": float(total), "model/active_parameters": float(active)}

    def _check_stop(self) -> None:
        """Raises TrainingFailed, on all workers alike, if the run is to end early."""
        if summed(torch.tensor(float(self.session.stop_requested()), device=self.session.device)):
            raise TrainingFailed(STOPPED_EARLY)

    def _check_parameters(self) -> None:
        """Raises TrainingFailed if the last update left parameters that are no numbers: nothing of it is kept."""
        if not (deepspeed_engine.finite(self.engine.module) and (not self.masks or self.masks.finite())):
            raise TrainingFailed(f"parameters are not finite after step {self.state.step}")

    def _checkpoint_due(self) -> bool:
        every = self.job.execution.checkpoint_every
        return bool(every) and self.state.step % every == 0 and self.state.step not in self.milestones  # type: ignore[operator]

    def _save(self, folder: Path) -> None:
        deepspeed_engine.save(self.engine, folder, vars(self.state))
        if self.session.rank == 0:
            if self.masks:
                self.masks.save(folder)
            (folder / LAYOUT).write_text(json.dumps(self._layout()))

    def finish(self) -> None:
        """Write the trained model as one Hugging Face folder, and the evaluations."""
        self.flush()
        tensors = deepspeed_engine.gathered_parameters(self.engine.module.model)
        if self.session.rank == 0:
            # what workers that were killed right after writing it left
            shutil.rmtree(self.job.out / "model", ignore_errors=True)
            dtype = torch.bfloat16 if self.run.precision == "bfloat16" else torch.float32
            self._write(self.job.out / "model", tensors, dtype)
            (self.job.out / "evaluations.json").write_text(json.dumps(self.state.evaluations, indent=1))
        else:
            for _ in tensors:
                pass

    def _write(self, out: Path, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        if self.masks:
            masks, description = self.masks.finished(self.encoded, self.evaluator.held_out)
            write_simoe(out, self.job.dense, masks, tensors, dtype)
            (self.job.out / "masks.json").write_text(json.dumps(description, indent=1))
        else:
            assert isinstance(self.run.method, Dense | Experts)
            write_model(out, self.job.dense, self.run.method, tensors, dtype)


def load_model(job: TrainJob, partition: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The dense model, expanded by the recipe if there is one, in the run's precision.

    `partition`: DeepSpeed's configuration under ZeRO-3: every layer's experts are spread over the workers as
    soon as they are made, so that no worker ever holds all of them.
    """
    dtype = torch.bfloat16 if job.run.precision == "bfloat16" else torch.float32
    if job.recipe is None:
        model = AutoModelForCausalLM.from_pretrained(
            job.dense, dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True
        )
    else:
        recipe, router = load_recipe(job.recipe)
        model = expand(
            job.dense,
            router,
            recipe.method,
            dtype,
            job.execution.experts_implementation,
            on_layer=(lambda m: deepspeed_engine.partition(m, partition)) if partition else None,
            seed=recipe.seed,
            attn_implementation=PACKED_ATTENTION,
        )
    model.config.use_cache = False
    return model


def peak_memory(device: torch.device) -> float:
    """Most bytes so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _alpha(run: Run) -> float:
    return run.method.load_balance_alpha if isinstance(run.method, Experts) else 0.0


def _top_k(run: Run) -> int:
    return run.method.top_k if isinstance(run.method, Experts) else 1


def _token_counts(encoded: Encoded, windows: Sequence[Any]) -> tuple[int, int]:
    """(completion tokens, all tokens) of the records in `windows`."""
    records = [int(r) for window in windows for r in window]
    lengths = encoded.lengths[records]
    return int((lengths - encoded.prompt_lengths[records]).sum()), int(lengths.sum())


def _add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def _reduced(steps: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Sum every metric of every step over the workers with one all-reduce, and copy it to the host once."""
    flat = summed(torch.cat([v.float().flatten() for metrics in steps for v in metrics.values()]))
    parts = iter(torch.split(flat.cpu(), [v.numel() for metrics in steps for v in metrics.values()]))
    return [{name: next(parts).view(value.shape) for name, value in metrics.items()} for metrics in steps]


def _named(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars under their names; tokens per expert [L, N] as shares, mean over layers."""
    named = {name: float(value) for name, value in metrics.items() if name != "routing/load"}
    if "routing/load" in metrics:
        load_LN = metrics["routing/load"] / metrics["routing/load"].sum(-1, keepdim=True)
        named |= {f"routing/load/{i}": float(share) for i, share in enumerate(load_LN.mean(0))}
        named["routing/max_load"] = float(load_LN.max(-1).values.mean())
    return named
