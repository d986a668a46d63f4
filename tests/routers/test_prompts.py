"""Prompt representations against transformers' own forward pass, one prompt at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from raymoe.data.instructions import Encoded
from raymoe.routers.actors import load_model
from raymoe.routers.prompts import Kind, represent, represent_all
from raymoe.schema import InputError

KINDS: tuple[Kind, ...] = ("last_hidden", "embedding")
Prompts = list[NDArray[np.int32]]


def random_encoded(lengths: Sequence[int], seed: int) -> Encoded:
    """Make examples of random tokens, each with at least one prompt and one completion token."""
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(0, 256, offsets[-1], dtype=np.int32)
    names = tuple(f"row {i}" for i in range(len(lengths)))
    return Encoded(tokens, offsets, generator.integers(1, lengths).astype(np.int32), names, names, names)


def prompts_of(encoded: Encoded) -> Prompts:
    return [encoded.prompt(index) for index in range(len(encoded))]


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    return random_encoded([9, 30, 4, 17, 2, 21, 12, 6, 40, 5], seed=0)


def expected(folder: Path, prompts: Prompts, kind: Kind, attention: str = "eager") -> Tensor:
    """Return [n, D] without packing: the mean of the last hidden state, or of embedding table rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    means = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt).long()
        if kind == "embedding":
            means.append(model.state_dict()["model.embed_tokens.weight"][ids].mean(0))
        else:
            with torch.no_grad():
                means.append(model(ids[None], output_hidden_states=True).hidden_states[-1][0].mean(0))
    return torch.stack(means)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_prompt_at_a_time_whatever_the_pack(
    dense_models: dict[str, Path], encoded: Encoded, family: str, kind: Kind
) -> None:
    model, prompts = load_model(dense_models[family], "float32"), prompts_of(encoded)
    for attention in ("eager", "sdpa"):
        wanted = expected(dense_models[family], prompts, kind, attention)
        for tokens_per_batch in (1, 20, 10_000):
            actual = represent(model, prompts, kind, tokens_per_batch)
            assert actual.dtype == torch.float32 and actual.device.type == "cpu"
            torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


def test_the_last_hidden_state_is_what_the_head_reads(pico: Path, encoded: Encoded) -> None:
    """After the final norm: one-token prompts, through the head, give the model's own logits."""
    stock = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    ids = torch.arange(5)
    one_token = [np.array([i], dtype=np.int32) for i in ids.tolist()]
    states = represent(load_model(pico, "float32"), one_token, "last_hidden")
    with torch.no_grad():
        torch.testing.assert_close(stock.lm_head(states), stock(ids[:, None]).logits[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_without_packed_attention_gives_the_same(
    pico: Path, encoded: Encoded, attention: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32, attn_implementation=attention)
    prompts = prompts_of(encoded)
    actual = represent(model, prompts, "last_hidden")
    torch.testing.assert_close(actual, expected(pico, prompts, "last_hidden"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_representation_depends_on_neither_order_nor_neighbours(
    pico: Path, encoded: Encoded, kind: Kind
) -> None:
    model, prompts = load_model(pico, "float32"), prompts_of(encoded)
    rows = represent(model, prompts, kind)
    order = np.random.default_rng(1).permutation(len(prompts)).tolist()
    shuffled = represent(model, [prompts[i] for i in order], kind)
    torch.testing.assert_close(shuffled, rows[order], atol=1e-5, rtol=0)
    neighbours = prompts_of(random_encoded([40] * len(prompts), seed=2))
    mixed = [prompt for pair in zip(neighbours, prompts, strict=True) for prompt in pair]
    torch.testing.assert_close(represent(model, mixed, kind)[1::2], rows, atol=1e-5, rtol=0)


def test_the_mean_of_a_bfloat16_model_is_taken_in_float32(pico: Path) -> None:
    prompt = np.random.default_rng(0).integers(0, 256, 200).astype(np.int32)
    actual = represent(load_model(pico, "bfloat16"), [prompt], "embedding")[0]
    table = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).get_input_embeddings().weight
    wanted = table.detach().bfloat16().double()[torch.from_numpy(prompt).long()].mean(0)
    torch.testing.assert_close(actual.double(), wanted, atol=1e-7, rtol=0)


def test_no_prompts_give_no_representations_and_an_empty_one_is_refused(pico: Path) -> None:
    model, empty = load_model(pico, "float32"), np.zeros(0, dtype=np.int32)
    assert represent(model, [], "last_hidden").shape == (0, 32)
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        represent(model, [np.ones(3, dtype=np.int32), empty], "last_hidden")


@pytest.mark.slow
def test_representing_needs_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; from raymoe.routers.prompts import represent"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_actors_write_every_prompt_of_both_splits_in_order(
    local_ray: None, pico: Path, encoded: Encoded, tmp_path: Path
) -> None:
    splits = {"train": encoded, "validation": random_encoded([3, 25, 8], seed=3)}
    for name, split in splits.items():
        # other completions of the same prompts: what is written may not depend on them
        spoiled = split.tokens.copy()
        for offset, prompt, end in zip(split.offsets, split.prompt_lengths, split.offsets[1:], strict=False):
            spoiled[offset + prompt : end] = 7
        replace(split, tokens=spoiled).save(tmp_path / "encoded" / name)
    info = represent_all(
        tmp_path / "encoded",
        pico,
        tmp_path / "out",
        kind="last_hidden",
        dtype="float32",
        actors=2,
        gpu=False,
        tokens_per_batch=25,
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["train.npy", "validation.npy"]
    for name, split in splits.items():
        written = np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False)
        assert written.dtype == np.float32
        wanted = expected(pico, prompts_of(split), "last_hidden")
        torch.testing.assert_close(torch.from_numpy(written), wanted, atol=1e-5, rtol=0)
    assert info == {
        "width": 32,
        "train_prompts": 10,
        "validation_prompts": 3,
        "tokens": sum(int(split.prompt_lengths.sum()) for split in splits.values()),
    }
