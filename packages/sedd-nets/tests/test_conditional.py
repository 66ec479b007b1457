"""RADD and MDLM: networks that predict the clean token, and the score that follows."""

import itertools
import json
import math
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sedd_nets import MDLM, RADD, SEDD, UDLM, from_pretrained, read_config

FAMILIES = {"sedd-tiny-absorb": SEDD, "sedd-tiny-uniform": SEDD, "radd-tiny": RADD, "mdlm-tiny": MDLM}
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "length": 12, "dropout": 0.0}


@pytest.fixture(params=[RADD, MDLM])
def make(request, randomise_):
    def make(num_states=11, **options):
        net = request.param(num_states, **SIZES | options)
        randomise_(net)
        return net

    return make


def test_golden_radd(golden):
    folder, expected = golden("radd-tiny")
    net = RADD.from_pretrained(folder)
    x, sigma = expected["xt"], torch.full((6,), 0.7)
    with torch.no_grad():
        logits = net.output_layer.linear(net.hidden(x, sigma))
        log_conditional = net.log_conditional(x, sigma)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    # The published code leaves the raw logit at the mask; here the clean token is never the mask.
    torch.testing.assert_close(log_conditional[..., :-1], expected["log_conditional"][..., :-1], atol=1e-5, rtol=0)
    assert (log_conditional[..., -1] == -torch.inf).all()


