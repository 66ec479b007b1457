import math

import pytest
import torch
from sedd_nets import BD3LM, SEDD, Documents
from torch import nn


@pytest.mark.parametrize("name", ["sedd-tiny-absorb", "sedd-tiny-uniform"])
def test_golden_log_score(golden, name):
    folder, expected = golden(name)
    net = SEDD.from_pretrained(folder)
    with torch.no_grad():
        log_score = net(expected["xt"], expected["sigma"])
    assert log_score.dtype == torch.float32
    torch.testing.assert_close(log_score, expected["log_score"], atol=1e-5, rtol=0)


def test_entry_at_x_is_zero(make_sedd, batch):
    x, sigma = batch
    log_score = make_sedd()(x, sigma)
    assert (log_score.gather(-1, x[..., None]) == 0).all()
    assert (log_score == 0).sum() == x.numel()


def test_fresh_network_guesses_uniformly(batch):
    x, sigma = batch
    net = SEDD(11, width=16, depth=1, heads=2, cond_dim=8, scale_by_sigma=True)
    log_score = net(x, sigma)
    expected = -torch.log(torch.expm1(sigma.double()) * 10)[:, None, None].expand(3, 7, 11).clone()
    expected.scatter_(-1, x[..., None], 0.0)
    torch.testing.assert_close(log_score.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 50.0, 200.0])
def test_offset_holds_at_extreme_noise(sigma):
    net = SEDD(11, width=16, depth=1, heads=2, cond_dim=8, scale_by_sigma=True)
    x = torch.tensor([[10]])
    log_score = net(x, torch.tensor([sigma]))[0, 0, 0].item()
    log_expm1 = math.log(math.expm1(sigma)) if sigma < 100 else sigma
    assert log_score == pytest.approx(-log_expm1 - math.log(10), rel=1e-5)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    net = SEDD(1000, width=64, depth=2, heads=4, cond_dim=32, scale_by_sigma=True)
    for name, parameter in net.named_parameters():
        if "adaLN_modulation" in name or name.startswith("output_layer.linear"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
    # kaiming_uniform(a = sqrt 5) is uniform on +- 1 / sqrt(fan_in)
    for name in ("vocab_embed.embedding", "blocks.0.attn_qkv.weight", "blocks.1.mlp.0.weight"):
        weight = net.get_parameter(name)
        assert weight.abs().max().item() == pytest.approx(1 / 8, rel=1e-3)
        assert weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.03)


def test_where_gives_the_rows(make_sedd, wide):
    x, sigma = wide
    net = make_sedd().double()
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    torch.testing.assert_close(net(x, sigma, where=where), net(x, sigma)[where], atol=1e-12, rtol=1e-12)
    assert net(x, sigma, where=torch.zeros_like(where)).shape == (0, 11)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("scale_by_sigma", [False, True])
def test_the_linear_head_is_the_head_but_at_the_own_state(make_sedd, wide, scale_by_sigma, per_position):
    net = make_sedd(scale_by_sigma=scale_by_sigma).double()
    x, sigma = wide
    sigma = sigma[:, None].expand(x.shape) if per_position else sigma
    hidden, (weight, bias, shift) = net.hidden(x, sigma), net.linear_head(x, sigma)
    log_score = hidden @ weight.T + bias
    if scale_by_sigma:
        assert shift.shape == sigma.shape
        log_score = log_score + shift.reshape(*shift.shape, *(1,) * (3 - shift.ndim))
    else:
        assert shift is None
    torch.testing.assert_close(log_score.scatter(-1, x[..., None], 0.0), net.head(hidden, x, sigma))
    with pytest.raises(ValueError, match="sigma's must be a leading part of x's"):
        net.linear_head(x, sigma[:, :1] if per_position else sigma[:, None])


def test_hidden_and_head_make_forward(make_sedd, wide):
    x, sigma = wide
    net = make_sedd().double()
    hidden = net.hidden(x, sigma)
    assert hidden.shape == (3, 7, 16)
    flat = net.head(hidden.flatten(0, 1), x.flatten(), sigma.repeat_interleave(7))
    torch.testing.assert_close(flat.view(3, 7, 11), net(x, sigma), atol=1e-12, rtol=1e-12)


def test_sigma_per_position(make_sedd, wide):
    x, sigma = wide
    net = make_sedd().double()
    same = sigma[:, None].expand(3, 7)
    torch.testing.assert_close(net(x, same), net(x, sigma), atol=1e-12, rtol=1e-12)
    differing = same.clone()
    differing[:, 3:] *= 2
    assert not torch.allclose(net.hidden(x, differing)[:, 3:], net.hidden(x, sigma)[:, 3:], atol=1e-3)


