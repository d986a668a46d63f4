"""README and docs/: short, true at today's layout, every link and command line right, what ages in one page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import raymoe
from raymoe.cli.command import parse
from raymoe.cli.main import ALIASES, VERBS
from raymoe.cli.sweep import SWEEP_OPTIONS
from raymoe.config import RunFile, load
from raymoe.methods import METHODS
from raymoe.schema import InputError
from raymoe.sweep.definition import load as load_sweep
from raymoe.sweep.definition import trials_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def blocks(page: Path, *languages: str) -> list[str]:
    """Code blocks of `page` in any of `languages`."""
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """Text of `page` without its code blocks."""
    return FENCE.sub("", page.read_text())


# ---- size, links, what ages


def test_readme_fits_on_two_pages() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9_000


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings; raises AssertionError where GitHub's and MkDocs' would differ."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        kept = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        assert re.sub(r"\s", "-", kept) == re.sub(r"[-\s]+", "-", kept), f"{page.name}: {heading}"
        found.add(kept.replace(" ", "-"))
    return found


@PAGE
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_readme_leads_to_every_page() -> None:
    linked = {(ROOT / link).resolve() for link in LINK.findall(prose(ROOT / "README.md"))}
    apart = {"index", "changelog", "contributing"}  # the site's own
    assert {page.stem for page in DOCS.glob("*.md") if page not in linked} == apart


@PAGE
def test_what_ages_is_in_results_alone(page: Path) -> None:
    """Hashes of commits and stages, and times that were measured."""
    hashes = r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,40}\b"
    found = re.findall(rf"{hashes}|\d+ min \d+ s|done in \d+", page.read_text())
    assert bool(found) == (page.stem == "results"), found


def test_one_address_of_the_repository() -> None:
    address = yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["urls"]["Source"] == address
    assert f"\nrepo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text()
    clone = f"git clone {address} && cd {address.rsplit('/', 1)[1]}\n"
    for page in ("README.md", "CONTRIBUTING.md", "docs/quickstart.md"):
        assert clone in (ROOT / page).read_text(), page


def test_licence_is_the_one_of_the_metadata() -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (
        metadata["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    )
    assert metadata["license-files"] == ["LICENSE"]
    words = (ROOT / "LICENSE").read_text().split()
    assert words[:4] == ["Apache", "License", "Version", "2.0,"]
    assert " ".join(words).endswith("limitations under the License.")


# ---- commands


def code_lines(page: Path) -> Iterator[str]:
    """Shell lines of a page: its bash blocks, continued lines joined, and what stands in backticks in its text."""
    for block in blocks(page, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """Command lines of `page` as words; environments, comments and what follows `--` of a job apart."""
    for line in code_lines(page):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose in backticks with an apostrophe
            continue
        text = " ".join(shlex.quote(word) if word not in ("&&", ";", "--") else word for word in words)
        for part in re.split(r" && | ; | -- ", text):
            if part:
                yield shlex.split(part)


def raymoe_commands(page: Path) -> list[list[str]]:
    """Arguments of every whole `raymoe VERB ...` in `page`."""
    found = [words for words in commands(page) if Path(words[0]).name == "raymoe" and len(words) > 1]
    return [words[1:] for words in found if words[1] in {*VERBS, *ALIASES, "sweep"} or "-" not in words[1]]


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the quickstart's my-run.yaml and the repository's sweeps and configs."""
    (text,) = (block for block in blocks(DOCS / "quickstart.md", "yaml") if block.startswith("# my-run.yaml"))
    (tmp_path / "my-run.yaml").write_text(text)
    for name in ("sweeps", "configs", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(arguments: list[str]) -> None:
    """Read one command line as raymoe does; raises InputError for what is wrong with it."""
    verb, rest = arguments[0], list(arguments[1:])
    if verb == "sweep" and rest:
        load_sweep(Path(rest.pop(0)))
    options = SWEEP_OPTIONS if verb == "sweep" else VERBS[ALIASES.get(verb, verb)].options
    if "--help" not in rest:
        parse(rest, options)


@PAGE
def test_raymoe_commands_are_understood(page: Path, working_folder: Path) -> None:
    problems = []
    for arguments in raymoe_commands(page):
        if "..." in arguments or "tempered" in arguments:  # the method that docs/extending.md adds
            continue
        try:
            parsed(arguments)
        except (InputError, KeyError) as error:
            problems.append(f"raymoe {shlex.join(arguments)}: {error}")
    assert not problems


def test_the_pages_have_commands_to_be_checked() -> None:
    """Every verb is in the quickstart, and the extraction above finds it."""
    assert {arguments[0] for arguments in raymoe_commands(DOCS / "quickstart.md")} >= {*VERBS, "sweep"} - {
        *ALIASES
    }
    assert ["train", "my-run.yaml", "--dry-run"] in raymoe_commands(ROOT / "README.md")


def test_wrong_commands_are_not_understood(working_folder: Path) -> None:
    for line in ("train my-run.yaml --num-expert 4", "plan absent.yaml", "sweep sweeps/absent.py"):
        with pytest.raises(InputError):
            parsed(line.split())


@PAGE
def test_other_commands_name_what_is_there(page: Path, working_folder: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for words in commands(page):
        if words[0] == "make" and len(words) > 1 and words[1] not in targets:
            missing.append(shlex.join(words))
        elif words[0] == "python" and words[1].startswith(("sweeps/", "benchmarks/")):
            missing += [] if Path(words[1]).is_file() else [shlex.join(words)]
            if words[1].startswith("sweeps/") and "..." not in words:
                parsed(["sweep", *words[1:]])
    paths = re.findall(r"`((?:raymoe|tests|sweeps|benchmarks|configs|deploy)/[\w./-]+)`", prose(page))
    if page.stem not in ("CHANGELOG", "changelog", "extending"):  # these name what was, or what a reader adds
        missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_cpu_build_of_torch_is_one_that_raymoe_takes() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = (each for each in dependencies if each.startswith("torch>"))
    for name in ("README.md", "docs/quickstart.md", ".github/workflows/ci.yml"):
        (wanted,) = set(re.findall(r"--torch-backend cpu '(torch[^']*)'", (ROOT / name).read_text()))
        assert wanted in (torch, "torch" + torch[torch.index("<") :]), name


def test_ci_runs_what_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    runs = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    made = {
        name: [run.split()[1] for run in steps if run.startswith("make ")] for name, steps in runs.items()
    }
    assert made == {"fast": ["check", "test-fast"], "everything": ["test"]}
    assert {target for some in made.values() for target in some} <= targets


# ---- configuration


@PAGE
def test_run_files_are_valid(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "my-run.yaml"
    for block in blocks(page, "yaml"):
        file.write_text(block)
        load(RunFile, file)


def test_configuration_page_is_what_the_types_say() -> None:
    done = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def keys_of(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting, those of all methods under `method.`."""
    for name, field in kind.model_fields.items():
        if name == "method":
            yield from (key for method in METHODS.values() for key in keys_of(method, "method."))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_configuration_page_has_every_key() -> None:
    page, keys = (DOCS / "configuration.md").read_text(), set(keys_of(RunFile)) - {"method.name"}
    assert len(keys) > 60
    assert not [key for key in keys if f"| `{key}` |" not in page]


# ---- what the pages say of the code


def test_a_pages_sweep_is_the_file(tmp_path: Path) -> None:
    (code,) = (block for block in blocks(DOCS / "sweeps.md", "python") if "SWEEP = " in block)
    assert code == (ROOT / "sweeps" / "load_balance_alpha.py").read_text()
    file = tmp_path / "sweep.py"
    file.write_text(code)
    assert len(trials_of(load_sweep(file), RunFile().run())) == 4


def test_every_sweep_is_listed() -> None:
    listed = set(re.findall(r"`sweeps/(\w+\.py)`", prose(DOCS / "sweeps.md")))
    assert listed == {file.name for file in (ROOT / "sweeps").glob("*.py")}


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(DOCS / "quickstart.md", "python")
    exec(compile(code, "quickstart.md", "exec"), {})
    assert "num_experts=4" in capsys.readouterr().out


def test_the_public_interface_is_documented() -> None:
    section = prose(DOCS / "quickstart.md").split("\n## From Python\n")[1]
    names = {
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"\w+", row)
    }
    assert names == {*raymoe.__all__} - {"__version__"}


def test_floors_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    table = prose(DOCS / "architecture.md").split("| floor of `raymoe/` |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    assert rows == [layer.split(" | ") for layer in layers]


def test_the_path_is_drawn_alike() -> None:
    pages = (ROOT / "README.md", DOCS / "index.md", DOCS / "architecture.md")
    pictures = [[block for block in blocks(page, "") if "instructions ──>" in block] for page in pages]
    assert len(pictures[0]) == 1 and pictures[0] == pictures[1] == pictures[2]


# ---- the site


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's word on its successor
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = sorted((tmp_path / "site").glob("*.html"))
    assert {file.stem for file in built} == {"404", *(page.stem for page in DOCS.glob("*.md"))}
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*https?:"
    )
    assert not [file.name for file in built if loaded.search(file.read_text())]
