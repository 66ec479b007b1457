"""Networks that were not made for it, in the samplers: masked language models of transformers, RADD and MDLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, Geometric, LogLinear, Uniform
from sedd_nets import MDLM, RADD
from sedd_objectives import denoising_loss
from sedd_samplers import Tweedie, Unmasking, cached, infill, sample
from sedd_samplers.adapters import from_hf, from_logits, from_masked_lm, from_posterior
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

PAD, CLS, SEP, MASK = 0, 1, 2, 5
SIZES: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32}
SPECIAL: dict[str, Any] = {
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "eos_token_id": SEP,
    "cls_token_id": CLS,
    "sep_token_id": SEP,
}
MODELS: dict[str, Any] = {
    "BERT": lambda: BertForMaskedLM(BertConfig(**SIZES, pad_token_id=PAD)),
    "RoBERTa": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=PAD)),
    "DistilBERT": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=24, dim=16, n_layers=2, n_heads=2, hidden_dim=32, pad_token_id=PAD)
    ),
    "ModernBERT": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, **SPECIAL)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # fresh ones say nearly the same of every token
    return made


def test_an_auto_model_for_masked_lm_is_a_sampler(model: Any) -> None:
    """Rows at the masks only are the rows of the whole; special tokens are not drawn; padding is not seen."""
    graph = Absorbing(model.config.vocab_size - 1, mask_id=MASK)
    score = from_masked_lm(model, graph, banned=[CLS, SEP], pad_id=PAD)
    x = torch.tensor([[CLS, 8, MASK, MASK, SEP, PAD, PAD], [CLS, MASK, 9, MASK, MASK, MASK, SEP]])
    sigma, where = torch.tensor([0.5, 1.0]), x == MASK
    with torch.no_grad():
        rows = score(x, sigma, where=where)
        logits = model(input_ids=x, attention_mask=(x != PAD).long()).logits
        logits[..., [PAD, CLS, SEP, MASK]] = -torch.inf
        expected = logits.log_softmax(-1) - sigma.expm1().log()[:, None, None]
        tokens = [i for i in range(24) if i != MASK]
        torch.testing.assert_close(rows[:, tokens], expected[where][:, tokens], rtol=1e-4, atol=1e-4)
        out = infill(score, graph, LogLinear(), x=x, given=~where, steps=20, method=Unmasking(), seeds=[1, 2])
        alone = infill(
            score, graph, LogLinear(), x=x[:1, :5], given=~where[:1, :5], steps=20, method=Unmasking(), seeds=[1]
        )
    assert torch.equal(out[~where], x[~where])
    assert not torch.isin(out[where], torch.tensor([PAD, CLS, SEP, MASK])).any()
    assert torch.equal(out[:1, :5], alone)


@pytest.fixture(params=[RADD, MDLM])
def conditional(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    net = request.param(9, width=16, depth=1, heads=2, length=64, dropout=0.0).eval()
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)
    return net.double()


def counted(function: Any) -> Any:
    count = SimpleNamespace(sequences=0, rows=0)

    def asked(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
        count.sequences += len(x)
        count.rows += int(where.sum())
        out: Tensor = function(x, sigma, where=where)
        return out

    return asked, count


def test_time_free_networks_run_only_on_what_changed(conditional: Any) -> None:
    """MDLM and RADD: cached, the same samples with a fraction of the calls; decided first, the same few calls."""
    graph, noise, steps = Absorbing(8), LogLinear(), 400
    expected = steps * (1 - (1 - 1 / steps) ** 64)  # 59

    def run(score: Any, method: Any) -> Tensor:
        return sample(score, graph, noise, shape=(2, 64), steps=steps, method=method, seeds=[1, 2])

    every, count = counted(conditional.log_conditional)
    plain = run(from_logits(every, graph), Tweedie())
    spared, fewer = counted(conditional.log_conditional)
    assert torch.equal(run(from_logits(cached(spared), graph), Tweedie()), plain)
    moved, at_moves = counted(conditional)
    run(moved, Unmasking())
    assert count.sequences > 5 * expected
    assert fewer.sequences / 2 == pytest.approx(expected, rel=0.1)
    assert at_moves.sequences / 2 == pytest.approx(expected, rel=0.1)
    assert at_moves.rows == 2 * 64


@pytest.mark.parametrize("through", ["logits", "posterior"])
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_a_network_of_logits_trains_through_its_adapter(name: str, through: str) -> None:
    """By the denoising loss, to the law of tokens that are independent, within .03: gradients go the whole way."""
    graph = Absorbing(3) if name == "absorbing" else Uniform(3)
    noise = LogLinear() if name == "absorbing" else Geometric(1e-3, 8.0)
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    weight = torch.zeros(graph.num_states, dtype=torch.float64, requires_grad=True)

    def logits(x: Tensor, sigma: Tensor) -> Tensor:
        """Of p(x0 | x_t): those of a token given the others, and what the noise did."""
        own = weight.expand(*x.shape, -1)
        if graph.mask_id is not None:
            return own
        stay = torch.log(1 + 3 * torch.exp(-sigma) / -torch.expm1(-sigma))[:, None, None]
        return own + stay * torch.nn.functional.one_hot(x, graph.num_states)

    score: Any = from_logits(logits, graph)
    if through == "posterior":
        mask = torch.arange(graph.num_states) == (-1 if graph.mask_id is None else graph.mask_id)
        score = from_posterior(lambda x, sigma: logits(x, sigma).masked_fill(mask, -torch.inf).softmax(-1), graph)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x0 = torch.multinomial(law, 512, replacement=True, generator=generator).view(256, 2)
        optimizer.zero_grad()
        denoising_loss(score, graph, noise, x0, generator=generator).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(weight.detach()[:3].softmax(0), law, rtol=0, atol=0.03)


def test_esm_is_given_its_frame() -> None:
    """Its token dropout divides by the share of tokens that are no masks: NaN where there are none, said before."""
    config = EsmConfig(**SIZES, pad_token_id=PAD, mask_token_id=MASK, token_dropout=True, max_position_embeddings=32)
    model: Any = EsmForMaskedLM(config).eval()
    score, graph, noise, options = from_hf(model, banned=[PAD, CLS, SEP])
    with pytest.raises(ValueError, match=r"give it its frame \(CLS and EOS\)"):
        sample(score, graph, noise, shape=(2, 6), steps=3, **options)
    x = torch.tensor([[CLS, MASK, MASK, MASK, MASK, SEP]])
    out = infill(score, graph, noise, x=x, given=x != MASK, steps=6, **options)
    assert not torch.isin(out[x == MASK], torch.tensor([PAD, CLS, SEP, MASK])).any()
