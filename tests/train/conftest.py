"""Fixtures of the trainings that run in the tests' own process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.local_session import environment, free_port, small_run

from raymoe.data.instructions import prepare


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process group of a single worker, as Ray Train would set it up."""
    environment(monkeypatch.setenv, 0, 1, free_port())


@pytest.fixture(scope="session")
def encoded(pico: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenised instructions of the small runs."""
    out = tmp_path_factory.mktemp("encoded")
    prepare(small_run(pico, data_folder).data, pico, out, corpus=None, seed=0)
    return out
