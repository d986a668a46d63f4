"""Packed attention and losses against stock transformers, one document at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import FAMILIES, SPARSE, write_pico
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymoe.data.instructions import Encoded
from raymoe.data.packing import Batch, collate
from raymoe.methods import SparseUpcycling
from raymoe.models import packed_attention
from raymoe.models.packed_attention import PACKED_ATTENTION, completion_losses, token_losses
from raymoe.upcycle.checkpoint import materialize

LENGTHS = (11, 5, 11, 2, 17, 9)
WINDOWS = ([4, 1], [0, 2], [5, 3])
WIDTH = 24


def encoded_examples(vocab_size: int = 256) -> Encoded:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (sum(LENGTHS),), generator=generator, dtype=torch.int32).numpy()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).numpy()
    prompt_lengths = torch.tensor([3, 1, 6, 1, 8, 8], dtype=torch.int32).numpy()
    labels = tuple(map(str, range(len(LENGTHS))))
    return Encoded(tokens, offsets, prompt_lengths, labels, labels, labels)


def packed_batch() -> Batch:
    return collate(encoded_examples(), [torch.tensor(w).numpy() for w in WINDOWS], WIDTH)


def load(folder: Path, attention: str, **config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, **config
    )


def losses_one_by_one(model: PreTrainedModel) -> list[torch.Tensor]:
    """Completion token losses of each document, in the batch's order, from transformers' logits."""
    encoded = encoded_examples()
    losses = []
    for record in (r for window in WINDOWS for r in window):
        ids = torch.from_numpy(encoded.example(record)).long()
        prompt = int(encoded.prompt_lengths[record])
        logits = model(input_ids=ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="none"))
    return losses


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_and_gradients_equal_one_by_one(
    dense_models: dict[str, Path], family: str, stock: str
) -> None:
    reference, packed = load(dense_models[family], stock), load(dense_models[family], PACKED_ATTENTION)
    expected = torch.cat(losses_one_by_one(reference))
    actual = completion_losses(packed, packed_batch())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    expected.mean().backward()
    actual.mean().backward()
    for (name, p), q in zip(reference.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_document_longer_than_the_sliding_window_sees_only_the_window(
    dense_models: dict[str, Path], family: str
) -> None:
    sliding: dict[str, object] = {"sliding_window": 4}
    if family != "mistral":
        sliding |= {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    expected = torch.cat(losses_one_by_one(load(dense_models[family], "eager", **sliding)))
    full = torch.cat(losses_one_by_one(load(dense_models[family], "eager")))
    actual = completion_losses(load(dense_models[family], PACKED_ATTENTION, **sliding), packed_batch())
    assert (expected - full).abs().max() > 1e-4  # the window matters here
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def upcycled(dense: Path, out: Path, gating: str) -> Path:
    router = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    materialize(dense, router, SparseUpcycling(num_experts=4, top_k=2, gating=gating), out)
    return out


def assert_packed_equals_stock(folder: Path, windowed: bool) -> None:
    """Logits of a document of 40 tokens, alone and after another one in the same window."""
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))
    stock, packed = load(folder, "eager"), load(folder, PACKED_ATTENTION)
    with torch.no_grad():
        expected = stock(input_ids=ids).logits[0]
        unlike = stock(input_ids=torch.cat([(ids[:, :1] + 1) % 256, ids[:, 1:]], dim=1)).logits[0]
        alone = packed(input_ids=ids).logits[0]
        positions = torch.cat([torch.arange(7), torch.arange(40)])[None]
        both = torch.cat([ids[:, :7], ids], dim=1)
        second = packed(input_ids=both, position_ids=positions, documents=((0, 7), (7, 47)), use_cache=False)
    assert torch.equal(unlike[-1], expected[-1]) == windowed  # two layers of 8 tokens don't see the first
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(second.logits[0, 7:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "gating"), [pair for pair in SPARSE if pair[1] != "renormalized"])
def test_exported_models_attend_as_stock_ones(
    dense_models: dict[str, Path], tmp_path: Path, family: str, gating: str
) -> None:
    folder = upcycled(dense_models[family], tmp_path / "moe", gating)
    assert_packed_equals_stock(folder, windowed=family == "mistral")


@pytest.mark.parametrize("gating", ["straight_through", "softmax"])
@pytest.mark.parametrize("full_layers", [0, 1, 2])
def test_exported_qwen2_models_keep_the_window_of_each_layer(
    tmp_path: Path, full_layers: int, gating: str
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": full_layers}
    dense = write_pico(tmp_path / "dense", "qwen2", **window)
    folder = upcycled(dense, tmp_path / "moe", gating)
    assert_packed_equals_stock(folder, windowed=full_layers == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks_between_documents(dense_models: dict[str, Path], family: str) -> None:
    model, batch = load(dense_models[family], PACKED_ATTENTION), packed_batch()
    start, end = batch.documents[2]
    changed = batch.input_ids.flatten().clone()
    changed[start:end] = (changed[start:end] + 1) % 256
    with torch.no_grad():
        before, after = (
            model(
                input_ids=ids.view_as(batch.input_ids),
                position_ids=batch.position_ids,
                documents=batch.documents,
                use_cache=False,
            ).logits.flatten(0, 1)
            for ids in (batch.input_ids, changed)
        )
    for document in batch.documents:
        same = torch.equal(before[slice(*document)], after[slice(*document)])
        assert same == (document != (start, end))


def test_padding_gets_zeros_from_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    documents = ((1, 4), (6, 11))
    output, _ = packed_attention.packed_attention(
        torch.nn.Identity(), query, key, value, None, documents=documents
    )
    assert output.shape == (2, 6, 4, 8)
    padding = [t for t in range(12) if not any(s <= t < e for s, e in documents)]
    assert torch.equal(output.flatten(0, 1)[padding], torch.zeros(len(padding), 4, 8))
    for start, end in documents:
        window, first, last = start // 6, start % 6, (end - 1) % 6 + 1
        keys, values = (x[window, :, first:last].repeat_interleave(2, 0) for x in (key, value))
        scores = query[window, :, first:last] @ keys.transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.ones(last - first, last - first).triu(1).bool(), float("-inf"))
        expected = (scores.softmax(-1) @ values).transpose(0, 1)
        torch.testing.assert_close(output[window, first:last], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(dense_models: dict[str, Path], family: str) -> None:
    plain, recomputed = (load(dense_models[family], PACKED_ATTENTION).train() for _ in range(2))
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, recomputed):
        completion_losses(model, packed_batch()).sum().backward()
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_documents_it_is_plain_causal_attention(dense_models: dict[str, Path], family: str) -> None:
    ids = torch.randint(0, 256, (3, 13), generator=torch.Generator().manual_seed(0))
    stock, packed = load(dense_models[family], "eager"), load(dense_models[family], PACKED_ATTENTION)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
        cached = packed(ids[:, :6], use_cache=True).past_key_values
        packed(ids[:, 6:10], past_key_values=cached)  # several queries over a longer cache
        last = packed(ids[:, 10:11], past_key_values=cached).logits[:, 0]
        torch.testing.assert_close(last, stock(ids[:, :11]).logits[:, -1], atol=1e-5, rtol=0)


def test_chunks_of_the_head_change_neither_losses_nor_gradients() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (23,))
    inputs = torch.randn(23, 8)
    results = []
    for chunks in (1, 4, 40):  # 40: more chunks than labels, as where a batch has few
        hidden = inputs.clone().requires_grad_()
        head = torch.nn.Linear(8, 50, bias=False)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
        losses = token_losses(head, hidden, labels, chunks)
        losses.sum().backward()
        results.append((losses.detach(), hidden.grad, head.weight.grad))
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            torch.testing.assert_close(actual, expected)


def test_losses_are_float32_whatever_the_model_computes_in(pico: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        pico, dtype=torch.bfloat16, attn_implementation=PACKED_ATTENTION
    )
    losses = completion_losses(model, packed_batch())
    exact = completion_losses(load(pico, PACKED_ATTENTION), packed_batch())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, atol=0.05, rtol=0)
