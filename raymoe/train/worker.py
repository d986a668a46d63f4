"""One training worker: build the model, step through the data, evaluate at milestones, write the result.

The same loop trains the dense baseline, every sparse method and the embedded dense model. It knows nothing of
Ray: `launch` gives it a `Session`, tests give it a local one.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raymoe.config import Run
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.evaluate.held_out import Evaluator
from raymoe.methods import Dense, Experts, SparseInterpolation
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.collectives import summed
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.models.simoe import interpolate
from raymoe.storage.location import delete, local, writing
from raymoe.storage.store import digest
from raymoe.train import engine as deepspeed_engine
from raymoe.train.flops import active_parameters, num_parameters, peak_flops, training_flops_per_token
from raymoe.train.masks import MaskTrainer
from raymoe.train.order import Order, learning_rate, micro_batches, milestone_steps
from raymoe.train.spec import STOPPED_EARLY, TrainingFailed, WorkerSpec
from raymoe.upcycle import expand, load_recipe
from raymoe.upcycle.checkpoint import write_model
from raymoe.upcycle.simoe import write_simoe

LAYOUT = "layout.json"
LOOK_EVERY = 5.0
"""Seconds between two looks whether a node is about to be taken away: clouds tell it 30 to 120 s before."""


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

    def leaving(self) -> bool:
        """A barrier over the workers: whether a node that one of them is on is about to be taken away."""


@dataclass
class State:
    """All that a checkpoint holds besides model and optimizer."""

    step: int = 0
    tokens: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)


def train(job: WorkerSpec, session: Session) -> list[dict[str, float]]:
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

    def __init__(self, job: WorkerSpec, session: Session) -> None:
        self.job, self.session, self.run = job, session, job.run
        torch.manual_seed(self.run.seed)  # for models with dropout
        self.encoded = Encoded.load(local(job.data) / "train")
        self.order = Order(self.encoded, self.run.data.max_length, self.run.optimization, self.run.seed)
        self.milestones = set(milestone_steps(self.run.evaluation.milestones, self.order.total_steps))
        self.micro_batch, self.accumulation = micro_batches(
            self.run.optimization.batch_size, session.world_size, job.execution.micro_batch
        )
        self.state = State()
        self.pending: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        """Of every step whose metrics are still on the device: what the host knows, and those."""
        self._build()
        self.clock = self.looked = self.saved = self.began = time.perf_counter()
        self.wait, self.seconds_per_step = 1, 1.0
        """Steps until the metrics are reduced next; seconds that a step took lately."""
        self.leaving = False
        """Whether a node of the workers is about to be taken away."""
        self.due: dict[str, bool] = {}
        """What all workers agreed on when metrics were last reduced: see `_due`."""

    def _build(self) -> None:
        run, execution = self.run, self.job.execution
        config = deepspeed_engine.deepspeed_config(
            run.precision, run.optimization, execution, self.micro_batch, self.accumulation
        )
        partition = config if config["zero_optimization"]["stage"] == 3 else None
        model = starting_model(self.job, partition)
        if execution.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.flops_per_token = training_flops_per_token(model, self.run.data.max_length, _top_k(run))
        self.peak_flops = peak_flops(self.session.device, run.precision) * self.session.world_size
        self.masks = self._interpolated(model, partition)
        self.engine = deepspeed_engine.start(
            CausalLoss(model).train().to(self.session.device), config, run.optimization
        )
        self.evaluator = Evaluator(
            run.evaluation,
            Encoded.load(local(self.job.data) / "validation"),
            AutoTokenizer.from_pretrained(local(self.job.dense)),
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
            local(job.prompts),
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
            workers = self._checked_layout(folder)["workers"]
            self.state = State(**deepspeed_engine.restore(self.engine, folder, workers))
            if self.masks:
                self.masks.load(folder)
            self.session.resumed(self.state.step)

    def _layout(self) -> dict[str, Any]:
        """How the checkpoints of this run are spread over files, and whose they are."""
        dense = (local(self.job.dense) / "config.json").read_text()
        return {
            "zero_stage": self.engine.zero_optimization_stage(),
            "workers": self.session.world_size,
            "run": digest([self.run.model_dump(mode="json"), dense]),
        }

    def _checked_layout(self, folder: Path) -> dict[str, Any]:
        """How the checkpoint is spread over files; raises TrainingFailed if this run can't go on from it."""
        written: dict[str, Any] = json.loads((folder / LAYOUT).read_text())
        ours = self._layout()
        if written["run"] != ours["run"]:
            raise TrainingFailed(f"the checkpoint {folder} is of another run or another model: remove it")
        if _partitioning(written["zero_stage"]) != _partitioning(ours["zero_stage"]):
            raise TrainingFailed(
                f"its checkpoint was written with execution.zero_stage {written['zero_stage']}, this run has "
                f"{ours['zero_stage']}: go on with {written['zero_stage']}"
            )
        return written

    def step(self) -> None:
        """One optimizer step over the global batch of `state.step`."""
        sequences = self.order.sequences(self.state.step)
        rate = learning_rate(self.state.step, self.order.total_steps, self.run.optimization)
        scheduled = rate / self.run.optimization.learning_rate
        if self.masks:
            rate = scheduled * self.masks.delta_rate
        deepspeed_engine.set_learning_rate(self.engine, rate)
        completion, real = _token_counts(self.encoded, sequences)
        mine = sequences[self.session.rank :: self.session.world_size]
        total: dict[str, Tensor] = {}
        if self.masks:
            self.masks.begin(self.state.step)
        for number in range(self.accumulation):
            some = mine[number * self.micro_batch : (number + 1) * self.micro_batch]
            # every worker takes part in every pass: one without sequences passes through one that does not count
            batch = collate(self.encoded, some or sequences[:1], self.run.data.max_length)
            counts = 1.0 if some else 0.0
            _add(total, self._forward_backward(batch.to(self.session.device), completion, real, counts))
        if self.masks:
            total |= self.masks.end(self.state.step, scheduled)
        self.state.step += 1
        self.state.tokens += real
        self._log(total, rate, real)
        if self._checkpoint_due():
            self.flush()
            self.checkpoint()

    def checkpoint(self) -> None:
        """Report a checkpoint of this step."""
        self._check_parameters()
        self.session.report({"step": self.state.step}, self._save)
        self.clock = time.perf_counter()

    def _forward_backward(self, batch: Batch, completion: int, real: int, counts: float) -> dict[str, Tensor]:
        """Gradients of one micro batch, as its share of the loss over the global batch; none if `counts` is 0.

        Loss = sum of completion nll / completion tokens of the global batch
             + alpha * load-balance loss, every sequence weighted by its share of the global batch's tokens.
        DeepSpeed averages gradients over workers, hence the factor world_size.
        """
        if self.masks:
            self.masks.set(batch)
        nll, balance, load, entropy = self.engine(batch)
        share = counts * batch.num_tokens / real
        loss = counts * nll.sum() / completion + _alpha(self.run) * balance * share
        self.engine.backward(loss * self.session.world_size, scale_wrt_gas=False)
        norm = deepspeed_engine.step(self.engine)
        metrics = {"train/loss": counts * nll.detach().sum() / completion}
        if norm is not None:  # every worker has the whole norm, and metrics are summed over workers
            metrics["train/grad_norm"] = norm / self.session.world_size
        if load.numel():
            metrics |= {
                "train/load_balance_loss": balance.detach() * share,
                "routing/entropy": entropy.mean() * share,
                "routing/load": counts * load.float(),
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
        if len(self.pending) >= self.wait:
            self.flush()

    def flush(self) -> None:
        """Reduce the pending metrics over the workers, read them (one synchronisation) and log them.

        Raises:
            TrainingFailed: a loss that is not a number.
        """
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        *host, due = _reduced([*(metrics for _, metrics in pending), self._due()])
        self.wait = int(due.pop("wait"))
        self.due = {what: bool(value) for what, value in due.items()}
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / len(pending), now
        self.seconds_per_step = seconds
        for metrics, (known, _) in zip(host, pending, strict=True):
            step, rate = int(known.pop("step")), known.pop("step_tokens") / seconds
            named = {
                **_named(metrics),
                **known,
                "system/tokens_per_second": rate,
                "system/mfu": rate * self.flops_per_token / self.peak_flops,
                "system/peak_memory_bytes": peak_memory(self.session.device),
                "system/workers": self.session.world_size,
                "system/seconds": now - self.began,
            }
            if self.masks:
                self.masks.read(step, named)
            if self.session.rank == 0:
                self.session.log(step, named)
            if not math.isfinite(named["train/loss"]):
                raise TrainingFailed(f"the loss is {named['train/loss']} at step {step}")

    def _due(self) -> dict[str, Tensor]:
        """What the first worker's clock says is due. On the way of the metrics it decides for all, at no cost.

        `wait`: steps until the metrics are reduced again: as configured, but no longer than LOOK_EVERY seconds.
        """
        now, first = time.perf_counter(), self.session.rank == 0
        late = {
            "checkpoint": now - self.saved > 60 * self.job.execution.checkpoint_minutes,
            "look": now - self.looked > LOOK_EVERY and not self.leaving,
        }
        values = {"wait": min(self.job.log_every, max(1, int(LOOK_EVERY / self.seconds_per_step))), **late}
        return {
            k: torch.tensor(float(v if first else 0), device=self.session.device) for k, v in values.items()
        }

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
        """By steps, by time, or because a node was announced to leave; a milestone has its own checkpoint."""
        due, self.due = self.due, {}
        every, step = self.job.execution.checkpoint_every, self.state.step
        wanted = due.get("checkpoint", False) or bool(every and step % every == 0)
        if due.get("look"):
            self.looked = time.perf_counter()
            self.leaving = self.session.leaving()
            if self.leaving:
                return True
        return wanted and step not in self.milestones

    def _save(self, folder: Path) -> None:
        self.saved = time.perf_counter()
        self.due.pop("checkpoint", None)
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
            delete(self.job.out / "model")
            dtype = torch.bfloat16 if self.run.precision == "bfloat16" else torch.float32
            with writing(self.job.out) as out:
                self._write(out, tensors, dtype)
                (out / "evaluations.json").write_text(json.dumps(self.state.evaluations, indent=1))
        else:
            for _ in tensors:
                pass

    def _write(self, out: Path, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        if self.masks:
            masks, description = self.masks.finished(self.encoded, self.evaluator.held_out)
            write_simoe(out / "model", self.job.dense, masks, tensors, dtype)
            (out / "masks.json").write_text(json.dumps(description, indent=1))
        else:
            assert isinstance(self.run.method, Dense | Experts)
            write_model(out / "model", local(self.job.dense), self.run.method, tensors, dtype)


def starting_model(job: WorkerSpec, partition: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The dense model, expanded by the recipe if there is one, in the run's precision.

    `partition`: DeepSpeed's configuration under ZeRO-3: every layer's experts are spread over the workers as
    soon as they are made, so that no worker ever holds all of them.
    """
    dtype = torch.bfloat16 if job.run.precision == "bfloat16" else torch.float32
    if job.recipe is None:
        model = AutoModelForCausalLM.from_pretrained(
            local(job.dense), dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True
        )
    else:
        recipe, router = load_recipe(local(job.recipe))
        model = expand(
            local(job.dense),
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


def _partitioning(zero_stage: int) -> str:
    """What of a checkpoint DeepSpeed partitions: stages 1 and 2 write the same."""
    return ("nothing", "optimizer", "optimizer", "parameters")[zero_stage]


def _alpha(run: Run) -> float:
    return run.method.load_balance_alpha if isinstance(run.method, Experts) else 0.0


def _top_k(run: Run) -> int:
    return run.method.top_k if isinstance(run.method, Experts) else 1


def _token_counts(encoded: Encoded, sequences: Sequence[Any]) -> tuple[int, int]:
    """(completion tokens, all tokens) of the records in `sequences`."""
    records = [int(r) for sequence in sequences for r in sequence]
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
