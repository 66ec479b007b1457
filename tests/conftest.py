"""What the tests of the tables' scripts share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel


def pytest_configure(config: pytest.Config) -> None:
    """Laws are followed here from the prior at whatever noise, as what they are compared with; networks are fresh."""
    config.addinivalue_line("filterwarnings", r"ignore:at t = .* is left of a token:UserWarning")
    config.addinivalue_line("filterwarnings", r"ignore:at sigma = .* the scores of the tokens at:UserWarning")


@pytest.fixture(scope="session")
def save_causal() -> Callable[..., Path]:
    """save_causal(folder, tokenizer, context=64) writes a tiny causal language model of transformers, freshly drawn."""

    def save(folder: Path, tokenizer: Any, context: int = 64) -> Path:
        sizes: dict[str, Any] = {
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": context,
            "initializer_range": 0.5,
        }
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
