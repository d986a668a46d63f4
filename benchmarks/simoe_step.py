"""How much does a training step of SIMoE cost, in both of its forms, against full fine-tuning of the dense model?

    python benchmarks/simoe_step.py [--device cuda] [--dtype bfloat16] [--tokens 2048] [--documents 64 256 1024]
    python benchmarks/simoe_step.py --log-alpha 4.605    # compact, as far as training lets gates close

A step of SIMoE is what its trainer does: sample the gates, mix them by the prompts, forward and backward,
clipping and torch's fused AdamW on the delta, orthogonality and sparsity constraint, Adam on gates and router.
The dense model trains all its parameters. Both see the same packed batch without padding, in which every token has
a loss. Taking turns, for every length of a document:

- factored and merged at the start, when (nearly) every column is open in some expert;
- factored and merged when compact: all experts have the same 25% of the columns open, at log_alpha = 40, and the
  others closed, at -40. (At -4.6, where training stops, noise opens a closed gate in 5% of the steps, and so
  a column in any of 8 experts in 32%: `--log-alpha` shows what that costs, `live_share` how many are open.)
- dense, and its floor: the GEMMs of all linear layers, forward and twice backward.

A form's floor is its own GEMMs: with a fraction s of live columns, (2 + s) / 3 of the dense ones if merged and
(2 + 3s) / 3 if factored, and the head's without its weights' gradient, as SIMoE freezes it. In bfloat16 parameters
and optimizer state are bfloat16, for all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Rounds, figure, interleaved, parser
from step import GOALS, Contest, Contestant, fast_float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymoe.config import Execution, Run, validate
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch
from raymoe.methods import SparseInterpolation
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.interpolated import Form
from raymoe.models.simoe import chosen_form
from raymoe.train.extension import Setting
from raymoe.train.masks import MaskTrainer
from raymoe.train.spec import WorkerSpec

FORMS: tuple[Form, ...] = ("factored", "merged")
STATES = {"start": 1.0, "compact": 0.25}
"""Fraction of the columns that are open."""
STANDS_STILL = 1e-9
"""Learning rate of the gates, so small that what is open at the first step is open at the last."""


class Documents(Contest):
    """The contest for one length of documents."""

    def __init__(self, o: argparse.Namespace, document: int) -> None:
        self.asked = document
        super().__init__(o)

    def _batch(self) -> Batch:
        self.document = min(self.asked, self.tokens)
        return super()._batch()


class Interpolating(Contestant):
    """SIMoE in one form; a `share` of its columns is open in all experts, the others in none (1: at the start)."""

    def __init__(self, contest: Contest, form: Form, share: float) -> None:
        self.batch, self.form, self.limit = contest.batch, form, contest.o.log_alpha
        dense = contest.dense_model()
        self.masks = self._trainer(contest, dense)
        self.interpolated = self.masks.interpolated
        self.log_alpha = self._start(share)
        self.causal = contest._ready(CausalLoss(dense))
        super().__init__(self.causal, self._loss)
        self.optimizer = torch.optim.AdamW(self._deltas(), lr=1e-7, fused=True)

    def _trainer(self, contest: Contest, dense: PreTrainedModel) -> MaskTrainer:
        method = SparseInterpolation(num_experts=contest.o.num_experts, mask_learning_rate=STANDS_STILL)
        count = len(self.batch.documents)
        prompts = np.random.default_rng(1).standard_normal((count, contest.width), np.float32)
        run = validate(
            Run,
            {
                "method": method.model_dump(),
                "optimization": {"learning_rate": 1e-7},
                "precision": str(contest.o.dtype).removeprefix("torch."),
            },
        )
        nothing = Encoded(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int32), (), (), ())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for split in ("train", "validation"):
                np.save(folder / f"{split}.npy", prompts)
            spec = WorkerSpec(
                run, Execution(simoe_form=self.form), folder, None, folder, folder, prompts=folder
            )
            device = torch.device(contest.o.device)
            return MaskTrainer(Setting(spec, dense, nothing, nothing, 10**6, 1, device, None))

    def _start(self, share: float) -> Tensor:
        """log_alpha [M, G]."""
        given = self.masks.gates.log_alpha.detach().clone()
        open_G = torch.rand(given.shape[1], generator=torch.Generator().manual_seed(2)) < share
        far = self.limit
        return given if share == 1 else torch.where(open_G, far, -far).to(given).expand_as(given)

    @property
    def live_share(self) -> float:
        """Return the fraction of all linears' columns that were open in the last step."""
        linears = [
            (s, v)
            for s, v in zip(self.interpolated.layout.spans, self.masks.live, strict=True)
            if s.kind != "norm"
        ]
        return sum(s.width if v is None else len(v) for s, v in linears) / sum(s.width for s, _ in linears)

    def _deltas(self) -> list[nn.Parameter]:
        return [layer.delta for layer in self.interpolated.layers]

    def _loss(self) -> Tensor:
        self.masks.gates.log_alpha.data.copy_(self.log_alpha)  # the trainer keeps it within limits
        self.masks.begin(0)
        self.masks.apply(self.batch)
        nll: Tensor = self.causal(self.batch)[0]
        return nll.mean()

    def update(self) -> None:
        """Clip and update the delta; add the constraint's losses and update gates and router."""
        nn.utils.clip_grad_norm_(self._deltas(), 1.0)
        self.optimizer.step()
        self.masks.end(0, 1.0)