def test_scalar_sigma_is_every_sequences(make_sedd, wide):
    x, _ = wide
    net = make_sedd().double()
    torch.testing.assert_close(
        net(x, torch.tensor(0.7, dtype=torch.float64)),
        net(x, torch.full((3,), 0.7, dtype=torch.float64)),
        atol=1e-12,
        rtol=1e-12,
    )


def test_sequences_do_not_mix(make_sedd, wide):
    x, sigma = wide
    net = make_sedd().double()
    torch.testing.assert_close(net(x[1:2], sigma[1:2]), net(x, sigma)[1:2], atol=1e-12, rtol=1e-12)


def test_positions_matter(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    reversed_twice = net(x.flip(1), sigma).flip(1)
    assert not torch.allclose(reversed_twice, net(x, sigma), atol=1e-3)


def test_dropout_in_training_only(make_sedd, batch):
    x, sigma = batch
    net = make_sedd(dropout=0.5)
    assert torch.equal(net.eval()(x, sigma), net(x, sigma))
    net.train()
    torch.manual_seed(0)
    first = net(x, sigma)
    assert not torch.equal(first, net(x, sigma))
    torch.manual_seed(0)
    assert torch.equal(first, net(x, sigma))


def test_checkpointed_activations_change_nothing(make_sedd, batch):
    x, sigma = batch
    net = make_sedd(dropout=0.5).train()
    gradients = []
    for net.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        net.zero_grad()
        net(x, sigma).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_every_parameter_gets_its_gradient(make_sedd, batch):
    x, sigma = batch
    net = make_sedd().double()
    weight = torch.randn(3, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigma = sigma.double()
    (net(x, sigma) * weight).sum().backward()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-5)
            above = (net(x, sigma) * weight).sum()
            parameter.sub_(direction, alpha=2e-5)
            below = (net(x, sigma) * weight).sum()
            parameter.add_(direction, alpha=1e-5)
        slope = ((above - below) / 2e-5).item()
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_float32_islands_under_autocast(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    seen: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _module, _given, out, name=name: seen.setdefault(name, out))
    exact = net(x, sigma)
    islands = {name: seen[name] for name in ("sigma_map", "blocks.0.adaLN_modulation", "blocks.0.norm1")}
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_score = net(x, sigma)
    assert seen["blocks.0.attn_qkv"].dtype == torch.bfloat16
    assert log_score.dtype == torch.float32
    for name, value in islands.items():
        assert torch.equal(seen[name], value), name
    # The offset is exact: only the logits carry bfloat16's rounding, whatever sigma.
    torch.testing.assert_close(log_score, exact, atol=0.2, rtol=0)
    fresh = SEDD(11, width=16, depth=1, heads=2, cond_dim=8, scale_by_sigma=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offset = fresh(x, sigma)
    assert torch.equal(offset, fresh(x, sigma))


def test_network_cast_to_bfloat16_takes_float32_sigma(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    exact = net(x, sigma)
    net.bfloat16()
    assert net.rotary_emb.inv_freq.dtype == torch.float32
    assert net.hidden(x, sigma).dtype == torch.bfloat16
    log_score = net(x, sigma)
    assert log_score.dtype == torch.float32
    torch.testing.assert_close(log_score, exact, atol=0.3, rtol=0)


def test_weights_are_used_by_their_owners_alone(make_sedd, batch):
    """What ZeRO stage 3 needs: outside its module's forward a parameter is an empty tensor."""
    x, sigma = batch
    net = make_sedd()
    expected = net(x, sigma)
    full = {}
    for module in net.modules():
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        for parameter in own:
            full[parameter] = parameter.data
            parameter.data = torch.empty(0)

        def gather(_module, _given, own=own):
            for parameter in own:
                parameter.data = full[parameter]

        def release(_module, _given, _out, own=own):
            for parameter in own:
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    assert torch.equal(net(x, sigma), expected)
    assert torch.equal(net.head(net.hidden(x, sigma), x, sigma), expected)
    assert all(parameter.numel() == 0 for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 3}, "width 16 over 3 heads"),
        ({"heads": 16}, "width 16 over 16 heads: every head needs an even"),
        ({"width": 0}, "width"),
        ({"depth": -1}, "depth"),
        ({"dropout": 1.5}, "dropout"),
        ({"cond_dim": 0}, "cond_dim"),
    ],
)
def test_impossible_sizes(make_sedd, options, named):
    with pytest.raises(ValueError, match=named):
        make_sedd(**options)


