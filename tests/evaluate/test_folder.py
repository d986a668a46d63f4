from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raymoe.evaluate.folder import check_tokenizer
from raymoe.schema import InputError


def test_a_tokenizer_with_other_ids_is_refused(pico: Path, dense_models: Any, tmp_path: Path) -> None:
    check_tokenizer(dense_models["qwen3"], pico)
    tokenizer = AutoTokenizer.from_pretrained(pico)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=f"^--model-folder: the tokenizer in {tmp_path}/other .*{pico}"):
        check_tokenizer(tmp_path / "other", pico)
    with pytest.raises(InputError, match=r"^--model-folder: no tokenizer in .*none: [^\n]*$"):
        check_tokenizer(tmp_path / "none", pico)
