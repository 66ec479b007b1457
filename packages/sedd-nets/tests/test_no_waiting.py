"""A step on an accelerator reads nothing back to the host: shown on the CPU, by what is dispatched."""

from typing import Any

import pytest
import torch
from sedd_nets import MDLM, RADD, SEDD, Documents, LabelCondition, bind
from torch.utils._python_dispatch import TorchDispatchMode

MODULES = ("attention", "block_diffusion", "checks", "conditioning", "documents", "fast.memory_efficient")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
SEEDS = torch.tensor([2**40, -1, 5])


class Reads(TorchDispatchMode):
    """Notes every operation whose result, or its shape, depends on values: the host waits for it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(f"sedd_nets.{module}.on_host", lambda _tensor: False)


def networks():
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "length": 12, "dropout": 0.3}
    sedd = SEDD(11, **sizes, scale_by_sigma=True)
    sedd.condition_embed = LabelCondition(5, 128)
    return [sedd, RADD(11, **sizes), MDLM(11, **sizes)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("seeds", [None, SEEDS])
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_reads_nothing_back(as_on_an_accelerator, batch, packed, seeds, checkpointed):
    x, sigma = batch
    for net in networks():
        net.train().checkpoint_activations = checkpointed
        condition = torch.tensor([4, -1, 0]) if net.condition_embed is not None else None
        with Reads() as reads:
            documents = Documents.padded(torch.tensor([7, 3, 5]), 7) if packed else None
            log_score = net(x, sigma, condition=condition, documents=documents, dropout_seeds=seeds)
            log_score.square().mean().backward()
        assert reads.found == [], type(net).__name__


@pytest.mark.parametrize("level", ["sequence", "position"])
def test_rows_at_positions_are_those_of_where_and_nothing_is_read(as_on_an_accelerator, batch, level):
    x, sigma = batch
    sigma = sigma if level == "sequence" else sigma[:, None] * torch.linspace(1, 2, x.shape[1])
    where = x > 4
    positions = where.flatten().nonzero()[:, 0]
    for net in [net.double().eval() for net in networks()]:
        torch.nn.init.normal_(net.output_layer.linear.weight)
        expected = net(x, sigma, where=where)
        with Reads() as reads:
            found = net(x, sigma, positions=positions)
        assert reads.found == [], type(net).__name__
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        with pytest.raises(
            ValueError, match=r"indices \(M,\) int64 into x.flatten\(\), without where; got .* and where"
        ):
            net(x, sigma, where, positions=positions)
        with pytest.raises(ValueError, match=r"got torch.bool \(3, 7\)"):
            net(x, sigma, positions=where)


def test_a_bound_network_takes_positions(batch):
    x, sigma = batch
    net = networks()[1].double().eval()
    torch.nn.init.normal_(net.output_layer.linear.weight)
    score = bind(net, lengths=[7, 5, 6])
    positions = torch.tensor([1, 3, 8, 20])
    torch.testing.assert_close(score(x, sigma, positions=positions), score(x, sigma).flatten(0, 1)[positions],
                               rtol=0, atol=1e-12)  # fmt: skip


def test_reads_are_found(batch):
    """On the CPU the tokens' extremes are read, and `where` on any device: how many rows there are is data."""
    x, sigma = batch
    net = networks()[1]
    with Reads() as reads:
        net(x, sigma, where=x > 4)
    assert reads.found.count("_local_scalar_dense") == 2
    assert reads.found.count("index") == 3


@pytest.mark.parametrize("token", [-1, 11])
def test_the_device_itself_refuses_what_is_out_of_range(as_on_an_accelerator, batch, token):
    x, sigma = batch
    net = networks()[0]
    with pytest.raises(RuntimeError, match=r"a token is outside 0\.\.10"):
        net(torch.full_like(x, token), sigma)
    with pytest.raises(RuntimeError, match=r"a label is outside 0\.\.4"):
        net(x, sigma, condition=torch.tensor([0, 6 + token, -2]))
