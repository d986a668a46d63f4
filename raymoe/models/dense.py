"""The dense model that a run starts from: a Hugging Face id, a folder, or a tiny Llama made for the local corpus.

Weights are read from safetensors only, and code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.config import LocalModel, Model
from raymoe.methods import Experts
from raymoe.models.families import FAMILIES, sparse_config
from raymoe.schema import InputError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
# Mistral's repositories hold the same weights a second time, Llama's in `original/`.
NOT_DOWNLOADED = ["consolidated*", "original/*", "*/*"]
# Hub ids: one or two names of letters, digits, `-`, `_` and `.`.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


# ---- the user's model ----


def resolve(model: Model) -> Path:
    """Return the folder of the named dense model; download a hub model unless it is in the cache.

    Raises:
        InputError: no such model, or one that raymoe can't start from; one line.
        ValueError: for `local` and `initial`, which are stages of their own.
    """
    folder = _local_folder(model)
    if folder is None:
        folder = _download(model)
    check_folder(folder)
    return folder


def identity(model: Model) -> dict[str, Any]:
    """Return a model's identity: a folder's `fingerprint`, or a hub id and its revision.

    The network is not used: without a revision, a hub model that changes keeps its identity.

    Raises:
        InputError: a folder that raymoe can't start from; one line.
    """
    folder = _local_folder(model)
    if folder is None:
        return {"name": model.name, "revision": model.revision}
    check_folder(folder)
    return fingerprint(folder)


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return a content hash of a model folder's small files; name, size and modification time (ns) of its weights."""
    small = sorted(
        f for f in folder.iterdir() if f.suffix in (".json", ".jinja", ".model", ".txt") and f.is_file()
    )
    content = hashlib.sha256()
    for file in small:
        content.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        content.update(file.read_bytes())
    weights = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return {
        "files": content.hexdigest(),
        "weights": [[name, status.st_size, status.st_mtime_ns] for name, status in weights],
    }


def dimensions(folder: Path) -> tuple[int, int]:
    """Return the number of layers and the width D of the model in `folder`."""
    config = _read_config(folder)
    return int(config["num_hidden_layers"]), int(config["hidden_size"])


