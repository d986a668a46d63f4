"""Measure a model folder: any of transformers', or a SIMoE one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from raymoe.config import Run
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch
from raymoe.evaluate.held_out import Evaluator
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.schema import InputError


def check_tokenizer(model_folder: Path, encoded_with: Path) -> None:
    """Refuse a model whose token ids are not those of the tokenizer that the data were encoded with.

    Raises:
        InputError: the vocabularies differ, or the model has no tokenizer.
    """
    try:
        own = AutoTokenizer.from_pretrained(model_folder, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise InputError(f"--model-folder: no tokenizer in {model_folder}: {_first_line(error)}") from None
    if own != AutoTokenizer.from_pretrained(encoded_with, local_files_only=True).get_vocab():
        raise InputError(
            f"--model-folder: the tokenizer in {model_folder} has another vocabulary than that in "
            f"{encoded_with}, which the data are encoded with"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def evaluate_folder(model_folder: Path, instructions: Path, run: Run) -> dict[str, float]:
    """Measure the model in a folder on encoded held-out instructions.

    A Hugging Face folder is loaded by stock transformers, a SIMoE folder by `raymoe.upcycle.simoe`.
    """
    from raymoe.upcycle.simoe import is_simoe  # it generates with this module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    if is_simoe(model_folder):
        return _evaluate_simoe(model_folder, instructions, run, dtype, device)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    held_out = Encoded.load(instructions / "validation")
    evaluator = Evaluator(run.evaluation, held_out, tokenizer, max_length=run.data.max_length)
    return evaluator.measure(CausalLoss(model), model)


def _evaluate_simoe(
    folder: Path, instructions: Path, run: Run, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    from raymoe.upcycle.simoe import load_simoe

    simoe = load_simoe(folder, dtype, device, PACKED_ATTENTION)
    held_out = Encoded.load(instructions / "validation")

    @contextmanager
    def applied(records: Sequence[int], batch: Batch | None) -> Iterator[None]:
        c_SG = simoe.coefficients([held_out.prompt(r) for r in records])
        with simoe.interpolated.applied(c_SG, *((batch.documents, batch.input_ids.numel()) if batch else ())):
            yield

    tokenizer = AutoTokenizer.from_pretrained(simoe.config.dense, local_files_only=True)
    evaluator = Evaluator(
        run.evaluation, held_out, tokenizer, max_length=run.data.max_length, applied=applied
    )
    return evaluator.measure(CausalLoss(simoe.model), simoe.model)
