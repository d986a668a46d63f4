"""One training worker: build the model, step through the data, evaluate at milestones, write the result.

The same loop trains the dense baseline, every sparse method and the embedded dense model; a method adds to it by its
`Extension`. It knows nothing of Ray: `launch` passes it a `Session`, tests pass it a local one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.evaluate.held_out import Evaluator
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.collectives import summed
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.storage.location import delete, local, writing
from raymoe.train import checkpoint
from raymoe.train import engine as deepspeed_engine
from raymoe.train.checkpoint import State
from raymoe.train.extension import Setting, extension_of
from raymoe.train.flops import peak_flops, training_flops_per_token
from raymoe.train.metrics import LONGEST_WAIT, StepMetrics, Sums, add_up, peak_memory
from raymoe.train.order import Order, PackedSequence, learning_rate, micro_batches, milestone_steps
from raymoe.train.session import Session
from raymoe.train.spec import STOPPED_EARLY, TrainingFailed, WorkerSpec
from raymoe.upcycle import expand, load_recipe


def train(spec: WorkerSpec, session: Session) -> list[dict[str, float]]:
    """Train to the end and write `spec.out`; return the evaluations at the milestones.

    Raises:
        TrainingFailed: the loss is not a number; names the step. The last checkpoint is kept.
    """
    trainer = Trainer(spec, session)
    trainer.restore()
    while trainer.state.step < trainer.order.total_steps:
        trainer.milestone()
        trainer.step()
    trainer.milestone()
    trainer.finish()
    return trainer.state.evaluations


class Trainer:
    """Model, engine, data and state of one worker."""

    def __init__(self, spec: WorkerSpec, session: Session) -> None:
        self.spec, self.session, self.run = spec, session, spec.run
        torch.manual_seed(self.run.seed)  # for models with dropout
        self.encoded = Encoded.load(local(spec.data) / "train")
        self.order = Order(self.encoded, self.run.data.max_length, self.run.optimization, self.run.seed)
        self.milestones = set(milestone_steps(self.run.evaluation.milestones, self.order.total_steps))
        self.micro_batch, self.accumulation = micro_batches(
            self.run.optimization.batch_size, session.world_size, spec.execution.micro_batch
        )
        self.state = State()
        self._build()
        self.looked = self.saved = time.perf_counter()
        self.leaving = False
        """True once it is known that a node of the workers will be taken away."""

    def _build(self) -> None:
        """Build model, extension, engine, metrics and evaluator, in this order: each needs the one before."""
        run, session, execution = self.run, self.session, self.spec.execution
        config = deepspeed_engine.deepspeed_config(
            run.precision, run.optimization, execution, self.micro_batch, self.accumulation
        )
        partition = _partition(config)
        model = starting_model(self.spec, partition)
        if execution.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        top_k = run.method.ffns_per_token
        flops_per_token = training_flops_per_token(model, run.data.max_length, top_k)
        held_out = Encoded.load(local(self.spec.data) / "validation")
        self.extension = extension_of(
            Setting(
                self.spec,
                model,
                self.encoded,
                held_out,
                self.order.total_steps,
                session.world_size,
                session.device,
                partition,
            )
        )
        loss = CausalLoss(model, self.extension.penalties)
        self.engine = deepspeed_engine.start(loss.train().to(session.device), config, run.optimization)
        self.metrics = StepMetrics(
            session,
            self.extension,
            every=self.spec.log_every,
            flops_per_token=flops_per_token,
            flops_per_second=peak_flops(session.device, run.precision) * session.world_size,
            due=self._due,
        )
        self.evaluator = Evaluator(
            run.evaluation,
            held_out,
            AutoTokenizer.from_pretrained(local(self.spec.dense)),
            rank=session.rank,
            world_size=session.world_size,
            max_length=run.data.max_length,
            synced=partition is not None and session.world_size > 1,
            applied=self.extension.held_out,
        )

    # ---- the step

    def step(self) -> None:
        """Take one optimizer step on the global batch of `state.step`, and save a checkpoint if one is due."""
        step, sequences = self.state.step, self.order.sequences(self.state.step)
        rate = learning_rate(step, self.order.total_steps, self.run.optimization)
        schedule = rate / self.run.optimization.learning_rate
        rate = self.extension.learning_rate(rate, schedule)
        deepspeed_engine.set_learning_rate(self.engine, rate)
        completion, tokens = _token_counts(self.encoded, sequences)
        sums: Sums = {}
        self.extension.begin(step)
        for batch, counts in self._micro_batches(sequences):
            add_up(sums, self._forward_backward(batch, completion, tokens, counts))
        add_up(sums, self.extension.end(step, schedule))
        self.state.step += 1
        self.state.tokens += tokens
        self.metrics.add({**self._known(rate, tokens), **self.extension.known(step)}, sums)
        if self._checkpoint_due():
            self.metrics.flush()
            self.checkpoint()

    def _micro_batches(self, sequences: Sequence[PackedSequence]) -> Iterator[tuple[Batch, float]]:
        """Yield this worker's share of a step: (batch, 1), or (a batch that does not count, 0) to keep in step."""
        mine = sequences[self.session.rank :: self.session.world_size]
        for number in range(self.accumulation):
            some = mine[number * self.micro_batch : (number + 1) * self.micro_batch]
            # every worker takes part in every pass; one without sequences of its own uses one that does not count
            batch = collate(self.encoded, some or sequences[:1], self.run.data.max_length)
            yield batch.to(self.session.device), 1.0 if some else 0.0

    def _forward_backward(self, batch: Batch, completion: int, tokens: int, counts: float) -> Sums:
        """Compute the gradients of one micro batch as part of the global batch's loss, zero if `counts` is 0.

        Loss = sum of completion nll / completion tokens of the global batch
             + weight * penalty, every batch weighted by its share of the global batch's tokens.
        DeepSpeed averages gradients over workers, hence the factor world_size.
        """
        self.extension.apply(batch)
        output = self.engine(batch)
        share = counts * batch.num_tokens / tokens
        loss = counts * output.nll.sum() / completion
        sums = {"train/loss": counts * output.nll.detach().sum() / completion}
        for name, penalty in output.penalties.items():
            loss = loss + self.extension.penalty_weights[name] * penalty * share
            sums[f"train/{name}"] = penalty.detach() * share
        self.engine.backward(loss * self.session.world_size, scale_wrt_gas=False)
        norm = deepspeed_engine.step(self.engine)
        if norm is not None:  # every worker has the global norm, and metrics are summed over workers
            sums["train/grad_norm"] = norm / self.session.world_size
        return sums | self.extension.sums(output, share, counts)

    def _known(self, rate: float, tokens: int) -> dict[str, float]:
        return {
            "step": float(self.state.step),
            "step_tokens": float(tokens),
            "train/learning_rate": rate,
            "train/tokens": float(self.state.tokens),
            "train/progress": self.state.step / self.order.total_steps,
        }

    # ---- milestones

    def milestone(self) -> None:
        """Evaluate, report and save a checkpoint if this step is one of the configured milestones."""
        done = {int(e["step"]) for e in self.state.evaluations}
        if self.state.step not in self.milestones - done:
            return
        self.metrics.flush()
        self._check_stop()
        self._check_parameters()
        model = self.engine.module.model
        metrics = self.evaluator.measure(self.engine, model)
        metrics |= {"system/peak_memory_bytes": peak_memory(self.session.device), **self.extension.measure()}
        row = {"step": float(self.state.step), "train/tokens": float(self.state.tokens), **metrics}
        self.state.evaluations.append(row)
        if self.session.rank == 0:
            self.session.log(self.state.step, metrics)
        self.session.report(row, self._save if self.state.step else None)
        self.metrics.restart_clock()

    def _check_stop(self) -> None:
        """Raise TrainingFailed, on all workers alike, if the run is to end early."""
        if summed(torch.tensor(float(self.session.stop_requested()), device=self.session.device)):
            raise TrainingFailed(STOPPED_EARLY)

    def _check_parameters(self) -> None:
        """Raise TrainingFailed if the last update made parameters non-finite, so that they are never saved."""
        if not (deepspeed_engine.finite(self.engine.module) and self.extension.finite()):
            raise TrainingFailed(f"parameters are not finite after step {self.state.step}")

    # ---- checkpoints

    def restore(self) -> None:
        """Resume from the session's checkpoint, if there is one."""
        if folder := self.session.checkpoint():
            workers = checkpoint.read_layout(folder, self._layout())["workers"]
            self.state = State(**deepspeed_engine.restore(self.engine, folder, workers))
            self.extension.load(folder)
            self.session.resumed(self.state.step)

    def checkpoint(self) -> None:
        """Save and report a checkpoint of this step."""
        self._check_parameters()
        self.session.report({"step": self.state.step}, self._save)
        self.metrics.restart_clock()

    def _save(self, folder: Path) -> None:
        self.saved = time.perf_counter()
        self.metrics.decided.pop("checkpoint", None)
        deepspeed_engine.save(self.engine, folder, vars(self.state))
        if self.session.rank == 0:
            self.extension.save(folder)
            checkpoint.write_layout(folder, self._layout())

    def _layout(self) -> dict[str, Any]:
        zero_stage = self.engine.zero_optimization_stage()
        return checkpoint.layout(self.spec, zero_stage, self.session.world_size)

    def _due(self) -> dict[str, bool]:
        """Return what is due by this worker's clock: a checkpoint, a look for nodes about to be taken away."""
        now = time.perf_counter()
        return {
            "checkpoint": now - self.saved > 60 * self.spec.execution.checkpoint_minutes,
            "look": now - self.looked > LONGEST_WAIT and not self.leaving,
        }

    def _checkpoint_due(self) -> bool:
        """True if a checkpoint is due by steps, by time, or because a node will be taken away.

        A milestone saves a checkpoint of its own.
        """
        due, self.metrics.decided = self.metrics.decided, {}
        every, step = self.spec.execution.checkpoint_every, self.state.step
        wanted = due.get("checkpoint", False) or bool(every and step % every == 0)
        if due.get("look"):
            self.looked = time.perf_counter()
            self.leaving = self.session.leaving()
            if self.leaving:
                return True
        return wanted and step not in self.milestones

    # ---- the end

    def finish(self) -> None:
        """Write the trained model as one Hugging Face folder, and the evaluations."""
        self.metrics.flush()
        tensors = deepspeed_engine.gathered_parameters(self.engine.module.model)
        if self.session.rank == 0:
            # left by workers that were killed right after writing it
            delete(self.spec.out / "model")
            dtype = torch.bfloat16 if self.run.precision == "bfloat16" else torch.float32
            with writing(self.spec.out) as out:
                self.extension.write(out, tensors, dtype)
                (out / "evaluations.json").write_text(json.dumps(self.state.evaluations, indent=1))
        else:
            for _ in tensors:
                pass


