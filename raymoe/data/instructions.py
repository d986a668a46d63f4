"""Instructions: tokenise them into examples.

    reading = sources.read(Data(train="data.jsonl"), "train", corpus=None, seed=0)
    encoded = encode(reading.instructions, tokenizer, data)         # flat token arrays, memory-mapped on load

Shapes: n examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymoe.config import Data
from raymoe.data.columns import Instruction, Messages
from raymoe.data.rows import BadRow
from raymoe.data.sources import Split, read, refused
from raymoe.schema import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
ENCODE_ROWS = 8192
"""Instructions tokenised together."""


def prepare(
    data: Data, tokenizer_folder: Path, out: Path, *, corpus: Path | None, seed: int
) -> dict[str, Any]:
    """Read and encode both splits into `out/train` and `out/validation`; returns counts and lineage.

    Raises:
        InputError: a source can't be read, has a bad row (unless those are skipped) or has no rows.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    tokenizer.model_max_length = 10**9  # longer examples are handled here: silence the tokenizer's warning
    info: dict[str, Any] = {}
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        reading = read(data, split, corpus, seed)
        encoded = encode(reading.instructions, tokenizer, data)
        encoded.save(out / split)
        skipped = [*reading.skipped, *encoded.skipped]
        info |= {
            f"{split}_examples": len(encoded),
            f"{split}_tokens": len(encoded.tokens),
            f"{split}_completion_tokens": int((encoded.lengths - encoded.prompt_lengths).sum()),
            f"{split}_skipped": len(skipped),
            f"{split}_skipped_first": skipped[:20],
            f"{split}_domains": dict(Counter(encoded.domains)),
            f"{split}_sources": reading.sources,
        }
        if split == "train":
            info["train_held_out"] = reading.held_out
    return info


# Tokens.


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples, tokenised into one flat array; example i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: NDArray[np.int32]
    """[all tokens]"""
    offsets: NDArray[np.int64]
    """[n + 1]"""
    prompt_lengths: NDArray[np.int32]
    """[n] number of leading tokens that are the prompt."""
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    """`file:line: reason` of each skipped instruction; not saved."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example [n]."""
        return np.diff(self.offsets)

    def example(self, index: int) -> NDArray[np.int32]:
        """Return all tokens of one example."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Return the tokens that one example's generation starts from."""
        return self.example(index)[: self.prompt_lengths[index]]

    def completion(self, index: int) -> NDArray[np.int32]:
        """Return the tokens to learn, the end of turn included."""
        return self.example(index)[self.prompt_lengths[index] :]

    def save(self, folder: Path) -> None:
        """Write `folder`: three .npy arrays and records.parquet."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokens", "offsets", "prompt_lengths"):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        labels = {"id": list(self.ids), "domain": list(self.domains), "task": list(self.tasks)}
        pq.write_table(pa.table(labels), folder / "records.parquet")

    @classmethod
    def load(cls, folder: Path) -> Encoded:
        """Load what `save` wrote; the arrays are memory-mapped."""
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "offsets", "prompt_lengths")
        }
        table = pq.read_table(folder / "records.parquet")
        ids, domains, tasks = (tuple(table[name].to_pylist()) for name in ("id", "domain", "task"))
        return cls(**arrays, ids=ids, domains=domains, tasks=tasks)


def encode(instructions: Sequence[Instruction], tokenizer: PreTrainedTokenizerFast, data: Data) -> Encoded:
    """Render and tokenise instructions; prompt tokens are exactly those that generation starts from.

    With the tokenizer's chat template, the completion is what the whole conversation adds to the prompt and its
    generation prompt. Without one: beginning of sequence, sections `### Instruction:` and `### Response:`, the
    completion, end of sequence.

    Raises:
        InputError: an instruction is longer than `data.max_length` or can't be rendered by the template (unless
            bad rows are skipped), or none is left.
    """
    own_template = data.chat_template == "tokenizer" and tokenizer.chat_template is not None
    encode_some = _encode_chat if own_template else _encode_plain
    kept: list[Instruction] = []
    examples: list[list[int]] = []
    prompt_lengths: list[int] = []
    skipped: list[str] = []
    for start in range(0, len(instructions), ENCODE_ROWS):
        some = instructions[start : start + ENCODE_ROWS]
        for instruction, pair in zip(some, encode_some(some, tokenizer), strict=True):
            if reason := _unusable(pair, data):
                skipped.append(refused(instruction.source, reason, data))
            else:
                prompt, completion = pair  # type: ignore[misc]
                kept.append(instruction)
                examples.append(prompt + completion)
                prompt_lengths.append(len(prompt))
    if not kept:
        raise InputError(f"data: no examples to encode ({len(skipped)} skipped; the first: {skipped[:1]})")
    return Encoded(
        tokens=_flat(examples),
        offsets=np.cumsum([0, *map(len, examples)], dtype=np.int64),
        prompt_lengths=np.asarray(prompt_lengths, dtype=np.int32),
        ids=tuple(x.id for x in kept),
        domains=tuple(x.domain for x in kept),
        tasks=tuple(x.task for x in kept),
        skipped=tuple(skipped),
    )


TokenPair = tuple[list[int], list[int]]
"""Tokens of a prompt and of its completion."""


def _flat(examples: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    total = sum(map(len, examples))
    return np.fromiter((token for example in examples for token in example), dtype=np.int32, count=total)


def _unusable(pair: TokenPair | BadRow, data: Data) -> str | None:
    """Return why an encoded instruction can't be used, None if it can."""
    if isinstance(pair, BadRow):
        return str(pair)
    length = len(pair[0]) + len(pair[1])
    if length > data.max_length:
        return f"{length} tokens, more than data.max_length {data.max_length}"
    return None if all(pair) else "no tokens in its prompt or completion"