def test_bad_input_is_named(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    with pytest.raises(IndexError, match=r"token 11 is outside 0\.\.10"):
        net(x.clone().fill_(11), sigma)
    with pytest.raises(IndexError, match="token -1"):
        net(x.masked_fill(x == x[0, 0], -1), sigma)
    with pytest.raises(ValueError, match="13 tokens; this network takes 1 to 12"):
        net(torch.zeros(1, 13, dtype=torch.int64), sigma[:1])
    with pytest.raises(ValueError, match="0 tokens; this network takes 1 to 12"):
        net(torch.zeros(1, 0, dtype=torch.int64), sigma[:1])
    with pytest.raises(ValueError, match=r"sigma has shape \(3, 1\)"):
        net(x, sigma[:, None])
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        net(x, sigma[:2])
    with pytest.raises(TypeError, match="int64"):
        net(x.float(), sigma)
    with pytest.raises(TypeError, match="floating point"):
        net(x, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        net(x[0], sigma[0])
    with pytest.raises(ValueError, match="where must be a bool mask"):
        net(x, sigma, where=x)


@pytest.mark.parametrize("scale_by_sigma", [True, False])
def test_the_noise_may_come_in_float64(make_sedd, batch, scale_by_sigma):
    """A schedule in float64 makes no other network: the numbers stay float32, and are those of float32 noise."""
    x, sigma = batch
    net = make_sedd(scale_by_sigma=scale_by_sigma)
    log_score = net(x, sigma.double())
    assert log_score.dtype == torch.float32
    torch.testing.assert_close(log_score, net(x, sigma), atol=1e-5, rtol=0)
    log_score.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_by_sigma", [True, False])
def test_noise_in_half_precision_is_computed_with_in_float32(make_sedd, batch, scale_by_sigma, dtype):
    x, sigma = batch
    net, half = make_sedd(scale_by_sigma=scale_by_sigma), sigma.to(dtype)
    assert torch.equal(net(x, half), net(x, half.float()))
    where = x > 4
    assert torch.equal(net(x, half, where), net(x, half.float(), where))
    for ours, wide in zip(net.linear_head(x, half), net.linear_head(x, half.float()), strict=True):
        assert ours is wide or torch.equal(ours, wide)


def test_published_names():
    net = SEDD(11, width=16, depth=1, heads=2, cond_dim=8, scale_by_sigma=True)
    assert isinstance(net, nn.Module)
    assert set(net.state_dict()) == {
        "vocab_embed.embedding",
        *(f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        "rotary_emb.inv_freq",
        "blocks.0.norm1.weight",
        "blocks.0.attn_qkv.weight",
        "blocks.0.attn_out.weight",
        "blocks.0.norm2.weight",
        *(f"blocks.0.{part}.{kind}" for part in ("mlp.0", "mlp.2", "adaLN_modulation") for kind in ("weight", "bias")),
        "output_layer.norm_final.weight",
        *(f"output_layer.{part}.{kind}" for part in ("linear", "adaLN_modulation") for kind in ("weight", "bias")),
    }


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_noise_is_a_floating_number_of_whatever_width(make_sedd, batch, dtype):
    x, net = batch[0], make_sedd()
    with pytest.raises(TypeError, match=f"sigma is the total noise and must be floating point; got {dtype}"):
        net(x, torch.ones(3, dtype=dtype))
    expected = net(x, torch.full((3,), 0.5))
    for width in (torch.bfloat16, torch.float16, torch.float64):
        torch.testing.assert_close(net(x, torch.full((3,), 0.5, dtype=width)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32])
def test_what_is_counted_comes_in_int64_and_what_is_chosen_in_bool(make_sedd, batch, dtype):
    """Never cast in silence: a uint8 mask taken for indices would answer something."""
    x, sigma = batch
    net, other = make_sedd(), torch.ones(3, 7).to(dtype)
    with pytest.raises(TypeError, match=f"x holds token ids and must be int64; got {dtype}"):
        net(other, sigma)
    with pytest.raises(ValueError, match=rf"indices \(M,\) int64 into x.flatten\(\).* got {dtype}"):
        net(x, sigma, positions=other[0])
    with pytest.raises(ValueError, match=f"dropout_seeds must be int64 of shape .*; got {dtype}"):
        net(x, sigma, dropout_seeds=other[:, 0])
    with pytest.raises(ValueError, match=rf"document ids must be \(B, L\) int64; got {dtype}"):
        Documents(other)
    if dtype != torch.bool:
        with pytest.raises(ValueError, match=rf"where must be a bool mask of x's shape \(3, 7\); got {dtype}"):
            net(x, sigma, where=other)
    one_block = BD3LM(11, width=8, depth=1, heads=1, cond_dim=4, length=12, block_size=4)
    with pytest.raises(ValueError, match=rf"clean must be \(3, 7\) int64, as x; got {dtype}"):
        one_block(x, sigma, clean=other)
