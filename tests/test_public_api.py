"""The names that `import raymoe` offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module, resources
from pathlib import Path

import pytest

import raymoe

DEFINED_IN = {
    "InputError": "raymoe.schema",
    "Point": "raymoe.sweep.definition",
    "Run": "raymoe.config",
    "Sweep": "raymoe.sweep.definition",
    "generate_simoe": "raymoe.upcycle.simoe",
    "load": "raymoe.config",
    "load_simoe": "raymoe.upcycle.simoe",
    "main": "raymoe.cli.sweep",
    "replace": "raymoe.config",
}


def test_exactly_these_names_are_exported() -> None:
    assert sorted(raymoe.__all__) == sorted(["__version__", *DEFINED_IN])
    assert dir(raymoe) == sorted(raymoe.__all__)


@pytest.mark.parametrize(("name", "module"), DEFINED_IN.items())
def test_every_name_is_that_of_its_module(name: str, module: str) -> None:
    assert getattr(raymoe, name) is getattr(import_module(module), name)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'raymoe' has no attribute 'no_such_name'"):
        _ = raymoe.no_such_name


def test_star_imports_them_all() -> None:
    names: dict[str, object] = {}
    exec("from raymoe import *", names)
    assert {*raymoe.__all__} <= set(names)


IMPORTS = """
import sys
import raymoe
dir(raymoe)
for name in sys.argv[1:]:
    getattr(raymoe, name)
print(*sorted({"torch", "ray", "transformers", "mlflow", "deepspeed", "numpy", "pydantic"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("names", "loaded"),
    [((), []), (("Run", "load", "replace", "InputError", "main", "Sweep", "Point"), ["pydantic"])],
)
def test_importing_it_loads_nothing_heavy(names: tuple[str, ...], loaded: list[str]) -> None:
    """Not even to write a sweep: models and Ray come when it runs."""
    command = [sys.executable, "-c", IMPORTS, *names]
    root = Path(raymoe.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == loaded


def test_its_types_are_for_others_to_check_against() -> None:
    assert resources.files("raymoe").joinpath("py.typed").is_file()
