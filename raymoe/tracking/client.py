"""Connecting to MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TRIAL_KEY = "raymoe.trial_key"
SWEEP_KEY = "raymoe.sweep"


def default_uri() -> str:
    """Return $MLFLOW_TRACKING_URI, else a database in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def without_credentials(text: str, uri: str = "") -> str:
    """Return `text` without the `user:password@` of any address, nor that of `uri` where it stands alone."""
    text = _USERINFO.sub("", text)
    for found in _USERINFO.findall(uri):
        text = text.replace(found, "").replace(unquote(found), "")
    return text


_USERINFO = re.compile(r"(?<=://)[^\s/'\"][^\s'\"]*@")
"""Up to the last @, since a password may hold a slash or an @ of its own; not in the paths of `sqlite:///`."""


def connect(uri: str) -> Any:
    """Return an MLflow client that gives up after seconds, not minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
    with quiet():
        from mlflow import MlflowClient

        return MlflowClient(uri)


def first_line(error: Exception, uri: str) -> str:
    """Return the first line of `error`, without the credentials in `uri`."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return without_credentials(line, uri)[:200]


def allowed_name(metric: str) -> str:
    """Return `metric` in the characters that MLflow takes: domains are named by users (`c++`)."""
    return re.sub(r"[^\w./ :-]", "_", metric)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the database migration's log lines off the terminal."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
