"""Reading: shapes of rows, splits, mixtures, and the hub (a server on this machine)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymoe.cli.options import parse_overrides
from raymoe.config import Data, RunFile, Source, load, validate
from raymoe.data.columns import Instruction
from raymoe.data.sources import read
from raymoe.schema import InputError
from raymoe.stages import instructions as instructions_stage

ROW = {"prompt": "2 + 2?", "completion": "4"}
SUM = (("user", "2 + 2?"),)
HALF = '{"prompt": "x\\ud800", "completion": "y"}'


def write_jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def numbered(count: int, first: int = 0, **more: str) -> list[dict[str, str]]:
    numbers = range(first, first + count)
    return [{"prompt": f"question {i}", "completion": f"answer {i}", **more} for i in numbers]


def other(folder: Path) -> str:
    """Return held-out data that share no prompt with the tests' rows."""
    (folder / "other").mkdir(exist_ok=True)
    return str(write_jsonl(folder / "other" / "held_out.jsonl", numbered(1, first=10**6)))


# Shapes of a row.


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        (ROW, (("user", "2 + 2?"),), "4"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "2 + 2?"},
                    {"role": "assistant", "content": "4"},
                ]
            },
            (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?")),
            "4",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "2 + 2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            (("user", "2 + 2?"),),
            "4",
        ),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, (("user", "Add.\n\n2, 2"),), "4"),
        ({"instruction": "Add 2, 2.", "input": "", "output": "4"}, (("user", "Add 2, 2."),), "4"),
        (
            {"instruction": "Add.", "context": "2, 2", "response": "4", "category": "sums"},
            (("user", "Add.\n\n2, 2"),),
            "4",
        ),
        ({"system_prompt": "", "question": "2 + 2?", "response": "4"}, SUM, "4"),
        (
            {"system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
            (("system", "Be brief."), *SUM),
            "4",
        ),
        ({"question": "2 + 2?", "answer": "4"}, SUM, "4"),
        ({"type": "x", "query": "2 + 2?", "original_question": "1 + 1?", "response": "4"}, SUM, "4"),
        ({"lang": "c", "seed": "x", "problem": "2 + 2?", "solution": "4"}, SUM, "4"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief.", "weight": None},
                    {"from": "human", "value": "Hi", "weight": 0},
                    {"from": "gpt", "value": "Hello", "weight": 1},
                    {"from": "human", "value": "2 + 2?", "weight": 0},
                    {"from": "gpt", "value": "4", "weight": 1},
                ]
            },
            (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?")),
            "4",
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
            },
            (("system", "Be brief."), *SUM),
            "4",
        ),
        (
            {
                "conversations": [
                    {"role": "user", "content": "2 + 2?"},
                    {"role": "assistant", "content": "4"},
                ]
            },
            SUM,
            "4",
        ),
    ],
    ids=[
        *("prompt_completion", "messages", "prompt_messages", "alpaca", "alpaca_no_input", "dolly"),
        *("openorca", "openorca_system", "gsm8k", "metamath", "oss_instruct"),
        *("sharegpt", "sharegpt_system", "sharegpt_roles"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shapes_of_a_row(
    tmp_path: Path, row: dict[str, Any], prompt: Any, completion: str, suffix: str
) -> None:
    file, rows = tmp_path / f"sums{suffix}", [row, {**row, "id": 7, "domain": "math", "task": "add"}]
    if suffix == ".jsonl":
        write_jsonl(file, rows)
    else:
        pq.write_table(
            pa.Table.from_pylist([{"id": None, "domain": None, "task": None, **r} for r in rows]), file
        )
    data = Data(train=str(file), validation=other(tmp_path))
    plain, labelled = read(data, "train", None, seed=0).instructions
    assert plain == Instruction(f"{file.name}:1", "sums", "sums", prompt, completion, f"{file}:1")
    assert labelled == Instruction("7", "math", "add", prompt, completion, f"{file}:2")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not valid JSON: Expecting property name"),
        ("[1, 2]", "expected an object with keys, found list"),
        ("[" * 200_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        (HALF, "not valid Unicode: half of a surrogate pair"),
        (HALF.replace("prompt", "a\\ud800"), "not valid Unicode: half of a surrogate pair"),
        (
            {"text": "x"},
            "no known columns among text: expected messages, conversations, prompt and completion",
        ),
        ({"prompt": "x", "completion": " \n"}, "empty completion"),
        ({"prompt": "", "completion": "x"}, "empty prompt"),
        ({"prompt": "x", "completion": 4}, "completion is int"),
        ({"prompt": "x", "completion": "y", "domain": ["a"]}, "domain is list, not text"),
        (
            {"prompt": "x", "completion": "y", "query": "x", "response": "y"},
            "prompt and completion or query and",
        ),
        (
            {"question": "x", "answer": "y", "choices": "a"},
            "no known columns among question, answer, choices",
        ),
        ({"system": "x", "prompt": "", "completion": "y"}, "empty prompt"),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            "conversations.from is 'tool': expected one of",
        ),
        ({"conversations": [{"from": "gpt", "text": "x"}]}, "conversations holds a turn without from"),
        ({"messages": []}, "messages is list"),
        ({"messages": [{"role": "user"}]}, "messages holds a turn without role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "empty prompt"),
    ],
)
def test_bad_rows_name_file_and_line_or_are_counted(tmp_path: Path, row: Any, reason: str) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [ROW, row, ROW])
    with pytest.raises(InputError) as error:
        read(Data(train=str(file), validation=other(tmp_path)), "train", None, seed=0)
    assert str(error.value).startswith(f"{file}:2: {reason}") and "\n" not in str(error.value)
    data = Data(train=str(file), validation=other(tmp_path), on_bad_row="skip")
    reading = read(data, "train", None, seed=0)
    assert [x.source for x in reading.instructions] == [f"{file}:1", f"{file}:3"]
    assert len(reading.skipped) == 1 and reading.skipped[0].startswith(f"{file}:2: {reason}")
    assert reading.sources[0]["rows"] == 2 and reading.sources[0]["skipped"] == 1


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80"])  # the latter: half of a surrogate pair
def test_a_row_that_is_not_utf8_is_bad(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "' + text + b'"}\n')
    with pytest.raises(InputError, match=r"data.jsonl:1: not UTF-8"):
        read(Data(train=str(tmp_path)), "train", None, seed=0)


