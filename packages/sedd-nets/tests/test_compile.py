"""Compiled networks: one graph, the numbers and the dropout of the network as it is written."""

import copy
import importlib.util
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sedd_nets import RADD, SEDD, Documents
from sedd_nets.attention import ScaledDotProduct
from torch._dynamo.backends.debugging import aot_eager

ScaledSEDD = partial(SEDD, scale_by_sigma=True)
pytestmark = [
    # torch's compiler looks for gradients of whatever enters a graph, and torch warns it,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # and it makes an object of each function of autograd, and torch warns it again.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

SEEDS = torch.tensor([2**40, -1, 5])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


class AsOnAGpu(ScaledDotProduct):
    """All documents in one call, on the CPU, too."""

    def prepare(self, documents):
        assert documents.mask.dtype == torch.bool

    def __call__(self, q, k, v, documents):
        return self.masked(q, k, v, documents)


@pytest.fixture
def gpus_code(monkeypatch):
    """The sources of the Triton kernels that torch's compiler makes, as it would for an H100; none is run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which no wheel for this system brings")
    import torch._inductor.config
    from torch._inductor.async_compile import AsyncCompile
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    sources = []

    def note(_self, _name, source, **_options):
        sources.append(source)
        return SimpleNamespace(run=lambda *_given, **_also: None)

    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, is_active=lambda: True
    )
    monkeypatch.setattr(AsyncCompile, "triton", note)
    monkeypatch.setattr(driver, "_active", card)
    with torch._inductor.config.patch(cpu_backend="triton", fx_graph_cache=False, compile_threads=1):
        yield sources


def loss_and_gradients(net, run, x, sigma):
    net.zero_grad()
    loss = run(x, sigma).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize(
    ("family", "depth", "checkpointed"), [(ScaledSEDD, 1, False), (ScaledSEDD, 1, True), (RADD, 2, False)]
)
def test_training_forward_is_one_graph(family, depth, checkpointed, wide, randomise_):
    net = family(11, width=16, depth=depth, heads=2, length=12, dropout=0.3).double()
    randomise_(net)
    net.checkpoint_activations = checkpointed
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    eager = loss_and_gradients(net, lambda x, sigma: net(x, sigma, dropout_seeds=SEEDS), *wide)
    ours = loss_and_gradients(net, lambda x, sigma: compiled(x, sigma, dropout_seeds=SEEDS), *wide)
    torch.testing.assert_close(ours, eager, atol=1e-12, rtol=1e-9)


def test_compiled_network_gives_the_rows_of_where(make_sedd, batch):
    """How many rows there are is data, so the head is a second graph; nothing else of the call differs."""
    x, sigma = batch
    net = make_sedd(depth=1)
    compiled = torch.compile(net, backend="aot_eager")
    for some in (x > 4, x > 7):
        loss, gradients = loss_and_gradients(net, lambda x, sigma, some=some: net(x, sigma, where=some), x, sigma)
        ours = loss_and_gradients(net, lambda x, sigma, some=some: compiled(x, sigma, where=some), x, sigma)
        torch.testing.assert_close(ours, (loss, gradients), atol=1e-5, rtol=1e-4)


def test_compiled_trunk_in_bfloat16_with_dropout(make_sedd, batch):
    x, sigma = batch
    net = make_sedd(depth=1, dropout=0.5).train()
    hidden = torch.compile(net.hidden, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hidden(x, sigma)
        out.square().sum().backward()
        assert not torch.equal(hidden(x, sigma), out)
    trunk = [parameter for name, parameter in net.named_parameters() if "output_layer.linear" not in name]
    assert all(parameter.grad.isfinite().all() for parameter in trunk)


@pytest.mark.parametrize(("family", "checkpointed"), [(ScaledSEDD, True), (RADD, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_are_one_graph_for_all_of_them(family, checkpointed, packed, wide, randomise_):
    net = family(11, width=16, depth=3, heads=2, length=12, dropout=0.3).double()
    randomise_(net)
    net.checkpoint_activations = checkpointed
    if packed:
        net.attention = AsOnAGpu()
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1, -1, -1]] * 3)) if packed else None
    graphs = []

    def counted(graph, given):
        graphs.append(graph)
        return aot_eager(graph, given)

    def run(x, sigma):
        return net(x, sigma, documents=documents, dropout_seeds=SEEDS)

    eager = loss_and_gradients(net, run, *wide)
    net.compile_blocks(backend=counted, fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(net, run, *wide), eager, atol=1e-12, rtol=1e-9)
    assert len(graphs) == 1
    # A bool seen as bytes cannot be compiled for a GPU by every torch that is supported.
    assert not any(torch.uint8 in node.args for node in graphs[0].graph.nodes)
    assert net.state_dict().keys() == family(11, width=16, depth=3, heads=2).state_dict().keys()


def test_a_copy_of_compiled_blocks_uses_its_own_weights(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    before = net(x, sigma)
    net.compile_blocks(backend="eager")
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(copied(x, sigma), net(x, sigma), atol=1e-3)
    torch.testing.assert_close(net(x, sigma), before, atol=1e-5, rtol=1e-5)


def test_compiled_choices_of_dropout_are_the_same(make_sedd, batch):
    """With torch's own compiler, whose arithmetic might know that whole numbers do not overflow."""
    x, sigma = batch
    net = make_sedd(depth=1, dropout=0.5).train()
    seeds = SEEDS.clone()
    with torch.no_grad():
        eager = net(x, sigma, dropout_seeds=seeds)
        net.compile_blocks(fullgraph=True)
        torch.testing.assert_close(net(x, sigma, dropout_seeds=seeds), eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("packed", "checkpointed"), [pytest.param(False, False, marks=pytest.mark.slow), (True, True)])
def test_a_gpus_code_is_made_of_a_training_step(make_sedd, batch, gpus_code, packed, checkpointed):
    """Forward and backward in bfloat16, with dropout, down to the kernels' source: without breaks, on a CPU."""
    x, sigma = batch
    net = make_sedd(depth=1, dropout=0.1).train()
    net.checkpoint_activations = checkpointed
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1, -1, -1]] * 3)) if packed else None
    if packed:
        net.attention = AsOnAGpu()
    net.compile_blocks(fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = net.hidden(x, sigma, documents=documents, dropout_seeds=None if packed else SEEDS)
    forward = len(gpus_code)
    assert forward > 5
    hidden.float().sum().backward()
    assert len(gpus_code) > forward + 5
    assert all("@triton.jit" in source for source in gpus_code)
    # The hash is worked out where its bits are used, in forward and backward, and no choice is stored.
    hashes = [source for source in gpus_code if str(0x3D4D51CB) in source]
    assert packed or len(hashes) >= 4
