"""The local corpus against `ast`, `inspect`, and arithmetic redone here from the numbers in each question."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raymoe.config import LocalModel
from raymoe.data import local_corpus
from raymoe.models import dense as seed
from raymoe.schema import InputError
from raymoe.storage.store import digest

Rows = dict[str, list[dict[str, str]]]


def read(folder: Path) -> Rows:
    return {
        str(file.relative_to(folder)): [
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in sorted(folder.glob("*/*.jsonl"))
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, local_corpus.write(folder)


@pytest.fixture(scope="module")
def rows(corpus: tuple[Path, dict[str, Any]]) -> Rows:
    return read(corpus[0])


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of single files only: no packages, no reference topics."""
    library = tmp_path / "library"
    library.mkdir()
    for file in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"):
        (library / file.name).symlink_to(file)
    monkeypatch.setattr(local_corpus, "library_folder", lambda: library)
    return library


def of(rows: Rows, domain: str) -> list[dict[str, str]]:
    return [row for name, some in rows.items() if f"/{domain}." in name for row in some]


def test_files_and_sizes(corpus: tuple[Path, dict[str, Any]], rows: Rows) -> None:
    folder, info = corpus
    domains = ("code", "math", "text")
    names = [f"instruct/{domain}.{split}.jsonl" for domain in domains for split in ("dev", "test", "train")]
    names += [f"seed/{domain}.train.jsonl" for domain in domains]
    assert list(rows) == names
    assert info["records"] == {name: len(some) for name, some in rows.items()}
    assert info["sha256"] == hashlib.sha256(b"".join((folder / n).read_bytes() for n in names)).hexdigest()
    assert sum(map(len, rows.values())) >= 6000
    assert all(200 <= len(some) <= 300 for name, some in rows.items() if "train" not in name)
    for name, some in rows.items():
        assert all(list(row) == ["prompt", "completion", "domain", "task", "source"] for row in some)
        assert all(row["domain"] == name.split("/")[1].split(".")[0] for row in some)
        assert all(value.strip() for row in some for value in row.values())


@pytest.mark.parametrize("domain", ["code", "text", "math"])
def test_every_split_has_several_tasks(rows: Rows, domain: str) -> None:
    for split in ("train", "dev", "test"):
        assert len({row["task"] for row in rows[f"instruct/{domain}.{split}.jsonl"]}) >= 3


def test_splits_share_no_source(rows: Rows) -> None:
    splits: dict[str, set[str]] = {}
    for name, some in rows.items():
        for row in some:
            splits.setdefault(row["source"], set()).add(name.split(".")[1])
    assert all(len(found) == 1 for found in splits.values())


def test_no_prompt_and_no_completion_is_repeated(rows: Rows) -> None:
    prompts = Counter(row["prompt"] for some in rows.values() for row in some)
    completions = Counter(" ".join(row["completion"].split()) for row in of(rows, "code") + of(rows, "text"))
    assert max(prompts.values()) == 1
    assert max(completions.values()) == 1


def test_another_process_hash_seed_and_locale_write_the_same_bytes(
    corpus: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    script = (
        "import sys, json; from pathlib import Path; from raymoe.data import local_corpus as c;"
        "print(json.dumps([c.write(Path(sys.argv[1])), c.identity()]))"
    )
    root = Path(local_corpus.__file__).parents[3]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [corpus[1], local_corpus.identity()]
    files = [file.relative_to(corpus[0]) for file in corpus[0].glob("*/*")]
    assert len(files) == 12
    assert all((tmp_path / file).read_bytes() == (corpus[0] / file).read_bytes() for file in files)


def test_identity_depends_on_the_library(small_library: Path) -> None:
    before = digest(local_corpus.identity())
    assert before == digest(local_corpus.identity())
    (small_library / "one_more.py").write_text('"""More."""\n')
    assert digest(local_corpus.identity()) != before


def test_a_stripped_library_is_enough(small_library: Path, tmp_path: Path) -> None:
    local_corpus.write(tmp_path)
    rows = read(tmp_path)
    assert min(map(len, rows.values())) >= 100
    assert not {row["source"].split(".")[0] for row in of(rows, "code")} & {"email", "asyncio", "unittest"}


def test_a_library_without_sources_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_corpus, "library_folder", lambda: tmp_path)
    with pytest.raises(
        InputError, match=r"^data\.train: no local corpus: .* lacks the standard library's sources$"
    ):
        local_corpus.write(tmp_path)


