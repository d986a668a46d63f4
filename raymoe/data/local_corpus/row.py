"""A row of the local corpus, and which rows are usable."""

from __future__ import annotations

import re
from dataclasses import dataclass

REVISION = 3
"""Raise it whenever a change in this package changes what is written."""
MAX_ESTIMATED_TOKENS = 400


@dataclass(frozen=True)
class Row:
    """One row of a JSONL file. Rows of one `source` stay in one split."""

    prompt: str
    completion: str
    domain: str
    task: str
    source: str


def usable(row: Row) -> bool:
    """True if the row is printable and short enough."""
    text = row.prompt + row.completion
    printable = all(character.isprintable() or character == "\n" for character in text)
    return printable and _estimated_tokens(text) <= MAX_ESTIMATED_TOKENS


def _estimated_tokens(text: str) -> int:
    """Estimate, on the high side, the tokens of `text` under a byte-level BPE with a vocabulary of 2048."""
    words = re.compile(r"[A-Z]?[a-z]+")
    rest = words.sub("", re.sub(r" (?=[^\s\d])", "", re.sub(r" {2,}", "\t", text)))
    return sum(-(-len(word) // 3) for word in words.findall(text)) + len(rest.encode())
