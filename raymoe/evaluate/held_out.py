"""Measure a model: held-out completion loss and perplexity per domain, routing per domain, exact match.

Used by the training loop at milestones and by `raymoe evaluate` on a model folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raymoe.config import Evaluation
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate, pack
from raymoe.evaluate.answers import same_answer
from raymoe.models.causal_loss import LossOutput
from raymoe.models.collectives import summed
from raymoe.models.generate import generate
from raymoe.models.moe import sparse_layers

Applied = Callable[[Sequence[int], Batch | None], AbstractContextManager[None]]
"""Sets a model up for some held-out examples within a block: packed in a batch or, without one, one per row."""
SEQUENCES_PER_FORWARD = 4
PROMPTS_PER_BATCH = 32


class Evaluator:
    """Measures models on held-out examples, split among the workers; every worker gets the totals."""

    def __init__(
        self,
        config: Evaluation,
        held_out: Encoded,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_length: int,
        synced: bool = False,
        applied: Applied | None = None,
    ) -> None:
        """`synced`: all workers must run the same number of forward passes (ZeRO-3).

        `applied`: for models whose weights depend on the prompt (SIMoE).
        """
        self.config, self.held_out, self.tokenizer = config, held_out, tokenizer
        self.rank, self.world_size, self.max_length, self.synced = rank, world_size, max_length, synced
        self.applied = applied or (lambda examples, batch: nullcontext())
        self.domains = sorted(set(held_out.domains))
        self.examples = {d: _first(held_out.domains, d, config.max_examples_per_domain) for d in self.domains}
        self.turn_ends = _turn_ends(held_out, np.concatenate([*self.examples.values()]), tokenizer)

    @torch.no_grad()
    def measure(self, loss: Callable[[Batch], LossOutput], model: PreTrainedModel) -> dict[str, float]:
        """Return all metrics of `model`; `loss` is its `CausalLoss`, or the engine around it."""
        was_training = model.training
        model.eval()
        metrics = self._losses(loss, model) | self._exact_match(model)
        model.train(was_training)
        return metrics

    def _losses(self, loss: Callable[[Batch], LossOutput], model: PreTrainedModel) -> dict[str, float]:
        """Return `eval/loss` and `eval/perplexity` over all completion tokens and per domain, and the routing."""
        device = model.device
        rows = {d: torch.zeros(2, dtype=torch.float64, device=device) for d in self.domains}
        loads: dict[str, Tensor] = {}
        for domain, sequences, counts in self._shared(self._batches()):
            batch = collate(self.held_out, sequences, self.max_length).to(device)
            with self.applied(batch.examples, batch):
                nll, _, statistics = loss(batch)
            if counts:
                rows[domain] += torch.stack([nll.double().sum(), nll.new_tensor(nll.numel()).double()])
            if "load" in statistics:
                share = statistics["load"].double() * counts
                loads[domain] = loads[domain] + share if domain in loads else share
        totals = {d: summed(row).tolist() for d, row in rows.items()}
        metrics = _loss_metrics(totals)
        return metrics | self._load_metrics(loads, model)

    def _load_metrics(self, loads: dict[str, Tensor], model: PreTrainedModel) -> dict[str, float]:
        """Return the share of each domain's tokens per expert, averaged over layers (RSU paper, Table 7)."""
        layers = sparse_layers(model)
        if not layers:
            return {}
        metrics: dict[str, float] = {}
        zero = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.float64, device=model.device)
        for domain in self.domains:
            load_LN = summed(loads.get(domain, zero))
            share_N = (load_LN / load_LN.sum(-1, keepdim=True)).mean(0)
            metrics |= {f"routing/{domain}/load/{i}": s for i, s in enumerate(share_N.tolist())}
        return metrics

    def _batches(self) -> Iterator[tuple[str, list[np.ndarray], int]]:
        """Yield (domain, packed sequences of that domain only, 1)."""
        for domain, examples in self.examples.items():
            packed = pack(self.held_out.lengths[examples], self.max_length, np.arange(len(examples)))
            sequences = [examples[sequence] for sequence in packed]
            for start in range(0, len(sequences), SEQUENCES_PER_FORWARD):
                yield domain, sequences[start : start + SEQUENCES_PER_FORWARD], 1

    def _shared(self, batches: Iterator[tuple[str, Any, int]]) -> Iterator[tuple[str, Any, int]]:
        """Yield this worker's batches; if workers must keep in step, idle ones repeat a batch with count 0."""
        while group := list(islice(batches, self.world_size)):
            if self.rank < len(group):
                yield group[self.rank]
            elif self.synced:
                domain, content, _ = group[0]
                yield domain, content, 0

    def _exact_match(self, model: Any) -> dict[str, float]:
        """Return the share of held-out examples whose final answer is right under greedy generation."""
        metrics = {}
        for domain in self.config.generation_domains:
            if domain not in self.examples or not self.config.generation_examples:
                continue
            examples = self.examples[domain][: self.config.generation_examples]
            hits = torch.zeros(2, dtype=torch.float64, device=model.device)
            starts = range(0, len(examples), PROMPTS_PER_BATCH)
            batches = ((domain, examples[s : s + PROMPTS_PER_BATCH], 1) for s in starts)
            for _, some, counts in self._shared(batches):
                right = self._answers_right(model, some)
                hits += counts * torch.tensor([sum(right), len(right)], device=model.device)
            correct, total = summed(hits).tolist()
            metrics[f"eval/{domain}/exact_match"] = correct / total
        return metrics

    def _answers_right(self, model: Any, examples: np.ndarray) -> list[bool]:
        prompts = [self.held_out.prompt(int(i)) for i in examples]
        length, ends = self.config.max_new_tokens, self.turn_ends
        with self.applied(examples.tolist(), None):
            texts = generate(model, self.tokenizer, prompts, length, synced=self.synced, stop=ends)
        completions = [self.held_out.completion(int(i)) for i in examples]
        references = [self.tokenizer.decode(c, skip_special_tokens=True) for c in completions]
        return [same_answer(t, r) for t, r in zip(texts, references, strict=True)]


def _turn_ends(held_out: Encoded, examples: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens that end the completions of `examples`, ignoring white space after them."""
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends: set[int] = set()
    for example in examples:
        for token in reversed(held_out.completion(int(example)).tolist()):
            if token in special:
                ends.add(token)
            elif str(tokenizer.decode([token])).strip():
                break
    return ends


def _loss_metrics(totals: dict[str, list[float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for domain, (nll, count) in totals.items():
        metrics |= {f"eval/{domain}/loss": nll / count, f"eval/{domain}/perplexity": _exp(nll / count)}
    mean = sum(nll for nll, _ in totals.values()) / sum(count for _, count in totals.values())
    return metrics | {"eval/loss": mean, "eval/perplexity": _exp(mean)}


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _first(domains: Sequence[str], domain: str, limit: int) -> np.ndarray:
    """Return the indices of the first `limit` examples of `domain`."""
    return np.flatnonzero(np.asarray(domains) == domain)[:limit]
