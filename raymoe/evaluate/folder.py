"""Measure a model folder, SIMoE or any that stock transformers loads, on held-out examples.

    raymoe evaluate my-run.yaml --model-folder some/model

Data and precision are those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymoe.config import Run
from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch
from raymoe.evaluate.held_out import Evaluator
from raymoe.models.causal_loss import CausalLoss
from raymoe.models.packed_attention import PACKED_ATTENTION
from raymoe.schema import InputError
from raymoe.upcycle.simoe import is_simoe, load_simoe


def check_tokenizer(model_folder: Path, encoded_with: Path) -> None:
    """Check that a model's token ids are those of the tokenizer with which the data were encoded.

    Raises:
        InputError: the vocabularies differ, or the model has no tokenizer.
    """
    try:
        own = AutoTokenizer.from_pretrained(model_folder, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--model-folder: no tokenizer in {model_folder}: {reason}") from None
    if own != AutoTokenizer.from_pretrained(encoded_with, local_files_only=True).get_vocab():
        raise InputError(
            f"--model-folder: the tokenizer in {model_folder} has another vocabulary than that in "
            f"{encoded_with}, with which the data were encoded"
        )


def evaluate_folder(model_folder: Path, instructions: Path, run: Run) -> dict[str, float]:
    """Return the held-out metrics of the model in a folder, in the precision of `run`, on a GPU if there is one.

    Args:
        model_folder: a folder written by `raymoe export`, or any causal language model.
        instructions: output of the instructions stage; its held-out examples are used.
        run: settings of the evaluation, the data and the precision.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    held_out = Encoded.load(instructions / "validation")
    measure = _measure_simoe if is_simoe(model_folder) else _measure_stock
    return measure(model_folder, held_out, run, dtype, device)


def _measure_stock(
    folder: Path, held_out: Encoded, run: Run, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    evaluator = Evaluator(run.evaluation, held_out, tokenizer, max_length=run.data.max_length)
    return evaluator.measure(CausalLoss(model), model)


def _measure_simoe(
    folder: Path, held_out: Encoded, run: Run, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    simoe = load_simoe(folder, dtype, device, PACKED_ATTENTION)

    @contextmanager
    def applied(examples: Sequence[int], batch: Batch | None) -> Iterator[None]:
        """Apply the coefficients of the prompts of `examples` within the block."""
        c_SG = simoe.coefficients([held_out.prompt(example) for example in examples])
        with simoe.interpolated.applied(c_SG, *((batch.documents, batch.input_ids.numel()) if batch else ())):
            yield

    tokenizer = AutoTokenizer.from_pretrained(simoe.config.dense, local_files_only=True)
    evaluator = Evaluator(
        run.evaluation, held_out, tokenizer, max_length=run.data.max_length, applied=applied
    )
    return evaluator.measure(CausalLoss(simoe.model), simoe.model)