def test_golden_mdlm(golden):
    folder, expected = golden("mdlm-tiny")
    net = MDLM.from_pretrained(folder)
    for sigma in (expected["sigma"], torch.full((6,), 3.0)):  # the trunk sees 0 whatever the noise
        with torch.no_grad():
            logits = net.output_layer.linear(net.hidden(expected["xt"], sigma))
        torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_family_is_found_by_the_keys(golden, name, family):
    net = from_pretrained(golden(name)[0])
    assert type(net) is family
    assert net.sections["graph"]["type"] == ("uniform" if "uniform" in name else "absorb")


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_every_golden_folder_loads_strictly(golden, tmp_path, name, family):
    folder, _ = golden(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    gone = family.key_prefix + "blocks.1.norm2.weight"
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing keys: blocks\.1\.norm2\.weight"):
        from_pretrained(tmp_path)
    save_file(weights | {family.key_prefix + "blocks.1.stranger": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra keys: blocks\.1\.stranger"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["radd-tiny", "mdlm-tiny"])
def test_published_files_survive_a_round_trip(golden, tmp_path, name):
    folder, _ = golden(name)
    net = from_pretrained(folder)
    net.save_pretrained(tmp_path)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config, written = read_config(folder)["model"], read_config(tmp_path)["model"]
    assert all(config[key] == written[key] for key in config.keys() & written.keys())
    assert {"hidden_size", "length", "n_blocks", "n_heads", "dropout"} <= written.keys()
    again = from_pretrained(tmp_path)
    assert again.sections == net.sections


def test_mask_elsewhere_and_options_survive_a_round_trip(tmp_path, batch):
    x, sigma = batch
    for net in (RADD(11, **SIZES, mask_id=4), MDLM(11, **SIZES, mask_id=4, cond_dim=8, time_conditioning=True)):
        net.save_pretrained(tmp_path, sections={"noise": {"type": "cosine"}})
        assert read_config(tmp_path)["graph"] == {"type": "absorb", "mask_id": 4}
        again = from_pretrained(tmp_path)
        assert again.mask_id == 4
        assert again.sections == {"tokens": 10, "graph": {"type": "absorb", "mask_id": 4}, "noise": {"type": "cosine"}}
        assert getattr(again, "time_conditioning", None) == getattr(net, "time_conditioning", None)
        assert torch.equal(again(x, sigma), net.eval()(x, sigma))


def test_flat_config_of_mdlm(golden, tmp_path):
    folder, expected = golden("mdlm-tiny")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    flat = {"model_type": "mdlm", "vocab_size": 41, "model_length": 24, "hidden_dim": 64, "cond_dim": 32}
    flat |= {"n_blocks": 2, "n_heads": 4, "dropout": 0.1, "time_conditioning": False}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    net = from_pretrained(tmp_path)
    with torch.no_grad():
        logits = net.output_layer.linear(net.hidden(expected["xt"], expected["sigma"]))
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    assert net.sections["graph"] == {"type": "absorb"}


@pytest.mark.parametrize("family", [SEDD, RADD, MDLM])
@pytest.mark.parametrize(("folder", "its"), FAMILIES.items())
def test_checkpoint_of_another_family(golden, family, folder, its):
    if family is its:
        assert type(family.from_pretrained(golden(folder)[0])) is its
        return
    with pytest.raises(ValueError, match=rf"{folder} is not {family.__name__}'s.*are {its.__name__}'s"):
        family.from_pretrained(golden(folder)[0])


@pytest.mark.parametrize("mask_id", [None, 0, 5])
def test_score_is_the_conditional_over_the_rate(make, batch, mask_id):
    x, sigma = batch
    net = make(mask_id=mask_id).double()
    assert net.mask_id == (10 if mask_id is None else mask_id)
    x = x.clone()
    x[:, ::2] = net.mask_id
    log_score, log_conditional = net(x, sigma.double()), net.log_conditional(x, sigma.double())
    masked = x == net.mask_id
    tokens = torch.arange(11) != net.mask_id
    total = log_conditional.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)
    rate = torch.expm1(sigma.double())[:, None, None]
    torch.testing.assert_close(
        log_score.exp()[masked][:, tokens], (log_conditional.exp() / rate)[masked][:, tokens], atol=0, rtol=1e-10
    )
    assert (log_score.gather(-1, x[..., None]) == 0).all()
    assert log_score.isfinite().all()
    at_mask = torch.log(rate[..., 0]).expand(x.shape)[~masked]  # no jump leads there: finite, to be weighted by 0
    torch.testing.assert_close(log_score[~masked][:, net.mask_id], at_mask, atol=0, rtol=1e-10)


def test_gradients_are_finite_and_reach_every_parameter(make, batch):
    x, sigma = batch
    net = make()
    weight = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(3))
    (net(x, sigma) * weight).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias of the norm before the softmax of one block may come out small, but nothing is exactly 0 all over.
        assert parameter.grad.any(), name


def test_where_gives_the_rows(make, wide):
    x, sigma = wide
    net = make().double()
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    torch.testing.assert_close(net(x, sigma, where=where), net(x, sigma)[where], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        net.log_conditional(x, sigma, where=where), net.log_conditional(x, sigma)[where], atol=1e-12, rtol=1e-12
    )


def test_hidden_and_head_make_forward(make, wide):
    x, sigma = wide
    net = make().double()
    hidden = net.hidden(x, sigma).flatten(0, 1)
    flat = net.head(hidden, x.flatten(), sigma.repeat_interleave(7))
    torch.testing.assert_close(flat.view(3, 7, 11), net(x, sigma), atol=1e-12, rtol=1e-12)


def test_time_enters_where_it_is_asked_to(batch, randomise_):
    x, sigma = batch
    families: list[Any] = [MDLM, UDLM]
    for family, conditioned in itertools.product(families, (False, True)):
        net = family(11, **SIZES, cond_dim=8, time_conditioning=conditioned)
        randomise_(net)
        assert torch.equal(net.hidden(x, sigma), net.hidden(x, sigma + 1)) is not conditioned
    radd = RADD(11, **SIZES)
    randomise_(radd)
    assert torch.equal(radd.hidden(x, sigma), radd.hidden(x, sigma + 1))
    assert math.isclose(  # the score of a masked row knows sigma even where the trunk does not
        (radd(torch.full_like(x, 10), sigma)[0, 0, 0] - radd(torch.full_like(x, 10), sigma + 1)[0, 0, 0]).item(),
        math.log(math.expm1(1.05) / math.expm1(0.05)),
        rel_tol=1e-5,
    )


def test_a_network_that_sees_the_time_is_of_one_schedule_which_its_writer_must_name(tmp_path):
    assert not MDLM(11, **SIZES).time_conditioning
    assert MDLM(11, **SIZES).sections["noise"] == {"type": "loglinear"}
    with pytest.warns(UserWarning, match="will not say which noise the network"):
        MDLM(11, **SIZES, time_conditioning=True).save_pretrained(tmp_path)
    assert "noise" not in read_config(tmp_path)


def test_float32_after_the_head_under_autocast(make, batch):
    """Products in bfloat16, what follows the head exact: the logits of that very pass give the score to 1e-5."""
    x, sigma = batch
    x = x.clone()
    x[:, ::2] = 10
    net = make()
    seen = []
    net.output_layer.linear.register_forward_hook(lambda _module, _given, out: seen.append(out.clone()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_score = net(x, sigma)
    (logits,) = seen
    assert torch.equal(logits, logits.bfloat16().float()), "the products were not in bfloat16"
    expected = (
        torch.log_softmax(logits[..., :10].double(), dim=-1) - torch.log(torch.expm1(sigma.double()))[:, None, None]
    )
    assert log_score.dtype == torch.float32
    masked = x == 10
    torch.testing.assert_close(log_score[masked][:, :10].double(), expected[masked], atol=1e-5, rtol=0)


def test_norms_are_float32_in_a_network_cast_to_bfloat16(randomise_):
    """Weights and biases are bfloat16 then; what leaves is rounded once, by 2^-8 at most."""
    net = RADD(11, **SIZES)
    randomise_(net)
    norm: Any = net.bfloat16().blocks[0].norm1
    h = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    out = norm(h)
    assert out.dtype == torch.bfloat16
    exact = torch.nn.functional.layer_norm(h.double(), (16,), norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=2**-8)


def test_dropout_in_training_only(make, batch):
    x, sigma = batch
    net = make(dropout=0.5)
    assert torch.equal(net.eval()(x, sigma), net(x, sigma))
    assert not torch.equal(net.train()(x, sigma), net(x, sigma))


@pytest.mark.parametrize("family", [RADD, MDLM])
def test_bad_input_is_named(family, batch):
    x, sigma = batch
    for mask_id in (-1, 11):
        with pytest.raises(ValueError, match=rf"mask_id {mask_id} is outside 0\.\.10"):
            family(11, **SIZES, mask_id=mask_id)
    with pytest.raises(ValueError, match="width 16 over 3 heads"):
        family(11, **SIZES | {"heads": 3})
    net = family(11, **SIZES)
    with pytest.raises(IndexError, match="token 11"):
        net(x.clone().fill_(11), sigma)
    with pytest.raises(ValueError, match=r"sigma has shape \(3, 1\)"):
        net(x, sigma[:, None])
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        net.log_conditional(x, sigma[:2])
    with pytest.raises(ValueError, match="where must be a bool mask"):
        net.log_conditional(x, sigma, where=x)