def test_complete_surrogate_pairs_and_a_byte_order_mark_are_text(tmp_path: Path) -> None:
    rows = ["\ufeff" + json.dumps({"prompt": "a \U0001f600", "completion": "b"}), *numbered(1)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    assert "\\ud83d" in file.read_text()
    data = Data(train=str(file), validation=other(tmp_path))
    assert read(data, "train", None, seed=0).instructions[0].prompt == (("user", "a \U0001f600"),)


NAMED = Source(name="x", prompt="ask", completion="say", system="style", domain="math", task="sums")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "ask": "2 + 2?",
                "say": "4",
                "style": "Be brief.",
                "domain": "code",
                "prompt": "no",
                "completion": "no",
            },
            ((("system", "Be brief."), *SUM), "4"),
        ),
        ({"ask": "2 + 2?", "say": "4", "style": None, "system": "no"}, (SUM, "4")),
        (
            {"ask": [{"role": "user", "content": "2 + 2?"}], "say": "4", "style": ""},
            (SUM, "4"),
        ),
        ({"ask": "2 + 2?", "style": ""}, "no column say; its columns are ask, style"),
        ({"ask": "2 + 2?", "say": "4"}, "no column style; its columns are ask, say"),
        ({"ask": 4, "say": "4", "style": ""}, "ask is int, not text or a list of messages"),
    ],
)
def test_columns_and_labels_named_by_a_source_win(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [row])
    source = NAMED.model_copy(update={"name": str(file)})
    data = Data(train=[source], validation=other(tmp_path))
    if isinstance(expected, str):
        with pytest.raises(InputError) as error:
            read(data, "train", None, seed=0)
        assert str(error.value).startswith(f"{file}:1: {expected}") and "\n" not in str(error.value)
    else:
        reading = read(data, "train", None, seed=0)
        assert reading.instructions == [Instruction("data.jsonl:1", "math", "sums", *expected, f"{file}:1")]


