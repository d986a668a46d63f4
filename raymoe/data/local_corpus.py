"""The embedded instructions: code, text and math made from the Python installation at hand, without network.

code: documented standard library functions, read with `ast` (nothing is imported), to be written or finished.
text: prose of the language reference (`pydoc_data.topics`) and of module, class and function docstrings.
math: generated word problems with a worked solution; its last line is `#### <answer>`, as in GSM8K.

The same Python makes the same bytes. No source (a module, a reference topic, one set of numbers) is in two
splits.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import platform
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from raymoe.schema import InputError

REVISION = 3
"""Raise it whenever a change here changes what is written."""
DOMAINS = ("code", "text", "math")
SPLITS = ("train", "dev", "test")
TRAIN_RECORDS = {"code": 2200, "text": 2200, "math": 3600}
SEED_FRACTION = 0.7
"""Share of the training records that the embedded dense model learns from."""
HELD_OUT_RECORDS = {"code": 220, "text": 220, "math": 220}
"""Of a domain in dev, and in test."""
MAX_ESTIMATED_TOKENS = 400
PROBLEMS_PER_KIND = 260

# Not read: absent in some distributions, tests, tables of data, or the same few lines over and over.
SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"),
}
SKIPPED_FILES = re.compile(r"_sysconfigdata|sitecustomize|usercustomize|_pydecimal|_pydatetime")


@dataclass(frozen=True)
class Record:
    """One instruction and what decides its split: records of one `source` stay together."""

    prompt: str
    completion: str
    domain: str
    task: str
    source: str


def identity() -> dict[str, Any]:
    """What decides the content: this module's revision, the Python version and which library files it has."""
    library = _library()
    listing = "\n".join(
        f"{file.relative_to(library).as_posix()} {file.stat().st_size}" for file in _files(library)
    )
    return {
        "local_corpus": REVISION,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "library": hashlib.sha256(listing.encode()).hexdigest(),
    }