def _encode_plain(
    instructions: Sequence[Instruction], tokenizer: PreTrainedTokenizerFast
) -> Iterable[TokenPair | BadRow]:
    """Encode with raymoe's own template; special tokens spelled out in the text stay text."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer {tokenizer.name_or_path} has no end-of-sequence token")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = [(_plain_prompt(x.prompt), x.completion) for x in instructions]
    for pair in _tokenize(texts, tokenizer, split_special_tokens=True):
        if isinstance(pair, BadRow):
            yield pair
        else:
            yield start + pair[0], [*pair[1], tokenizer.eos_token_id]


def _plain_prompt(messages: Messages) -> str:
    headings = {"user": "### Instruction:\n", "assistant": "### Response:\n", "system": ""}
    parts = [headings.get(role, f"### {role.capitalize()}:\n") + content for role, content in messages]
    return "\n\n".join([*parts, headings["assistant"]])


def _encode_chat(
    instructions: Sequence[Instruction], tokenizer: PreTrainedTokenizerFast
) -> Iterable[TokenPair | BadRow]:
    """Encode with the tokenizer's own chat template."""
    rendered = [_render(x, tokenizer) for x in instructions]
    good = [pair for pair in rendered if not isinstance(pair, BadRow)]
    encoded = iter(_tokenize(good, tokenizer, split_special_tokens=False))
    return [pair if isinstance(pair, BadRow) else next(encoded) for pair in rendered]


def _render(instruction: Instruction, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str] | BadRow:
    """Render the texts of prompt and completion."""
    import jinja2

    messages = [{"role": role, "content": content} for role, content in instruction.prompt]
    answer = {"role": "assistant", "content": instruction.completion}
    try:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        return BadRow(f"the tokenizer's chat template rejects it: {' '.join(str(error).split())}")
    if not whole.startswith(prompt):
        return BadRow(
            "the tokenizer's chat template renders the prompt differently within the whole conversation: "
            "use data.chat_template plain"
        )
    return prompt, whole[len(prompt) :]


def _tokenize(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, split_special_tokens: bool
) -> list[TokenPair | BadRow]:
    """Tokenise prompts and completions.

    A completion is what the whole text adds to the prompt's tokens. If a token of the whole text straddles the
    boundary, generation could not produce it: then the completion is tokenised by itself, and both together
    must still spell the same text.
    """

    def ids(some: Sequence[str]) -> list[list[int]]:
        if not some:
            return []
        options = {"split_special_tokens": split_special_tokens}
        return tokenizer(list(some), add_special_tokens=False, **options)["input_ids"]  # type: ignore[no-any-return]

    prompts = ids([prompt for prompt, _ in texts])
    wholes = ids([prompt + completion for prompt, completion in texts])
    straddles = [i for i, (p, w) in enumerate(zip(prompts, wholes, strict=True)) if w[: len(p)] != p]
    apart = dict(zip(straddles, ids([texts[i][1] for i in straddles]), strict=True))
    return [
        _joined(p, apart[i], w, tokenizer) if i in apart else (p, w[len(p) :])
        for i, (p, w) in enumerate(zip(prompts, wholes, strict=True))
    ]


def _joined(
    prompt: list[int], completion: list[int], whole: list[int], tokenizer: PreTrainedTokenizerFast
) -> TokenPair | BadRow:
    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    if text(prompt + completion) != text(whole):
        return BadRow(
            "the tokenizer can't split it between prompt and completion: use data.chat_template plain"
        )
    return prompt, completion
