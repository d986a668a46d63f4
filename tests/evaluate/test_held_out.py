from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raymoe.config import Data, Evaluation, Run
from raymoe.data.instructions import Encoded, encode
from raymoe.data.packing import Batch
from raymoe.data.sources import read
from raymoe.evaluate import held_out as evaluate
from raymoe.evaluate.folder import evaluate_folder
from raymoe.evaluate.held_out import Evaluator
from raymoe.methods import SparseUpcycling
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.generate import generate
from raymoe.models.moe import sparse_layers, upcycle_model
from raymoe.models.packed_attention import PACKED_ATTENTION

MAX_LENGTH = 160
DOMAINS = ("code", "math", "text")


def stock(folder: Path) -> PreTrainedModel:
    """Return the model as plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def packed(folder: Path) -> PreTrainedModel:
    """Return the model as the training loop loads it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
    )
    model.config.use_cache = False
    return model


def upcycled(folder: Path) -> PreTrainedModel:
    rows = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    return upcycle_model(packed(folder), rows, SparseUpcycling(num_experts=3, gating="softmax"))


@pytest.fixture(scope="module")
def tokenizer(pico: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pico)


@pytest.fixture(scope="module")
def held_out(data_folder: Path, tokenizer: Any) -> Encoded:
    """Return six held-out examples of each domain."""
    data = Data(train=str(data_folder), max_length=MAX_LENGTH, chat_template="plain")
    instructions = read(data, "validation", corpus=None, seed=0).instructions
    return encode(
        [x for d in DOMAINS for x in [y for y in instructions if y.domain == d][:6]], tokenizer, data
    )


def evaluator(held_out: Encoded, tokenizer: Any, **more: Any) -> Evaluator:
    settings = {"generation_examples": 0, **more.pop("config", {})}
    return Evaluator(Evaluation(**settings), held_out, tokenizer, max_length=MAX_LENGTH, **more)


@torch.no_grad()
def losses_one_by_one(model: PreTrainedModel, held_out: Encoded, limit: int = 100) -> dict[str, list[float]]:
    """Return, by domain, the negative log-likelihood of every completion token."""
    losses: dict[str, list[float]] = {d: [] for d in DOMAINS}
    used = dict.fromkeys(DOMAINS, 0)
    for i, domain in enumerate(held_out.domains):
        if used[domain] == limit:
            continue
        used[domain] += 1
        ids = torch.from_numpy(held_out.example(i).astype(np.int64))
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        prompt = len(held_out.prompt(i))
        losses[domain] += [-float(log_p[t - 1, ids[t]]) for t in range(prompt, len(ids))]
    return losses


def loss_metrics(losses: dict[str, list[float]]) -> dict[str, float]:
    everything = [x for some in losses.values() for x in some]
    means = {f"eval/{d}/": np.mean(some) for d, some in losses.items()} | {"eval/": np.mean(everything)}
    return {f"{k}loss": float(m) for k, m in means.items()} | {
        f"{k}perplexity": math.exp(m) for k, m in means.items()
    }


# ---- losses


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_losses_are_those_of_transformers_one_by_one(
    dense_models: dict[str, Path], family: str, held_out: Encoded, tokenizer: Any
) -> None:
    folder = dense_models[family]
    model = packed(folder).train()
    metrics = evaluator(held_out, tokenizer).measure(CausalLoss(model), model)
    expected = loss_metrics(losses_one_by_one(stock(folder), held_out))
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert len({round(expected[f"eval/{d}/loss"], 3) for d in DOMAINS}) == 3
    assert model.training


def test_at_most_so_many_examples_per_domain(pico: Path, held_out: Encoded, tokenizer: Any) -> None:
    model = packed(pico)
    some = evaluator(held_out, tokenizer, config={"max_examples_per_domain": 3})
    expected = loss_metrics(losses_one_by_one(stock(pico), held_out, limit=3))
    assert some.measure(CausalLoss(model), model) == pytest.approx(expected, rel=1e-5)


def test_a_folder_is_measured_like_the_model_in_it(pico: Path, held_out: Encoded, tmp_path: Path) -> None:
    held_out.save(tmp_path / "validation")
    run = Run(data=Data(max_length=MAX_LENGTH), evaluation=Evaluation(generation_examples=0))
    metrics = evaluate_folder(pico, tmp_path, run)
    assert metrics == pytest.approx(loss_metrics(losses_one_by_one(stock(pico), held_out)), rel=1e-5)


