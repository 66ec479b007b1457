"""A folder in each published format becomes network, graph, schedule and text: scored, bounded, sampled."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import BD3LM, UDLM
from sedd_objectives import denoising_loss, denoising_score_entropy, likelihood_bound
from sedd_samplers import clamped, infill
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
        x = infill(net, graph, noise, x=x0, given=given, steps=8, generator=generator, conditioning=clamped)
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


def random_net(family, states, **options):
    """A network of random weights, float64."""
    torch.manual_seed(0)
    net = family(states, width=8, depth=2, heads=2, cond_dim=4, dropout=0.0, length=6, **options).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.6)
    return net


@torch.no_grad()
def test_score_entropy_of_udlm_s_score_is_the_loss_that_udlm_and_duo_print():
    """Schiff et al. 2024 (arXiv 2412.10193), in continuous time; Sahoo et al. 2025 (arXiv 2506.10892) repeat it.

    With b = N a x + 1 - a for x one-hot and b' for x = softmax(logits), i the state of x_t and a = e^-sigma,

        -a' / (N a) [N / b'_i - N / b_i + sum_j b_j / b_i log(b'_i b_j / (b'_j b_i))].
    """
    states = 7
    net, noise = random_net(UDLM, states), LogLinear()
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(states, (5, 6), generator=generator)
    x = torch.where(torch.rand(x0.shape, generator=generator) < 0.5, x0, x0.roll(1, 0))
    t = torch.tensor([1e-3, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    sigma, dsigma = noise(t)
    a = (-sigma).exp()[:, None, None]
    model = torch.softmax(net.output_layer.linear(net.hidden(x, sigma)), -1)
    b, b_model = (states * a * law + 1 - a for law in (torch.nn.functional.one_hot(x0, states).double(), model))
    b_i, b_model_i = (law.gather(-1, x[..., None]) for law in (b, b_model))
    printed = (states / b_model_i - states / b_i)[..., 0] + (b / b_i * (b_model_i * b / (b_model * b_i)).log()).sum(-1)
    slope = -(1 - noise.eps) / (a[:, 0] * states)
    found = dsigma[:, None] * denoising_score_entropy(net(x, sigma), Uniform(states), x, x0, sigma)
    torch.testing.assert_close(found, -slope * printed, rtol=2e-7, atol=0)  # rates are float32


@torch.no_grad()
def test_blocks_of_one_position_are_an_autoregressive_model():
    """Their loss is the chain rule's log-likelihood, and samples drawn block by block have its law.

    4000 samples of 27 texts, chi-square at 1e-6.
    """
    net = random_net(BD3LM, 4, block_size=1)
    graph, noise = Absorbing(3), LogLinear()
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_p, one = torch.zeros(27, dtype=torch.float64), torch.ones(27, dtype=torch.float64)
    for position in range(3):
        x = texts[:, : position + 1].clone()
        x[:, position] = 3
        log_p += net.log_conditional(x, one)[:, position].gather(-1, texts[:, position, None])[:, 0]
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
    t = torch.full((27,), 0.4, dtype=torch.float64)
    sigma, dsigma = noise(t)
    loss = denoising_loss(partial(net, clean=texts), graph, noise, texts, t, xt=torch.full_like(texts, 3))
    torch.testing.assert_close(loss, -log_p * dsigma / sigma.expm1(), rtol=1e-6, atol=1e-6)

    x, generator = torch.empty(4000, 0, dtype=torch.int64), torch.Generator().manual_seed(2)
    for start in range(3):
        x = torch.cat([x, torch.full((4000, 1), 3)], 1)
        given = (torch.arange(start + 1) < start).expand(x.shape)
        x = infill(net, graph, noise, x=x, given=given, steps=2, generator=generator)
    counts = (x * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    expected = 4000 * log_p.exp()
    assert float(((counts - expected).square() / expected).sum()) < chi2.isf(1e-6, 26)


def test_a_block_diffusion_says_how_it_is_sampled():
    net = random_net(BD3LM, 4, block_size=2).float()
    with pytest.raises(ValueError, match=r"masks in several blocks of 2 positions.*block by block"):
        infill(
            net, Absorbing(3), LogLinear(), x=torch.full((1, 4), 3), given=torch.zeros(1, 4, dtype=torch.bool), steps=2
        )
