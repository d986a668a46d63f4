"""`raymoe sweep FILE [config.yaml] [--key value ...] --submit`: the same sweep as a job of a Ray cluster.

The working folder is uploaded as `ray job submit --working-dir .` does it, so `.gitignore` and `.rayignore` count.
What is submitted decides the job's name: the same command finds its job again while it runs, and resumes it after.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raymoe.cluster.address import JOBS, TIMEOUT, no_token, refused_token, token
from raymoe.cluster.ray_internals import PACKAGING_LOGGER
from raymoe.config import RunFile
from raymoe.console import say
from raymoe.schema import InputError
from raymoe.storage.store import digest
from raymoe.tracking.client import without_credentials

if TYPE_CHECKING:
    import requests

    from raymoe.sweep.definition import Sweep

PASSED_ON = ("RAYMOE_STORAGE", "MLFLOW_TRACKING_URI")
"""Variables that a job gets from where it was submitted."""
PATIENCE = 60
"""Seconds for which the cluster may be out of reach while a job's log is followed."""


@dataclass(frozen=True)
class Submission:
    """A sweep as a job of a Ray cluster."""

    name: str
    address: str
    entrypoint: str
    environment: Mapping[str, str]


def submit(
    sweep: Sweep, file: Path, arguments: Sequence[str], run_file: RunFile, dry_run: bool = False
) -> int:
    """Submit `sweep`, or attach to its job if it runs; follow its log and return its exit code.

    `arguments`: the command line behind the sweep's file, as it was typed.

    Raises:
        InputError: a path that a job would not find, nobody at the address, a wrong token, another version of Ray.
    """
    _check_points(sweep, run_file)
    submission = _submission(sweep, file, arguments, run_file)
    if dry_run:
        passed_on = _passed_on(submission.environment)
        print(f"job {submission.name} at {submission.address}\n{submission.entrypoint}\n{passed_on}".rstrip())
        return 0
    client = _client(submission.address)
    name = _attach(client, submission) or _start(client, submission)
    try:
        return asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        stop = f"ray job stop --address {submission.address} {name}"
        say(f"\n{name} goes on; the same command attaches again, and `{stop}` ends it")
        return 130


def _check_points(sweep: Sweep, run_file: RunFile) -> None:
    """Raise here, not in the job, what is wrong with the sweep."""
    base = run_file.run()
    sweep.ranking()
    for point in sweep.points:
        sweep.run(base, point)


def _submission(sweep: Sweep, file: Path, arguments: Sequence[str], run_file: RunFile) -> Submission:
    words = [word for word in arguments if not re.fullmatch(r"--(no-)?(submit|dry-run)(=.*)?", word)]
    if words and not words[0].startswith("--"):
        words[0] = _inside(words[0])
    if run_file.execution.address:
        words.append("--execution.address=auto")  # of the job: the cluster that it runs on
    _check_paths(run_file)
    command = ["python", "-m", "raymoe.cli", "sweep", _inside(file), *words]
    flags = sorted({"--asha", "--json"} & set(words))
    configuration = run_file.model_dump(mode="json", exclude={"execution": {"address"}})
    identity = [file.read_text(), configuration, flags]
    name = f"raymoe-{re.sub(r'[^A-Za-z0-9_.-]', '-', sweep.name)}-{digest(identity)}"
    return Submission(name, _address(run_file), shlex.join(command), _environment(run_file))


