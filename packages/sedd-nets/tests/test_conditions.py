import pytest
import torch
from sedd_nets import MDLM, RADD, LabelCondition, PromptCondition, from_pretrained


def conditions():
    generator = torch.Generator().manual_seed(8)
    return [
        (LabelCondition(5, 8), torch.tensor([4, -1, 0]), torch.tensor([-1, -1, -1])),
        (PromptCondition(6, 8), torch.randn(3, 6, generator=generator), torch.zeros(3, 6)),
    ]


@pytest.mark.parametrize(("embed", "given", "none"), conditions(), ids=["label", "prompt"])
def test_unconditional_path_is_untouched(make_sedd, batch, randomise_, embed, given, none):
    x, sigma = batch
    net = make_sedd()
    before = net(x, sigma)
    net.condition_embed = embed
    assert torch.equal(net(x, sigma, condition=given), before)  # a new embedding is 0
    randomise_(embed)
    assert torch.equal(net(x, sigma), before)
    assert torch.equal(net(x, sigma, condition=none), before)
    assert not torch.allclose(net(x, sigma, condition=given)[0], before[0], atol=1e-3)


@pytest.mark.parametrize(("embed", "given", "none"), conditions(), ids=["label", "prompt"])
def test_a_condition_is_added_to_the_noise_levels_embedding(make_sedd, batch, randomise_, embed, given, none):
    """c = silu(embed(sigma) + embed(y)), with y a row of the table or a linear map of the prompt."""
    x, sigma = batch
    net = make_sedd()
    net.condition_embed = embed
    randomise_(embed)
    weight = next(embed.parameters())
    of_y = weight[given] * (given >= 0)[:, None] if isinstance(embed, LabelCondition) else given @ weight.T
    a = (net.sigma_map(sigma[:, None]) + of_y)[:, None]
    torch.testing.assert_close(net.conditioning(x, sigma, given), a / (1 + torch.exp(-a)), atol=1e-6, rtol=1e-5)


def test_each_sequence_has_its_own_label(make_sedd, wide, randomise_):
    x, sigma = wide
    net = make_sedd().double()
    net.condition_embed = LabelCondition(5, 8).double()
    randomise_(net.condition_embed)
    together = net(x, sigma, condition=torch.tensor([4, -1, 0]))
    torch.testing.assert_close(together[1], net(x, sigma)[1], atol=1e-12, rtol=1e-12)
    alone = net(x[2:], sigma[2:], condition=torch.tensor([0]))
    torch.testing.assert_close(together[2:], alone, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(together[2:], net(x[2:], sigma[2:]), atol=1e-3)  # 0 is a label like the others
    per_position = net(x, sigma[:, None].expand(3, 7), condition=torch.tensor([4, -1, 0]))
    torch.testing.assert_close(per_position, together, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("embed", "given", "none"), conditions(), ids=["label", "prompt"])
def test_condition_learns_and_survives_a_round_trip(make_sedd, batch, tmp_path, embed, given, none):
    x, sigma = batch
    net = make_sedd()
    net.condition_embed = embed
    weight = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(9))
    (net(x, sigma, condition=given) * weight).sum().backward()
    parameter = next(embed.parameters())
    assert parameter.grad.any()
    with torch.no_grad():
        parameter.sub_(parameter.grad)
    net.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(x, sigma, condition=given), net.eval()(x, sigma, condition=given))
    assert again.parameter_counts()["conditioning"] == net.parameter_counts()["conditioning"]


@pytest.mark.parametrize(("embed", "given", "none"), conditions(), ids=["label", "prompt"])
def test_what_knows_of_a_condition_is_counted_as_conditioning(make_sedd, embed, given, none):
    net = make_sedd()
    before, own = net.parameter_counts(), sum(parameter.numel() for parameter in embed.parameters())
    net.condition_embed = embed
    assert net.parameter_counts() == before | {"conditioning": before["conditioning"] + own}


def test_unknown_condition_in_a_checkpoint(make_sedd, tmp_path):
    net = make_sedd()
    net.condition_embed = LabelCondition(5, 8)
    net.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"label"', '"image"'))
    with pytest.raises(ValueError, match="condition of type 'image'"):
        from_pretrained(tmp_path)


def test_bad_conditions_are_named(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    with pytest.raises(ValueError, match="network without conditions: assign"):
        net(x, sigma, condition=torch.tensor([0, 1, 2]))
    net.condition_embed = LabelCondition(5, 8)
    with pytest.raises(IndexError, match=r"label 5 is outside 0\.\.4"):
        net(x, sigma, condition=torch.tensor([0, 5, 2]))
    with pytest.raises(IndexError, match="label -2"):
        net(x, sigma, condition=torch.tensor([0, -2, 2]))
    with pytest.raises(ValueError, match=r"labels must be \(B,\) int64"):
        net(x, sigma, condition=torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"labels must be \(B,\) int64; got torch\.int32"):
        net(x, sigma, condition=torch.tensor([0, 1, 2], dtype=torch.int32))
    net.condition_embed = PromptCondition(6, 8)
    with pytest.raises(ValueError, match=r"prompts must be \(B, 6\); got \(3, 5\)"):
        net(x, sigma, condition=torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"prompts must be \(B, 6\); got \(3, 1, 6\)"):
        net(x, sigma, condition=torch.zeros(3, 1, 6))
    radd = RADD(11, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="RADD is not modulated"):
        radd(x, sigma, condition=torch.tensor([0, 1, 2]))


def test_time_free_network_takes_labels(batch, randomise_):
    x, sigma = batch
    net = MDLM(11, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0)
    net.condition_embed = LabelCondition(5, 8)
    randomise_(net)
    given = torch.tensor([4, -1, 0])
    assert not torch.equal(net(x, sigma, condition=given)[0], net(x, sigma)[0])