def write(folder: Path) -> dict[str, Any]:
    """Write `instruct/{domain}.{split}.jsonl` and `seed/{domain}.train.jsonl` into `folder`.

    `instruct` is what runs train on and are measured with; the embedded dense model has learnt from `seed`, whose
    instructions are others.

    Returns:
        `records`: file name to number of records; `sha256`: over all files in order of their names.

    Raises:
        InputError: this Python comes without the sources of its standard library.
    """
    splits = _split([*_library_records(_library()), *_math_records()])
    files: dict[str, list[Record]] = {}
    for domain in DOMAINS:
        of_domain = {split: [r for r in splits[split] if r.domain == domain] for split in SPLITS}
        for_seed = round(len(of_domain["train"]) * SEED_FRACTION)
        files[f"seed/{domain}.train.jsonl"] = of_domain["train"][:for_seed]
        of_domain["train"] = of_domain["train"][for_seed:]
        files |= {f"instruct/{domain}.{split}.jsonl": of_domain[split] for split in SPLITS}
    if not all(files.values()):
        raise InputError(f"data.train: no local corpus: {_library()} lacks the standard library's sources")
    checksum = hashlib.sha256()
    for name, records in sorted(files.items()):
        content = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records).encode()
        checksum.update(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {
        "records": {name: len(records) for name, records in files.items()},
        "sha256": checksum.hexdigest(),
    }


# ---- choice and splits ----


def _estimated_tokens(text: str) -> int:
    """About the tokens of `text` under a byte-level BPE with a vocabulary of 2048, rather too many."""
    words = re.compile(r"[A-Z]?[a-z]+")
    rest = words.sub("", re.sub(r" (?=[^\s\d])", "", re.sub(r" {2,}", "\t", text)))
    return sum(-(-len(word) // 3) for word in words.findall(text)) + len(rest.encode())


def _usable(record: Record) -> bool:
    text = record.prompt + record.completion
    printable = all(character.isprintable() or character == "\n" for character in text)
    return printable and _estimated_tokens(text) <= MAX_ESTIMATED_TOKENS


def _split(candidates: Iterable[Record]) -> dict[str, list[Record]]:
    """Usable records without repetitions, whole sources to a split, each split shuffled."""
    sources: dict[str, list[Record]] = {}
    for record in _distinct(filter(_usable, candidates)):
        sources.setdefault(record.source, []).append(record)
    rng = random.Random(f"splits {REVISION}")
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for source in rng.sample(sorted(sources), len(sources)):
        size = Counter(record.domain for record in sources[source])
        split = next((s for s in ("test", "dev") if _wanted(counts[s], size)), "train")
        counts[split] += size
        splits[split] += sources[source]
    for records in splits.values():
        rng.shuffle(records)
    limits = {"train": TRAIN_RECORDS, "dev": HELD_OUT_RECORDS, "test": HELD_OUT_RECORDS}
    return {split: _first(records, limits[split]) for split, records in splits.items()}


def _wanted(count: Mapping[str, int], size: Mapping[str, int]) -> bool:
    """Whether a source is held out: it has what is missing and is no large one."""
    missing = any(count[domain] < HELD_OUT_RECORDS[domain] for domain in size)
    return missing and all(n <= HELD_OUT_RECORDS[domain] // 5 for domain, n in size.items())


def _first(records: Iterable[Record], limits: Mapping[str, int]) -> list[Record]:
    seen: Counter[str] = Counter()
    kept = []
    for record in records:
        seen[record.domain] += 1
        if seen[record.domain] <= limits[record.domain]:
            kept.append(record)
    return kept


def _distinct(records: Iterable[Record]) -> Iterator[Record]:
    """No prompt twice and, outside of math, no completion twice (the library holds copies of itself)."""
    prompts, completions = set(), set()
    for record in records:
        completion = record.prompt if record.domain == "math" else " ".join(record.completion.split())
        if record.prompt not in prompts and completion not in completions:
            prompts.add(record.prompt)
            completions.add(completion)
            yield record


# ---- the standard library: code and text ----


@dataclass(frozen=True)
class Function:
    """A documented function: its lines are dedented to its own `def`."""

    module: str
    name: str
    signature: str
    doc: str
    body: str


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files(library: Path) -> list[Path]:
    """The Python files that are read, in the same order everywhere."""
    files = []
    for folder, folders, names in os.walk(library):
        folders[:] = [
            n for n in folders if n not in SKIPPED_FOLDERS and not n.startswith(("config-", "__ph"))
        ]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not SKIPPED_FILES.match(n)]
    topics = library / "pydoc_data" / "topics.py"
    return sorted(
        [*files, *([topics] if topics.is_file() else [])], key=lambda file: file.relative_to(library).parts
    )


def _library_records(library: Path) -> Iterator[Record]:
    rng = random.Random(f"library {REVISION}")
    for file in _files(library):
        try:
            source = file.read_bytes().decode()
            tree = _parse(source)
        except (OSError, SyntaxError, ValueError):  # unreadable, of another Python, or not UTF-8
            continue
        if file.parent.name == "pydoc_data":
            yield from _reference_records(tree)
            continue
        module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        yield from _module_records(module, tree, source.splitlines(), rng)


def _parse(source: str) -> ast.Module:
    """The syntax tree; warnings about the source are ignored, whatever the filters say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _module_records(
    module: str, tree: ast.Module, lines: Sequence[str], rng: random.Random
) -> Iterator[Record]:
    yield from _prose(f"the module `{module}`", _doc(tree), "module_description", module)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in classes:
        yield from _prose(f"the class `{module}.{node.name}`", _doc(node), "class_description", module)
    bodies = [("", tree.body), *((f"{node.name}.", node.body) for node in classes)]
    for prefix, body in bodies:
        for child in body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _function_records(module, prefix + child.name, child, lines, rng)


def _function_records(
    module: str,
    name: str,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    lines: Sequence[str],
    rng: random.Random,
) -> Iterator[Record]:
    """A code record where the function is short and says what it does, else text records of its docstring."""
    function = _function(module, name, node, lines)
    record = _code_record(function, rng) if function else None
    if record and _usable(record):
        yield record
    else:
        yield from _prose(f"the function `{module}.{name}`", _doc(node), "function_description", module)


def _function(
    module: str, name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]
) -> Function | None:
    """The parts of `node`, or None where the docstring is too short or the body does too little."""
    doc, first = _doc(node).split("\n\n")[0], node.body[0]
    indent, top = re.compile(f"^ {{,{node.col_offset}}}"), node.lineno
    own = [indent.sub("", line).rstrip() for line in lines[top - 1 : node.end_lineno]]
    signature = "\n".join(own[: first.lineno - top])
    body = "\n".join(own[(first.end_lineno or top) - top + 1 :]).strip("\n")
    described = len(doc.split()) >= 5 and len(doc) <= 400 and not re.search(r'\\|"""|"$', doc)
    worked = len(body) >= 40 and not body.strip().startswith("raise ")
    if not (described and worked and signature.endswith(":")):
        return None
    return Function(module, name, signature, doc, body)


def _code_record(function: Function, rng: random.Random) -> Record:
    kind = "method" if "." in function.name else "function"
    where = f"`{function.name}` of the module `{function.module}`"
    doc = "\n".join(f"    {line}".rstrip() for line in f'"""{function.doc}"""'.split("\n"))
    head, lines = f"{function.signature}\n{doc}", function.body.split("\n")
    completion = function.body
    task = rng.choice(["complete_function", "write_function", "finish_function"])
    if task == "finish_function" and len(lines) < 4:
        task = "complete_function"
    if task == "write_function":
        wish = rng.choice(["Write the Python {} {}.", "Implement the Python {} {}."]).format(kind, where)
        prompt = f"{wish}\n\n{function.doc}\n\n{function.signature}"
        completion = f"{function.signature}\n{function.body}"
    elif task == "finish_function":
        start = rng.randint(1, len(lines) // 2)
        prompt = f"Finish the Python {kind} {where}.\n\n{head}\n" + "\n".join(lines[:start])
        completion = "\n".join(lines[start:])
    else:
        wish = rng.choice(["Complete the Python {} {}.", "Write the body of the Python {} {}."]).format(
            kind, where
        )
        prompt = f"{wish}\n\n{head}"
    return Record(prompt.rstrip(), completion.strip("\n"), "code", task, function.module)


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "").expandtabs().strip()


def _prose(subject: str, text: str, task: str, source: str) -> Iterator[Record]:
    """Passages of `text`: what `subject` is, and every later one as the continuation of the one before."""
    passages = _passages(_prose_blocks(text))
    for index, passage in enumerate(passages):
        prompt = f"What is {subject}?" if task != "function_description" else f"What does {subject} do?"
        if index:
            prompt = f"Continue this description of {subject}.\n\n{passages[index - 1].split(_GAP)[-1]}"
        if len(passage.split()) >= 12:
            yield Record(prompt, passage, "text", "continuation" if index else task, source)


_GAP = "\n\n"
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\(.*\)$")
_NOT_PROSE = re.compile(r">>>|::=|^\s*[+|]|\A\n* {4,}.*[=(]|WARRANT|LIABLE|Copyright", re.M)
_UNDERLINE = re.compile(r"[*=\-~^]{3,}$")


def _prose_blocks(text: str) -> list[str]:
    """Paragraphs; tables, grammar, code, licences and left-over words (`Examples:`) are dropped."""
    blocks = ["\n".join(line.rstrip() for line in block.split("\n")) for block in re.split(r"\n\s*\n", text)]
    return [
        b.strip("\n") for b in blocks if len(b.split()) > 2 or _SIGNATURE.match(b) if not _NOT_PROSE.search(b)
    ]


def _passages(blocks: Iterable[str], size: int = 480) -> list[str]:
    """Neighbouring blocks joined up to `size` characters."""
    passages: list[str] = []
    for block in blocks:
        if passages and len(passages[-1]) + len(block) <= size:
            passages[-1] += _GAP + block
        else:
            passages.append(block)
    return passages


def _reference_records(tree: ast.Module) -> Iterator[Record]:
    """The language reference, shortest topics first: what the long ones repeat of them is left out."""
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(assigned[-1]) if assigned else {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        blocks = [block for block in _prose_blocks(topics[name]) if " ".join(block.split()) not in seen]
        seen.update(" ".join(block.split()) for block in blocks)
        for title, section in _sections(blocks, name):
            yield from _section_records(title, section, f"topics/{name}")


def _sections(blocks: Iterable[str], topic: str) -> Iterator[tuple[str, list[str]]]:
    """Blocks under each heading and under each signature (`str.lower()` and the indented blocks after it)."""
    title, section = topic, list[str]()
    for block in blocks:
        lines = block.split("\n")
        heading = len(lines) == 2 and _UNDERLINE.match(lines[1]) is not None
        ended = _SIGNATURE.match(title) is not None and not block.startswith(" ")
        if heading or ended or _SIGNATURE.match(lines[0]):
            yield title, section
            title, section = lines[0] if heading or _SIGNATURE.match(lines[0]) else topic, []
            lines = lines[2 if heading else len(lines) if title != topic else 0 :]
        if lines:
            section.append("\n".join(lines))
    yield title, section


def _section_records(title: str, section: Sequence[str], source: str) -> Iterator[Record]:
    defined = _SIGNATURE.match(title) is not None
    plain = title.replace('"', "")
    subject = f"`{title}` in Python" if defined else f"the section `{plain}` of the Python reference"
    blocks = [inspect.cleandoc(block) if defined else block for block in section]
    yield from _prose(subject, _GAP.join(blocks), "definition" if defined else "language_reference", source)


# ---- math ----

NAMES = (
    *(
        "Ada",
        "Ali",
        "Ana",
        "Ben",
        "Chen",
        "Dan",
        "Ella",
        "Eva",
        "Finn",
        "Hana",
        "Ida",
        "Ivan",
        "Jack",
        "Kofi",
    ),
    *(
        "Lea",
        "Leo",
        "Lina",
        "Mia",
        "Nils",
        "Nora",
        "Omar",
        "Priya",
        "Rosa",
        "Sam",
        "Tara",
        "Tom",
        "Yara",
        "Zoe",
    ),
)
ITEMS = (
    *("apples", "balls", "books", "buttons", "cakes", "candles", "cards", "coins", "cups", "eggs", "flowers"),
    *("marbles", "oranges", "pears", "pencils", "pens", "plates", "shells", "stamps", "stickers", "toys"),
)
UNITS = (
    *(("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7)),
    *(("metres", "centimetres", 100), ("centimetres", "millimetres", 10), ("feet", "inches", 12)),
    *(("kilograms", "grams", 1000), ("dollars", "cents", 100), ("years", "months", 12)),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A question, the lines of its solution and the answer; equal `given` means the same calculation."""

    given: tuple[object, ...]
    question: str
    solution: tuple[str, ...]
    answer: int | str


class Draw:
    """What generators draw from: names, things, numbers and wordings, all from one seeded source."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self._random.randint(low, high)

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """`count` integers in [low, high]."""
        return [self.number(low, high) for _ in range(count)]

    def one(self, *choices: T) -> T:
        """One of `choices`."""
        return self._random.choice(choices)

    def two(self, choices: Sequence[str]) -> list[str]:
        """Two different ones of `choices`."""
        return self._random.sample(choices, 2)


def _math_records() -> Iterator[Record]:
    """Every kind's problems, no calculation twice: what is held out was not seen under other names either."""
    for kind, generate in KINDS.items():
        draw = Draw(f"{kind} {REVISION}")
        problems: dict[tuple[object, ...], Problem] = {}
        while len(problems) < PROBLEMS_PER_KIND:
            problem = generate(draw)
            problems.setdefault(problem.given, problem)
        for given, problem in problems.items():
            completion = "\n".join([*problem.solution, f"#### {problem.answer}"])
            yield Record(problem.question, completion, "math", kind, "/".join(map(str, (kind, *given))))


def _arithmetic(draw: Draw) -> Problem:
    a, b, c = draw.numbers(3, 2, 20)
    first, second = draw.one("+", "-", "*"), draw.one("+", "-")
    value = {"+": a + b, "-": a - b, "*": a * b}[first]
    result = value + c if second == "+" else value - c
    ask = draw.one("Compute {}.", "What is {}?", "Work out {} step by step.", "Evaluate {}.")
    steps = (f"{a} {first} {b} = {value}", f"{value} {second} {c} = {result}")
    return Problem((a, first, b, second, c), ask.format(f"{a} {first} {b} {second} {c}"), steps, result)


def _shopping(draw: Draw) -> Problem:
    a, p, b, q = draw.numbers(4, 2, 9)
    name, (x, y) = draw.one(*NAMES), draw.two(ITEMS)
    question = draw.one(
        f"{name} buys {a} {x} for {p} dollars each and {b} {y} for {q} dollars each. What is the total?",
        f"At a market, {name} pays for {a} {x} at {p} dollars each and {b} {y} at {q} dollars each. "
        "What is the total in dollars?",
        f"{name} needs {a} {x} that cost {p} dollars each, and {b} {y} that cost {q} dollars each. "
        f"How many dollars does {name} spend?",
    )
    steps = (
        f"The {x} cost {a} * {p} = {a * p} dollars.",
        f"The {y} cost {b} * {q} = {b * q} dollars.",
        f"Together that is {a * p} + {b * q} = {a * p + b * q} dollars.",
    )
    return Problem((a, p, b, q), question, steps, a * p + b * q)


def _change(draw: Draw) -> Problem:
    note, a, p = draw.one(50, 60, 70, 80, 100), draw.number(2, 9), draw.number(2, 5)
    extra, name, item = draw.number(1, 4), draw.one(*NAMES), draw.one(*ITEMS)
    question = draw.one(
        f"{name} has {note} dollars and buys {a} {item} for {p} dollars each and a bag for {extra} dollars. "
        "How many dollars are left?",
        f"With {note} dollars in hand, {name} takes {a} {item} at {p} dollars each and a drink for {extra} "
        f"dollars. How much change does {name} get, in dollars?",
    )
    total = a * p + extra
    steps = (
        f"The {item} cost {a} * {p} = {a * p} dollars.",
        f"With the rest it is {a * p} + {extra} = {total} dollars.",
        f"There remain {note} - {total} = {note - total} dollars.",
    )
    return Problem((note, a, p, extra), question, steps, note - total)


def _travel(draw: Draw) -> Problem:
    v, t, w, u = draw.number(2, 20), draw.number(2, 6), draw.number(2, 20), draw.number(2, 6)
    name, way = draw.one(*NAMES), draw.one("rides", "sails", "skates", "cycles")
    question = draw.one(
        f"{name} {way} at {v} km per hour for {t} hours and then at {w} km per hour for {u} hours. "
        "How many km is that?",
        f"At {v} km per hour for {t} hours, then at {w} km per hour for {u} hours: how many km is that?",
    )
    steps = (
        f"The first part is {v} * {t} = {v * t} km.",
        f"The second part is {w} * {u} = {w * u} km.",
        f"In all it is {v * t} + {w * u} = {v * t + w * u} km.",
    )
    return Problem((v, t, w, u), question, steps, v * t + w * u)


def _production(draw: Draw) -> Problem:
    rate, box, boxes = draw.number(2, 12), draw.number(2, 10), draw.number(2, 12)
    minutes, item = box * boxes, draw.one(*ITEMS)
    question = draw.one(
        f"A machine makes {rate} {item} per minute and runs for {minutes} minutes. "
        f"Boxes hold {box} {item} each. How many boxes are filled?",
        f"Every minute, {rate} {item} come off a line. After {minutes} minutes they are packed {box} to "
        "a box. How many boxes is that?",
    )
    made = rate * minutes
    steps = (
        f"It makes {rate} * {minutes} = {made} {item}.",
        f"They fill {made} / {box} = {made // box} boxes.",
    )
    return Problem((rate, minutes, box), question, steps, made // box)


def _sequence(draw: Draw) -> Problem:
    start, step, n = draw.number(1, 30), draw.number(2, 9), draw.number(6, 12)
    shown = ", ".join(str(start + step * i) for i in range(4))
    question = draw.one(
        f"The numbers {shown} go on in the same way. What is number {n} of this sequence?",
        f"A sequence starts {shown} and always grows by the same amount. Find its term number {n}.",
    )
    steps = (
        f"It grows by {start + step} - {start} = {step} each time.",
        f"To term {n} there are {n} - 1 = {n - 1} steps.",
        f"They add {n - 1} * {step} = {(n - 1) * step}.",
        f"The term is {start} + {(n - 1) * step} = {start + (n - 1) * step}.",
    )
    return Problem((start, step, n), question, steps, start + (n - 1) * step)


def _percentage(draw: Draw) -> Problem:
    percent, whole = draw.one(10, 20, 25, 30, 40, 50, 75), 20 * draw.number(1, 50)
    part, name, item = (
        percent * whole // 100,
        draw.one(*NAMES),
        draw.one("coat", "bike", "desk", "lamp", "phone"),
    )
    question = draw.one(
        f"A {item} costs {whole} dollars. {name} gets {percent} percent off. What is the price then?",
        f"The price of a {item} is {whole} dollars and falls by {percent} percent. What is it then?",
    )
    steps = (
        f"{percent} percent of {whole} is {whole} * {percent} / 100 = {part}.",
        f"The price is {whole} - {part} = {whole - part} dollars.",
    )
    return Problem((whole, percent), question, steps, whole - part)


def _fraction_of(draw: Draw) -> Problem:
    d, k = draw.number(2, 10), draw.number(2, 15)
    n, whole = draw.number(1, d - 1), d * k
    name, item = draw.one(*NAMES), draw.one(*ITEMS)
    question = draw.one(
        f"{name} has {whole} {item} and gives {n}/{d} of them away. How many {item} are left?",
        f"Of {whole} {item}, {name} sells {n}/{d}. How many {item} remain?",
    )
    steps = (
        f"1/{d} of {whole} is {whole} / {d} = {k}.",
        f"{n}/{d} is {n} * {k} = {n * k} {item}.",
        f"There remain {whole} - {n * k} = {whole - n * k} {item}.",
    )
    return Problem((whole, n, d), question, steps, whole - n * k)


def _fraction_sum(draw: Draw) -> Problem:
    b, d = draw.number(2, 9), draw.number(2, 9)
    a, c = draw.number(1, b), draw.number(1, d)
    total, name = Fraction(a, b) + Fraction(c, d), draw.one(*NAMES)
    question = draw.one(
        f"What is {a}/{b} + {c}/{d} as a fraction in lowest terms?",
        f"{name} drinks {a}/{b} of a litre, then {c}/{d} of a litre. How many litres, in lowest terms?",
    )
    steps = (
        f"{a}/{b} = {a * d}/{b * d}",
        f"{c}/{d} = {c * b}/{b * d}",
        f"{a * d}/{b * d} + {c * b}/{b * d} = {a * d + c * b}/{b * d}",
        f"{a * d + c * b}/{b * d} = {total}",
    )
    return Problem((a, b, c, d), question, steps, str(total))


def _units(draw: Draw) -> Problem:
    large, small, factor = draw.one(*UNITS)
    a, b = draw.number(2, 12), draw.number(1, min(factor - 1, 50))
    question = draw.one(
        f"How many {small} are {a} {large} and {b} {small}?",
        f"Convert {a} {large} and {b} {small} to {small}.",
    )
    steps = (
        f"{a} {large} are {a} * {factor} = {a * factor} {small}.",
        f"With the rest it is {a * factor} + {b} = {a * factor + b} {small}.",
    )
    return Problem((large, a, b), question, steps, a * factor + b)


def _ages(draw: Draw) -> Problem:
    age, more, times = draw.number(3, 15), draw.number(2, 12), draw.number(2, 4)
    x, y = draw.two(NAMES)
    z = draw.one(*(name for name in NAMES if name not in (x, y)))
    question = draw.one(
        f"{x} is {age} years old. {y} is {more} years older than {x}, and {z} {times} times as old as "
        f"{y}. How old is {z}?",
        f"{x} is {age}, {y} is older by {more} years, and {z} has {times} times {y}'s age. How old is {z}?",
    )
    steps = (
        f"{y} is {age} + {more} = {age + more} years old.",
        f"{z} is {times} * {age + more} = {times * (age + more)} years old.",
    )
    return Problem((age, more, times), question, steps, times * (age + more))


def _rectangle(draw: Draw) -> Problem:
    a, b, price = draw.number(2, 20), draw.number(2, 20), draw.number(2, 5)
    thing = draw.one("garden", "field", "yard", "park")
    question = draw.one(
        f"A {thing} is {a} metres long and {b} metres wide. A fence around it costs {price} dollars per "
        "metre. What does the fence cost in dollars?",
        f"The sides of a {thing} are {a} metres and {b} metres. Fencing it in costs {price} dollars a metre."
        " How many dollars is that?",
    )
    around = 2 * (a + b)
    steps = (
        f"Two sides are {a} + {b} = {a + b} metres.",
        f"The fence is 2 * {a + b} = {around} metres long.",
        f"It costs {around} * {price} = {around * price} dollars.",
    )
    return Problem((a, b, price), question, steps, around * price)


def _average(draw: Draw) -> Problem:
    mean = draw.number(5, 20)
    a, b = draw.number(2, mean + 2), draw.number(2, mean + 2)
    c, name, item = 3 * mean - a - b, draw.one(*NAMES), draw.one(*ITEMS)
    question = draw.one(
        f"{name} finds {a}, {b} and {c} {item} on three days. How many is that per day on average?",
        f"What is the average of {a}, {b} and {c}?",
    )
    steps = (
        f"{a} + {b} = {a + b}",
        f"{a + b} + {c} = {3 * mean}",
        f"{3 * mean} / 3 = {mean}",
    )
    return Problem((a, b, c), question, steps, mean)


def _sharing(draw: Draw) -> Problem:
    people, each = draw.number(3, 12), draw.number(2, 12)
    left, item = draw.number(1, people - 1), draw.one(*ITEMS)
    total = people * each + left
    question = draw.one(
        f"{total} {item} are shared equally among {people} children. How many {item} are left over?",
        f"A teacher gives {total} {item} to {people} children, each as many as the others. "
        f"How many {item} can't be given out?",
    )
    steps = (
        f"Each gets {each}, because {people} * {each} = {people * each}.",
        f"There are {total} - {people * each} = {left} left over.",
    )
    return Problem((total, people), question, steps, left)


def _equation(draw: Draw) -> Problem:
    a, x, b = draw.number(2, 9), draw.number(2, 12), draw.number(1, 20)
    c, name = a * x + b, draw.one(*NAMES)
    question = draw.one(
        f"Solve {a} * x + {b} = {c} for x.",
        f"{name} thinks of a number, multiplies it by {a}, adds {b} and gets {c}. What is the number?",
    )
    steps = (f"Without the {b} it is {c} - {b} = {a * x}.", f"The number is {a * x} / {a} = {x}.")
    return Problem((a, b, c), question, steps, x)


def _stock(draw: Draw) -> Problem:
    start, days, sold, came = draw.number(60, 99), draw.number(2, 6), draw.number(2, 9), draw.number(5, 40)
    item = draw.one(*ITEMS)
    question = draw.one(
        f"A shop has {start} {item}. For {days} days it sells {sold} {item} a day, then {came} new ones "
        f"arrive. How many {item} does it have now?",
        f"From {start} {item}, in {days} days {sold} are taken each day, and {came} are put back afterwards."
        f" How many {item} are there then?",
    )
    rest = start - days * sold
    steps = (
        f"Gone are {days} * {sold} = {days * sold} {item}.",
        f"There remain {start} - {days * sold} = {rest} {item}.",
        f"Then there are {rest} + {came} = {rest + came} {item}.",
    )
    return Problem((start, days, sold, came), question, steps, rest + came)


KINDS: dict[str, Callable[[Draw], Problem]] = {
    "arithmetic": _arithmetic,
    "shopping": _shopping,
    "change": _change,
    "travel": _travel,
    "production": _production,
    "sequence": _sequence,
    "percentage": _percentage,
    "fraction_of": _fraction_of,
    "fraction_sum": _fraction_sum,
    "units": _units,
    "ages": _ages,
    "rectangle": _rectangle,
    "average": _average,
    "sharing": _sharing,
    "equation": _equation,
    "stock": _stock,
}
