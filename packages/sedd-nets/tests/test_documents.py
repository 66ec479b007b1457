import pytest
import torch
from sedd_nets import Documents, sdpa

IDS = torch.tensor([[4, 4, 4, 1, 1, 1, 1], [1, 1, -1, -1, 2, 2, 2], [0, 0, 0, 0, 0, -1, -1]])
SPANS = ((0, 3), (3, 7), (7, 9), (11, 14), (14, 19))


def test_spans_lengths_and_padding():
    documents = Documents(IDS)
    assert documents.spans == SPANS  # the 1s of two rows are two documents
    assert documents.cu_seqlens.tolist() == [0, 3, 7, 9, 12, 17]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.longest == 5
    assert documents.kept is not None
    assert documents.kept.tolist() == [*range(9), *range(11, 19)]
    assert Documents(IDS.abs()).kept is None


def test_what_is_known_moves_along():
    for ids in (IDS, IDS.abs()):
        documents, moved = Documents(ids), Documents(ids).to("cpu")
        assert torch.equal(moved.ids, ids)
        assert (moved.spans, moved.longest) == (documents.spans, documents.longest)
        assert torch.equal(moved.cu_seqlens, documents.cu_seqlens)
        if documents.kept is None:
            assert moved.kept is None
        else:
            assert moved.kept is not None
            assert torch.equal(moved.kept, documents.kept)


def test_padded_rows():
    assert Documents.padded([2, 5], 5).ids.tolist() == [[0, 0, -1, -1, -1], [0] * 5]
    assert Documents.padded(torch.tensor([2, 5]), 5).spans == ((0, 2), (5, 10))


def test_documents_equal_separate_runs(make_sedd, batch):
    x, sigma = batch
    net = make_sedd()
    together = net(x, sigma, documents=Documents(IDS)).flatten(0, 1)
    for start, stop in SPANS:
        alone = net(x.flatten()[None, start:stop], sigma[start // 7, None])
        torch.testing.assert_close(together[start:stop], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, net(x, sigma).flatten(0, 1), atol=1e-3)


def test_documents_with_noise_of_their_own(make_sedd, batch):
    x, _ = batch
    net = make_sedd()
    sigma = torch.rand(3, 7, generator=torch.Generator().manual_seed(5))
    together = net(x, sigma, documents=Documents(IDS)).flatten(0, 1)
    for start, stop in SPANS:
        alone = net(x.flatten()[None, start:stop], sigma.flatten()[None, start:stop])
        torch.testing.assert_close(together[start:stop], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_equal_separate_runs(make_sedd, batch):
    x, sigma = batch
    net = make_sedd().double()
    sigma = sigma.double()
    weight = torch.randn(21, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    kept = torch.cat([torch.arange(start, stop) for start, stop in SPANS])
    (net(x, sigma, documents=Documents(IDS)).flatten(0, 1)[kept] * weight[kept]).sum().backward()
    together = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    for start, stop in SPANS:
        alone = net(x.flatten()[None, start:stop], sigma[start // 7, None])[0]
        (alone * weight[start:stop]).sum().backward()
    for a, parameter in zip(together, net.parameters(), strict=True):
        # Rotary angles are float32 in every network, and a document alone sits at other positions.
        torch.testing.assert_close(a, parameter.grad, atol=2e-6, rtol=1e-5)


def test_padding_is_read_by_no_one(make_sedd, batch):
    x, sigma = batch
    net, documents = make_sedd(), Documents(IDS)
    other = torch.where(IDS < 0, (x + 1) % 11, x)
    kept = IDS >= 0
    assert torch.equal(
        net(x, sigma, where=kept, documents=documents), net(other, sigma, where=kept, documents=documents)
    )


def test_padding_attends_to_nothing():
    q, k, v = torch.randn(3, 3, 7, 2, 4, generator=torch.Generator().manual_seed(7))
    out = sdpa(q, k, v, Documents(IDS))
    assert (out[IDS < 0] == 0).all()
    assert (out[IDS >= 0] != 0).all()


def test_length_limits_documents_not_rows(make_sedd):
    net = make_sedd(length=12)
    x, sigma = torch.zeros(1, 20, dtype=torch.int64), torch.ones(1)
    assert net(x, sigma, documents=Documents.padded([12], 20)).shape == (1, 20, 11)
    with pytest.raises(ValueError, match="13 tokens; this network takes 1 to 12"):
        net(x, sigma, documents=Documents.padded([13], 20))


def test_bad_documents_are_named(make_sedd, batch):
    x, sigma = batch
    with pytest.raises(ValueError, match="int64"):
        Documents(IDS.float())
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        Documents(IDS[0])
    with pytest.raises(ValueError, match="no document"):
        Documents(torch.full((2, 3), -1))
    for lengths in ([0, 3], [4, 6], []):
        with pytest.raises(ValueError, match=r"1\.\.5"):
            Documents.padded(lengths, 5)
    with pytest.raises(ValueError, match=r"a batch \(2, 7\); x is \(3, 7\)"):
        make_sedd()(x, sigma, documents=Documents(IDS[:2]))


def test_who_sees_whom_position_by_position():
    documents = Documents(torch.tensor([[4, 4, 1, 4, -1, -1], [-1, 2, 2, -1, 2, 3]]))
    assert documents.inside.tolist() == [[True] * 4 + [False] * 2, [False, True, True, False, True, True]]
    assert documents.runs.tolist() == [[0, 0, 1, 2, -1, -1], [-1, 1, 1, -1, 3, 4]]
    for row, mask in zip(documents.runs.tolist(), documents.mask, strict=True):
        assert mask.tolist() == [[a == b for b in row] for a in row]
    assert documents.longest == 2


def test_a_row_as_long_as_its_only_text():
    documents = Documents.padded([5, 1], 5)
    assert (documents.spans, documents.longest) == (((0, 5), (5, 6)), 5)
    assert Documents.padded([5, 5], 5).kept is None
    assert documents.cu_seqlens.tolist() == [0, 5, 6]


@pytest.mark.parametrize("padding", [True, False])
def test_all_that_a_device_needs_goes_there(padding):
    documents = Documents(torch.tensor([[0, 0, 1, -1 if padding else 1], [2, 2, 2, 2]]))
    moved = documents.to("meta")
    assert {moved.ids.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert moved.cu_seqlens.dtype == torch.int32
    assert (None if moved.kept is None else moved.kept.device.type) == ("meta" if padding else None)
    assert (moved.spans, moved.longest) == (documents.spans, 4)
    assert documents.cu_seqlens.device.type == "cpu"
