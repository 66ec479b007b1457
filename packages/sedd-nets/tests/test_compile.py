"""Compiled networks: one graph, the numbers and the dropout of the network as it is written."""

import pytest
import torch
from sedd_nets import RADD, SEDD
from sedd_nets.fast.dropout import dropped, place_keys

SEEDS = torch.tensor([2**40, -1, 5])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def loss_and_gradients(net, run, x, sigma):
    net.zero_grad()
    loss = run(x, sigma).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize(("family", "depth", "checkpointed"), [(SEDD, 1, False), (SEDD, 1, True), (RADD, 2, False)])
def test_training_forward_is_one_graph(family, depth, checkpointed, wide, randomise_):
    net = family(11, width=16, depth=depth, heads=2, length=12, dropout=0.3).double()
    randomise_(net)
    net.checkpoint_activations = checkpointed
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    eager = loss_and_gradients(net, lambda x, sigma: net(x, sigma, dropout_seeds=SEEDS), *wide)
    ours = loss_and_gradients(net, lambda x, sigma: compiled(x, sigma, dropout_seeds=SEEDS), *wide)
    torch.testing.assert_close(ours, eager, atol=1e-12, rtol=1e-9)


# torch's compiler looks for gradients of whatever enters the second graph, and torch warns it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
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


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_choices_are_the_same():
    """With torch's own compiler, whose arithmetic might know that whole numbers do not overflow."""
    keys = place_keys(SEEDS, 3)
    compiled = torch.compile(lambda seeds: dropped(place_keys(seeds, 3)[:, 2], 50, 70, 0.3), fullgraph=True)
    assert torch.equal(compiled(SEEDS), dropped(keys[:, 2], 50, 70, 0.3))