def test_every_row_fits_into_480_tokens(
    corpus: tuple[Path, dict[str, Any]], rows: Rows, tmp_path: Path
) -> None:
    shape = LocalModel(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)
    assert shape.vocab_size == 2048
    seed.write_initial(tmp_path, corpus[0] / "seed", shape, max_length=512, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    template = tokenizer.bos_token + "### Instruction:\n{}\n\n### Response:\n{}" + tokenizer.eos_token
    texts = [template.format(row["prompt"], row["completion"]) for some in rows.values() for row in some]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert max(lengths) <= 480
    assert len(tokenizer) == 2048


# ---- code ----


def function_of(row: dict[str, str]) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """Return the function that prompt and completion together make."""
    text = row["completion"]
    if row["task"] != "write_function":
        text = row["prompt"].split("\n\n", 1)[1] + "\n" + text
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return function


def code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Normalise a function: no docstring, comments, layout or decorators."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return f"{function.name}({ast.unparse(function.args)})\n" + "\n".join(map(ast.unparse, body))


def test_code_rows_are_functions(rows: Rows) -> None:
    for row in of(rows, "code"):
        function = function_of(row)
        assert row["prompt"].split("`")[1].split(".")[-1] == function.name
        documented = ast.get_docstring(function) is not None
        assert documented == (row["task"] != "write_function")
        assert len(function.body) > documented


def test_code_is_taken_from_the_library(rows: Rows) -> None:
    modules = {"argparse", "textwrap", "fractions", "shutil", "statistics", "zipfile", "configparser", "ast"}
    library = {
        name: {
            code(node)
            for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(name))))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for name in modules
    }
    found = [
        code(function_of(row)) in library[row["source"]]
        for row in of(rows, "code")
        if row["source"] in modules
    ]
    assert len(found) >= 20 and all(found)


# ---- text ----


def test_descriptions_are_the_docstrings(rows: Rows) -> None:
    modules = {
        "argparse",
        "collections",
        "textwrap",
        "fractions",
        "shutil",
        "statistics",
        "logging",
        "pathlib",
    }
    checked = 0
    for row in of(rows, "text"):
        if row["source"] in modules and row["task"] in ("class_description", "function_description"):
            subject: Any = importlib.import_module(row["source"])
            for name in row["prompt"].split("`")[1].removeprefix(row["source"]).strip(".").split("."):
                subject = inspect.getattr_static(subject, name)
            subject = getattr(subject, "__func__", getattr(subject, "fget", subject))
            docstring = " ".join((inspect.getdoc(subject) or "").expandtabs().split())
            assert all(" ".join(part.split()) in docstring for part in row["completion"].split("\n\n"))
            checked += 1
    assert checked >= 20


def test_text_is_prose(rows: Rows) -> None:
    assert all(
        len(row["completion"].split()) >= 12 and ">>>" not in row["completion"] for row in of(rows, "text")
    )
    assert sum(row["source"].startswith("topics/") for row in of(rows, "text")) >= 400


# ---- math ----


