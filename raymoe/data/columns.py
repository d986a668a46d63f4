"""Columns: turn a row into an instruction, whatever its columns are called.

A row is a conversation (`messages`, or ShareGPT's `conversations`), whose last assistant message is the
completion, or a pair of columns: those that the source names, else one of `PAIRS`. `id`, `domain`, `task` and
a system prompt are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from raymoe.config import Source
from raymoe.data.rows import BadRow, Table

Messages = tuple[tuple[str, str], ...]
"""(role, content) of each turn."""


class Pair(NamedTuple):
    """Column names of a prompt and its completion in common data sets."""

    prompt: str
    completion: str
    more: tuple[str, ...] = ()
    """Columns that continue the prompt, in rows that have them."""
    unless: tuple[str, ...] = ()
    """Columns that make the prompt incomplete: rows with them are refused rather than guessed at."""


PAIRS = (
    Pair("prompt", "completion"),
    Pair("instruction", "output", more=("input",)),  # Alpaca
    Pair("instruction", "response", more=("context", "input")),  # Dolly, Evol-Instruct
    Pair("question", "response", unless=("context",)),  # OpenOrca
    Pair("question", "answer", unless=("context", "choices", "options")),  # GSM8K
    Pair("query", "response"),  # MetaMathQA
    Pair("problem", "solution"),  # OSS-Instruct
)
SYSTEM = ("system", "system_prompt")
"""Columns that hold a system prompt."""
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Roles of ShareGPT's `from`."""


@dataclass(frozen=True)
class Instruction:
    """A prompt and its completion as text: messages to answer, and the answer to learn."""

    id: str
    domain: str
    task: str
    prompt: Messages
    completion: str
    source: str
    """`file:line`, for error messages."""


def instruction(row: Any, table: Table, line: int) -> Instruction:
    """Return the instruction in `row`; raises BadRow if it can't be used."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with keys, found {type(row).__name__}")
    prompt, completion = _with_system(row, *_prompt_and_completion(row, table.source), table.source)
    if not completion.strip():
        raise BadRow("empty completion")
    if not any(content.strip() for role, content in prompt if role != "system"):
        raise BadRow("empty prompt")
    domain = table.source.domain or _label(row, "domain", table.domain)
    task = table.source.task or _task(row, table.source.task_column, domain)
    name = _label(row, "id", f"{Path(table.name).name}:{line}")
    return Instruction(name, domain, task, prompt, completion, f"{table.name}:{line}")


def _task(row: Mapping[str, Any], column: str | None, domain: str) -> str:
    if column is not None and column not in row:
        raise BadRow(f"no column {column}, which task_column names")
    return _label(row, column or "task", domain)


def _label(row: Mapping[str, Any], key: str, default: str) -> str:
    value = row.get(key)
    if value is None or value == "":
        return default
    if not isinstance(value, str | int):
        raise BadRow(f"{key} is {type(value).__name__}, not text")
    return str(value)


def _prompt_and_completion(row: Mapping[str, Any], source: Source) -> tuple[Messages, str]:
    if source.prompt is not None and source.completion is not None:
        return _pair(row, Pair(source.prompt, source.completion))
    for column, turns in CONVERSATIONS.items():
        if row.get(column) is not None:
            return _split_conversation(turns(row[column], column))
    return _pair(row, _known_pair(row))


def _known_pair(row: Mapping[str, Any]) -> Pair:
    """Return the one of `PAIRS` that `row` has; raises BadRow if none or several match."""
    has = {key for key, value in row.items() if value is not None}
    found = [p for p in PAIRS if {p.prompt, p.completion} <= has and not has & set(p.unless)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{p.prompt} and {p.completion}" for p in found)
        raise BadRow(f"{choices}? Name the columns: set prompt and completion of the source")
    known = [*CONVERSATIONS, *(f"{p.prompt} and {p.completion}" for p in PAIRS)]
    raise BadRow(
        f"no known columns among {', '.join(map(str, row)) or 'none'}: expected {', '.join(known)}; "
        "for others, set prompt and completion of the source"
    )


def _pair(row: Mapping[str, Any], pair: Pair) -> tuple[Messages, str]:
    question, answer = (_column(row, name) for name in (pair.prompt, pair.completion))
    more = [_text(row[name], name) for name in pair.more if row.get(name)]
    if more:
        question = "\n\n".join(part for part in (_text(question, pair.prompt), *more) if part)
    prompt = _messages_or_text(question, pair.prompt, "user")
    return _split_conversation(prompt + _messages_or_text(answer, pair.completion, "assistant"))


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"no column {name}; its columns are {', '.join(map(str, row)) or 'none'}")
    return row[name]


def _with_system(
    row: Mapping[str, Any], prompt: Messages, completion: str, source: Source
) -> tuple[Messages, str]:
    """Prepend the system prompt of a column, unless the prompt already has one."""
    if any(role == "system" for role, _ in prompt):
        return prompt, completion
    if source.system is not None:
        text = _text(_column(row, source.system) or "", source.system)
    else:
        text = next((row[c] for c in SYSTEM if isinstance(row.get(c), str)), "")
    return ((("system", text), *prompt) if text.strip() else prompt), completion


def _split_conversation(messages: Messages) -> tuple[Messages, str]:
    """Split a conversation into what precedes its last assistant message, and that message."""
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=None)
    if last is None:
        raise BadRow("no assistant message")
    return messages[:last], messages[last][1]


def _messages_or_text(value: Any, key: str, role: str) -> Messages:
    return ((role, value),) if isinstance(value, str) else _messages(value, key)


def _messages(value: Any, key: str) -> Messages:
    return _turns(value, key, "role", "content")


def _sharegpt(value: Any, key: str) -> Messages:
    """Read ShareGPT's turns, or messages in its column."""
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping) and "from" not in value[0]:
        return _messages(value, key)
    turns = _turns(value, key, "from", "value")
    if unknown := {speaker for speaker, _ in turns} - SPEAKERS.keys():
        raise BadRow(f"{key}.from is {sorted(unknown)[0]!r}: expected one of {', '.join(SPEAKERS)}")
    return tuple((SPEAKERS[speaker], text) for speaker, text in turns)


def _turns(value: Any, key: str, role: str, content: str) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"{key} is {type(value).__name__}, not text or a list of messages")
    for turn in value:
        if not isinstance(turn, Mapping) or not {role, content} <= turn.keys():
            raise BadRow(f"{key} holds a turn without {role} and {content}")
    return tuple((_text(t[role], f"{key}.{role}"), _text(t[content], f"{key}.{content}")) for t in value)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type(value).__name__}, not text")
    return value


CONVERSATIONS: dict[str, Callable[[Any, str], Messages]] = {"messages": _messages, "conversations": _sharegpt}
"""Columns that hold a whole conversation, and the function that reads its turns."""