def _inside(file: str | Path) -> str:
    """Return `file` relative to the working folder, which is what a job sees.

    Raises:
        InputError: it is elsewhere.
    """
    try:
        return str(Path(file).resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        raise InputError(
            f"--submit: {file} is not in the working folder {Path.cwd()}, which is all that a job gets"
        ) from None


def _check_paths(run_file: RunFile) -> None:
    """Raise InputError if model or data are files here, named by a path that means nothing to a job."""
    given = {"model.name": [run_file.model.name]}
    for split in ("train", "validation"):
        value = getattr(run_file.data, split)
        given[f"data.{split}"] = [value] if isinstance(value, str) else [s.name for s in value or ()]
    for key, names in given.items():
        for name in names:
            if name not in ("local", "initial") and not Path(name).is_absolute() and Path(name).exists():
                raise InputError(
                    f"{key}: {name} is a relative path: give a job the absolute one on the nodes"
                )


def _address(run_file: RunFile) -> str:
    """Return the address of the jobs API: as configured, else from the environment, else of this machine's cluster.

    Raises:
        InputError: it is no dashboard's address, or has a password in it.
    """
    sources = {
        "execution.address": run_file.execution.address,
        "RAY_API_SERVER_ADDRESS": os.environ.get("RAY_API_SERVER_ADDRESS"),
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS"),
    }
    key, address = next(((k, a) for k, a in sources.items() if a), ("--submit", JOBS))
    if without_credentials(address) != address:
        raise InputError(f"{key}: the address must not have a password in it")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{key}: a job goes to the dashboard's address, such as {JOBS} (got {address!r})")
    return address.rstrip("/")


def _environment(run_file: RunFile) -> dict[str, str]:
    """Return the variables that the job gets from this environment.

    Raises:
        InputError: a relative storage, or a password, which the job's record would show to everyone.
    """
    found = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    key, storage = "RAYMOE_STORAGE", found.get("RAYMOE_STORAGE")
    if "storage" in run_file.execution.model_fields_set:
        key, storage = "execution.storage", run_file.execution.storage
        found.pop("RAYMOE_STORAGE", None)
    if storage and "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise InputError(f"{key}: {storage} is a relative path: give a job a folder that all nodes see")
    for name, value in found.items():
        if without_credentials(value) != value:
            raise InputError(
                f"{name}: has a password in it, which the job's record would show: set it on the nodes instead "
                "(MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
            )
    return found


def _passed_on(environment: Mapping[str, str]) -> str:
    passed = ", ".join(f"{name}={value}" for name, value in environment.items())
    return f"passed on: {passed}" if passed else ""


def _client(address: str) -> Any:
    """Return Ray's client of the jobs API, after a question of our own whose answer says what is wrong.

    Raises:
        InputError: nobody there, a missing or wrong token, or another version of Ray.
    """
    where = f"execution.address: the Ray cluster at {address}"
    reply = _ask(address, None)
    if reply.status_code == 401:
        if (found := token()) is None:
            raise no_token(where)
        reply = _ask(address, found)
        if reply.status_code in (401, 403):
            raise refused_token(where)
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray's client shows the token only if this is set
    theirs, ours = _version(reply, address), metadata.version("ray")
    if theirs != ours:
        raise InputError(f"{where} runs Ray {theirs}, and here is Ray {ours}: they have to be the same")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # it would go before what the client is told
    return _quiet_client(address)


def _quiet_client(address: str) -> Any:
    import logging

    from ray.job_submission import JobSubmissionClient

    for module in ("", ".dashboard.modules.dashboard_sdk", ".dashboard.modules.job.sdk"):
        logging.getLogger(f"ray{module}").setLevel(logging.WARNING)
    # it says on every submission that __pycache__ and the like are left out, as they should be
    logging.getLogger(PACKAGING_LOGGER).setLevel(logging.ERROR)
    return JobSubmissionClient(address)


def _ask(address: str, shown: str | None) -> requests.Response:
    import requests

    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        return requests.get(f"{address}/api/version", headers=headers, timeout=TIMEOUT)
    except requests.Timeout:
        reason = f"no answer in {TIMEOUT} s"
    except requests.RequestException as error:
        reason = "connection refused" if "refused" in str(error) else type(error).__name__
    raise InputError(f"execution.address: no Ray cluster at {address}: {reason}")


def _version(reply: requests.Response, address: str) -> str:
    try:
        return str(reply.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"execution.address: no Ray cluster at {address}: what answers there is something else"
        ) from None


def _attach(client: Any, submission: Submission) -> str | None:
    """Return the name of the submission's job that runs; None if none does."""
    jobs = _jobs(client, submission.name)
    name = next((job.submission_id for job in jobs if not job.status.is_terminal()), None)
    if name:
        say(f"{name} runs already: this is its log")
    return name


def _jobs(client: Any, name: str) -> list[Any]:
    """Return the jobs called `name`, `name-2` and so on."""
    called = re.compile(rf"{re.escape(name)}(-\d+)?")
    return [job for job in client.list_jobs() if called.fullmatch(job.submission_id or "")]


def _start(client: Any, submission: Submission) -> str:
    """Submit, and return the job's name; Ray takes none twice, so later ones of a submission are `name-2`, ..."""
    before = len(_jobs(client, submission.name))
    try:
        name = client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=f"{submission.name}-{before + 1}" if before else submission.name,
            runtime_env={"working_dir": ".", "env_vars": dict(submission.environment)},
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"--submit: {' '.join(str(error).split())[:400]}") from None
    say(f"{name}: submitted to {submission.address}; {_passed_on(submission.environment)}".rstrip("; "))
    return str(name)


async def _follow(client: Any, name: str) -> int:
    """Print the job's log as it grows, over lost connections too; return the job's exit code."""
    printed, lost = 0, None
    while True:
        try:
            position = 0
            async for text in client.tail_job_logs(name):
                new = text[max(0, printed - position) :]
                position += len(text)
                printed, lost = max(printed, position), None
                print(new, end="", flush=True)
            info = client.get_job_info(name)
            if info.status.is_terminal():
                return _outcome(name, info)
        except (RuntimeError, OSError) as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE:
                say(f"{name}: the cluster is out of reach: {' '.join(str(error).split())[:200]}")
                return 1
        await asyncio.sleep(1)


def _outcome(name: str, info: Any) -> int:
    status = str(info.status)
    if status == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    say(f"{name}: {status}" + (f" (exit code {code})" if code else f": {info.message}"))
    return 130 if status == "STOPPED" else code or 1
