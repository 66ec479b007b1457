"""The fused head and loss against the plain ones: the same numbers, and never more than a chunk of log-scores."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import pytest
import torch
from sedd_objectives import denoising_loss, denoising_score_entropy, fused_denoising_loss
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

fused_module = importlib.import_module("sedd_objectives.fast.fused")
linear_module = importlib.import_module("sedd_objectives.fast.linear_head")
EXACTLY: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """A trunk that mixes positions and a head that is called apart; counts the head's calls and rows."""

    def __init__(self, num_states, width=6):
        super().__init__()
        self.embed, self.mix = nn.Embedding(num_states, width), nn.Linear(width, width)
        self.linear = nn.Linear(width, num_states)
        self.rows = []

    def hidden(self, x, sigma):
        level = sigma.log1p()[..., None] if sigma.ndim == 2 else sigma.log1p()[:, None, None]
        h = self.embed(x)
        return torch.tanh(self.mix(h + h.mean(1, keepdim=True)) + level.to(h.dtype))

    def head(self, hidden, x, sigma):
        """As a score network for absorbing graphs has it: everything after the product is in place."""
        self.rows.append(len(hidden))
        log_score = self.linear(hidden)
        log_score.sub_(sigma.expm1().log()[..., None])
        return log_score.scatter_(-1, x[..., None], 0.0)

    def forward(self, x, sigma):
        h = self.hidden(x, sigma)
        per_position = sigma if sigma.ndim == 2 else sigma[:, None].expand(x.shape)
        return self.head(h.flatten(0, 1), x.flatten(), per_position.flatten()).view(*x.shape, -1)


class NormalisedNet(Net):
    """Softmax keeps its output for the backward pass; the weight is used twice, a scale is no part of a linear map."""

    def __init__(self, num_states):
        super().__init__(num_states)
        self.linear = nn.Linear(6, num_states, bias=False)
        self.scale = nn.Parameter(torch.full((num_states,), 0.7))

    def head(self, hidden, x, sigma):
        self.rows.append(len(hidden))
        logits = F.linear(torch.relu(hidden), self.linear.weight) + hidden @ self.linear.weight.T
        return (self.scale * logits).log_softmax(-1) - sigma.expm1().log()[..., None]


class SharedNet(Net):
    """A gradient that two operations receive: neither may clear entries of it for the other."""

    def head(self, hidden, x, sigma):
        self.rows.append(len(hidden))
        log_score = self.linear(hidden)
        return log_score + log_score.clone().scatter_(-1, (x[..., None] + 1) % log_score.shape[-1], 0.0)


class FrozenNet(Net):
    """The bias learns, the weight does not."""

    def __init__(self, num_states):
        super().__init__(num_states)
        self.linear.weight.requires_grad_(False)


class LinearHead(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    shift: torch.Tensor | None


class LinearNet(Net):
    """Hands its head over as what it is."""

    def linear_head(self, sigma):
        return LinearHead(self.linear.weight, self.linear.bias, -sigma.expm1().log())


class FrozenLinearNet(LinearNet, FrozenNet):
    """The bias learns, the weight does not."""


class BareLinearNet(LinearNet):
    """Neither bias nor shift."""

    def __init__(self, num_states):
        super().__init__(num_states)
        self.linear = nn.Linear(6, num_states, bias=False)

    def head(self, hidden, x, sigma):
        return self.linear(hidden)

    def linear_head(self, sigma):
        return LinearHead(self.linear.weight, None, None)


@pytest.fixture
def case(graph, log_linear, generator):
    """A noised batch with times in float64."""
    x0 = torch.randint(5, (3, 7), generator=generator)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    return x0, t, graph.sample(x0, log_linear(t)[0], generator=generator)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused_module, "CHUNK_ELEMENTS", 25)  # four or five positions


def fused(net, graph, noise, x0, t, xt, **how):
    sigma, dsigma = noise(t)
    head = net.linear_head(sigma) if isinstance(net, LinearNet) else net.head
    return fused_denoising_loss(net.hidden(xt, sigma), head, graph, xt, x0, sigma, dsigma, **how)


def gradients(loss, net):
    """By every parameter that learns, None where there is none."""
    learning = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, learning, allow_unused=True)


