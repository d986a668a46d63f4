"""Encoding, packing and collating, against formulas written out and the tokenizer's own output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raymoe.config import Data
from raymoe.data.columns import Instruction
from raymoe.data.instructions import Encoded, encode, prepare
from raymoe.data.packing import collate, epoch_sequences, pack
from raymoe.schema import InputError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ROW = {"prompt": "2 + 2?", "completion": "4"}


def write_jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def numbered(count: int, **more: str) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}", **more} for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(pico: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(pico)


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that has learnt to merge line ends with the indentation after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(["def f(x):\n    return x\n\n    y = 1\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        chat_template=template,
    )


# Tokens.


def spelled(tokenizer: PreTrainedTokenizerFast, encoded: Encoded, record: int) -> tuple[str, str]:
    return tokenizer.decode(encoded.prompt(record)), tokenizer.decode(encoded.completion(record))


def test_the_plain_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Sum?"))
    instructions = [
        Instruction("a", "d", "t", (("user", "2 + 2?"),), "4", "f:1"),
        Instruction("b", "d", "t", turns, "4</s>5", "f:2"),
    ]
    encoded = encode(instructions, tokenizer, Data(chat_template="plain"))
    assert spelled(tokenizer, encoded, 0) == ("<s>### Instruction:\n2 + 2?\n\n### Response:\n", "4</s>")
    assert spelled(tokenizer, encoded, 1) == (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello"
        "\n\n### Instruction:\nSum?\n\n### Response:\n",
        "4</s>5</s>",
    )
    eos = tokenizer.eos_token_id
    assert [int((encoded.completion(i) == eos).sum()) for i in (0, 1)] == [1, 1]  # not the one in the text
    assert encoded.example(0)[0] == tokenizer.bos_token_id and encoded.ids == ("a", "b")


def test_the_chat_template_splits_where_generation_starts(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(tokenizer, CHAT_TEMPLATE)
    turns = (("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?"))
    encoded = encode([Instruction("a", "d", "t", turns, "4", "f:1")], chat, Data())
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = chat.apply_chat_template([*messages, {"role": "assistant", "content": "4"}], return_dict=False)
    assert encoded.prompt(0).tolist() == prompt
    assert encoded.example(0).tolist() == whole
    assert spelled(chat, encoded, 0)[1] == "4</s>"


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_prompt_tokens_are_those_of_generation_where_a_merge_would_straddle(
    merging_tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer = with_template(merging_tokenizer, template) if template else merging_tokenizer
    instruction = Instruction("a", "d", "t", (("user", "def f(x):"),), "    return x", "f:1")
    encoded = encode([instruction], tokenizer, Data())
    prompt, completion = spelled(tokenizer, encoded, 0)
    straddling = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert straddling[: len(alone)] != alone  # the trap is real
    assert encoded.prompt(0).tolist() == alone
    assert completion.startswith("    return x")


def test_rows_that_the_template_refuses_or_rewrites_are_bad(tokenizer: PreTrainedTokenizerFast) -> None:
    late_system = Instruction("a", "d", "t", (("user", "x"), ("system", "y")), "z", "f:1")
    good = Instruction("b", "d", "t", (("user", "x"),), "z", "f:2")
    chat = with_template(tokenizer, CHAT_TEMPLATE)
    with pytest.raises(
        InputError, match=r"f:1: the tokenizer's chat template rejects it: system must come first"
    ):
        encode([late_system, good], chat, Data())
    kept = encode([late_system, good], chat, Data(on_bad_row="skip"))
    assert kept.ids == ("b",) and len(kept.skipped) == 1
    rewriting = with_template(tokenizer, "{{ messages | length }}{% if add_generation_prompt %}:{% endif %}")
    with pytest.raises(
        InputError, match=r"f:2: .* renders the prompt differently within the whole conversation"
    ):
        encode([good], rewriting, Data())


def test_rows_that_are_too_long_are_bad(tokenizer: PreTrainedTokenizerFast) -> None:
    instructions = [Instruction(str(n), "d", "t", (("user", "x"),), "y" * n, f"f:{n}") for n in (5, 6)]
    fits = len(encode(instructions[:1], tokenizer, Data()).tokens)
    with pytest.raises(InputError, match=rf"f:6: {fits + 1} tokens, more than data.max_length {fits}"):
        encode(instructions, tokenizer, Data(max_length=fits))
    kept = encode(instructions, tokenizer, Data(max_length=fits, on_bad_row="skip"))
    assert kept.ids == ("5",) and kept.skipped[0].startswith("f:6")
    with pytest.raises(InputError, match="no examples"):
        encode(instructions, tokenizer, Data(max_length=8, on_bad_row="skip"))


def test_saved_and_loaded_is_the_same_and_mapped_into_memory(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    instructions = [
        Instruction(f"id {n}", "d", f"t{n}", (("user", "x" * n),), "y" * n, "f:1") for n in range(1, 9)
    ]
    encoded = encode(instructions, tokenizer, Data())
    encoded.save(tmp_path / "encoded")
    loaded = Encoded.load(tmp_path / "encoded")
    assert isinstance(loaded.tokens, np.memmap)
    for name in ("tokens", "offsets", "prompt_lengths"):
        actual, expected = getattr(loaded, name), getattr(encoded, name)
        assert actual.dtype == expected.dtype and np.array_equal(actual, expected)
    assert (loaded.ids, loaded.domains, loaded.tasks) == (encoded.ids, encoded.domains, encoded.tasks)


def test_prepare_writes_both_splits_and_says_what_is_in_them(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "math.train.jsonl", [*numbered(8), {"prompt": "x", "completion": "y" * 999}])
    write_jsonl(folder / "math.dev.jsonl", [{"prompt": "question 7", "completion": "z"}, ROW])
    info = prepare(Data(train=str(folder), on_bad_row="skip"), pico, tmp_path / "out", corpus=None, seed=0)
    train = Encoded.load(tmp_path / "out" / "train")
    assert len(train) == info["train_examples"] == 7 and info["train_domains"] == {"math": 7}
    assert info["train_held_out"] == 1
    assert info["train_skipped"] == 1 and info["train_tokens"] == len(train.tokens)
    assert info["validation_examples"] == len(Encoded.load(tmp_path / "out" / "validation")) == 2
    assert info["train_sources"][0]["path"] == str(folder / "math.train.jsonl")
    json.dumps(info)


# Packing.


@pytest.mark.parametrize("capacity", [40, 100, 512])
def test_every_example_is_packed_once_and_windows_are_full(capacity: int) -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(3.0, 0.7, 20_000).astype(np.int64) + 2, capacity)
    order = generator.permutation(len(lengths))
    windows = pack(lengths, capacity, order)
    assert sorted(np.concatenate(windows).tolist()) == list(range(len(lengths)))
    assert max(lengths[window].sum() for window in windows) <= capacity
    assert lengths.sum() / (len(windows) * capacity) > 0.95
    again = pack(lengths, capacity, order)
    assert all(np.array_equal(a, b) for a, b in zip(windows, again, strict=True))


def test_an_example_longer_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens does not fit a sequence of 10"):
        pack(np.array([3, 12]), 10, np.arange(2))


def random_encoded(lengths: Sequence[int], seed: int = 0) -> Encoded:
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(0, 256, offsets[-1], dtype=np.int32)
    prompts = generator.integers(1, np.asarray(lengths)).astype(np.int32)
    labels = tuple(map(str, range(len(lengths))))
    return Encoded(tokens, offsets, prompts, labels, labels, labels)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    encoded = random_encoded(np.random.default_rng(0).integers(2, 30, 300).tolist())
    orders = {
        key: [w.tolist() for w in epoch_sequences(encoded, 64, *key)] for key in ((0, 0), (0, 1), (1, 0))
    }
    assert [w.tolist() for w in epoch_sequences(encoded, 64, 0, 0)] == orders[0, 0]
    assert len({json.dumps(order) for order in orders.values()}) == 3
    for order in orders.values():
        assert sorted(record for window in order for record in window) == list(range(300))
        halves = [sum(map(len, half)) for half in (order[: len(order) // 2], order[len(order) // 2 :])]
        assert max(halves) < 1.2 * min(halves)  # the emptier windows are not all at the end


def test_a_batch_spelled_out() -> None:
    encoded = Encoded(
        tokens=np.array([10, 11, 12, 13, 20, 21, 30, 31, 32], dtype=np.int32),
        offsets=np.array([0, 4, 6, 9]),
        prompt_lengths=np.array([2, 1, 1], dtype=np.int32),
        ids=("a", "b", "c"),
        domains=("d",) * 3,
        tasks=("t",) * 3,
    )
    batch = collate(encoded, [np.array([2, 1]), np.array([0])], 6)
    assert batch.input_ids.tolist() == [[30, 31, 32, 20, 21, 0], [10, 11, 12, 13, 0, 0]]
    assert batch.labels.tolist() == [[31, 32, -100, 21, -100, -100], [-100, 12, 13, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch.mask.tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]
    assert batch.targets.tolist() == [0, 1, 3, 7, 8]
    assert batch.documents == ((0, 3), (3, 5), (6, 10))
    assert batch.completion_lengths == (2, 1, 2)
    assert batch.num_tokens == 9
    assert batch.to("cpu").labels.equal(batch.labels)
    with pytest.raises(ValueError, match="sequence 0 has 7 tokens, more than 6"):
        collate(encoded, [np.array([0, 2])], 6)


def test_labels_are_the_next_tokens_of_the_completion_and_nothing_else() -> None:
    encoded = random_encoded([9, 4, 17, 2, 12, 6, 21, 3])
    windows = epoch_sequences(encoded, 32, seed=0, epoch=0)
    batch = collate(encoded, windows, 32)
    ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
    expected = torch.full_like(labels, -100)
    records = [int(record) for window in windows for record in window]
    for (start, end), record in zip(batch.documents, records, strict=True):
        assert ids[start:end].tolist() == encoded.example(record).tolist()
        for position in range(start + int(encoded.prompt_lengths[record]), end):
            expected[position - 1] = ids[position]
    assert torch.equal(labels, expected)
    assert torch.equal(batch.targets, torch.nonzero(labels != -100).flatten())
