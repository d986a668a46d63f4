"""README, "Adding a method": its code, put into a copy of the package as it says, and run on the pico model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"`([\w/]+\.py)`[^`\n]*:\n\n```(python|diff)\n(.*?)```", re.DOTALL)
NUM_EXPERTS, RATIO, SEED, IDS = 4, 0.25, 3, torch.arange(40)[None]
SCRIPT = f"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from raymoe.config import Run, validate
from raymoe.upcycle import expand, expert_start, load_recipe, router, write_recipe
from raymoe.upcycle.checkpoint import materialize

dense, out = map(Path, sys.argv[1:])
given = {{"name": "drop", "num_experts": {NUM_EXPERTS}, "drop_ratio": {RATIO}}}
method = validate(Run, {{"method": given}}).method
rows = router(method, num_layers=2, width=32, clusters=None, seed={SEED})
write_recipe(out / "recipe", dense, method, rows, {SEED})
recipe, rows = load_recipe(out / "recipe")
materialize(dense, rows, recipe.method, out / "moe", start=expert_start(recipe.method, recipe.seed))
model = expand(dense, rows, recipe.method, torch.float32, seed=recipe.seed).eval()
with torch.no_grad():
    save_file({{"logits": model(torch.arange(40)[None]).logits}}, out / "in_memory.safetensors")
"""


def with_hunks(text: str, diff: str) -> str:
    """`text` with the hunks of a diff without line numbers, each of which fits in one place."""
    for hunk in diff.split("@@\n"):
        lines = [line or " " for line in hunk.splitlines()]
        old, new = ("".join(f"{x[1:]}\n" for x in lines if x[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, f"the README's hunk does not fit:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package to which the README's method was added."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "raymoe", root / "raymoe", ignore=shutil.ignore_patterns("__pycache__"))
    section = (ROOT / "README.md").read_text().split("\n## Adding a method\n")[1].split("\n## ")[0]
    blocks = BLOCK.findall(section)
    assert [(file, kind) for file, kind, _ in blocks] == [
        ("raymoe/upcycle/drop.py", "python"),
        ("raymoe/config.py", "diff"),
        ("raymoe/upcycle/__init__.py", "diff"),
    ]
    for name, kind, content in blocks:
        file = root / name
        file.write_text(with_hunks(file.read_text(), content) if kind == "diff" else content)
    return root


def run(extended: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=extended, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def upcycled(extended: Path, pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the pico Llama, upcycled by the README's method: `moe` on disk, and its logits in memory."""
    out = tmp_path_factory.mktemp("upcycled")
    run(extended, "-c", SCRIPT, str(pico), str(out))
    return out


def dropped(moe: Mapping[str, Tensor], dense: Mapping[str, Tensor], layer: int, expert: int) -> Tensor:
    """Mask [F] of the columns that are not the dense FFN's; the same in all three matrices, in full."""
    masks = []
    for name, projection in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        new = moe[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
        old = dense[f"model.layers.{layer}.mlp.{projection}.weight"]
        changed_FD = (new != old).T if name == "w2" else new != old
        assert torch.equal(changed_FD.any(1), changed_FD.all(1))
        masks.append(changed_FD.any(1))
        values, lost = ((w.T if name == "w2" else w)[masks[-1]] for w in (new, old))
        error = lost.std() / lost.numel() ** 0.5
        assert abs(values.mean() - lost.mean()) < 5 * error
        assert abs(values.std() - lost.std()) < 5 * error
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    return masks[0]


@pytest.mark.slow
def test_every_expert_redraws_another_quarter_of_the_columns(upcycled: Path, pico: Path) -> None:
    """Nakamura et al. 2025, section 3: floor(r F) columns S, the same in all three matrices, from N(mean, std)."""
    moe, dense = load_file(upcycled / "moe" / "model.safetensors"), load_file(pico / "model.safetensors")
    masks = [dropped(moe, dense, layer, e) for layer in range(2) for e in range(NUM_EXPERTS)]
    assert [int(mask.sum()) for mask in masks] == [int(RATIO * len(masks[0]))] * len(masks)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


@pytest.mark.slow
def test_training_starts_from_what_is_written(upcycled: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(upcycled / "moe").eval()
    assert type(stock).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        logits = stock(IDS).logits
    torch.testing.assert_close(load_file(upcycled / "in_memory.safetensors")["logits"], logits)


def test_the_command_line_knows_it(extended: Path, pico: Path, data_folder: Path) -> None:
    given = ["--method", "drop", "--drop-ratio", "0.3", "--model.name", str(pico), "--dry-run"]
    out = run(extended, "-m", "raymoe.cli", "train", "--data.train", str(data_folder), *given)
    assert "drop-2" in out
    assert "--method.drop-ratio" in run(extended, "-m", "raymoe.cli", "train", "--help")
