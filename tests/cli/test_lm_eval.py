"""The command of lm-evaluation-harness that the `eval` extra is for, on an exported folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymoe import stages
from raymoe.cli.main import main
from raymoe.config import Run, load
from raymoe.methods import SparseUpcycling
from raymoe.storage.store import Store
from raymoe.upcycle.checkpoint import materialize

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"What is {a} + {a + 1}?", "choices": [str(2 * a + 1), str(a), str(3 * a)], "answer": a % 3}
    for a in range(2, 10)
]


@pytest.fixture
def exported(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `raymoe export` writes of a run whose trained model is a pico Mixture-of-Experts."""
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "trained"
    rows = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    materialize(pico, rows, SparseUpcycling(), trained)
    stage = stages.training(load(Run, None, {"model.name": str(pico)}))

    def build(folder: Path) -> dict[str, object]:
        shutil.copytree(trained, folder / "model")
        return {}

    Store("runs").make(stage.name, stage.identity, build)
    with pytest.raises(SystemExit, match="^0$"):
        main(["export", "--model.name", str(pico), "--out", "moe"])
    return tmp_path / "moe"


def write_task(folder: Path) -> Path:
    """A multiple-choice task on a local file."""
    (folder / "tasks").mkdir()
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks" / "sums.yaml").write_text(yaml.safe_dump(task))
    return folder / "tasks"


def log_likelihoods(model_folder: Path) -> torch.Tensor:
    """Of every choice after its question, [questions, choices], by stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def log_likelihood(question: str, choice: str) -> float:
        asked, ids = (tokenizer(text).input_ids for text in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_p_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(log_p_TV[t - 1, ids[t]]) for t in range(len(asked), len(ids)))

    return torch.tensor([[log_likelihood(q["question"], c) for c in q["choices"]] for q in QUESTIONS])


@pytest.mark.slow
def test_lm_eval_measures_an_exported_folder_as_transformers_does(exported: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "hf"]
    command += ["--model_args", f"pretrained={exported}", "--device", "cpu"]
    command += ["--tasks", "sums", "--include_path", str(write_task(tmp_path))]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = log_likelihoods(exported)
    (samples,) = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
    found = torch.tensor([[float(choice[0][0]) for choice in row["resps"]] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    right = expected.argmax(1) == torch.tensor([question["answer"] for question in QUESTIONS])
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["sums"]["acc,none"]
    assert accuracy == pytest.approx(right.float().mean().item())
    assert 0 < accuracy < 1
