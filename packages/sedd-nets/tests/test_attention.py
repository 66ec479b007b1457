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


def heads(dtype):
    """Queries, keys and values (2, 160, 2, 16) as views of one projection."""
    qkv = torch.randn(2, 160, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def by_definition(q, k, v, ids):
    """Softmax(q k' / sqrt d) v in float64 with a dense mask; rows of padding are 0."""
    q, k, v = (a.double().transpose(1, 2) for a in (q, k, v))
    within = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~within[:, None], -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num() @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa(dtype, packed):
    (q, k, v), ids = heads(dtype), IDS if packed else torch.zeros_like(IDS)
    out = sdpa(q, k, v, Documents(ids) if packed else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(q, k, v, ids), atol=TOLERANCE[dtype], rtol=0)


@imports_compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_flex_gives_the_same_numbers(dtype, packed):
    (q, k, v), documents = heads(dtype), Documents(IDS) if packed else None
    flex = FlexAttention()
    flex.attend = flex_attention  # uncompiled: the same contract, without a minute of compilation
    out = flex(q, k, v, documents)
    assert out.dtype == dtype
    torch.testing.assert_close(out, sdpa(q, k, v, documents), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.slow
@imports_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_flex_gives_the_same_numbers(dtype, packed):
    (q, k, v), documents = heads(dtype), Documents(IDS) if packed else None
    with torch.no_grad():
        out = FlexAttention()(q, k, v, documents)
    assert out.dtype == dtype
    torch.testing.assert_close(out, sdpa(q, k, v, documents), atol=TOLERANCE[dtype], rtol=0)


def test_block_mask_is_the_documents():
    mask = Documents(IDS).block_mask
    positions = torch.arange(160)
    b, query, key = torch.meshgrid(torch.arange(2), positions, positions, indexing="ij")
    expected = (IDS[:, :, None] == IDS[:, None, :]) & (IDS[:, :, None] >= 0)
    assert torch.equal(mask.mask_mod(b, torch.tensor(0), query, key), expected)


def test_an_id_that_comes_again_is_another_document():
    ids = torch.tensor([[3, 3, 5, 3, -1, 3]])
    assert Documents(ids).spans == ((0, 2), (2, 3), (3, 4), (5, 6))
    query, key = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    within = Documents(ids).block_mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
    assert within.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3], [5, 5]]


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the flash-attn package with its signatures, computed by definition."""

    def rows(q, k, v):
        return by_definition(q, k, v, torch.zeros(q.shape[:2], dtype=torch.int64)).to(q.dtype)

    def varlen(q, k, v, ends_q, ends_k, longest_q, longest_k):
        assert ends_q.dtype == torch.int32
        assert ends_q[-1] == len(q)
        assert longest_q == longest_k == ends_q.diff().max()
        assert torch.equal(ends_q, ends_k)
        ids = torch.arange(len(ends_q) - 1).repeat_interleave(ends_q.diff())
        return by_definition(q[None], k[None], v[None], ids[None])[0].to(q.dtype)

    module = types.SimpleNamespace(flash_attn_func=rows, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("ids", [None, IDS, IDS.abs()], ids=["rows", "padding", "no padding"])
def test_flash_packs_and_unpacks(flash_attn, ids):
    (q, k, v), documents = heads(torch.bfloat16), None if ids is None else Documents(ids)
    out = FlashAttention()(q, k, v, documents)
    torch.testing.assert_close(out, sdpa(q, k, v, documents), atol=TOLERANCE[torch.bfloat16], rtol=0)


def test_flash_refuses_float32(flash_attn):
    q, k, v = heads(torch.float32)
    with pytest.raises(TypeError, match=r"was given torch\.float32.*autocast"):
        FlashAttention()(q, k, v, None)


def test_flash_missing_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=r"pip install sedd-nets\[flash-attn\]"):
        FlashAttention()


def test_network_uses_the_attention_it_is_given(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    given = []

    def recorded(q, k, v, documents):
        given.append((q.shape, k.shape, v.shape, documents))
        return sdpa(q, k, v, documents)

    expected = net(x, sigma)
    net.attention = recorded
    documents = Documents(torch.zeros_like(x))
    assert torch.equal(net(x, sigma), expected)
    net(x, sigma, documents=documents)
    assert given == [*[(*[(3, 7, 2, 8)] * 3, None)] * 2, *[(*[(3, 7, 2, 8)] * 3, documents)] * 2]
