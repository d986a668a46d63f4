"""Encoding, against texts written out and the tokenizer's own output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raymoe.config import Data
from raymoe.data.columns import Instruction
from raymoe.data.instructions import Encoded, encode, prepare
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
    """A byte-level BPE that merges line ends with the indentation after them."""
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


def spelled(tokenizer: PreTrainedTokenizerFast, encoded: Encoded, index: int) -> tuple[str, str]:
    return tokenizer.decode(encoded.prompt(index)), tokenizer.decode(encoded.completion(index))


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


def test_instructions_that_the_template_rejects_or_rewrites_are_bad(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
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


def test_instructions_that_are_too_long_are_bad(tokenizer: PreTrainedTokenizerFast) -> None:
    instructions = [Instruction(str(n), "d", "t", (("user", "x"),), "y" * n, f"f:{n}") for n in (5, 6)]
    fits = len(encode(instructions[:1], tokenizer, Data()).tokens)
    with pytest.raises(InputError, match=rf"f:6: {fits + 1} tokens, more than data.max_length {fits}"):
        encode(instructions, tokenizer, Data(max_length=fits))
    kept = encode(instructions, tokenizer, Data(max_length=fits, on_bad_row="skip"))
    assert kept.ids == ("5",) and kept.skipped[0].startswith("f:6")
    with pytest.raises(InputError, match="no examples"):
        encode(instructions, tokenizer, Data(max_length=8, on_bad_row="skip"))


def test_loading_gives_what_was_saved_memory_mapped(
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


def test_prepare_writes_both_splits_and_describes_them(pico: Path, tmp_path: Path) -> None:
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