@pytest.mark.parametrize("kind", [Net, NormalisedNet, SharedNet, FrozenNet, LinearNet, FrozenLinearNet, BareLinearNet])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_the_loss_and_all_gradients_are_those_of_the_plain_path(kind, weighted, graph, log_linear, case, generator):
    net = kind(graph.num_states).double()
    x0, t, xt = case
    weight = torch.rand(3, 7, generator=generator).double().masked_fill(x0 == 2, 0) if weighted else None
    plain = denoising_loss(net, graph, log_linear, x0, t, xt=xt, weight=weight)
    ours = fused(net, graph, log_linear, x0, t, xt, weight=weight)
    torch.testing.assert_close(ours.per_sequence, plain, **EXACTLY)
    assert not ours.per_sequence.requires_grad
    for one, other in zip(gradients(2.5 * ours.total, net), gradients(2.5 * plain.sum(), net), strict=True):
        torch.testing.assert_close(one, other, **EXACTLY)


@pytest.mark.parametrize("kind", [NormalisedNet, LinearNet])
def test_gradients_arrive_in_the_same_order_in_every_process(kind, make_graphs, log_linear, generator):
    """Ranks reduce them in the order of arrival; one that hung on addresses in memory would mix them up."""
    graph, x0 = make_graphs(5)["uniform"], torch.randint(5, (3, 7), generator=generator)
    orders = set()
    for _ in range(20):
        net = kind(5)
        order: list[str] = []
        for name, parameter in net.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        fused(net, graph, log_linear, x0, torch.full((3,), 0.5), x0).total.backward()
        orders.add(tuple(order))
    assert len(orders) == 1


@pytest.mark.usefixtures("small_chunks")
def test_gradient_by_the_hidden_states(graph, log_linear, case):
    net, (x0, t, xt) = Net(graph.num_states).double(), case
    sigma, dsigma = log_linear(t)
    hidden = net.hidden(xt, sigma).detach().requires_grad_()
    per_position = sigma[:, None].expand(xt.shape)
    log_score = net.head(hidden.flatten(0, 1), xt.flatten(), per_position.flatten()).view(*xt.shape, -1)
    plain = (dsigma[:, None] * denoising_score_entropy(log_score, graph, xt, x0, sigma)).sum()
    ours = fused_denoising_loss(hidden, net.head, graph, xt, x0, sigma, dsigma).total
    (expected,), (found,) = torch.autograd.grad(plain, hidden), torch.autograd.grad(ours, hidden)
    torch.testing.assert_close(found, expected, **EXACTLY)


@pytest.mark.usefixtures("small_chunks")
def test_noise_a_position(graph, log_linear, case, generator):
    net, (x0, _, xt) = Net(graph.num_states).double(), case
    t = torch.rand(3, 7, generator=generator, dtype=torch.float64) + 1e-2
    plain = denoising_loss(net, graph, log_linear, x0, t * 0.9, xt=xt)
    torch.testing.assert_close(fused(net, graph, log_linear, x0, t * 0.9, xt).per_sequence, plain, **EXACTLY)


@pytest.mark.parametrize("net", [Net, LinearNet])
@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid"])  # whose closed forms are differentiable
@pytest.mark.usefixtures("small_chunks")
def test_a_learnt_schedule_receives_the_same_gradient(net, kind, make_graphs, generator):
    """By way of dsigma, of the ratios, of the trunk and of the head."""
    graph = make_graphs(5)[kind]
    net = net(graph.num_states).double()
    power = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x0, t = torch.randint(5, (3, 7), generator=generator), torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    xt = graph.sample(x0, t, generator=generator)

    def noise(t):
        return t**power, power * t ** (power - 1)

    (expected,) = torch.autograd.grad(denoising_loss(net, graph, noise, x0, t, xt=xt).sum(), power)
    (found,) = torch.autograd.grad(fused(net, graph, noise, x0, t, xt).total, power)
    torch.testing.assert_close(found, expected, **EXACTLY)


