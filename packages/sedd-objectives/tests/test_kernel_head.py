"""The way that a GPU takes from hidden states to loss and gradients, on the CPU: kernels in Triton's interpreter."""

from __future__ import annotations

import importlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_objectives import cross_entropy_loss, fused_cross_entropy_loss, fused_denoising_loss
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU benchmarks/gpu.py compares this way with the CPU's")
checks, fused, kernel_head = (
    importlib.import_module(f"sedd_objectives.{name}") for name in ("checks", "fast.fused", "fast.kernel_head")
)
WIDTH = 6
READS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten._unique2",
    "aten.masked_select",
    "aten.item",
    "aten.is_nonzero",
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernel is used, several chunks are, and values are not read."""
    monkeypatch.setattr(fused, "kernel_serves", lambda hidden, dtype, *_: dtype == torch.float32)
    monkeypatch.setattr(kernel_head, "LEAST_ROWS", 5)
    for module in (checks, importlib.import_module("sedd_objectives.jumps")):
        monkeypatch.setattr(module, "reading_waits", lambda device: True)


def batch(graph, generator, *, bias=True, learns=("hidden", "weight", "bias")):
    """(3, 7) positions and what the loss of them takes."""
    x0 = torch.randint(5, (3, 7), generator=generator)
    sigma = torch.tensor([0.2, 0.7, 2.0])
    x = graph.sample(x0, sigma, generator=generator)
    draw = {"hidden": (3, 7, WIDTH), "weight": (graph.num_states, WIDTH), "bias": (graph.num_states,)}
    made: dict[str, Any] = {
        name: torch.randn(shape, generator=generator).requires_grad_(name in learns) for name, shape in draw.items()
    }
    if not bias:
        made["bias"] = None
    head = SimpleNamespace(weight=made["weight"], bias=made["bias"], shift=-sigma.expm1().log())
    return made, (made["hidden"], head, graph, x, x0, sigma, torch.tensor([1.0, 0.5, 2.0]))


def loss_and_gradients(made, arguments, **how):
    loss = fused_denoising_loss(*arguments, **how)
    leaves = [value for value in made.values() if value is not None and value.requires_grad]
    return loss, torch.autograd.grad(2.5 * loss.total, leaves) if loss.total.requires_grad else ()


def in_float64(made, arguments):
    """The same, for the way without a kernel."""
    wide = {
        name: value if value is None else value.detach().double().requires_grad_(value.requires_grad)
        for name, value in made.items()
    }
    _, head, *rest = arguments
    head = SimpleNamespace(weight=wide["weight"], bias=wide["bias"], shift=head.shift.double())
    return wide, (wide["hidden"], head, *rest)


def assert_near(found, expected, tolerance=1e-6):
    """As vectors: an entry in which terms cancel is as precise as the terms."""
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_the_other_way(weighted, bias, graph, generator, request):
    made, arguments = batch(graph, generator, bias=bias)
    weight = torch.rand(3, 7, generator=generator).masked_fill(arguments[4] == 2, 0) if weighted else None
    expected, slopes = loss_and_gradients(*in_float64(made, arguments), weight=weight)
    request.getfixturevalue("as_on_a_gpu")
    found, ours = loss_and_gradients(made, arguments, weight=weight)
    torch.testing.assert_close(found.per_sequence.double(), expected.per_sequence, rtol=2e-6, atol=0)
    assert_near(ours, slopes)


@pytest.mark.parametrize("learns", [(), ("hidden",), ("weight",), ("hidden", "bias")])
def test_what_does_not_learn_gets_no_gradient(learns, make_graphs, generator, request):
    made, arguments = batch(make_graphs(5)["hybrid"], generator, learns=learns)
    expected, slopes = loss_and_gradients(*in_float64(made, arguments))
    request.getfixturevalue("as_on_a_gpu")
    found, ours = loss_and_gradients(made, arguments)
    assert found.total.requires_grad == bool(learns)
    torch.testing.assert_close(found.total.double(), expected.total, rtol=2e-6, atol=0)
    assert_near(ours, slopes)


def test_under_autocast_products_are_bfloat16_and_the_weights_gradient_is_summed_in_float32(
    make_graphs, generator, request
):
    """Against the same products on the other way: what is left is a slope's rounding to bfloat16."""
    made, arguments = batch(make_graphs(5)["uniform"], generator)
    with torch.autocast("cpu", torch.bfloat16):
        expected, slopes = loss_and_gradients(made, arguments)
        request.getfixturevalue("as_on_a_gpu")
        found, ours = loss_and_gradients(made, arguments)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.per_sequence, expected.per_sequence, rtol=1e-5, atol=0)
    assert all(slope.dtype == torch.float32 for slope in ours)
    assert_near(ours, slopes, tolerance=1e-2)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_where_nothing_can_move_the_loss_and_the_gradients_are_zero(make_graphs, generator):
    made, arguments = batch(make_graphs(5)["absorbing"], generator)
    loss, slopes = loss_and_gradients(made, (*arguments[:3], arguments[4], *arguments[4:]))
    assert loss.total == 0
    assert all((slope == 0).all() for slope in slopes)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_goes_backward_only_once_and_finds_a_nan(make_graphs, generator):
    made, arguments = batch(make_graphs(5)["uniform"], generator)
    total = fused_denoising_loss(*arguments).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward only once"):
        total.backward()
    with torch.no_grad():
        made["hidden"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="the loss is NaN at 1 of 21 positions"):
        fused_denoising_loss(*arguments)
    assert fused_denoising_loss(*arguments, refuse_nan=False).per_sequence.isnan().tolist() == [False, True, False]