# Splits.


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"math.jsonl": []}, r"math.jsonl: no usable rows"),
        ({}, r"data.train: no .jsonl or .parquet file in"),
        ({"math.train.jsonl": [ROW], "code.dev.jsonl": [ROW]}, r"no training file for code"),
        ({"math.train.parquet": ["x"]}, r"math.train.parquet: not a readable parquet file"),
    ],
)
def test_empty_or_incomplete_sources_are_errors(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    for name, rows in files.items():
        write_jsonl(tmp_path / name, rows)
    with pytest.raises(InputError, match=reason):
        read(Data(train=str(tmp_path)), "train", None, seed=0)


@pytest.mark.parametrize("name", ["./nothing.jsonl", "/no/such/folder", "nothing.parquet"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(Data(train=name), "train", None, seed=0)


def test_each_domain_of_a_folder_is_held_out_by_its_preferred_split(tmp_path: Path) -> None:
    for split in ("train", "dev", "validation", "test"):
        write_jsonl(tmp_path / f"math.{split}.jsonl", [{**ROW, "prompt": f"math {split}", "id": split}])
    write_jsonl(tmp_path / "code.jsonl", numbered(3))
    write_jsonl(tmp_path / "code.test.jsonl", [{**ROW, "id": "test"}])
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"text.{split}.jsonl", [{**ROW, "prompt": f"text {split}", "id": split}])
    data = Data(train=str(tmp_path))
    held_out = read(data, "validation", None, seed=0).instructions
    assert [(x.domain, x.id) for x in held_out] == [("code", "test"), ("math", "dev"), ("text", "validation")]
    train = read(data, "train", None, seed=0).instructions
    assert [x.domain for x in train] == ["code"] * 3 + ["math", "text"]
    assert read(Data(), "train", tmp_path, seed=0).instructions == train  # the local corpus has this layout


def test_the_held_out_share_is_disjoint_splits_no_prompt_and_is_the_same_for_every_seed(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"question {i % 60}", "completion": f"answer {i}"} for i in range(120)]
    data = Data(train=str(write_jsonl(tmp_path / "data.jsonl", rows)), validation_fraction=0.25)
    train, held_out = (read(data, split, None, seed=3).instructions for split in ("train", "validation"))
    assert {x.id for x in train} | {x.id for x in held_out} == {f"data.jsonl:{i + 1}" for i in range(120)}
    assert not {x.prompt for x in train} & {x.prompt for x in held_out}
    assert len(held_out) == 30
    assert read(data, "validation", None, seed=3).instructions == held_out
    assert read(data, "validation", None, seed=4).instructions == held_out
    assert read(data, "train", None, seed=3).held_out == 30
    given = data.model_copy(update={"validation": other(tmp_path)})
    assert len(read(given, "train", None, seed=3).instructions) == 120


@pytest.mark.parametrize("measured", ["own split", "another source's split", "data.validation"])
def test_no_prompt_of_any_held_out_data_is_trained_on(tmp_path: Path, measured: str) -> None:
    train = write_jsonl(
        tmp_path / "math.jsonl", [*numbered(20), {"prompt": "question 3", "completion": "other"}]
    )
    if measured == "own split":
        write_jsonl(tmp_path / "math.dev.jsonl", numbered(5))
        data = Data(train=str(tmp_path))
    elif measured == "another source's split":
        (tmp_path / "code").mkdir()
        write_jsonl(tmp_path / "code" / "code.jsonl", numbered(10, first=100))
        write_jsonl(tmp_path / "code" / "code.test.jsonl", numbered(5))
        data = Data(train=[str(train), str(tmp_path / "code")], validation_fraction=0.01)
    else:
        (tmp_path / "given").mkdir()
        given = write_jsonl(tmp_path / "given" / "any.jsonl", numbered(5))
        data = Data(train=str(train), validation=str(given))
    reading, held_out = (read(data, split, None, seed=0) for split in ("train", "validation"))
    prompts = {x.prompt for x in held_out.instructions}
    assert {(("user", f"question {i}"),) for i in range(5)} <= prompts
    assert not prompts & {x.prompt for x in reading.instructions}
    rows = 21 + (10 if "another" in measured else 0)
    assert reading.held_out == rows - len(reading.instructions) >= 6


def test_nothing_left_to_train_on_is_an_error_of_one_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", numbered(5))
    with pytest.raises(InputError) as error:
        read(Data(train=str(file), validation=str(file)), "train", None, seed=0)
    assert str(error.value) == (
        f"data.train: {file}: every prompt is also held out, which leaves none to train on"
    )


def test_a_domain_that_can_not_be_held_out_is_named(tmp_path: Path) -> None:
    rows = [*numbered(100, domain="many"), *numbered(2, first=200, domain="two")]
    file = write_jsonl(tmp_path / "data.jsonl", [*rows, *numbered(1, first=300, domain="one")])
    data = Data(train=str(file), validation_fraction=0.01)
    for split in ("train", "validation"):
        with pytest.raises(InputError, match="data.train: domain one has a single prompt"):
            read(data, split, None, seed=0)
    more = write_jsonl(tmp_path / "more.jsonl", numbered(1, first=301, domain="one"))
    both = data.model_copy(update={"train": (Source(name=str(file)), Source(name=str(more)))})
    train, held_out = (read(both, split, None, seed=0).instructions for split in ("train", "validation"))
    assert Counter(x.domain for x in train) == {"many": 99, "two": 1, "one": 1}
    assert Counter(x.domain for x in held_out) == {"many": 1, "two": 1, "one": 1}


def test_max_examples_is_a_seeded_sample_of_the_training_rows(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", numbered(200))
    data = Data(train=str(file), max_examples=20, validation_fraction=0.5)
    some, again, other = (read(data, "train", None, seed).instructions for seed in (0, 0, 1))
    assert len(some) == 20 and some == again and some != other
    assert len(read(data, "validation", None, 0).instructions) == 100
    assert max(int(x.id.split(":")[1]) for x in some) > 50  # not the first ones


# Mixtures.


def test_a_mixture_is_read_source_by_source_each_with_its_own_held_out_rows(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    write_jsonl(own / "math.jsonl", numbered(30))
    write_jsonl(own / "math.dev.jsonl", numbered(5, first=900))
    share = write_jsonl(tmp_path / "share.jsonl", numbered(40, first=100))
    sources = [Source(name=str(own), domain="sums"), str(share)]
    data = Data(train=sources, validation_fraction=0.25)
    train, held_out = (read(data, split, None, seed=0) for split in ("train", "validation"))
    assert Counter(x.domain for x in train.instructions) == {"sums": 30, "share": 30}
    assert Counter(x.domain for x in held_out.instructions) == {"sums": 5, "share": 10}
    assert {x.id for x in held_out.instructions if x.domain == "sums"} == {
        f"math.dev.jsonl:{i}" for i in range(1, 6)
    }
    alone = read(Data(train=str(share), validation_fraction=0.25), "train", None, seed=0).instructions
    assert [x for x in train.instructions if x.domain == "share"] == alone  # as without the other source
    assert [(s["path"], s["rows"]) for s in train.sources] == [
        (str(own / "math.jsonl"), 30),
        (str(share), 40),
    ]
    sha256 = hashlib.sha256(share.read_bytes()).hexdigest()
    assert train.sources[1]["sha256"] == sha256 and train.sources[1]["split"] == "train"


def test_no_held_out_prompt_is_in_the_training_rows_of_another_source(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", numbered(60))
    second = write_jsonl(tmp_path / "second.jsonl", numbered(60, first=30))
    data = Data(train=[str(first), str(second)], validation_fraction=0.2)
    train, held_out = (read(data, split, None, seed=1).instructions for split in ("train", "validation"))
    assert not {x.prompt for x in train} & {x.prompt for x in held_out}
    assert len(train) + len(held_out) == 120 and {x.domain for x in held_out} == {"first", "second"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_max_examples_of_a_source_is_one_sample_for_all_seeds_beside_the_held_out_share(
    tmp_path: Path, suffix: str
) -> None:
    file, rows = tmp_path / f"data{suffix}", numbered(20_000)
    if suffix == ".jsonl":
        write_jsonl(file, ["", *rows])
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    data = Data(train=[Source(name=str(file), max_examples=900)], validation_fraction=0.1)
    train, held_out = (read(data, split, None, seed=0).instructions for split in ("train", "validation"))
    assert len(train) == 900 and len(held_out) == 100
    assert len({x.prompt for x in [*train, *held_out]}) == 1000
    assert read(data, "train", None, seed=1).instructions == train
    assert read(data, "validation", None, seed=1).instructions == held_out
    blank = suffix == ".jsonl"
    lines = [int(x.source.rsplit(":", 1)[1]) for x in train]
    assert all(x.prompt[0][1] == f"question {n - 1 - blank}" for x, n in zip(train, lines, strict=True))
    assert lines == sorted(lines)
    # A uniform draw: its mean is within 4 standard errors, sd 20,000 / sqrt(12).
    assert abs(sum(lines) / 900 - 10_000) < 4 * (20_000 / 12**0.5) / 900**0.5


def test_samples_span_the_files_of_a_folder_and_measure_is_limited_too(tmp_path: Path) -> None:
    for name, count in (("math", 300), ("code", 100)):
        for folder, first in (("train", 0), ("measure", 1000)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_jsonl(tmp_path / folder / f"{name}.jsonl", numbered(count, first))
    source, measure = (Source(name=str(tmp_path / f), max_examples=100) for f in ("train", "measure"))
    data = Data(train=[source], validation=[measure])
    found = Counter(x.domain for x in read(data, "train", None, seed=0).instructions)
    assert sum(found.values()) == 100 and 50 < found["math"] < 95
    assert len(read(data, "validation", None, seed=0).instructions) == 100
    fewer = Data(train=[source, source], validation=[measure], max_examples=120)
    assert len(read(fewer, "train", None, seed=0).instructions) == 120
    same = read(Data(train=[source], validation=[source]), "train", None, seed=0)
    assert same.held_out == 100 - len(same.instructions) < 60  # training and measuring draw other rows


def test_the_local_corpus_can_be_part_of_a_mixture(tmp_path: Path, data_folder: Path) -> None:
    file = write_jsonl(tmp_path / "more.jsonl", numbered(10))
    reading = read(Data(train=["local", str(file)]), "train", data_folder, seed=0)
    assert Counter(x.domain for x in reading.instructions) == {"math": 40, "text": 40, "code": 40, "more": 9}


def test_lists_come_from_yaml_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  train:\n  - {name: a.jsonl, domain: math, max_examples: 5}\n  - b/c\n"
        "  validation: [d.jsonl]\n"
    )
    data = load(RunFile, file).data
    assert data.train == (Source(name="a.jsonl", domain="math", max_examples=5), Source(name="b/c"))
    assert data.validation == "d.jsonl"
    assert load(RunFile, file, parse_overrides(["--data.train", "x.jsonl"])).data.train == "x.jsonl"
    some = parse_overrides(["--data.train", "x.jsonl", "{name: o/y, domain: code}"])
    assert load(RunFile, None, some).data.train == (Source(name="x.jsonl"), Source(name="o/y", domain="code"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train: expected a name, or a list of names and of sources with a name (got [])"),
        (["a", {"name": "b", "promt": "x"}], "data.train.1.promt: unknown key"),
        ([{"name": "b", "prompt": "x"}], "data.train.0: b: prompt and completion name two columns"),
        ([{"domain": "b"}], "data.train.0.name: Field required"),
        (
            [{"name": "b", "max_examples": 0}],
            "data.train.0.max_examples: Input should be greater than or equal to 1",
        ),
    ],
)
def test_wrong_sources_are_errors_of_one_line(train: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(RunFile, None, {"data.train": train})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_stage_key_depends_on_the_content_of_its_sources(tmp_path: Path, pico: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", numbered(5)) for name in "ab"]

    def key(*names: Any, **changes: Any) -> str:
        run_file = load(RunFile, None, {"model.name": str(pico), "data.train": list(names), **changes})
        return instructions_stage(run_file.run()).key

    both = key(*map(str, files))
    assert both == key(*map(str, files)) != key(str(files[0])) != key(str(files[1]), str(files[0]))
    write_jsonl(files[1], numbered(6))
    assert key(*map(str, files)) != both
    assert key({"name": "o/d", "revision": "a"}) != key({"name": "o/d", "revision": "b"})
    with pytest.raises(InputError, match=r"data.train: .*c.jsonl does not exist"):
        key(str(files[0]), str(tmp_path / "c.jsonl"))
    assert [
        s.name
        for s in instructions_stage(load(RunFile, None, {"data.train": ["local", str(files[0])]}).run()).needs
    ]


# The hub.


class Hub(BaseHTTPRequestHandler):
    """Count requests; answer each with an error."""

    requests: list[str]
    status: int
    headers_sent: dict[str, str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.send_response(self.status)
        for name, value in {"Content-Length": "0", **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """Serve a hub that answers (status, headers); yields its address and the requests it got."""
    status, headers = request.param
    handler = type("Hub", (Hub,), {"requests": [], "status": status, "headers_sent": headers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.requests
        server.shutdown()


def read_elsewhere(
    home: Path, endpoint: str, source: dict[str, Any]
) -> tuple[str, list[list[Any]], list[Any]]:
    """Read `source` in a process whose hub is `endpoint`: error, instructions and lineage."""
    program = (
        "import json, sys\n"
        "from raymoe.config import Data, InputError, Source\n"
        "from raymoe.data.sources import read\n"
        "try:\n"
        "    r = read(Data(train=[Source(**json.loads(sys.argv[1]))]), 'train', None, seed=0)\n"
        "    rows = [[x.source, x.domain, x.prompt[0][1]] for x in r.instructions]\n"
        "    print(json.dumps(['', rows, r.sources]))\n"
        "except InputError as error:\n"
        "    print(json.dumps([str(error), [], []]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith(("_offline", "_proxy"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, json.dumps(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    error, examples, lineage = json.loads(done.stdout.splitlines()[-1])
    return error, examples, lineage


@pytest.mark.parametrize(
    ("hub", "reason"),
    [
        ((503, {}), "can't be reached (Server error '503"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "has no such data set (or a private one"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), "has no revision 'v1' of it"),
        ((403, {"X-Error-Code": "GatedRepo"}), "has it gated: request access"),
    ],
    indirect=["hub"],
)
def test_a_hub_that_does_not_serve_a_data_set_is_asked_once(
    tmp_path: Path, hub: tuple[str, list[str]], reason: str
) -> None:
    address, requests = hub
    error, _, _ = read_elsewhere(tmp_path, address, {"name": "nobody/nothing", "revision": "v1"})
    assert error.startswith(f"data.train: 'nobody/nothing' is not a file, and the Hugging Face Hub {reason}")
    asked = [path for path in requests if "nobody" in path]
    assert "\n" not in error and asked == ["/api/datasets/nobody/nothing/revision/v1"]


def cache_dataset(home: Path, name: str, commit: str, splits: dict[str, list[Any]]) -> None:
    """Put a data set into the cache the way loading it from the hub does."""
    namespace, short = name.split("/")
    folder = home / "datasets" / f"{namespace}___{short}" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    infos = datasets.SplitDict(dataset_name=short)
    for split, rows in splits.items():
        table = datasets.Dataset.from_list(rows)
        with datasets.arrow_writer.ArrowWriter(
            path=str(folder / f"{short}-{split}.arrow"), features=table.features
        ) as w:
            for row in rows:
                w.write(row)
            w.finalize()
        infos.add(datasets.SplitInfo(name=split, num_examples=len(rows), dataset_name=short))
        features = table.features
    info = datasets.DatasetInfo(features=features, splits=infos, dataset_name=short, config_name="default")
    info.write_to_directory(str(folder))


def test_with_an_unreachable_hub_only_a_cached_copy_of_the_revision_is_used(tmp_path: Path) -> None:
    splits = {"train": numbered(40), "test": numbered(5, first=900), "extra": numbered(1)}
    cache_dataset(tmp_path, "org/sums", "c0ffee0", splits)
    refused = "http://127.0.0.1:9"
    error, examples, lineage = read_elsewhere(tmp_path, refused, {"name": "org/sums", "domain": "math"})
    assert error == ""
    assert examples == [[f"org/sums[train]:{i + 1}", "math", f"question {i}"] for i in range(40)]
    assert lineage[0] | {"hub": "org/sums", "commit": "c0ffee0", "split": "train", "rows": 40} == lineage[0]
    source = {"name": "org/sums", "revision": "c0ffee0", "max_examples": 4}
    error, examples, _ = read_elsewhere(tmp_path, refused, source)
    numbers = [int(where.rsplit(":", 1)[1]) for where, _, _ in examples]
    assert error == "" and len(set(numbers)) == 4
    assert all(text == f"question {n - 1}" for n, (_, _, text) in zip(numbers, examples, strict=True))
    error, _, _ = read_elsewhere(tmp_path, refused, {"name": "org/sums", "revision": "v2"})
    assert "can't be reached" in error and error.endswith("is commit c0ffee0, which may not be revision v2")


def test_a_source_names_the_column_of_its_tasks(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{i}", "completion": "b", "task_name": f"task{i % 2}"} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(
        train=({"name": str(tmp_path / "x.jsonl"), "task_column": "task_name"},), validation_fraction=0.5
    )  # type: ignore[arg-type]
    found = {i.task for split in ("train", "validation") for i in read(data, split, None, 0).instructions}  # type: ignore[arg-type]
    assert found == {"task0", "task1"}
    missing = Data(train=({"name": str(tmp_path / "x.jsonl"), "task_column": "nope"},))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="x.jsonl:1: no column nope, which task_column names"):
        read(missing, "train", None, 0)
    with pytest.raises(InputError, match="give task, the same for all rows, or task_column"):
        validate(Data, {"train": [{"name": "x", "task": "a", "task_column": "b"}]})
