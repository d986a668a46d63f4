"""Run the training loop under Ray Train: workers, failures, checkpoints."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raymoe.cluster.capacity import trial_workers
from raymoe.cluster.ray_internals import checkpoint_list_name, in_tune_trial
from raymoe.schema import InputError
from raymoe.storage.lease import is_held_by
from raymoe.storage.location import (
    Location,
    Remote,
    delete,
    ray_storage,
    read_file,
    replace_file,
    scratch,
    writing,
)
from raymoe.tracking.metric_log import MetricLog, metric_log, read_rows
from raymoe.train.process_group import ProcessGroup
from raymoe.train.spec import TrainingFailed, WorkerSpec, stop_flag

FAILURE_FILE = "failure.txt"
KEPT_SNAPSHOT = "checkpoints.kept.json"


def fit(spec: WorkerSpec, name: str, storage: Location, lease: str | None = None) -> dict[str, Any]:
    """Train with Ray Train and return the stage's info; resumes from the last checkpoint under `name`.

    `lease`: id of the lease on `storage / name`, which keeps others from training there.

    Raises:
        TrainingFailed: retrying would not help (the loss is not a number).
        ray.train.TrainingFailedError: workers failed more than `execution.max_failures` times.
    """
    first = read_rows(metric_log(storage, name))[:1]  # of the first attempt: its time counts too
    started = first[0]["time"] / 1000 if first else time.time()
    stop_flag(storage, name).unlink(missing_ok=True)
    mend_snapshot(storage / name)
    _remove_unreported(storage / name)
    workers = trial_workers(spec.execution, spec.run.optimization.batch_size)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec, "metrics": metric_log(storage, name), "lease": lease},
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.most == workers.count else (workers.count, workers.most),
            elastic_resize_monitor_interval_s=spec.execution.resize_interval,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        torch_config=ProcessGroup(backend="nccl" if workers.gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            **ray_storage(storage),
            failure_config=FailureConfig(max_failures=spec.execution.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    failure = spec.out / FAILURE_FILE
    try:
        with _told_to_tune(metric_log(storage, name)):
            trainer.fit()
    except Exception:
        if not failure.is_file():
            raise
    if failure.is_file():
        raise TrainingFailed(failure.read_text())
    (spec.out / "metrics.jsonl").write_bytes(metric_log(storage, name).read_bytes())
    _draw_masks(spec)
    (spec.out / "run.json").write_text(spec.run.model_dump_json(indent=1))
    return _info(spec, workers.gpu, started)


def _draw_masks(spec: WorkerSpec) -> None:
    """Draw the figures of a SIMoE run from the files its worker wrote."""
    if not (spec.out / "masks.json").is_file():
        return
    from raymoe.analysis.figures import draw

    description = json.loads((spec.out / "masks.json").read_text())
    try:
        with writing(spec.out / "figures") as folder:
            draw(description, read_rows(spec.out / "metrics.jsonl"), description["sizes"], folder)
    except Exception as error:  # a trained model must not be lost to a failed figure
        print(f"figures of {spec.out.name}: {type(error).__name__}: {error}", file=sys.stderr)


def _info(spec: WorkerSpec, gpu: bool, started: float) -> dict[str, Any]:
    """Return the stage's info: steps, evaluations, and their cost: seconds from the first start to the end, and GPU
    hours of workers while they trained."""
    evaluations = json.loads((spec.out / "evaluations.json").read_text())
    rows = [r for r in read_rows(spec.out / "metrics.jsonl") if "system/workers" in r["metrics"]]
    times = [started, *(row["time"] / 1000 for row in rows)]
    workers = [row["metrics"]["system/workers"] for row in rows]
    # count at most the time since the attempt began: nobody trains in the pauses between attempts
    trained = [
        min(end - start, row["metrics"]["system/seconds"])
        for start, end, row in zip(times, times[1:], rows, strict=False)
    ]
    busy = sum(seconds * n for seconds, n in zip(trained, workers, strict=True))
    cost = {
        "workers": max(workers, default=0),
        "seconds": time.time() - started,
        "gpu_hours": busy / 3600 if gpu else 0.0,
    }
    return {
        "steps": int(evaluations[-1]["step"]) if evaluations else 0,
        "evaluations": evaluations,
        "cost": cost,
    }


@contextmanager
def _told_to_tune(log: Location) -> Iterator[None]:
    """Inside a Tune trial, report evaluations to Tune as they appear in the run's metric log.

    Ray's own TuneReportCallback can deadlock (Ray 2.60): if its last report coincides with the end of the trial,
    Tune's session puts both into a queue with room for one, which only the session itself empties.
    """
    if not in_tune_trial():
        yield
        return
    ending = threading.Event()
    thread = threading.Thread(target=_tell_tune, args=(log, ending), name="tell-tune", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def _tell_tune(log: Location, ending: threading.Event) -> None:
    told: set[int] = set()
    last = False
    while not last:
        last = ending.wait(10.0 if isinstance(log, Remote) else 1.0)
        with suppress(OSError):  # a storage that fails for a moment: the next try may succeed
            for line in (read_file(log) or b"").splitlines(keepends=True):
                if b'"eval/loss"' in line and line.endswith(b"\n"):
                    row = json.loads(line)
                    if row["step"] not in told:
                        told.add(row["step"])
                        tune.report({"step": row["step"], **row["metrics"]})


def _worker(config: dict[str, Any]) -> None:
    """Run training in one worker. A failure that would recur is written to a file, which prevents retries."""
    spec: WorkerSpec = config["spec"]
    if (spec.out / FAILURE_FILE).is_file():
        return
    import torch

    from raymoe.train.worker import train  # here, so that drivers and controllers need not import it

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    session = RaySession(config["metrics"], config["lease"])
    try:
        try:
            train(spec, session)
        finally:
            session.flush()
    except TrainingFailed as failure:
        if session.rank == 0:
            (spec.out / FAILURE_FILE).write_text(str(failure))
    except InputError as failure:  # in one worker alone: others may wait for it, so all must end
        (spec.out / FAILURE_FILE).write_text(str(failure))
        raise


class RaySession:
    """A worker's `Session` under Ray Train."""

    def __init__(self, metrics: Location, lease: str | None = None) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._metrics_file, self._lease = metrics, lease
        self._metrics: MetricLog | None = None
        self._resumed_at: int | None = None
        self._downloaded = ExitStack()

    def checkpoint(self) -> Path | None:
        """Return the last reported checkpoint's folder, in the storage or this node's copy; valid until `resumed`."""
        checkpoint = ray.train.get_checkpoint()
        return Path(self._downloaded.enter_context(checkpoint.as_directory())) if checkpoint else None

    def resumed(self, step: int) -> None:
        """Note that training resumes after `step`: rows logged beyond it are written anew."""
        self._resumed_at = step
        self._downloaded.close()

    def stop_requested(self) -> bool:
        """True if the sweep's scheduler has stopped the run."""
        return (self._metrics_file.parent / "stop").exists()

    def leaving(self) -> bool:
        """True if the cloud has announced that it will take away a node of the run; a barrier over the workers."""
        return ray.train.get_preemption_info() is not None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append to the run's metric log (first worker only)."""
        if self._metrics is None:
            self._metrics = MetricLog(self._metrics_file, self._resumed_at)
        self._metrics.append(step, metrics)

    def flush(self) -> None:
        """Flush the metric log to the storage."""
        if self._metrics:
            self._metrics.flush()

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        """Report to Ray Train, with a checkpoint of which every worker writes its share."""
        self._check_lease()
        self.flush()
        if save is None:
            ray.train.report(dict(metrics))
            return
        with self._saving() as folder:
            save(folder)
            ray.train.report(dict(metrics), checkpoint=Checkpoint.from_directory(folder))

    @contextmanager
    def _saving(self) -> Iterator[Path]:
        """Yield a temporary folder, inside the run's folder if the storage is a file system."""
        with ExitStack() as stack:
            if isinstance(run := self._metrics_file.parent, Remote):
                yield stack.enter_context(scratch())
                return
            if self.rank == 0:
                keep_snapshot(run)
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=run, prefix=".saving-")))

    def _check_lease(self) -> None:
        if self._lease and self.rank == 0 and not is_held_by(self._metrics_file.parent, self._lease):
            raise InputError("another process has taken over this run, after a minute without a sign of life")


def _remove_unreported(run: Location) -> None:
    """Remove checkpoints whose workers were killed while writing them."""
    for folder in run.glob(".saving-*") if isinstance(run, Path) else ():
        delete(folder)


def keep_snapshot(run: Path) -> None:
    """Copy Ray Train's list of checkpoints in `run`: Ray overwrites it in place, and truncates it on a full disk."""
    content = read_file(run / checkpoint_list_name())
    if content is not None and _is_json(content):
        replace_file(run / KEPT_SNAPSHOT, content)


def mend_snapshot(run: Location) -> None:
    """Replace a truncated list of Ray Train's checkpoints in `run` by its copy.

    The copy's checkpoints still exist: Ray removes an older one only after writing the list with the newer one.
    """
    content = read_file(run / checkpoint_list_name())
    if isinstance(run, Path) and content is not None and not _is_json(content):
        kept = read_file(run / KEPT_SNAPSHOT)
        if kept is None:
            (run / checkpoint_list_name()).unlink()
        else:
            replace_file(run / checkpoint_list_name(), kept)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True
