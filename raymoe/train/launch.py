"""Ray Train around the worker's loop: workers, failures, checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raymoe.cluster import trial_workers
from raymoe.config import InputError
from raymoe.tracking import MetricLog, metric_log, read_rows
from raymoe.train.job import TrainingFailed, TrainJob, stop_flag

FAILURE = "failure.txt"


def fit(job: TrainJob, name: str, storage: Path) -> dict[str, Any]:
    """Train with Ray Train and return the stage's info; goes on from the last checkpoint under `name`.

    Raises:
        TrainingFailed: training can't go on (a loss that is not a number).
        ray.train.TrainingFailedError: workers failed more than `execution.max_failures` times.
    """
    first = read_rows(metric_log(storage, name))[:1]  # of an earlier attempt, whose time counts too
    started = first[0]["time"] / 1000 if first else time.time()
    stop_flag(storage, name).unlink(missing_ok=True)
    workers = trial_workers(job.execution, job.run.optimization.batch_size)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "metrics": str(metric_log(storage, name))},
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=job.execution.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=_tune_callbacks(),
        ),
    )
    failure = job.out / FAILURE
    try:
        trainer.fit()
    except Exception:
        if not failure.is_file():
            raise
    if failure.is_file():
        raise TrainingFailed(failure.read_text())
    shutil.copy(metric_log(storage, name), job.out / "metrics.jsonl")
    _draw_masks(job)
    (job.out / "run.json").write_text(job.run.model_dump_json(indent=1))
    return _info(job, workers.count, workers.gpu, time.time() - started)


def _draw_masks(job: TrainJob) -> None:
    """Figures of a SIMoE run, of what its worker wrote."""
    if not (job.out / "masks.json").is_file():
        return
    from raymoe.analysis.figures import draw

    description = json.loads((job.out / "masks.json").read_text())
    try:
        draw(description, read_rows(job.out / "metrics.jsonl"), description["sizes"], job.out / "figures")
    except Exception as error:  # what was trained is worth more than its pictures
        print(f"figures of {job.out.name}: {type(error).__name__}: {error}", file=sys.stderr)


def clean(name: str, storage: Path) -> None:
    """Remove the checkpoints of a finished run: its model is in the store."""
    shutil.rmtree(storage / name, ignore_errors=True)


def _info(job: TrainJob, workers: int, gpu: bool, seconds: float) -> dict[str, Any]:
    evaluations = json.loads((job.out / "evaluations.json").read_text())
    cost = {"workers": workers, "seconds": seconds, "gpu_hours": workers * seconds / 3600 if gpu else 0.0}
    return {
        "steps": int(evaluations[-1]["step"]) if evaluations else 0,
        "evaluations": evaluations,
        "cost": cost,
    }


def _tune_callbacks() -> list[Any]:
    """Inside a Tune trial, pass what workers report on to Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    return [TuneReportCallback()] if _in_tune_session() else []


def _worker(config: dict[str, Any]) -> None:
    """What every worker runs. A failure that would come again is written down: no retries."""
    job: TrainJob = config["job"]
    if (job.out / FAILURE).is_file():
        return
    import torch

    from raymoe.train.worker import train  # only here: drivers and controllers start without it

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    session = RaySession(Path(config["metrics"]))
    try:
        train(job, session)
    except TrainingFailed as failure:
        if session.rank == 0:
            (job.out / FAILURE).write_text(str(failure))
    except InputError as failure:  # of one worker alone: the others may be waiting for it, so all must end
        (job.out / FAILURE).write_text(str(failure))
        raise


class RaySession:
    """A worker's surroundings under Ray Train."""

    def __init__(self, metrics: Path) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._metrics_file = metrics
        self._metrics: MetricLog | None = None
        self._resumed_at: int | None = None

    def checkpoint(self) -> Path | None:
        """Folder of the last reported checkpoint, in the storage that all nodes share."""
        checkpoint = ray.train.get_checkpoint()
        return Path(checkpoint.path) if checkpoint else None

    def resumed(self, step: int) -> None:
        """Training goes on after `step`: what was logged beyond is written again."""
        self._resumed_at = step

    def stop_requested(self) -> bool:
        """Whether the sweep's scheduler has given the run up."""
        return (self._metrics_file.parent / "stop").exists()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append to the run's metric log (worker 0)."""
        if self._metrics is None:
            self._metrics = MetricLog(self._metrics_file, self._resumed_at)
        self._metrics.append(step, metrics)

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        """Report to Ray Train, with a checkpoint that every worker writes its share of."""
        if save is None:
            ray.train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory(dir=self._metrics_file.parent, prefix=".saving-") as folder:
            save(Path(folder))
            ray.train.report(dict(metrics), checkpoint=Checkpoint.from_directory(folder))
