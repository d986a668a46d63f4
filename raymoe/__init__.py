"""raymoe: from a dense language model to the Mixture-of-Experts that suits your data and budget.

The path, in the order of the folder listing::

    instructions -> perplexity -> representations -> clusters -> upcycle -> train -> evaluate -> report

`stages.py` says what each step reads and keeps; `sweep/` runs many of them. The names in `__all__` are the public
interface; each is loaded when it is first used, so that `import raymoe` costs nothing::

    import raymoe

    def run(base: raymoe.Run, point: raymoe.Point) -> raymoe.Run:
        return raymoe.replace(base, {"method.name": point["method"]})

    SWEEP = raymoe.Sweep("methods", "which is best?", [{"method": "dense"}, {"method": "su"}], run)

    if __name__ == "__main__":
        raymoe.main(SWEEP)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymoe.cli.sweep import main as main
    from raymoe.config import Run as Run
    from raymoe.config import load as load
    from raymoe.config import replace as replace
    from raymoe.schema import InputError as InputError
    from raymoe.sweep.definition import Point as Point
    from raymoe.sweep.definition import Sweep as Sweep
    from raymoe.upcycle.simoe import generate_simoe as generate_simoe
    from raymoe.upcycle.simoe import load_simoe as load_simoe

__version__ = "0.1.0"

_PUBLIC = {
    "InputError": "schema",
    "Point": "sweep.definition",
    "Run": "config",
    "Sweep": "sweep.definition",
    "generate_simoe": "upcycle.simoe",
    "load": "config",
    "load_simoe": "upcycle.simoe",
    "main": "cli.sweep",
    "replace": "config",
}
"""Public name -> the module below raymoe that defines it."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"raymoe.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
