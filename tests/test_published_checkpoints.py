"""A folder in each published format becomes network, graph, schedule and text: scored, bounded, sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sedd_objectives import denoising_loss, likelihood_bound
from sedd_samplers import infill
from sedd_train import load
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[1] / "packages" / "sedd-nets" / "tests" / "golden"


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(40)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))


@pytest.mark.parametrize("name", ["sedd-tiny-absorb", "sedd-tiny-uniform", "radd-tiny", "mdlm-tiny"])
def test_from_folder_to_text(name, tokenizer):
    net, graph, noise, coder = load(GOLDEN / name, tokenizer=tokenizer)
    assert graph.num_states == net.num_states
    assert (graph.mask_id is None) == ("uniform" in name)
    x0 = torch.randint(40, (3, 24), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        assert denoising_loss(net, graph, noise, x0, generator=generator).isfinite().all()
        bound = likelihood_bound(net, graph, noise, x0, num_times=8, generator=generator)
        given = torch.arange(24).expand(3, -1) % 3 == 0
        x = infill(net, graph, noise, x=x0, given=given, steps=8, generator=generator)
    assert bound.value.isfinite().all()
    # random tokens cost a random network about log 40 nats each, under any of the four
    assert (bound.value / 24 > 3).all()
    assert torch.equal(x[given], x0[given])
    assert len(coder.decode(x[0].tolist()).split()) == 24


def test_the_tokenizer_must_be_the_checkpoint_s(tokenizer):
    with pytest.raises(ValueError, match=r"has no tokenizer.json and 40 tokens"):
        load(GOLDEN / "sedd-tiny-absorb")
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match="was trained on a vocabulary of 40 tokens, and the tokenizer has 41"):
        load(GOLDEN / "sedd-tiny-absorb", tokenizer=tokenizer)