def evaluate(node: ast.expr) -> Fraction:
    """Evaluate an arithmetic expression exactly."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    a, b = evaluate(node.left), evaluate(node.right)
    if isinstance(node.op, ast.Add):
        return a + b
    if isinstance(node.op, ast.Sub):
        return a - b
    if isinstance(node.op, ast.Mult):
        return a * b
    assert isinstance(node.op, ast.Div)
    return a / b


NUMBER = r"-?\d+(?:/\d+)?"
EQUATION = re.compile(rf"({NUMBER}(?: [-+*/] {NUMBER})*) = ({NUMBER})")


def value(text: str) -> Fraction:
    if text.startswith("-"):
        return -value(text[1:])
    return evaluate(ast.parse(text, mode="eval").body)


def test_every_equation_holds_and_leads_to_the_answer(rows: Rows) -> None:
    for row in of(rows, "math"):
        *solution, last = row["completion"].split("\n")
        equations = EQUATION.findall("\n".join(solution))
        assert len(equations) == "\n".join(solution).count("=") >= 2 - (row["task"] == "sharing")
        assert all(signed(left) == value(right) for left, right in equations)
        assert last == f"#### {equations[-1][1]}"


def signed(text: str) -> Fraction:
    """Evaluate like `value`, allowing a negative first number."""
    return value(f"0 {'-' if text.startswith('-') else '+'} {text.lstrip('-')}")


UNITS = {
    **{("hours", "minutes"): 60, ("minutes", "seconds"): 60, ("days", "hours"): 24, ("weeks", "days"): 7},
    **{("metres", "centimetres"): 100, ("centimetres", "millimetres"): 10, ("feet", "inches"): 12},
    **{("kilograms", "grams"): 1000, ("dollars", "cents"): 100, ("years", "months"): 12},
}


def in_small_unit(question: str) -> int:
    large, small = re.findall(r"\d+ (\w+)", question)
    a, b = map(int, re.findall(r"\d+", question))
    return a * UNITS[large, small] + b


# What each kind asks, from the numbers of its question in their order.
ANSWERS: dict[str, Callable[..., object]] = {
    "shopping": lambda a, p, b, q: a * p + b * q,
    "change": lambda note, a, p, extra: note - a * p - extra,
    "travel": lambda v, t, w, u: v * t + w * u,
    "production": lambda rate, minutes, box: Fraction(rate * minutes, box),
    "sequence": lambda a, b, c, d, n: a + (n - 1) * (b - a) if b - a == c - b == d - c else None,
    "fraction_of": lambda whole, n, d: whole - Fraction(n, d) * whole,
    "fraction_sum": lambda a, b, c, d: Fraction(a * d + c * b, b * d),
    "ages": lambda age, more, times: (age + more) * times,
    "rectangle": lambda a, b, price: (a + a + b + b) * price,
    "average": lambda a, b, c: Fraction(a + b + c, 3),
    "sharing": lambda total, people: total % people,
    "equation": lambda a, b, c: Fraction(c - b, a),
    "stock": lambda start, days, sold, came: start - days * sold + came,
}


def answer(row: dict[str, str]) -> object:
    question = row["prompt"]
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if row["task"] == "arithmetic":
        return value(re.search(r"\d+ [-+*] \d+ [-+] \d+", question).group())  # type: ignore[union-attr]
    if row["task"] == "units":
        return in_small_unit(question)
    if row["task"] == "percentage":
        whole, percent = numbers
        return whole * Fraction(100 - percent, 100)
    return ANSWERS[row["task"]](*numbers)


def test_every_answer_answers_its_question(rows: Rows) -> None:
    for row in of(rows, "math"):
        said = row["completion"].rsplit("#### ", 1)[1]
        assert Fraction(said) == answer(row), row
        if "/" in said:
            assert math.gcd(*map(int, said.split("/"))) == 1


def test_every_kind_of_problem_is_in_every_split(rows: Rows) -> None:
    kinds = {row["task"] for row in of(rows, "math")}
    assert kinds == {*ANSWERS, "arithmetic", "units", "percentage"}
    assert all(
        {row["task"] for row in rows[f"instruct/math.{split}.jsonl"]} == kinds
        for split in ("train", "dev", "test")
    )