@pytest.mark.usefixtures("small_chunks")
def test_the_head_is_called_as_often_whatever_can_move_and_sees_nothing_else(make_graphs, log_linear, generator):
    graph, net = make_graphs(5)["absorbing"], Net(6).double()
    x0, t = torch.randint(5, (3, 7), generator=generator), torch.full((3,), 0.5, dtype=torch.float64)
    for masked in (0, 1, 7, 21):
        net.rows = []
        xt = x0.flatten().index_fill(0, torch.randperm(21, generator=generator)[:masked], 5).view(3, 7)
        loss = fused(net, graph, log_linear, x0, t, xt)
        assert (
            len(net.rows) == 7
        )  # 21 positions, 6 states, 25 log-scores at a time: 6 chunks, and one call without rows
        assert sum(net.rows) == masked
        assert max(net.rows) <= 4
        assert sum(count > 0 for count in net.rows) == math.ceil(masked / 4)  # large products, then calls without rows
        assert all(slope is not None for slope in gradients(loss.total, net))


@pytest.mark.parametrize("kind", [Net, LinearNet])
def test_padding_never_reaches_the_head(kind, make_graphs, generator):
    """Whatever its hidden states are: NaN there spoils nothing."""
    graph, x0 = make_graphs(5)["uniform"], torch.randint(5, (3, 7), generator=generator)
    net, weight, sigma = kind(5), torch.ones(3, 7).index_fill(1, torch.tensor([5, 6]), 0), torch.ones(3)
    hidden = torch.randn(3, 7, 6, generator=generator)
    head = net.linear_head(sigma) if kind is LinearNet else net.head
    found = []
    for spoilt in (0.0, torch.nan):
        hidden[:, 5:] = spoilt
        net.rows.clear()
        loss = fused_denoising_loss(hidden, head, graph, x0, x0, sigma, sigma, weight=weight)
        found.append((loss.total, *gradients(loss.total, net.linear)))
        assert sum(net.rows) == (15 if kind is Net else 0)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [Net, LinearNet])
def test_where_nothing_can_move_the_gradients_are_zero(kind, make_graphs, log_linear, generator):
    graph, net = make_graphs(5)["absorbing"], kind(6)
    x0 = torch.randint(5, (3, 7), generator=generator)
    loss = fused(net, graph, log_linear, x0, torch.full((3,), 0.5), x0)
    assert (loss.per_sequence == 0).all()
    assert all((slope == 0).all() for slope in gradients(loss.total, net))


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that anything made."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("net", [Net, LinearNet])
@pytest.mark.parametrize("kind", ["uniform", "absorbing", "hybrid", "dense"])
def test_no_tensor_is_larger_than_a_chunk(kind, net, make_graphs, generator, monkeypatch):
    """Nor than the hidden states: 600 positions and 40 states would make 24,000 log-scores."""
    monkeypatch.setattr(fused_module, "CHUNK_ELEMENTS", 2000)
    graph = make_graphs(40)[kind]
    if kind == "dense":  # at one noise level its exponential is one matrix
        matrices = graph.exp(torch.ones(1))
        graph.exp = lambda sigma: matrices.expand(len(sigma), -1, -1)
    net, noise = net(graph.num_states, width=4), lambda t: (torch.ones_like(t), torch.ones_like(t))
    x0, t = torch.randint(40, (2, 300), generator=generator), torch.ones(2)
    jumped = torch.rand(2, 300, generator=generator) < 0.6
    xt = torch.where(jumped, 39 if graph.mask_id is None else graph.mask_id, x0)
    with Largest() as largest:
        fused(net, graph, noise, x0, t, xt).total.backward()
    assert largest.entries <= 2 * 300 * 4  # the hidden states
    with Largest() as largest:
        denoising_loss(net, graph, noise, x0, t, xt=xt)
    assert largest.entries >= 24000


@pytest.mark.parametrize("kind", [Net, LinearNet])
def test_goes_backward_only_once(kind, make_graphs, log_linear, generator):
    net, x0 = kind(5), torch.randint(5, (3, 7), generator=generator)
    total = fused(net, make_graphs(5)["uniform"], log_linear, x0, torch.full((3,), 0.5), x0).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward only once"):
        total.backward()


@pytest.mark.parametrize("kind", [Net, LinearNet])
def test_without_gradients_it_makes_none(kind, graph, log_linear, case):
    net, (x0, t, xt) = kind(graph.num_states).double(), case
    with torch.no_grad():
        loss = fused(net, graph, log_linear, x0, t, xt)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.per_sequence, fused(net, graph, log_linear, x0, t, xt).per_sequence, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Net, NormalisedNet, LinearNet])