def starting_model(spec: WorkerSpec, partition: Callable[[nn.Module], None] | None = None) -> PreTrainedModel:
    """Return the dense model, expanded by the recipe if there is one, in the run's precision.

    `partition`: under ZeRO-3, partitions each layer's experts over the workers as soon as they are made, so that no
    worker ever holds all of them.
    """
    dtype = torch.bfloat16 if spec.run.precision == "bfloat16" else torch.float32
    if spec.recipe is None:
        model = AutoModelForCausalLM.from_pretrained(
            local(spec.dense), dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True
        )
    else:
        recipe, router = load_recipe(local(spec.recipe))
        model = expand(
            local(spec.dense),
            router,
            recipe.method,
            dtype,
            spec.execution.experts_implementation,
            on_layer=partition,
            seed=recipe.seed,
            attn_implementation=PACKED_ATTENTION,
        )
    model.config.use_cache = False
    return model


def _partition(config: Mapping[str, Any]) -> Callable[[nn.Module], None] | None:
    """Return the function that partitions a module over the workers under ZeRO-3; None below stage 3."""
    if config["zero_optimization"]["stage"] != 3:
        return None
    return lambda module: deepspeed_engine.partition(module, config)


def _token_counts(encoded: Encoded, sequences: Sequence[PackedSequence]) -> tuple[int, int]:
    """Count the (completion tokens, all tokens) of the examples in `sequences`."""
    examples = [int(example) for sequence in sequences for example in sequence]
    lengths = encoded.lengths[examples]
    return int((lengths - encoded.prompt_lengths[examples]).sum()), int(lengths.sum())