def cross_entropy_and_gradients(made, arguments, **how):
    loss = fused_cross_entropy_loss(*arguments, **how)
    return loss.per_sequence, torch.autograd.grad(2.5 * loss.total, [v for v in made.values() if v is not None])


def plain_cross_entropy(made, arguments, *, weight=None):
    hidden, head, graph, x, x0, sigma, dsigma = arguments
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    loss = cross_entropy_loss(lambda x, sigma: logits, graph, lambda t: (sigma, dsigma), x0, sigma, xt=x, weight=weight)
    return loss, torch.autograd.grad(2.5 * loss.sum(), [v for v in made.values() if v is not None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["absorbing", "dense absorbing"])
def test_head_and_cross_entropy_are_the_plain_ones(kind, weighted, bias, make_graphs, generator, monkeypatch, request):
    """In float64 without a kernel, several chunks of it, and in float32 with one."""
    made, arguments = batch(make_graphs(5)[kind], generator, bias=bias)
    weight = torch.rand(3, 7, generator=generator).masked_fill(arguments[4] == 2, 0) if weighted else None
    wide = in_float64(made, arguments)
    expected, slopes = plain_cross_entropy(*wide, weight=weight)
    monkeypatch.setattr(kernel_head, "LEAST_ROWS", 4)
    found, ours = cross_entropy_and_gradients(*wide, weight=weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # the rates are float32
    assert_near(ours, slopes)
    request.getfixturevalue("as_on_a_gpu")
    found, ours = cross_entropy_and_gradients(made, arguments, weight=weight)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    assert_near(ours, slopes, tolerance=2e-6)


def test_cross_entropy_refuses_what_is_not_absorbing_and_a_nan(make_graphs, generator):
    _, arguments = batch(make_graphs(5)["uniform"], generator)
    with pytest.raises(ValueError, match="the graph is not one that absorbs every token at one rate"):
        fused_cross_entropy_loss(*arguments)
    made, arguments = batch(make_graphs(5)["absorbing"], generator)
    with torch.no_grad():
        made["hidden"].fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is NaN"):
        fused_cross_entropy_loss(*arguments)
    assert fused_cross_entropy_loss(*arguments, refuse_nan=False).total.isnan()


class Reads(TorchDispatchMode):
    """The operations that read a value back, or whose output's size is one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name in READS or (name.startswith("aten.index") and any(_is_bool(part) for part in args[1:2])):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _is_bool(indices):
    tensors = indices if isinstance(indices, (list, tuple)) else [indices]
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in tensors)


class Plain:
    """A graph's rows without its checks, whose like sedd_graphs leaves to the device."""

    def __init__(self, num_states, mask_id):
        self.num_states, self.mask_id = num_states, mask_id

    def rates_into(self, x):
        one = torch.ones(x.shape)
        if self.mask_id is None:
            return SimpleNamespace(base=one / self.num_states, index=x[..., None], value=one[..., None] * 0 - 1)
        masked = (x == self.mask_id).float()
        return SimpleNamespace(base=masked, index=x[..., None], value=(masked - 1)[..., None])

    def ratio(self, x, x0, sigma):
        if self.mask_id is None:
            q = sigma.expm1() / (sigma.expm1() + self.num_states)
            same = x == x0
            at_x0 = torch.where(same, 1, 1 / q)
            return SimpleNamespace(base=torch.where(same, q, 1), index=x0[..., None], value=at_x0[..., None])
        return SimpleNamespace(base=torch.zeros_like(sigma), index=x0[..., None], value=1 / sigma.expm1()[..., None])


@pytest.mark.parametrize("mask_id", [8, None])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_reads_back_one_number(mask_id, weighted, generator):
    """How many positions can move, in several chunks, forward and backward."""
    made, (hidden, head, _, x, x0, sigma, dsigma) = batch(SimpleNamespace(num_states=9, sample=_keep), generator)
    x = torch.where(torch.rand(3, 7, generator=generator) < 0.7, 8 if mask_id else x, x0)
    weight = (x0 != 2).float() if weighted else None
    graph: Any = Plain(9, mask_id)
    with Reads() as reads:
        loss = fused_denoising_loss(hidden, head, graph, x, x0, sigma, dsigma, weight=weight, refuse_nan=False)
        loss.total.backward()
    assert reads.seen == ["aten.nonzero"]
    assert made["weight"].grad is not None
    live = ((x == 8) if mask_id else torch.ones_like(x).bool()) & (True if weight is None else weight > 0)
    positions = live.flatten().nonzero()[:, 0]
    with Reads() as reads:
        given: dict[str, Any] = {"weight": weight, "positions": positions, "refuse_nan": False}
        same = fused_denoising_loss(hidden, head, graph, x, x0, sigma, dsigma, **given)
        same.total.backward()
    assert reads.seen == []
    assert torch.equal(same.per_sequence, loss.per_sequence)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_of_cross_entropy_reads_back_one_number(generator):
    made, (hidden, head, _, x, x0, sigma, dsigma) = batch(SimpleNamespace(num_states=9, sample=_keep), generator)
    x = torch.where(torch.rand(3, 7, generator=generator) < 0.7, 8, x0)
    graph: Any = Plain(9, 8)
    with Reads() as reads:
        loss = fused_cross_entropy_loss(hidden, head, graph, x, x0, sigma, dsigma, refuse_nan=False)
        loss.total.backward()
    assert reads.seen == ["aten.nonzero"]
    assert made["weight"].grad is not None
    positions = (x == 8).flatten().nonzero()[:, 0]
    with Reads() as reads:
        how: dict[str, Any] = {"positions": positions, "refuse_nan": False}
        same = fused_cross_entropy_loss(hidden, head, graph, x, x0, sigma, dsigma, **how)
    assert reads.seen == []
    assert torch.equal(same.per_sequence, loss.per_sequence)


def test_positions_must_be_those_that_count(make_graphs, generator):
    _, arguments = batch(make_graphs(5)["absorbing"], generator)
    mask, x = arguments[2].mask_id, arguments[3]
    right = (x == mask).flatten().nonzero()[:, 0]
    assert len(right) > 2
    loss = fused_denoising_loss(*arguments)
    assert torch.equal(fused_denoising_loss(*arguments, positions=right).per_sequence, loss.per_sequence)
    others = (x != mask).flatten().nonzero()[:, 0]
    for wrong in (
        right[1:],
        right.flip(0),
        torch.cat([right[:-1], others[-1:]]).sort().values,
        right[[0, *range(len(right) - 1)]],
    ):
        with pytest.raises(ValueError, match=r"positions must be all places of x.flatten\(\) that can move"):
            fused_denoising_loss(*arguments, positions=wrong)
    for shape in (right.float(), right[None]):
        with pytest.raises(ValueError, match=r"positions must be \(M,\) int64, got torch"):
            fused_denoising_loss(*arguments, positions=shape)


def test_reads_are_seen(make_graphs, generator):
    """The way without a GPU reads many."""
    _, arguments = batch(make_graphs(5)["uniform"], generator)
    with Reads() as reads:
        fused_denoising_loss(*arguments).total.backward()
    assert len(reads.seen) > 10


def _keep(x0, sigma, *, generator):
    return x0


class Bytes(TorchDispatchMode):
    """The largest number of bytes at one time in the storages that were made inside."""

    def __init__(self):
        super().__init__()
        self.holders, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
                self.holders[key] = self.holders.get(key, 0) + 1
                self.now += size if self.holders[key] == 1 else 0
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._release, key, size)
        return out

    def _release(self, key, size):
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.holders[key]
            self.now -= size


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_memory_above_the_weights_is_a_formula(rows, generator, monkeypatch):
    """Of M rows, N states padded to P, width D, chunks of C, in bfloat16:

        2 P D   the weight's copy            4 P D   its gradient, and once more the product that is added to it
        2 C P   a chunk's logits, its slopes 4 M D   the rows and their gradient

    and no more than a tenth beside: no float32 logits (4 M P), no second chunk.
    """
    monkeypatch.setattr(kernel_head, "LEAST_ROWS", 8)
    states, width, chunk = 501, 32, 8
    graph: Any = Plain(states, states - 1)
    hidden = torch.randn(1, rows, width, generator=generator).requires_grad_()
    head = SimpleNamespace(
        weight=torch.randn(states, width, generator=generator).requires_grad_(),
        bias=None,
        shift=torch.zeros(1),
    )
    x0 = torch.randint(states - 1, (1, rows), generator=generator)
    x, sigma = torch.full_like(x0, states - 1), torch.ones(1)
    with Bytes() as memory, torch.autocast("cpu", torch.bfloat16):
        fused_denoising_loss(hidden, head, graph, x, x0, sigma, sigma, refuse_nan=False).total.backward()
    padded = 512
    formula = (2 + 4 + 4) * padded * width + 2 * chunk * padded + 4 * rows * width
    assert 0.8 * formula < memory.peak < 1.1 * formula
    assert memory.peak < formula + rows * padded * 4 / 2  # float32 logits would be seen


def test_the_kernel_serves_only_where_it_can():
    """Not on a CPU, not in float64, not where a schedule learns through the jumps."""
    serves, on_gpu = kernel_head.kernel_serves, SimpleNamespace(is_cuda=True)
    assert serves(on_gpu, torch.float32, torch.zeros(2))
    assert not serves(torch.zeros(2, 3), torch.float32, torch.zeros(2))
    assert not serves(on_gpu, torch.float64, torch.zeros(2))
    assert not serves(on_gpu, torch.float32, torch.zeros(2, requires_grad=True))


def test_chunks_follow_the_card(monkeypatch):
    rows = kernel_head.rows_at_a_time
    assert rows(torch.device("cpu"), 50_258, torch.bfloat16) == 4096
    for memory, expected in ((80 << 30, 13_340), (24 << 30, 4096)):
        card = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert rows(torch.device("cuda"), 50_258, torch.bfloat16) == expected


def test_a_kernel_needs_triton_and_a_schedule_learns_only_with_gradients(monkeypatch):
    on_gpu, learning = SimpleNamespace(is_cuda=True), torch.zeros(2, requires_grad=True)
    with torch.no_grad():
        assert kernel_head.kernel_serves(on_gpu, torch.float32, learning)
    assert not kernel_head.kernel_serves(on_gpu, torch.float32, torch.zeros(2), learning)
    monkeypatch.setattr(kernel_head.importlib.util, "find_spec", lambda name: None)
    assert not kernel_head.kernel_serves(on_gpu, torch.float32)


@pytest.mark.parametrize(("states", "rows"), [(1, 64), (63, 64), (64, 64), (65, 128), (50_258, 50_304)])
def test_weights_are_padded_with_zeros_to_a_multiple_of_64(states, rows):
    assert kernel_head.aligned(states) == rows
    if states > 100:
        return
    weight = torch.rand(states, 3, requires_grad=True)
    for value in (weight, weight[:, 0]):
        padded = kernel_head._padded(value, torch.bfloat16)
        assert padded.shape == (rows, *value.shape[1:])
        assert padded.dtype == torch.bfloat16
        assert not padded.requires_grad
        assert torch.equal(padded[:states], value.detach().bfloat16())
        assert not padded[states:].any()