@torch.no_grad()
def test_load_is_the_share_of_each_domains_tokens(pico: Path, held_out: Encoded, tokenizer: Any) -> None:
    model = upcycled(pico).eval()
    metrics = evaluator(held_out, tokenizer).measure(CausalLoss(model), model)
    model.set_attn_implementation("eager")
    for domain in DOMAINS:
        counts = np.zeros((2, 3))
        for i in np.flatnonzero(np.asarray(held_out.domains) == domain):
            model(torch.from_numpy(held_out.example(int(i)).astype(np.int64))[None])
            for layer, sparse in enumerate(sparse_layers(model)):
                counts[layer] += np.bincount(sparse.take_routing().expert_ids.flatten().numpy(), minlength=3)
        shares = (counts / counts.sum(1, keepdims=True)).mean(0)
        assert [metrics[f"routing/{domain}/load/{e}"] for e in range(3)] == pytest.approx(
            list(shares), abs=1e-9
        )
        assert shares.max() > 1.1 / 3


# ---- several workers


class Workers:
    """A process group of threads: sums what they pass in at the same call."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.barrier = threading.Barrier(number, timeout=60)
        self.given: list[Any] = [None] * number
        self.here = threading.local()

    def summed(self, values: Tensor) -> Tensor:
        self.given[self.here.rank] = values.clone()
        self.barrier.wait()
        total: Tensor = sum(self.given)  # type: ignore[assignment]
        self.barrier.wait()
        return total

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.number

        def enter(rank: int) -> None:
            self.here.rank = rank
            results[rank] = work(rank)

        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize(("number", "synced"), [(2, False), (2, True), (3, True)])
def test_workers_share_the_work_and_have_the_same_metrics(
    pico: Path,
    held_out: Encoded,
    tokenizer: Any,
    number: int,
    synced: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "SEQUENCES_PER_FORWARD", 1)
    monkeypatch.setattr(evaluate, "PROMPTS_PER_BATCH", 2)
    config = {"generation_examples": 5, "generation_domains": ("math", "nowhere"), "max_new_tokens": 2}
    whole = upcycled(pico)
    forwards = [0] * (number + 1)

    def counting(model: PreTrainedModel, rank: int) -> Callable[[Batch], Any]:
        loss = CausalLoss(model)

        def forward(batch: Batch) -> Any:
            forwards[rank] += 1
            return loss(batch)

        return forward

    expected = evaluator(held_out, tokenizer, config=config).measure(counting(whole, number), whole)
    workers = Workers(number)
    monkeypatch.setattr(evaluate, "summed", workers.summed)
    models = [upcycled(pico) for _ in range(number)]

    def work(rank: int) -> dict[str, float]:
        share = evaluator(held_out, tokenizer, config=config, rank=rank, world_size=number, synced=synced)
        return share.measure(counting(models[rank], rank), models[rank])

    monkeypatch.setattr(evaluate, "generate", answers(held_out))
    for metrics in workers.run(work):
        for name, value in expected.items():
            if "exact_match" not in name:
                assert metrics[name] == pytest.approx(value, rel=1e-6), name
        assert metrics["eval/math/exact_match"] == 3 / 5  # 0, 1 and 3
        assert metrics.keys() == expected.keys()
    *shares, all_forwards = forwards
    assert sum(shares) == all_forwards or synced
    assert max(shares) == math.ceil(all_forwards / number) < all_forwards
    if synced:
        assert len(set(shares)) == 1


# ---- answers


def answers(held_out: Encoded) -> Callable[..., list[str]]:
    """Return a `generate` that answers correctly, except the math examples 2 and 4."""
    math_examples = np.flatnonzero(np.asarray(held_out.domains) == "math")
    indices = {bytes(held_out.prompt(int(example))): i for i, example in enumerate(math_examples)}

    def generate(model: Any, tokenizer: Any, prompts: Sequence[Any], *_: Any, **__: Any) -> list[str]:
        texts = []
        for prompt in prompts:
            index = indices[bytes(prompt)]
            reference = tokenizer.decode(held_out.completion(int(math_examples[index])))
            right = index not in (2, 4)
            texts.append(reference if right else "I say\n#### -1")
        return texts

    return generate


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generation_is_transformers_greedy_one_by_one_without_padding(
    dense_models: dict[str, Path], family: str, held_out: Encoded
) -> None:
    folder = dense_models[family]
    tokenizer, model, reference = AutoTokenizer.from_pretrained(folder), packed(folder).eval(), stock(folder)
    prompts = [held_out.prompt(i) for i in (0, 5, 8, 15)]
    assert len({len(p) for p in prompts}) > 1

    def one_by_one() -> list[Tensor]:
        return [
            reference.generate(
                torch.from_numpy(p.astype(np.int64))[None],
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(p) :]
            for p in prompts
        ]

    free = one_by_one()
    assert generate(model, tokenizer, prompts, 12) == [
        tokenizer.decode(t, skip_special_tokens=True) for t in free
    ]
    # the fourth token that the first prompt brings ends a text: some stop early, some don't
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(free[0][3]))
    stopped = one_by_one()
    assert min(map(len, stopped)) < 12
    assert generate(model, tokenizer, prompts, 12) == [
        tokenizer.decode(t[t != tokenizer.eos_token_id], skip_special_tokens=True) for t in stopped
    ]
    assert model.config._attn_implementation == PACKED_ATTENTION


@torch.no_grad()
def argmax_loop(model: PreTrainedModel, prompt: np.ndarray, steps: int) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_the_models_own_generation_settings_do_not_apply(
    pico: Path, held_out: Encoded, tokenizer: Any
) -> None:
    prompts = [held_out.prompt(i) for i in (0, 5, 8, 15)]
    model, reference = packed(pico).eval(), stock(pico)
    loops = [argmax_loop(reference, p, 12) for p in prompts]
    nasty = GenerationConfig(
        eos_token_id=[257, loops[0][6]],  # this alone is meant
        do_sample=True,
        temperature=2.0,
        top_k=3,
        num_beams=3,
        num_return_sequences=2,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        max_length=20,
        suppress_tokens=[loop[0] for loop in loops],
        bad_words_ids=[[loops[1][1]]],
        forced_eos_token_id=65,
        sequence_bias=[[[65], 50.0]],
        return_dict_in_generate=True,
    )
    model.generation_config = nasty
    expected = []
    for loop in loops:
        ends = [i for i, token in enumerate(loop) if token in (257, loops[0][6])]
        expected.append(tokenizer.decode(loop[: ends[0] if ends else 12], skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, prompts, 12) == expected
    assert model.generation_config is nasty


def test_generation_ends_before_the_end_of_the_turn(pico: Path, held_out: Encoded, tokenizer: Any) -> None:
    prompts = [held_out.prompt(i) for i in (0, 5, 8, 15)]
    model, reference = packed(pico).eval(), stock(pico)
    loops = [argmax_loop(reference, p, 12) for p in prompts]
    stop = loops[2][3]
    expected = [loop[: loop.index(stop)] if stop in loop else loop for loop in loops]
    assert {len(e) for e in expected} > {12}  # some stop early, some don't
    texts = generate(model, tokenizer, prompts, 12, stop={stop})
    assert texts == [tokenizer.decode(e, skip_special_tokens=True) for e in expected]


def test_turns_end_with_the_last_special_token_of_held_out_completions(pico: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(pico)
    marks = [AddedToken(t, special=True) for t in ("<|im_end|>", "<|tool|>", "<|unused|>")]
    tokenizer.add_tokens(marks)
    end, tool, _ = tokenizer.convert_tokens_to_ids([str(m) for m in marks])
    completions = ["<|tool|>four<|im_end|>\n", "five<|im_end|>\n"]
    rows = [tokenizer.encode(c, add_special_tokens=False) for c in completions]
    assert tool in rows[0] and end in rows[0]
    labels = ("math",) * 2
    chats = Encoded(
        np.array([1, *rows[0], 1, *rows[1]], np.int32),
        np.cumsum([0, *(len(row) + 1 for row in rows)]),
        np.array([1, 1], np.int32),
        labels,
        labels,
        labels,
    )
    assert evaluator(chats, tokenizer).turn_ends == {end}


def test_exact_match_is_the_share_of_right_answers(
    pico: Path, held_out: Encoded, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "generate", answers(held_out))
    monkeypatch.setattr(evaluate, "PROMPTS_PER_BATCH", 3)
    model = packed(pico)
    for examples, expected in {1: 1.0, 3: 2 / 3, 5: 3 / 5, 100: 4 / 6}.items():
        some = evaluator(held_out, tokenizer, config={"generation_examples": examples})
        assert some.measure(CausalLoss(model), model)["eval/math/exact_match"] == pytest.approx(expected)
    none = evaluator(
        held_out, tokenizer, config={"generation_domains": ("nowhere",), "generation_examples": 5}
    )
    assert not any("exact_match" in name for name in none.measure(CausalLoss(model), model))
