"""How fast is an upcycled model written, against copying its bytes and against mergekit-moe?

    python benchmarks/upcycle.py [--rounds 5] [--folder /a/fast/disk]

Writes a Llama of 220M parameters as four experts (bfloat16), again and again, taking turns with a plain
copy of the finished folder. With mergekit installed, or RAYMOE_MERGEKIT_PYTHON naming an interpreter that
has it, whole processes of both are compared too, imports included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import Rounds, figure, parser
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raymoe.methods import SparseUpcycling
from raymoe.upcycle import router, write_recipe
from raymoe.upcycle.checkpoint import materialize

METHOD = SparseUpcycling(num_experts=4)
SHAPE = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
PROCESS = """
import sys
from pathlib import Path
from raymoe.upcycle import load_recipe
from raymoe.upcycle.checkpoint import materialize
recipe, rows = load_recipe(Path(sys.argv[1]))
materialize(Path(recipe.dense), rows, recipe.method, Path(sys.argv[2]))
"""


def write_dense(folder: Path, config: LlamaConfig) -> None:
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    print(f"dense model: {model.num_parameters() / 1e6:.0f}M parameters")
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def seconds(work: Callable[[Path], object], out: Path) -> float:
    """Return the wall time of writing `out`, which is removed again; earlier rounds' pages are flushed first."""
    os.sync()
    started = time.perf_counter()
    work(out)
    taken = time.perf_counter() - started
    shutil.rmtree(out)
    return taken


def interleaved(rounds: int, out: Path, **works: Callable[[Path], object]) -> Rounds:
    """Time in turn as the harness does, without timing the removal and without a warm-up."""
    times = [{name: seconds(work, out) for name, work in works.items()} for _ in range(rounds)]
    return Rounds({name: [one[name] for one in times] for name in works})


def peak_growth(work: Callable[[Path], object], out: Path) -> float:
    """Return the most MiB by which this process's resident memory grows during `work` (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status("VmRSS")
    work(out)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def run_process(command: list[str], out: Path) -> None:
    subprocess.run([*command, str(out)], check=True, capture_output=True)


def mergekit_command(root: Path, python: str) -> list[str]:
    recipe = {
        "base_model": str(root / "dense"),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 1,
        "experts": [{"source_model": str(root / "dense")}] * METHOD.num_experts,
    }
    (root / "mergekit.yaml").write_text(json.dumps(recipe))
    flag = "--i-understand-this-is-not-useful-without-training"
    return [python, "-m", "mergekit.scripts.moe", flag, str(root / "mergekit.yaml")]


def against_copy(root: Path, layers: int, width: int, rounds: int) -> None:
    rows = router(METHOD, num_layers=layers, width=width, clusters=None, seed=0)

    def upcycle(out: Path) -> None:
        materialize(root / "dense", rows, METHOD, out)

    memory = peak_growth(upcycle, root / "moe")
    gigabytes = sum(f.stat().st_size for f in (root / "moe").iterdir()) / 1e9
    taken = interleaved(rounds, root / "out", raymoe=upcycle, copy=partial(shutil.copytree, root / "moe"))
    ours, copy = taken.median("raymoe"), taken.median("copy")
    print(f"{gigabytes:.2f} GB written in {ours:.2f} s, copied in {copy:.2f} s; {memory:.0f} MiB more memory")
    ratio = taken.ratio("raymoe", "copy")
    figure("upcycle_vs_copy", "shutil.copytree", ratio, 1.5, ratio, "disk")


def against_mergekit(root: Path, layers: int, width: int, rounds: int, python: str) -> None:
    """Compare whole processes; the floor is a copy of what they write."""
    rows = router(METHOD, num_layers=layers, width=width, clusters=None, seed=0)
    write_recipe(root / "recipe", root / "dense", METHOD, rows)
    taken = interleaved(
        rounds,
        root / "out",
        raymoe=partial(run_process, [sys.executable, "-c", PROCESS, str(root / "recipe")]),
        mergekit=partial(run_process, mergekit_command(root, python)),
        copy=partial(shutil.copytree, root / "moe"),
    )
    ours, theirs = taken.median("raymoe"), taken.median("mergekit")
    print(f"whole processes: raymoe {ours:.1f} s, mergekit-moe {theirs:.1f} s")
    ratio, floor = taken.ratio("raymoe", "mergekit"), taken.ratio("raymoe", "copy")
    figure("upcycle_vs_mergekit", "mergekit-moe", ratio, 1.0, floor, "disk")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="where to write (4 GB); by default the temporary folder")
    o = options.parse_args()
    config = LlamaConfig(**SHAPE | (TINY if o.size == "tiny" else {}))
    layers, width = config.num_hidden_layers, config.hidden_size
    installed = sys.executable if find_spec("mergekit") else None
    mergekit = os.environ.get("RAYMOE_MERGEKIT_PYTHON", installed)
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        write_dense(Path(folder) / "dense", config)
        against_copy(Path(folder), layers, width, o.rounds)
        if mergekit:
            against_mergekit(Path(folder), layers, width, o.rounds, mergekit)
        else:
            print("mergekit is not installed: no comparison with it")


if __name__ == "__main__":
    main()