def check_folder(folder: Path) -> None:
    """Raise InputError unless `folder` holds a supported dense model, its tokenizer and all its weights."""
    config = _read_config(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"model.name: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    check_supported(config)
    _check_weights(folder)


def check_supported(config: PretrainedConfig | Mapping[str, Any]) -> None:
    """Raise InputError unless `config` (or the values of a config.json) describes a dense model of a known family."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    kind = str(values.get("model_type"))
    architectures = values.get("architectures") or []
    if count := next((name for name in EXPERT_COUNTS if (values.get(name) or 0) > 1), None):
        raise InputError(
            f"model.name: already a Mixture-of-Experts ({kind}, {count} {values[count]}): give a dense model"
        )
    if kind == "mixtral" or kind.endswith("moe"):
        raise InputError(f"model.name: already a Mixture-of-Experts ({kind}): give a dense model")
    if kind not in FAMILIES:
        raise InputError(
            f"model.name: architecture {kind} is not supported: choose from {', '.join(FAMILIES)}"
        )
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise InputError(f"model.name: {', '.join(map(str, architectures))} is not a causal language model")
    if values.get("quantization_config"):
        raise InputError(
            "model.name: the weights are quantised: give the model in float32, bfloat16 or float16"
        )
    if refusal := FAMILIES[kind].refusal(values):
        setting, reason = refusal
        raise InputError(f"model.name: {kind} with {setting} is not supported: {reason}")


def check_upcycling(folder: Path, method: Experts) -> None:
    """Raise InputError unless a stock sparse class computes what `method` makes of the dense model in `folder`."""
    from transformers import AutoConfig

    check_supported(_read_config(folder))
    sparse_config(AutoConfig.from_pretrained(folder, local_files_only=True), method)


def _local_folder(model: Model) -> Path | None:
    """Return the folder that `model` names, or None for a hub id."""
    if model.is_embedded:
        raise ValueError(f"{model.name} is a stage's output, not a folder or a Hugging Face id")
    path = os.path.expanduser(model.name)
    if os.path.isdir(path):
        return Path(path).absolute()
    if os.path.exists(path) or not HUB_ID.fullmatch(model.name):
        raise InputError(f"model.name: {model.name!r} is neither a folder nor a Hugging Face id")
    return None


def _download(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(
                model.name, revision=model.revision, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED
            )
        )
    except GatedRepoError:
        reason = "request access on its page, then log in (`hf auth login`)"
    except RepositoryNotFoundError:
        reason = "no such folder here, and no such model on Hugging Face (or a private one: `hf auth login`)"
    except RevisionNotFoundError:
        reason = f"it has no revision {model.revision!r}"
    except (OSError, ValueError) as error:  # offline, connection, proxy, HTTP, disk
        reason = f"not a folder here, and can't be downloaded: {' '.join(str(error).split())}"
    raise InputError(f"model.name: {model.name!r}: {reason}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise InputError(f"model.name: {folder} has no config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"model.name: {folder / 'config.json'} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model.name: {folder / 'config.json'} is not a model's configuration")
    return config


def _check_weights(folder: Path) -> None:
    """Raise InputError unless all shards are there and as long as their safetensors headers say."""
    from safetensors import SafetensorError, safe_open

    files = {file.name for file in folder.glob("*.safetensors")}
    if not files:
        pickled = any(file for pattern in PICKLES for file in folder.glob(pattern))
        found = "only pickled weights, which raymoe never loads" if pickled else "no weights"
        raise InputError(f"model.name: {folder} has {found}: give *.safetensors")
    if missing := sorted(_indexed_shards(folder) - files):
        raise InputError(
            f"model.name: {folder} lacks {len(missing)} of its shards, the first is {missing[0]}"
        )
    for name in sorted(files):
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (SafetensorError, OSError):
            raise InputError(
                f"model.name: {folder / name} is cut off or no safetensors file (a Git LFS pointer?)"
            ) from None


def _indexed_shards(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"model.name: {index} is not an index of weights") from None


# ---- the local model, before its training ----


def write_initial(folder: Path, corpus: Path, shape: LocalModel, max_length: int, seed: int) -> None:
    """Write a tokenizer trained on `corpus` and a random Llama of `shape` as a Hugging Face folder.

    The same arguments give the same tokens and the same tensors.

    Args:
        folder: where to write.
        corpus: folder `seed` of the local corpus; its `*.train.jsonl` are read.
        shape: widths, depth and vocabulary size.
        max_length: tokens of a training sequence; the model accepts twice as many.
        seed: random seed of the weights.
    """
    tokenizer = _train_tokenizer(corpus, shape.vocab_size)
    tokenizer.model_max_length = 2 * max_length
    tokenizer.save_pretrained(folder)
    _write_random_llama(folder, tokenizer, shape, max_length, seed)


def _train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit is a token, so that arithmetic can be learnt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def _texts(corpus: Path) -> Iterator[str]:
    """Yield the training instructions with the plain template's headings, so that these become tokens too."""
    for file in sorted(corpus.glob("*.train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield f"### Instruction:\n{row['prompt']}\n\n### Response:\n{row['completion']}"


def local_config(shape: LocalModel, **settings: Any) -> LlamaConfig:
    """Return the Llama config of `shape`; `settings` depend on the tokenizer and the data."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        tie_word_embeddings=False,
        **settings,
    )


def _write_random_llama(
    folder: Path, tokenizer: PreTrainedTokenizerFast, shape: LocalModel, max_length: int, seed: int
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    config = local_config(
        shape,
        max_position_embeddings=2 * max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype=torch.float32)
    model.save_pretrained(folder)
