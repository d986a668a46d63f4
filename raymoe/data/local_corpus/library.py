"""Code and text from the standard library's own source files, read with `ast` (nothing is imported)."""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymoe.data.local_corpus.row import REVISION, Row, usable

# Skipped: absent from some distributions, tests, data tables, or the same few lines over and over.
SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"),
}
SKIPPED_FILES = re.compile(r"_sysconfigdata|sitecustomize|usercustomize|_pydecimal|_pydatetime")


@dataclass(frozen=True)
class Function:
    """A documented function, its lines dedented to its own `def`."""

    module: str
    name: str
    signature: str
    doc: str
    body: str


def library_folder() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(library: Path) -> list[Path]:
    """List the Python files that are read, in the same order on every machine."""
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


def library_rows(library: Path) -> Iterator[Row]:
    """Yield code and text rows from every file of the standard library."""
    rng = random.Random(f"library {REVISION}")
    for file in library_files(library):
        try:
            source = file.read_bytes().decode()
            tree = _parse(source)
        except (OSError, SyntaxError, ValueError):  # unreadable, for another Python, or not UTF-8
            continue
        if file.parent.name == "pydoc_data":
            yield from _reference_rows(tree)
            continue
        module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        yield from _module_rows(module, tree, source.splitlines(), rng)


def _parse(source: str) -> ast.Module:
    """Parse `source`, ignoring warnings about it whatever the active filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _module_rows(module: str, tree: ast.Module, lines: Sequence[str], rng: random.Random) -> Iterator[Row]:
    yield from _prose(f"the module `{module}`", _doc(tree), "module_description", module)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in classes:
        yield from _prose(f"the class `{module}.{node.name}`", _doc(node), "class_description", module)
    bodies = [("", tree.body), *((f"{node.name}.", node.body) for node in classes)]
    for prefix, body in bodies:
        for child in body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _function_rows(module, prefix + child.name, child, lines, rng)


def _function_rows(
    module: str,
    name: str,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    lines: Sequence[str],
    rng: random.Random,
) -> Iterator[Row]:
    """Yield a code row if the function is short and documented, else text rows from its docstring."""
    function = _function(module, name, node, lines)
    row = _code_row(function, rng) if function else None
    if row and usable(row):
        yield row
    else:
        yield from _prose(f"the function `{module}.{name}`", _doc(node), "function_description", module)


def _function(
    module: str, name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]
) -> Function | None:
    """Return the parts of `node`; None if its docstring is too short or its body does too little."""
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


def _code_row(function: Function, rng: random.Random) -> Row:
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
    return Row(prompt.rstrip(), completion.strip("\n"), "code", task, function.module)


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "").expandtabs().strip()


def _prose(subject: str, text: str, task: str, source: str) -> Iterator[Row]:
    """Yield the passages of `text`: the first says what `subject` is, each later one continues the previous."""
    passages = _passages(_prose_blocks(text))
    for index, passage in enumerate(passages):
        prompt = f"What is {subject}?" if task != "function_description" else f"What does {subject} do?"
        if index:
            prompt = f"Continue this description of {subject}.\n\n{passages[index - 1].split(_GAP)[-1]}"
        if len(passage.split()) >= 12:
            yield Row(prompt, passage, "text", "continuation" if index else task, source)


_GAP = "\n\n"
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\(.*\)$")
_NOT_PROSE = re.compile(r">>>|::=|^\s*[+|]|\A\n* {4,}.*[=(]|WARRANT|LIABLE|Copyright", re.M)
_UNDERLINE = re.compile(r"[*=\-~^]{3,}$")


def _prose_blocks(text: str) -> list[str]:
    """Split `text` into paragraphs, without tables, grammar, code, licences or stray words (`Examples:`)."""
    blocks = ["\n".join(line.rstrip() for line in block.split("\n")) for block in re.split(r"\n\s*\n", text)]
    return [
        b.strip("\n") for b in blocks if len(b.split()) > 2 or _SIGNATURE.match(b) if not _NOT_PROSE.search(b)
    ]


def _passages(blocks: Iterable[str], size: int = 480) -> list[str]:
    """Join neighbouring blocks into passages of up to `size` characters."""
    passages: list[str] = []
    for block in blocks:
        if passages and len(passages[-1]) + len(block) <= size:
            passages[-1] += _GAP + block
        else:
            passages.append(block)
    return passages


def _reference_rows(tree: ast.Module) -> Iterator[Row]:
    """Yield the language reference, shortest topic first; longer topics omit what shorter ones said."""
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(assigned[-1]) if assigned else {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        blocks = [block for block in _prose_blocks(topics[name]) if " ".join(block.split()) not in seen]
        seen.update(" ".join(block.split()) for block in blocks)
        for title, section in _sections(blocks, name):
            yield from _section_rows(title, section, f"topics/{name}")


def _sections(blocks: Iterable[str], topic: str) -> Iterator[tuple[str, list[str]]]:
    """Group blocks by heading and by signature (`str.lower()` and the indented blocks after it)."""
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


def _section_rows(title: str, section: Sequence[str], source: str) -> Iterator[Row]:
    defined = _SIGNATURE.match(title) is not None
    plain = title.replace('"', "")
    subject = f"`{title}` in Python" if defined else f"the section `{plain}` of the Python reference"
    blocks = [inspect.cleandoc(block) if defined else block for block in section]
    yield from _prose(subject, _GAP.join(blocks), "definition" if defined else "language_reference", source)
