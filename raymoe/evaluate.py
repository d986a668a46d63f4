"""Measure a model: held-out completion loss and perplexity per domain, routing per domain, exact match.

Used by the training loop at the milestones and by `raymoe evaluate` on a finished folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raymoe.config import Evaluation, InputError, Run
from raymoe.data.instructions import Batch, Encoded, collate, pack
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.moe import sparse_layers
from raymoe.models.packed_attention import PACKED_ATTENTION

Applied = Callable[[Sequence[int], Batch | None], AbstractContextManager[None]]
"""Makes the model that of some held-out records while they are measured: packed in a batch or, without one, a
row each."""
LossOutput = tuple[Tensor, Tensor, Tensor, Tensor]
"""What `CausalLoss` returns."""
NUMBER = re.compile(
    r"(?:(?<!\d)-)?"  # in `5-3` it subtracts
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/\d+)?"
)
SEQUENCES_PER_FORWARD = 4
PROMPTS_PER_BATCH = 32


class Evaluator:
    """Held-out examples, shared among the workers; every worker gets the sums of all."""

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
        """`synced`: every worker must run the same number of forward passes (ZeRO-3).

        `applied`: for models that differ from prompt to prompt (SIMoE).
        """
        self.config, self.held_out, self.tokenizer = config, held_out, tokenizer
        self.rank, self.world_size, self.max_length, self.synced = rank, world_size, max_length, synced
        self.applied = applied or (lambda records, batch: nullcontext())
        self.domains = sorted(set(held_out.domains))
        self.records = {d: _first(held_out.domains, d, config.max_examples_per_domain) for d in self.domains}
        self.turn_ends = _turn_ends(held_out, np.concatenate([*self.records.values()]), tokenizer)

    @torch.no_grad()
    def measure(self, loss: Callable[[Batch], LossOutput], model: PreTrainedModel) -> dict[str, float]:
        """All metrics of `model`; `loss` is its `CausalLoss`, or the engine around that."""
        was_training = model.training
        model.eval()
        metrics = self._losses(loss, model) | self._exact_match(model)
        model.train(was_training)
        return metrics

    def _losses(self, loss: Callable[[Batch], LossOutput], model: PreTrainedModel) -> dict[str, float]:
        """`eval/loss` and `eval/perplexity` over all completion tokens, and the same per domain."""
        device = model.device
        rows = {d: torch.zeros(2, dtype=torch.float64, device=device) for d in self.domains}
        loads: dict[str, Tensor] = {}
        for domain, windows, counts in self._shared(self._batches()):
            batch = collate(self.held_out, windows, self.max_length).to(device)
            with self.applied(batch.records, batch):
                nll, _, load_LN, _ = loss(batch)
            if counts:
                rows[domain] += torch.stack([nll.double().sum(), nll.new_tensor(nll.numel()).double()])
            if load_LN.numel():
                share = load_LN.double() * counts
                loads[domain] = loads[domain] + share if domain in loads else share
        totals = {d: summed(row).tolist() for d, row in rows.items()}
        metrics = _loss_metrics(totals)
        return metrics | self._load_metrics(loads, model)

    def _load_metrics(self, loads: dict[str, Tensor], model: PreTrainedModel) -> dict[str, float]:
        """Share of each domain's tokens per expert, mean over layers (RSU paper, Table 7)."""
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
        """(domain, packed sequences of that domain alone, 1)."""
        for domain, records in self.records.items():
            packed = pack(self.held_out.lengths[records], self.max_length, np.arange(len(records)))
            windows = [records[window] for window in packed]
            for start in range(0, len(windows), SEQUENCES_PER_FORWARD):
                yield domain, windows[start : start + SEQUENCES_PER_FORWARD], 1

    def _shared(self, batches: Iterator[tuple[str, Any, int]]) -> Iterator[tuple[str, Any, int]]:
        """This worker's batches; if workers must keep in step, idle ones repeat a batch that counts 0."""
        while group := list(islice(batches, self.world_size)):
            if self.rank < len(group):
                yield group[self.rank]
            elif self.synced:
                domain, content, _ = group[0]
                yield domain, content, 0

    def _exact_match(self, model: Any) -> dict[str, float]:
        """Share of held-out examples whose final answer greedy generation gets right."""
        metrics = {}
        for domain in self.config.generation_domains:
            if domain not in self.records or not self.config.generation_examples:
                continue
            records = self.records[domain][: self.config.generation_examples]
            hits = torch.zeros(2, dtype=torch.float64, device=model.device)
            starts = range(0, len(records), PROMPTS_PER_BATCH)
            batches = ((domain, records[s : s + PROMPTS_PER_BATCH], 1) for s in starts)
            for _, some, counts in self._shared(batches):
                right = self._answers_right(model, some)
                hits += counts * torch.tensor([sum(right), len(right)], device=model.device)
            correct, total = summed(hits).tolist()
            metrics[f"eval/{domain}/exact_match"] = correct / total
        return metrics

    def _answers_right(self, model: Any, records: np.ndarray) -> list[bool]:
        prompts = [self.held_out.prompt(int(r)) for r in records]
        length, ends = self.config.max_new_tokens, self.turn_ends
        with self.applied(records.tolist(), None):
            texts = generate(model, self.tokenizer, prompts, length, synced=self.synced, stop=ends)
        completions = [self.held_out.completion(int(r)) for r in records]
        references = [self.tokenizer.decode(c, skip_special_tokens=True) for c in completions]
        return [same_answer(t, r) for t, r in zip(texts, references, strict=True)]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    synced: bool = False,
    stop: Collection[int] = (),
) -> list[str]:
    """Greedy completions of tokenised prompts, as text without special tokens.

    A completion ends before the tokenizer's end of sequence, any of the model's own or a token in `stop` (a
    chat's end of turn). Nothing else of the model's generation settings applies.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, width - len(prompt) :] = 1
    ends = _end_tokens(model, tokenizer, stop)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )
    with _generating(model, greedy):
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
            synced_gpus=synced,
        )
    rows = [_before(row, ends) for row in out[:, width:].tolist()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


@contextmanager
def _generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """`model` with padded attention and `settings` alone: `generate` fills in gaps from the model's own."""
    own, packed = model.generation_config, model.config._attn_implementation == PACKED_ATTENTION
    if packed:
        model.set_attn_implementation("sdpa")
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        if packed:
            model.set_attn_implementation(PACKED_ATTENTION)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, stop: Collection[int]) -> list[int]:
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({t for t in (tokenizer.eos_token_id, *own, *stop) if t is not None})


