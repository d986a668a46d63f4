"""Fixtures of all tests: an isolated home, tiny models and data on disk, one local Ray."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models import FAMILIES, write_pico


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: what is left at the end is short, so that parallel workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def isolated() -> Iterator[None]:
    """Nothing of the user's is read or written, and the network is not touched."""
    torch.set_num_threads(1)  # on a busy machine more are 9 times slower with models this small
    with tempfile.TemporaryDirectory(prefix="raymoe") as home, pytest.MonkeyPatch.context() as patch:
        for name, value in {"HOME": home, "RAY_TMPDIR": home, "GIT_CONFIG_GLOBAL": "/dev/null"}.items():
            patch.setenv(name, value)
        for name in ("TRANSFORMERS_OFFLINE", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # else every process compiles raymoe again
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYMOE_STORAGE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def own_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 puts a product of its own in the place of torch's, for the rest of the process."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def dense_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family name -> folder of a pico dense model with a tokenizer of one token per byte."""
    root = tmp_path_factory.mktemp("dense")
    return {family: write_pico(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def pico(dense_models: dict[str, Path]) -> Path:
    """Folder of the pico Llama."""
    return dense_models["llama"]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instructions of three domains in files as a user has them: additions, reversals, small functions."""
    folder = tmp_path_factory.mktemp("instructions")
    makers = {
        "math": lambda a, b: (f"What is {a} + {b}?", f"{a} + {b} = {a + b}\n#### {a + b}"),
        "text": lambda a, b: (f"Say {a} and {b} backwards.", f"{b} and {a}"),
        "code": lambda a, b: (f"Write f{a} that adds {b}.", f"def f{a}(x):\n    return x + {b}"),
    }
    for domain, make in makers.items():
        for split, numbers in {"train": range(40), "dev": range(40, 50)}.items():
            pairs = [make(n, 7 * n % 50) for n in numbers]
            rows = [
                {"prompt": p, "completion": c, "task": f"{domain}-{i % 2}"} for i, (p, c) in enumerate(pairs)
            ]
            file = folder / f"{domain}.{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """The one Ray of the test session, through raymoe's own connection."""
    from raymoe.cluster.connection import connected
    from raymoe.config import Execution

    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", folder)  # Ray writes a token there
        patch.setenv("RAY_TMPDIR", folder)  # short: sockets' paths are limited to 107 bytes
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(Execution()):
            yield
