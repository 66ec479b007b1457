"""A captured network is its network: what it hands on, what it refuses. Replaying itself is seen on a GPU alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from sedd_nets import MDLM, RADD, SEDD, CapturedNetwork, LabelCondition
from sedd_nets.fast import cuda_graph

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.1, "length": 16}
X = torch.arange(24).view(3, 8) % 11
SIGMA = torch.tensor([0.2, 1.0, 3.0])


def networks():
    torch.manual_seed(0)
    nets = [SEDD(11, cond_dim=16, **SIZES, scale_by_sigma=True), RADD(11, **SIZES), MDLM(11, cond_dim=16, **SIZES)]
    for net in nets:
        torch.nn.init.normal_(net.output_layer.linear.weight)
    return [net.eval() for net in nets]


@pytest.fixture(params=networks(), ids=["sedd", "radd", "mdlm"])
def net(request):
    return request.param


@pytest.fixture
def replays(monkeypatch):
    """As on a GPU, but for the graph: the trunk is called in its place. The shapes it was captured for."""
    shapes = []

    def captured(net, x, sigma, kind):
        shapes.append((tuple(x.shape), tuple(sigma.shape)))
        return net.hidden

    monkeypatch.setattr(cuda_graph, "_captured", captured)
    monkeypatch.setattr(CapturedNetwork, "serves", lambda _self, _x: not torch.is_grad_enabled())
    return shapes


WAYS: list[dict[str, Any]] = [
    {},
    {"where": X > 5},
    {"positions": torch.tensor([0, 7, 23])},
    {"positions": torch.tensor([1]), "apart": True},
    {"apart": True},
]


@pytest.mark.parametrize("given", WAYS)
def test_same_answers(net, given, replays):
    captured = CapturedNetwork(net)
    with torch.no_grad():
        torch.testing.assert_close(captured(X, SIGMA, **given), net(X, SIGMA, **given), atol=0, rtol=0)
        captured(X, SIGMA, **given)
    assert replays == [((3, 8), (3,))]  # once for both calls


def test_one_graph_for_each_shape(net, replays):
    captured = CapturedNetwork(net)
    with torch.no_grad():
        for x, sigma in (
            (X, SIGMA),
            (X[:2], SIGMA[:2]),
            (X, SIGMA[:, None].expand(3, 8)),
            (X[:, :4], SIGMA),
            (X, SIGMA),
        ):
            torch.testing.assert_close(captured(x, sigma), net(x, sigma), atol=0, rtol=0)
    assert replays == [((3, 8), (3,)), ((2, 8), (2,)), ((3, 8), (3, 8)), ((3, 4), (3,))]


def test_gradients_and_further_arguments_go_to_the_network_itself(net, replays):
    captured = CapturedNetwork(net)
    log_score = captured(X, SIGMA)
    assert log_score.requires_grad
    labelled = networks()[0]
    labelled.condition_embed = LabelCondition(3, labelled.cond_dim)
    label = torch.tensor([0, 2, 1])
    with torch.no_grad():
        found = CapturedNetwork(labelled)(X, SIGMA, condition=label)
        assert torch.equal(found, labelled(X, SIGMA, condition=label))
        CapturedNetwork(labelled)(X, SIGMA, condition=None)
    assert replays == [((3, 8), (3,))]  # the last call's


def test_arguments_are_those_of_a_network():
    ours, theirs = (inspect.signature(call).parameters for call in (CapturedNetwork.__call__, SEDD.forward))
    assert [name for name in theirs if name in ours] == ["self", "x", "sigma", "where", "positions", "apart"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"positions": torch.tensor([0]), "where": X > 5}, "without where"),
        ({"positions": torch.tensor([0.0])}, "int64"),
        ({"where": X[:2] > 5}, "x's shape"),
    ],
)
def test_refuses_what_the_network_refuses(given, match, replays):
    net = networks()[1]
    with torch.no_grad():
        for model in (net, CapturedNetwork(net)):
            with pytest.raises(ValueError, match=match):
                model(X, SIGMA, **given)
    assert replays == []


def test_moved_weights_and_training_are_refused(replays):
    net = networks()[1]
    captured = CapturedNetwork(net)
    with torch.no_grad():
        net.output_layer.linear.weight.mul_(2)  # in place: seen
        assert torch.equal(captured(X, SIGMA), net(X, SIGMA))
        net.train()
        with pytest.raises(ValueError, match="evaluation mode"):
            captured(X, SIGMA)
        net.eval().double()
        with pytest.raises(ValueError, match="make CapturedNetwork"):
            captured(X, SIGMA)
        assert torch.equal(CapturedNetwork(net)(X, SIGMA), net(X, SIGMA))


def test_without_a_gpu_the_network_is_called(net, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_captured", None)
    with torch.no_grad():
        assert torch.equal(CapturedNetwork(net)(X, SIGMA), net(X, SIGMA))