@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_the_head_is_bfloat16_and_the_loss_float32(kind, graph, log_linear, case):
    """The plain path under the same autocast; each chunk's share of a gradient is rounded to bfloat16, 2^-9."""
    net, (x0, t, xt) = kind(graph.num_states), case
    with torch.autocast("cpu", torch.bfloat16):
        plain = denoising_loss(net, graph, log_linear, x0, t.float(), xt=xt)
        ours = fused(net, graph, log_linear, x0, t.float(), xt)
    assert ours.total.dtype == ours.per_sequence.dtype == torch.float32
    torch.testing.assert_close(ours.per_sequence, plain, rtol=2e-2, atol=0)
    for one, other in zip(gradients(ours.total, net), gradients(plain.sum(), net), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("kind", [Net, LinearNet])
def test_a_bfloat16_head_sums_its_gradients_in_float32(kind, make_graphs, log_linear, generator, monkeypatch):
    """Summed in bfloat16 over 200 chunks, they would be off by several percent."""
    graph, net = make_graphs(5)["uniform"], kind(5).bfloat16()
    x0, t = torch.randint(5, (8, 50), generator=generator), torch.full((8,), 0.5)
    xt = graph.sample(x0, t, generator=generator)
    found = {}
    for chunk in (10, 1 << 20):
        monkeypatch.setattr(fused_module, "CHUNK_ELEMENTS", chunk)
        total = fused(net, graph, log_linear, x0, t, xt).total
        found[chunk] = torch.autograd.grad(total, net.linear.weight)[0].float()
    assert (found[10] - found[1 << 20]).norm() < 5e-3 * found[10].norm()


@pytest.mark.filterwarnings("default")  # the compiler reads every attribute of what it traces, deprecated ones too
@pytest.mark.usefixtures("small_chunks")
def test_works_with_a_compiled_network_and_inside_a_compiled_function(make_graphs, log_linear, generator):
    graph = make_graphs(5)["hybrid"]
    net, x0 = Net(6).double(), torch.randint(5, (3, 7), generator=generator)
    sigma, dsigma = log_linear(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    xt = graph.sample(x0, sigma, generator=generator)

    def loss(hidden, head):
        return fused_denoising_loss(hidden(xt, sigma), head, graph, xt, x0, sigma, dsigma).total

    hidden, head = torch.compile(net.hidden, backend="aot_eager"), torch.compile(net.head, backend="eager")
    expected = loss(net.hidden, net.head)
    whole = torch.compile(loss, backend="aot_eager")
    for found in (loss(hidden, net.head), loss(net.hidden, head), whole(net.hidden, net.head)):
        torch.testing.assert_close(found, expected, **EXACTLY)
        for one, other in zip(gradients(found, net), gradients(loss(net.hidden, net.head), net), strict=True):
            torch.testing.assert_close(one, other, **EXACTLY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 7)}, r"hidden must have shape \(B, L, D\)"),
        ({"hidden": torch.zeros(3, 6, 6)}, r"hidden must have shape \(B, L, D\)"),
        ({"x": torch.full((3, 7), 9)}, "x must lie in"),
        ({"x0": torch.full((3, 7), -1)}, "x0 must lie in"),
        ({"x0": torch.zeros(3, 6, dtype=torch.int64)}, "x0 must have shape"),
        ({"sigma": -torch.ones(3)}, "sigma is a total noise and must be >= 0"),
        ({"sigma": torch.ones(3, 1)}, "sigma must have a shape that is a leading part"),
        ({"dsigma": torch.ones(7)}, "dsigma must have a shape that is a leading part"),
        ({"weight": torch.zeros(3)}, "weight is 0 at every position"),
        ({"weight": -torch.ones(3)}, "weight must be >= 0"),
        ({"head": lambda hidden, x, sigma: hidden}, "head must return log_score of shape"),
        ({"head": LinearHead(torch.zeros(6, 5), None, None)}, r"head.weight must have shape \(N, D\), \(5, 6\)"),
        ({"head": LinearHead(torch.zeros(5, 6), torch.zeros(6), None)}, r"head.bias must have shape \(N,\), \(5,\)"),
        (
            {"head": LinearHead(torch.zeros(5, 6), None, torch.zeros(3, 1))},
            "head.shift must have a shape that is a lead",
        ),
        ({"head": lambda hidden, x, sigma: hidden[:, :5] * float("nan")}, "log_score is NaN"),
    ],
)
def test_bad_input_is_named(change, message, make_graphs):
    states = torch.zeros(3, 7, dtype=torch.int64)
    arguments = {"hidden": torch.zeros(3, 7, 6), "head": Net(5).head, "graph": make_graphs(5)["uniform"]}
    arguments |= {"x": states, "x0": states, "sigma": torch.ones(3), "dsigma": torch.ones(3), "weight": None} | change
    weight = arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        fused_denoising_loss(*arguments.values(), weight=weight)


