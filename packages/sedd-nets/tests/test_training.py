"""What training asks of a network: recomputed activations, bfloat16, counts of its work."""

from functools import partial
from typing import Any

import pytest
import torch
from sedd_nets import MDLM, RADD, SEDD, Documents
from sedd_nets.layers import GeluLinear
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ScaledSEDD = partial(SEDD, scale_by_sigma=True)
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "length": 12, "dropout": 0.0}


def loss_and_gradients(net, run, x, sigma):
    net.zero_grad()
    loss = run(x, sigma).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("family", [ScaledSEDD, RADD, MDLM])
def test_recomputed_activations_with_documents(family, batch, randomise_):
    x, sigma = batch
    net = family(11, **SIZES | {"dropout": 0.3}).train()
    randomise_(net)
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1, -1, -1]] * 3))
    found = []
    for net.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        found.append(loss_and_gradients(net, lambda x, sigma: net(x, sigma, documents=documents), x, sigma))
    (loss, gradients), (same_loss, same_gradients) = found
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


def test_recomputed_activations_are_not_kept(make_sedd, batch):
    x, sigma = batch
    net = make_sedd(depth=6)
    kept = []
    for net.checkpoint_activations in (False, True):
        held = 0

        def hold(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            net(x, sigma)
        kept.append(held)
    assert kept[1] < kept[0] / 4


def test_stream_and_norms_are_float32_under_autocast(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    dtypes: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, _given, out, name=name: dtypes.setdefault(name, out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x, sigma)
    for name in ("vocab_embed", "blocks.0", "blocks.1", "blocks.1.norm2", "output_layer", "output_layer.linear"):
        assert dtypes[name].dtype == torch.float32, name
    for name in ("blocks.0.attn_qkv", "blocks.0.attn_out", "blocks.1.mlp"):
        assert dtypes[name].dtype == torch.bfloat16, name


@pytest.mark.parametrize("family", [ScaledSEDD, RADD, MDLM])
@pytest.mark.parametrize("rows", [None, 5])
def test_flops_are_what_torch_counts(family, rows):
    net = family(50, **SIZES)
    x, where = torch.zeros(1, 12, dtype=torch.int64), None if rows is None else (torch.arange(12) < rows)[None]
    # torch's counter does not know the CPU's fused attention; its plain form is made of products that it does.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(x, torch.ones(1), where=where)
    assert counter.get_total_flops() == net.flops(12, rows=rows)


def test_gradients_under_autocast_are_float32_and_near(make_sedd, batch):
    """Of every parameter, after the backward pass has been taken outside of autocast, as it should be."""
    x, sigma = batch
    net = make_sedd()
    weight = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(2))
    (net(x, sigma) * weight).sum().backward()
    exact = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (net(x, sigma) * weight).sum()
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == torch.float32
        off, size = (parameter.grad - exact[name]).norm(), exact[name].norm()
        assert off < 0.05 * size, (name, float(off / size))


@pytest.mark.parametrize("family", [ScaledSEDD, RADD, MDLM])
def test_parameter_counts_add_up(family):
    net = family(50, **SIZES)
    counts = net.parameter_counts()
    assert sum(counts.values()) == sum(parameter.numel() for parameter in net.parameters())
    assert counts["embedding"] == 50 * 16
    assert counts["head"] == 50 * 16 + 50 + 16 * (2 if family is RADD else 1)
    assert (counts["conditioning"] == 0) is (family is RADD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gelu_and_its_linear_map_compute_in_autocasts_dtype_or_their_own(dtype):
    """Whatever comes in under autocast, as any linear layer does."""
    layer = GeluLinear(8, 4).to(dtype)
    a = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.nn.functional.gelu(a.double(), approximate="tanh") @ layer.weight.double().T + layer.bias.double()
    out = layer(a)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(a)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)
