import sys
import types

import pytest
import torch
from sedd_nets import Documents, FlashAttention, FlexAttention, sdpa
from torch.nn.attention.flex_attention import flex_attention

IDS = torch.zeros(2, 160, dtype=torch.int64)
IDS[:, 50:] = 1
IDS[1, 120:] = -1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# torch's compiler, which FlexAttention imports, imports a part of torch that torch deprecates.
imports_compiler = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def projection(dtype):
    return torch.randn(2, 160, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_definition(qkv, ids):
    """Softmax(q k' / sqrt d) v in float64 with a dense mask; rows of padding are 0."""
    q, k, v = qkv.double().transpose(1, 3).unbind(2)
    within = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~within[:, None], -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num() @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa(dtype, packed):
    qkv, ids = projection(dtype), IDS if packed else torch.zeros_like(IDS)
    out = sdpa(qkv, Documents(ids) if packed else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(qkv, ids), atol=TOLERANCE[dtype], rtol=0)


@imports_compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_flex_gives_the_same_numbers(dtype, packed):
    qkv, documents = projection(dtype), Documents(IDS) if packed else None
    flex = FlexAttention()
    flex.attend = flex_attention  # uncompiled: the same contract, without a minute of compilation
    out = flex(qkv, documents)
    assert out.dtype == dtype
    torch.testing.assert_close(out, sdpa(qkv, documents), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.slow
@imports_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_flex_gives_the_same_numbers(dtype, packed):
    qkv, documents = projection(dtype), Documents(IDS) if packed else None
    with torch.no_grad():
        out = FlexAttention()(qkv, documents)
    assert out.dtype == dtype
    torch.testing.assert_close(out, sdpa(qkv, documents), atol=TOLERANCE[dtype], rtol=0)


def test_block_mask_is_the_documents():
    mask = Documents(IDS).block_mask
    positions = torch.arange(160)
    b, query, key = torch.meshgrid(torch.arange(2), positions, positions, indexing="ij")
    expected = (IDS[:, :, None] == IDS[:, None, :]) & (IDS[:, :, None] >= 0)
    assert torch.equal(mask.mask_mod(b, torch.tensor(0), query, key), expected)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the flash-attn package with its signatures, computed by definition."""

    def packed(qkv):
        return by_definition(qkv, torch.zeros(qkv.shape[:2], dtype=torch.int64)).to(qkv.dtype)

    def varlen(tokens, cu_seqlens, longest):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[-1] == len(tokens)
        assert longest == cu_seqlens.diff().max()
        ids = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
        return by_definition(tokens[None], ids[None])[0].to(tokens.dtype)

    module = types.ModuleType("flash_attn")
    module.flash_attn_qkvpacked_func = packed
    module.flash_attn_varlen_qkvpacked_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("ids", [None, IDS, IDS.abs()], ids=["rows", "padding", "no padding"])
def test_flash_packs_and_unpacks(flash_attn, ids):
    qkv, documents = projection(torch.bfloat16), None if ids is None else Documents(ids)
    out = FlashAttention()(qkv, documents)
    torch.testing.assert_close(out, sdpa(qkv, documents), atol=TOLERANCE[torch.bfloat16], rtol=0)


def test_flash_refuses_float32(flash_attn):
    with pytest.raises(TypeError, match=r"was given torch\.float32.*autocast"):
        FlashAttention()(projection(torch.float32), None)


def test_flash_missing_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=r"pip install sedd-nets\[flash-attn\]"):
        FlashAttention()


def test_network_uses_the_attention_it_is_given(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    given = []

    def recorded(qkv, documents):
        given.append((tuple(qkv.shape), documents))
        return sdpa(qkv, documents)

    expected = net(x, sigma)
    net.attention = recorded
    documents = Documents(torch.zeros_like(x))
    assert torch.equal(net(x, sigma), expected)
    net(x, sigma, documents=documents)
    assert given == [((3, 7, 3, 2, 8), None)] * 2 + [((3, 7, 3, 2, 8), documents)] * 2