def _before(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _turn_ends(held_out: Encoded, records: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens that the completions of `records` end with, whatever white space follows them."""
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends: set[int] = set()
    for record in records:
        for token in reversed(held_out.completion(int(record)).tolist()):
            if token in special:
                ends.add(token)
            elif str(tokenizer.decode([token])).strip():
                break
    return ends


def check_tokenizer(model_folder: Path, encoded_with: Path) -> None:
    """Refuse a model whose token ids are not those of the tokenizer that the data were encoded with.

    Raises:
        InputError: the vocabularies differ, or the model has no tokenizer.
    """
    try:
        own = AutoTokenizer.from_pretrained(model_folder, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise InputError(f"--model-folder: no tokenizer in {model_folder}: {_first_line(error)}") from None
    if own != AutoTokenizer.from_pretrained(encoded_with, local_files_only=True).get_vocab():
        raise InputError(
            f"--model-folder: the tokenizer in {model_folder} has another vocabulary than that in "
            f"{encoded_with}, which the data are encoded with"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def evaluate_folder(model_folder: Path, instructions: Path, run: Run) -> dict[str, float]:
    """Measure the model in a folder on encoded held-out instructions.

    A Hugging Face folder is loaded by stock transformers, a SIMoE folder by `raymoe.upcycle.simoe`.
    """
    from raymoe.upcycle.simoe import is_simoe  # it generates with this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    if is_simoe(model_folder):
        return _evaluate_simoe(model_folder, instructions, run, dtype, device)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    held_out = Encoded.load(instructions / "validation")
    evaluator = Evaluator(run.evaluation, held_out, tokenizer, max_length=run.data.max_length)
    return evaluator.measure(CausalLoss(model), model)


def _evaluate_simoe(
    folder: Path, instructions: Path, run: Run, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    from raymoe.upcycle.simoe import load_simoe

    simoe = load_simoe(folder, dtype, device, PACKED_ATTENTION)
    held_out = Encoded.load(instructions / "validation")

    @contextmanager
    def applied(records: Sequence[int], batch: Batch | None) -> Iterator[None]:
        c_SG = simoe.coefficients([held_out.prompt(r) for r in records])
        with simoe.interpolated.applied(c_SG, *((batch.documents, batch.input_ids.numel()) if batch else ())):
            yield

    tokenizer = AutoTokenizer.from_pretrained(simoe.config.dense, local_files_only=True)
    evaluator = Evaluator(
        run.evaluation, held_out, tokenizer, max_length=run.data.max_length, applied=applied
    )
    return evaluator.measure(CausalLoss(simoe.model), simoe.model)


def final_answer(text: str) -> str | None:
    """The number after the last `####`, else the last number of the text, as a whole number or fraction."""
    _, marked, tail = text.rpartition("####")
    numbers: list[str] = NUMBER.findall(tail if marked else text)
    if not numbers:
        return None
    number = (numbers[0] if marked else numbers[-1]).replace(",", "")
    numerator, _, denominator = number.partition("/")
    try:
        return str(Fraction(numerator) / Fraction(denominator or 1))
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or 1/0
        return number


def same_answer(text: str, reference: str) -> bool:
    """Whether both end in the same final answer; a text without a number is never right."""
    answer = final_answer(text)
    return answer is not None and answer == final_answer(reference)


def _loss_metrics(totals: dict[str, list[float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for domain, (nll, count) in totals.items():
        metrics |= {f"eval/{domain}/loss": nll / count, f"eval/{domain}/perplexity": _exp(nll / count)}
    mean = sum(nll for nll, _ in totals.values()) / sum(count for _, count in totals.values())
    return metrics | {"eval/loss": mean, "eval/perplexity": _exp(mean)}


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def summed(values: Tensor) -> Tensor:
    """`values` added up over all workers, in place; as they are in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _first(domains: Sequence[str], domain: str, limit: int) -> np.ndarray:
    """Indices of the first `limit` examples of `domain`."""
    return np.flatnonzero(np.asarray(domains) == domain)[:limit]