def test_a_nan_can_be_left_to_the_caller_who_finds_its_sequence(make_graphs, generator):
    """With as many calls of the head, so that ranks stay in step, and gradients that say so too."""
    net = Net(5)
    x0 = torch.randint(5, (3, 7), generator=generator)
    hidden = torch.randn(3, 7, 6, generator=generator)
    arguments = {"head": net.head, "graph": make_graphs(5)["uniform"], "x": x0.roll(1), "x0": x0}
    arguments |= {"sigma": torch.ones(3), "dsigma": torch.ones(3)}
    whole = fused_denoising_loss(hidden, **arguments, refuse_nan=False)
    calls = len(net.rows)
    hidden[1, 2] = float("nan")
    with pytest.raises(ValueError, match="the loss is NaN at 1 of 21 positions: log_score is NaN"):
        fused_denoising_loss(hidden, **arguments)
    net.rows.clear()
    loss = fused_denoising_loss(hidden, **arguments, refuse_nan=False)
    assert len(net.rows) == calls
    assert loss.per_sequence.isnan().tolist() == [False, True, False]
    assert torch.equal(loss.per_sequence[::2], whole.per_sequence[::2])
    loss.total.backward()
    assert net.linear.weight.grad is not None
    assert net.linear.weight.grad.isnan().all()


@pytest.mark.parametrize("chunk", [1 << 20, 10])
def test_a_head_may_use_what_was_made_outside_in_as_many_chunks_as_it_takes(chunk, make_graphs, generator, monkeypatch):
    """A tensor with a history of its own: each chunk goes back through it, and so does the caller's own loss."""
    monkeypatch.setattr(fused_module, "CHUNK_ELEMENTS", chunk)
    x0, table = torch.randint(5, (3, 7), generator=generator), torch.randn(6, 5, generator=generator).requires_grad_()
    hidden, graph = torch.randn(3, 7, 6, generator=generator), make_graphs(5)["uniform"]
    weight = table.tanh()
    sigma = torch.ones(3)
    total = fused_denoising_loss(hidden, lambda h, x, s: h @ weight, graph, x0, x0.roll(1), sigma, sigma).total
    (found,) = torch.autograd.grad(total + weight.sum(), table)
    plain = denoising_score_entropy(hidden @ table.tanh(), graph, x0, x0.roll(1), sigma).sum() + table.tanh().sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, table)[0])


def test_the_plain_loss_leaves_a_nan_to_its_caller_too(make_graphs, log_linear):
    x0, t = torch.zeros(3, 7, dtype=torch.int64), torch.full((3,), 0.5)

    def score(x, sigma):
        return torch.zeros(3, 7, 5).index_fill_(0, torch.tensor([1]), float("nan"))

    with pytest.raises(ValueError, match="the loss is NaN at 7 of 21 positions"):
        denoising_loss(score, make_graphs(5)["uniform"], log_linear, x0, t, xt=x0)
    loss = denoising_loss(score, make_graphs(5)["uniform"], log_linear, x0, t, xt=x0, refuse_nan=False)
    assert loss.isnan().tolist() == [False, True, False]