def floor(contest: Contest, form: Form | None, share: float = 1.0) -> Callable[[], None]:
    """Return the GEMMs of all linear layers in a step of `form`; None: of the dense model.

    One layer's operands for all layers: nothing but the products is timed.
    """
    d, f, s = contest.width, contest.ffn, contest.batch.num_tokens
    linears = [(d, d), (d, d // 2), (d, d // 2), (d, d), (d, f), (d, f), (f, d)]
    options: Any = {"dtype": contest.o.dtype, "device": contest.o.device}

    def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        x, w, dy = (torch.ones(shape, **options) for shape in shapes)
        return x, w, dy

    both = [operands(s, i, o) for i, o in linears]
    live = both if share == 1 else [operands(s, round(share * i), o) for i, o in linears]
    head = operands(len(contest.batch.targets), d, contest.vocab)

    def run() -> None:
        for _ in range(contest.layers):
            for x, w, dy in both:
                torch.mm(x, w.T)
                torch.mm(dy, w)
            for x, w, dy in live:
                torch.mm(dy.T, x)
                if form == "factored":
                    torch.mm(x, w.T)
                    torch.mm(dy, w)
        x, w, dy = head
        torch.mm(x, w.T)
        torch.mm(dy, w)
        if form is None:
            torch.mm(dy.T, x)

    return run


def compare(contest: Documents) -> None:
    """Time all contestants on one length of documents and print their figures."""
    o = contest.o
    dense = contest.dense()
    field = {
        (name, form): Interpolating(contest, form, share) for name, share in STATES.items() for form in FORMS
    }
    work: dict[str, Callable[[], object]] = {"dense": dense.step, "dense floor": floor(contest, None)}
    for (name, form), contestant in field.items():
        work[f"{name} {form}"] = contestant.step
        work[f"{name} {form} floor"] = floor(contest, form, STATES[name])
    rounds = interleaved(work, o.rounds)
    print(f"{len(contest.batch.documents)} documents of {contest.document} tokens")
    print("  ms: " + ", ".join(f"{name} {1000 * rounds.median(name):.1f}" for name in work))
    report(contest, rounds, "start", "simoe_step_vs_dense", 1.08, field["start", "merged"].live_share)
    report(
        contest, rounds, "compact", "simoe_compact_step_vs_dense", 1.0, field["compact", "merged"].live_share
    )


def report(contest: Documents, rounds: Rounds, state: str, name: str, goal: float, live_share: float) -> None:
    """Print which form is faster, which one raymoe picks, and the figure of each."""
    o, samples = contest.o, len(contest.batch.documents)
    faster = min(FORMS, key=lambda form: rounds.median(f"{state} {form}"))
    picked = chosen_form(o.device, o.dtype, contest.batch.num_tokens, samples)
    print(f"  {state}: faster {faster}, picked {picked}, {live_share:.0%} of the columns open")
    for form in FORMS:
        own = f"{state} {form}"
        figure(
            name,
            "the dense model's step",
            rounds.ratio(own, "dense"),
            goal,
            rounds.ratio(own, f"{own} floor"),
            o.device,
            form=form,
            picked=form == picked,
            dtype=str(o.dtype).removeprefix("torch."),
            samples=samples,
            tokens_per_sample=contest.document,
            live_share=round(live_share, 4),
            floor_vs_dense_floor=round(rounds.ratio(f"{own} floor", "dense floor"), 4),
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=tuple(GOALS), help="by default bfloat16 on a GPU, else float32")
    options.add_argument("--tokens", type=int, help="tokens of a step")
    options.add_argument("--documents", type=int, nargs="+", default=[64, 256, 1024], help="their tokens")
    options.add_argument("--num-experts", type=int, default=8)
    options.add_argument("--log-alpha", type=float, default=40.0, help="of open gates when compact")
    options.add_argument("--layers", type=int)
    o = options.parse_args()
    o.experts = [4]  # what the shapes of a GPU are divided by
    o.dtype = getattr(torch, o.dtype or ("bfloat16" if o.device == "cuda" else "float32"))
    precision = fast_float32() if o.device == "cpu" else torch.get_float32_matmul_precision()
    for document in sorted({min(d, o.tokens or 10**9) for d in o.documents}):
        contest = Documents(o, document)
        print(
            f"{contest.layers} layers of {contest.width} x {contest.ffn}, {contest.batch.num_tokens} tokens, "
            f"{o.dtype}, float32 matmul precision {precision}: median of {o.rounds}"
        )
        compare(contest)


if __name__ == "__main__":
    main()
