import sys
import types

import pytest
import torch
from sedd_nets import Documents, FlashAttention, FlexAttention, attention_named, sdpa
from sedd_nets.attention import Rotary, ScaledDotProduct
from torch.nn.attention.flex_attention import flex_attention

IDS = torch.zeros(2, 160, dtype=torch.int64)
IDS[:, 50:] = 1
IDS[1, 120:] = -1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


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


def test_angles_are_positions_times_powers_of_ten_thousand():
    angle = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    cos, sin = Rotary(8)(5)
    assert cos.shape == sin.shape == (5, 3, 1, 8)
    for turned in (0, 1):  # queries and keys
        torch.testing.assert_close(cos[:, turned, 0], angle.cos().repeat(1, 2), atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[:, turned, 0], torch.cat([-angle.sin(), angle.sin()], -1), atol=1e-6, rtol=0)
    assert (cos[:, 2] == 1).all()
    assert (sin[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa(dtype, packed):
    (q, k, v), ids = heads(dtype), IDS if packed else torch.zeros_like(IDS)
    out = sdpa(q, k, v, Documents(ids) if packed else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(q, k, v, ids), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
def test_one_call_with_a_mask_is_the_documents_one_by_one(dtype, causal):
    q, k, v = heads(dtype)
    attend = ScaledDotProduct(causal=causal)
    out = attend.masked(q, k, v, Documents(IDS))
    assert out.dtype == dtype
    torch.testing.assert_close(out, attend(q, k, v, Documents(IDS)), atol=TOLERANCE[dtype], rtol=0)
    assert (out[IDS < 0] == 0).all()


def test_gradients_with_a_mask_are_finite_where_a_row_is_all_padding():
    q, k, v = (a.double().requires_grad_() for a in heads(torch.float32))
    documents = Documents(torch.stack([IDS[0], torch.full_like(IDS[0], -1)]))
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((sdpa.masked(q, k, v, documents) * weight).sum(), (q, k, v))
    one_by_one = torch.autograd.grad((sdpa(q, k, v, documents) * weight).sum(), (q, k, v))
    torch.testing.assert_close(ours, one_by_one, atol=1e-12, rtol=0)


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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_gradients_of_flex_are_those_of_a_dense_mask(monkeypatch, dtype, tolerance):
    """Uncompiled. torch refuses a backward pass on a CPU, where it has no kernel; its plain formula needs none."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    flex = FlexAttention()
    flex.attend = flex_attention
    q, k, v = (a.to(dtype).requires_grad_() for a in heads(torch.float32))
    slope = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad((flex(q, k, v, Documents(IDS)) * slope).sum(), (q, k, v))

    plain = [a.detach().double().requires_grad_() for a in (q, k, v)]
    q, k, v = (a.transpose(1, 2) for a in plain)
    within = (IDS[:, :, None] == IDS[:, None, :])[:, None]
    law = torch.softmax((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~within, -torch.inf), dim=-1)
    out = (law @ v).transpose(1, 2) * (IDS >= 0)[:, :, None, None]
    expected = torch.autograd.grad((out * slope).sum(), plain)
    for ours, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), dense, atol=tolerance, rtol=0)
        assert (ours[IDS < 0] == 0).all()
        assert ours[IDS >= 0].abs().min() > 0


@pytest.mark.slow
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

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q[-1] == len(q)
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        ids = torch.arange(len(cu_seqlens_q) - 1).repeat_interleave(cu_seqlens_q.diff())
        return by_definition(q[None], k[None], v[None], ids[None])[0].to(q.dtype)

    module = types.SimpleNamespace(flash_attn_func=rows, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    with_normalisers = types.SimpleNamespace(
        flash_attn_func=lambda *given: (rows(*given), None),
        flash_attn_varlen_func=lambda *given, **lengths: (varlen(*given, **lengths), None),
    )
    monkeypatch.setitem(sys.modules, "flash_attn.cute", with_normalisers)


@pytest.mark.parametrize(
    "ids", [None, IDS, IDS.flip(0, 1), IDS.abs()], ids=["rows", "padding", "padding before", "no padding"]
)
@pytest.mark.parametrize("version", [2, 4])
def test_flash_packs_and_unpacks(flash_attn, ids, version):
    (q, k, v), documents = heads(torch.bfloat16), None if ids is None else Documents(ids)
    out = FlashAttention(version)(q, k, v, documents)
    torch.testing.assert_close(out, sdpa(q, k, v, documents), atol=TOLERANCE[torch.bfloat16], rtol=0)


def test_flash_refuses_float32(flash_attn):
    q, k, v = heads(torch.float32)
    with pytest.raises(TypeError, match=r"was given torch\.float32.*autocast"):
        FlashAttention()(q, k, v, None)


@pytest.mark.parametrize(("version", "package"), [(2, "flash-attn"), (4, "flash-attn-4")])
def test_flash_missing_says_how_to_install(monkeypatch, version, package):
    for module in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed.*pip install sedd-nets\[{package}\]"):
        FlashAttention(version)


def test_attention_by_name(flash_attn):
    assert attention_named("sdpa") is sdpa
    assert isinstance(attention_named("flex"), FlexAttention)
    q, k, v = heads(torch.bfloat16)
    for name, module in (("flash", "flash_attn"), ("flash-4", "flash_attn.cute")):
        attend = attention_named(name)
        assert isinstance(attend, FlashAttention)
        assert attend.rows is sys.modules[module].flash_attn_func
        torch.testing.assert_close(attend(q, k, v, None), sdpa(q, k, v, None), atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="no attention 'xformers': one of sdpa, flex, flash, flash-4"):
        attention_named("xformers")
    with pytest.raises(ValueError, match=r"version=3"):
        FlashAttention(3)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_takes_either_half_precision(flash_attn, dtype):
    q, k, v = heads(dtype)
    out = FlashAttention()(q, k, v, Documents(IDS))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(q, k, v, IDS), atol=2e-2, rtol=0)
    with pytest.raises(TypeError, match=r"was given torch\.float64"):
        FlashAttention()(q.double(), k.double(), v.double(), None)


def test_angles_stay_float32_whatever_the_network_becomes():
    exact = Rotary(8).inv_freq.clone()
    for cast in (torch.bfloat16, torch.float64):
        rotary = Rotary(8).to(cast)
        assert torch.equal(rotary.inv_freq, exact)
        assert rotary.inv_freq.dtype == torch.float32
    assert Rotary(8).to("meta").inv_freq.is_meta
    assert torch.allclose(Rotary(8, base=100.0)(2)[0][1, 0, 0, :4], torch.tensor([1.0, 0.316228, 0.1, 0.0316228]).cos())


def test_left_to_right_within_each_document():
    q, k, v = heads(torch.float32)
    out = ScaledDotProduct(causal=True)(q, k, v, Documents(IDS))
    within = (IDS[:, :, None] == IDS[:, None, :]) & (IDS[:, :, None] >= 0)
    score = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / 4
    score = score.masked_fill(~within.tril()[:, None], -torch.inf)
    expected = torch.einsum("bhlm,bmhd->blhd", score.softmax(-1).nan_to_num(), v.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_masks_are_made_beforehand_where_a_device_would_wait(monkeypatch):
    documents = Documents(IDS)
    sdpa.prepare(documents)
    assert "mask" not in vars(documents)  # on the host documents are attended one by one
    monkeypatch.setattr("sedd_nets.attention.on_host", lambda _tensor: False)
    sdpa.prepare(documents)
    assert "mask" in vars(documents)
    FlexAttention.prepare(FlexAttention.__new__(FlexAttention), documents)
    assert "block_mask" in vars(documents)
    FlashAttention.prepare(FlashAttention.__new__(FlashAttention), documents)
    assert {"kept", "cu_seqlens", "longest"} <= vars(documents).keys()