def test_a_chunk_is_128_mib_of_float32_and_holds_a_position_at_least(make_graphs, monkeypatch):
    assert fused_module.CHUNK_ELEMENTS * 4 == 128 * 2**20
    monkeypatch.setattr(fused_module, "CHUNK_ELEMENTS", 3)  # fewer than states
    x0, sigma, net = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1), Net(5)
    hidden = torch.randn(1, 4, 6)
    fused_denoising_loss(hidden, net.head, make_graphs(5)["uniform"], x0, x0, sigma, sigma)
    assert net.rows[-4:] == [1] * 4


@pytest.mark.parametrize("shift", [torch.tensor([0.5, -1.0]), torch.tensor([[0.5, 0.0, 1.0], [-1.0, 2.0, 0.25]])])
def test_a_shift_a_sequence_or_a_position_is_added_to_every_log_score(shift, graph, generator):
    """With its gradient, of whatever shape and dtype; autocast changes none of it."""
    x0 = torch.randint(5, (2, 3), generator=generator)
    sigma, factor = torch.tensor([0.3, 1.0]).double(), torch.tensor([1.0, 0.5]).double()
    x = graph.sample(x0, sigma, generator=generator)
    hidden = torch.randn(2, 3, graph.num_states, generator=generator, dtype=torch.float64)
    leaf = shift.double().requires_grad_()
    head = LinearHead(torch.eye(graph.num_states, dtype=torch.float64), None, leaf)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_denoising_loss(hidden, head, graph, x, x0, sigma, factor)
    spread = leaf.reshape(*shift.shape, *[1] * (3 - shift.ndim))
    want = (factor[:, None] * denoising_score_entropy(hidden + spread, graph, x, x0, sigma)).sum(-1)
    torch.testing.assert_close(found.per_sequence, want.detach(), **EXACTLY)
    torch.testing.assert_close(found.total, want.sum(), **EXACTLY)
    slopes = [torch.autograd.grad(loss, leaf)[0] for loss in (found.total, want.sum())]
    torch.testing.assert_close(*slopes, **EXACTLY)


@pytest.mark.parametrize("linear", [False, True])
def test_the_factor_s_gradient_is_the_loss_of_its_position(linear, graph, generator):
    """By weights and by dsigma, a position and a sequence."""
    x0 = torch.randint(5, (2, 3), generator=generator)
    sigma = torch.tensor([0.3, 1.0], dtype=torch.float64)
    x = graph.sample(x0, sigma, generator=generator)
    hidden = torch.randn(2, 3, graph.num_states, generator=generator, dtype=torch.float64)
    dsigma = torch.rand(2, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.rand(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    head: Any = LinearHead(torch.eye(graph.num_states).double(), None, None) if linear else lambda h, x, s: h
    total = fused_denoising_loss(hidden, head, graph, x, x0, sigma, dsigma, weight=weight).total
    each = denoising_score_entropy(hidden, graph, x, x0, sigma)
    by_dsigma, by_weight = torch.autograd.grad(3 * total, (dsigma, weight))
    torch.testing.assert_close(by_weight, 3 * dsigma.detach()[:, None] * each, **EXACTLY)
    torch.testing.assert_close(by_dsigma, 3 * (weight.detach() * each).sum(-1), **EXACTLY)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_are_in_autocast_s_dtype_but_float64_s(dtype, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = linear_module.product_dtype(torch.zeros(1, dtype=dtype))
    assert found == (torch.bfloat16 if autocast and dtype != torch.float64 else dtype)


@pytest.mark.parametrize("wide", [True, False])
def test_products_are_added_in_the_total_s_dtype(wide, generator):
    one, other = torch.randn(3, 5, generator=generator), torch.randn(5, 2, generator=generator)
    total = torch.full((3, 2), 2.0)
    if wide:
        one, other = one.bfloat16(), other.bfloat16()
    linear_module.add_product(total, one, other)
    torch.testing.assert_close(
        total, 2 + one.float() @ other.float(), rtol=1e-2 if wide else 1e-6, atol=2e-2 if wide else 1e-6
    )
    rows, out = torch.randn(4, 5, generator=generator), torch.empty(4, 3)
    weight, bias = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    assert linear_module.linear(rows, weight, None, out=out) is out
    torch.testing.assert_close(out, rows @ weight.T)
    torch.testing.assert_close(linear_module.linear(rows, weight, bias, out=out), rows @ weight.T + bias)
