"""What the harness's model makes of requests, without the harness: windows, contexts, options, what is generated."""

from __future__ import annotations

import importlib
import math
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import MDLM, RADD, SEDD
from sedd_objectives import Estimate
from sedd_samplers import ConfidenceUnmasking, clamped
from sedd_train import Model, conditional, tokenizers

SIZES: dict[str, Any] = {"width": 8, "depth": 1, "heads": 1, "length": 6, "dropout": 0.0}


@pytest.fixture(scope="module")
def harness():
    """The module, over the harness where that is installed, else over what it takes from there."""
    if find_spec("lm_eval") is not None:
        yield importlib.import_module("sedd_train.harness")
        return
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    made = {name: ModuleType(name) for name in names}
    made["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})  # type: ignore[attr-defined]
    made["lm_eval.api.registry"].register_model = lambda name: lambda model: model  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("sedd_train.harness")
        sys.modules.pop("sedd_train.harness")


def model(net: Any = None, graph: Any = None) -> Model:
    coder = tokenizers.load_tokenizer("characters:abcd", None)  # and the end
    torch.manual_seed(0)
    net = RADD(6, **SIZES) if net is None else net
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Model(net, graph or Absorbing(5), LogLinear(), coder)


def asked(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_options_unless_told_otherwise(harness):
    found = harness.SeddLM(model(), device="cpu")
    assert (found.num_times, found.exact, found.steps, found.seed, found.chunk) == (128, 6, 0, 0, 8)
    assert (found.backend, found.measured, found.estimator, found.net.training) == ("causal", [], "masks", False)
    assert harness.SeddLM(model(), device="cpu", batch_size="3").chunk == 3
    assert harness.SeddLM(model(), device="cpu", batch_size="auto", max_batch_size=9).chunk == 8
    with pytest.raises(ValueError, match="exakt is none of sedd's options pretrained, num_times, exact, steps, seed"):
        harness.SeddLM(model(), exakt=3)
    assert found.device_name == "cpu"


def test_text_is_text_and_ends_by_the_tokenizer_s_end(harness):
    found = harness.SeddLM(model(), device="cpu")
    assert (found.eot_token_id, found.tok_encode("abcd"), found.tok_encode("")) == (4, [0, 1, 2, 3], [])
    assert found.tokenizer_name == str(found.tokenizer.name_or_path)
    found.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token, for a text without context"):
        _ = found.eot_token_id


def test_sets_of_masks_are_weighed_as_orders_come_by_them(harness):
    """sum over M of 1 / (|M| binom(n, |M|)) sum of -log p: of two free positions by hand, of none nothing."""
    asked_of: list[Any] = []

    class Net:
        def log_conditional(self, x, sigma, where):
            asked_of.append((x.tolist(), sigma.tolist(), where.tolist()))
            return torch.tensor([[-1.0, -2.0, -4.0]]).expand(int(where.sum()), 3)

    x0, given = torch.tensor([[0, 1, 2], [2, 1, 1]]), torch.tensor([[True, False, False], [False, True, False]])
    found = harness.subsets_bound(Net(), x0, given, 9)
    first = (2 + 4) / (1 * 2) + (2 + 4) / (2 * 1)
    second = (4 + 2) / 2 + (4 + 2) / 2
    assert (found.tolist(), found.dtype) == ([first, second], torch.float64)
    assert [x for x, *_ in asked_of] == [[[0, 9, 2], [9, 1, 1]], [[0, 1, 9], [2, 1, 9]], [[0, 9, 9], [9, 1, 9]]]
    assert all(sigma == [1.0, 1.0] for _, sigma, _ in asked_of)
    assert [[sum(row) for row in where] for *_, where in asked_of] == [[1, 1], [1, 1], [2, 2]]
    assert x0.tolist() == [[0, 1, 2], [2, 1, 1]]
    assert harness.subsets_bound(Net(), x0, torch.ones_like(given), 9).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("net", "graph", "exactly"),
    [
        (RADD(6, **SIZES), Absorbing(5), True),
        (MDLM(6, **SIZES, cond_dim=4, time_conditioning=False), Absorbing(5), True),
        (MDLM(6, **SIZES, cond_dim=4, time_conditioning=True), Absorbing(5), False),
        (SEDD(6, **SIZES, cond_dim=4, scale_by_sigma=True), Absorbing(5), False),
        (SEDD(5, **SIZES, cond_dim=4, scale_by_sigma=False), Uniform(5), False),
    ],
    ids=["radd", "mdlm", "timed mdlm", "sedd", "uniform"],
)
def test_few_tokens_are_summed_exactly_where_noise_is_not_seen(net, graph, exactly, harness, monkeypatch):
    found = harness.SeddLM(model(net, graph), device="cpu", exact=2, num_times=4)
    assert found._looks_at_tokens_alone() is exactly
    summed, estimated = [], []

    def subsets(net, x0, given, mask_id):
        assert mask_id == graph.mask_id
        summed.append((~given).sum(-1).tolist())
        return torch.full((len(x0),), 2.0, dtype=torch.float64)

    def bound_by(estimator, net, graph, noise, x0, **how):
        estimated.append(
            (estimator, (~how["given"]).sum(-1).tolist(), how["num_times"], how.get("num_reconstructions"))
        )
        return Estimate(torch.full((len(x0),), 3.0), torch.full((len(x0),), 0.5))

    monkeypatch.setattr(harness, "subsets_bound", subsets)
    monkeypatch.setattr(harness, "bound_by", bound_by)
    pairs = [([0], [1, 2]), ([0], [1, 2, 3]), ([0, 1], [2]), ([0], [3, 3])]
    measured = found._nats(pairs, True)
    masks = exactly or (graph.mask_id is not None)
    name, more = ("masks", 16) if masks else ("times", None)
    if exactly:
        assert measured.value.tolist() == [2.0, 3.0, 2.0, 2.0]
        assert measured.standard_error.tolist() == [0.0, 0.5, 0.0, 0.0]
        assert estimated == [(name, [3], 4, more)]
    else:
        assert measured.value.tolist() == [3.0] * 4
        assert sorted(size for _, sizes, *_ in estimated for size in sizes) == [1, 2, 2, 3]
        assert {(estimator, times, more) for estimator, _, times, more in estimated} == {(name, 4, more)}
        assert summed == []
    assert found.measured == [measured]


def test_likelihoods_are_of_the_pairs_in_their_order(harness, monkeypatch):
    found = harness.SeddLM(model(), device="cpu")
    nats = conditional.Conditional(torch.tensor([2.0, 5.0]), torch.zeros(2), torch.tensor([1, 2]))
    seen: list[Any] = []

    def noted(pairs, quiet):
        seen.append((pairs, quiet))
        return nats

    monkeypatch.setattr(found, "_nats", noted)
    monkeypatch.setattr(found, "_is_greedy", lambda context, rest: rest == [3])
    requests = [(("x", "y"), (1, 2), (3,)), (("x", "z"), (1,), (2, 0))]
    assert found._loglikelihood_tokens(requests, disable_tqdm=True) == [(-2.0, True), (-5.0, False)]
    assert seen == [([([1, 2], [3]), ([1], [2, 0])], True)]


def test_a_long_text_is_read_in_windows(harness, monkeypatch):
    """The first as long as the model takes, then halves, each after all before it."""
    found = harness.SeddLM(model(), device="cpu")
    seen: list[Any] = []

    def nats(pairs, quiet):
        seen.append(pairs)
        return SimpleNamespace(value=torch.tensor([1.0] * len(pairs)))

    monkeypatch.setattr(found, "_nats", nats)
    text = "abcdabcdabc"
    tokens = found.tok_encode(text)
    assert found.loglikelihood_rolling(asked((text,), ("",), ("abc",)), disable_tqdm=True) == [-3.0, 0.0, -1.0]
    assert seen == [
        [([], tokens[:6]), (tokens[:6], tokens[6:9]), (tokens[:9], tokens[9:11])],
        [([], tokens[:3])],
    ]
    assert found.loglikelihood_rolling(asked((text[:6],)), disable_tqdm=True) == [-1.0]


def test_each_token_must_be_the_likeliest_under_masks(harness, monkeypatch):
    """Token i of the rest is asked for with masks from it on, at the noise that masks as many of the row's length."""

    class Net(torch.nn.Linear):
        length, num_states = 6, 6

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.append((x.tolist(), sigma.tolist()))
            out = torch.zeros(*x.shape, 6)
            out[..., 5] = 9.0  # the mask itself is never the likeliest
            out[..., 2] = 1.0
            return out

    seen: list[Any] = []
    found = harness.SeddLM(model(), device="cpu", batch_size=2)
    found.net = Net(1, 1)
    assert found._is_greedy([0, 1], [2, 2, 2]) is True
    assert [row for x, _ in seen for row in x] == [[0, 1, 5, 5, 5], [0, 1, 2, 5, 5], [0, 1, 2, 2, 5]]
    shares = [3 / 5, 2 / 5, 1 / 5]
    assert [s for _, sigma in seen for s in sigma] == pytest.approx([-math.log1p(-share) for share in shares])
    assert found._is_greedy([0, 1], [2, 0, 2]) is False
    seen.clear()
    assert found._is_greedy([], [2]) is True  # nothing is left unmasked: as much noise as there is
    assert seen[0][1] == pytest.approx([-math.log(1e-3)], rel=1e-3)
    seen.clear()
    assert found._is_greedy([0, 1, 0, 1, 0, 1], [2, 2]) is True  # cut at its beginning
    assert seen[0][0] == [[0, 1, 0, 1, 5, 5], [0, 1, 0, 1, 2, 5]]
    found.estimator = "times"
    assert found._is_greedy([0], [2]) is False


@pytest.mark.parametrize(
    ("context", "options", "row", "free"),
    [
        ("ab", {"max_gen_toks": 2}, [0, 1], 2),
        ("ab", {"max_new_tokens": 3}, [0, 1], 3),
        ("ab", {}, [0, 1], 4),
        ("abcdab", {"max_gen_toks": 2}, [2, 3, 0, 1], 2),
        ("abcdab", {"max_gen_toks": 9}, [3, 0, 1], 3),  # half of the length is kept for the context
        ("", {"max_gen_toks": 9}, [], 6),
    ],
)
@pytest.mark.parametrize("masks", [True, False])
def test_what_is_filled_in_follows_the_context(context, options, row, free, masks, harness, monkeypatch):
    found = harness.SeddLM(model(), device="cpu", seed=7)
    found.estimator = "masks" if masks else "times"
    seen: list[Any] = []

    def infill(net, graph, noise, *, x, given, **how):
        seen.append((x.tolist(), given.tolist(), how))
        filled = torch.tensor([[*row, 1, 4, 2, 0, 0, 0, 0]])
        return filled[:, : x.shape[1]]

    monkeypatch.setattr(harness, "infill", infill)
    assert found._continued(context, options, 11) == "b"  # up to the end of text
    ((x, given, how),) = seen
    assert x == [[*row, *[0] * free]]
    assert given == [[*[True] * len(row), *[False] * free]]
    assert (how["steps"], how["seeds"]) == (free, [11])
    assert ("method" in how, how.get("conditioning")) == (masks, None if masks else clamped)
    if masks:
        assert isinstance(how["method"], ConfidenceUnmasking)
    found.steps = 3
    found._continued(context, options, 11)
    assert seen[-1][2]["steps"] == 3


def test_what_is_generated_is_cut_where_the_task_says(harness, monkeypatch):
    found = harness.SeddLM(model(), device="cpu", seed=7)
    seen: list[Any] = []

    def continued(context, options, seed):
        seen.append((context, options, seed))
        return "abcabd"

    monkeypatch.setattr(found, "_continued", continued)
    cases: list[tuple[Any, str]] = [
        (["c"], "ab"), ("d", "abcab"), ([], "abcabd"), (None, "abcabd"), (["d", "b"], "a"), ([""], "abcabd")
    ]  # fmt: skip
    requests = asked(*[("x", {"until": until}) for until, _ in cases])
    assert found.generate_until(requests, disable_tqdm=True) == [text for _, text in cases]
    assert [seed for *_, seed in seen] == list(range(7, 13))


def test_tokens_are_drawn_where_the_task_draws(harness, monkeypatch):
    found = harness.SeddLM(model(), device="cpu")
    controls: list[Any] = []
    monkeypatch.setattr(harness, "top_k", lambda k: ("top", k))
    monkeypatch.setattr(harness, "at_temperature", lambda heat: ("heat", heat))
    monkeypatch.setattr(harness, "ConfidenceUnmasking", lambda confidence, controls: controls)

    def infill(*given, x, method, **how):
        controls.append(method)
        return x.clone()

    monkeypatch.setattr(harness, "infill", infill)
    for options in ({}, {"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}, {"do_sample": True}):
        found._continued("ab", options | {"max_gen_toks": 1}, 0)
    assert controls == [(("top", 1),), (("heat", 0.5),), (("top", 1),), (("top", 1),)]


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        (
            [[0.3], [0.4, 0.0]],
            f"measurement error of a log-likelihood, from noise: {math.sqrt(0.25 / 3):.3g} nats, 0.4 at most",
        ),
        ([[0.0], [0.0]], "no measurement error: sums over all sets of masks"),
        ([], "no log-likelihood was measured"),
    ],
)
def test_errors_are_told_by_their_root_mean_square(errors, told, harness):
    found = harness.SeddLM(model(), device="cpu")
    found.measured = [SimpleNamespace(standard_error=torch.tensor(part)) for part in errors]
    assert found.stated_error() == told
