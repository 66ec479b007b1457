"""Another's code for the same mathematics, d3-dna: where it is right we agree with it; and where it is not, why not.

Its graphs, losses and steps were written independently of ours, of SEDD's ancestry. Install it without what it depends
on (`pip install --no-deps d3-dna`): its module of mathematics needs torch and tqdm only, and is loaded by its path.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from sedd_graphs import Absorbing, Geometric, Row, Uniform
from sedd_objectives import denoising_score_entropy
from sedd_samplers.steps import denoise_probs, euler_probs, tweedie_probs
from torch import Tensor
from torch.nn.functional import one_hot

BATCH, LENGTH, TOKENS = 3, 5, 7  # all different, so that no axis is taken for another
SIGMA = torch.tensor([0.05, 0.6, 4.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def oracle():
    package = importlib.util.find_spec("d3_dna")
    if package is None:
        pytest.skip("d3-dna is not installed: pip install --no-deps d3-dna")
    path = Path(str(package.origin)).parent / "models/diffusion.py"
    spec = importlib.util.spec_from_file_location("d3_dna_diffusion", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _float64():
    """The oracle makes its tables in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["uniform", "absorbing"])
def both(request, oracle):
    """Our graph and the oracle's."""
    if request.param == "uniform":
        return Uniform(TOKENS), oracle.Uniform(TOKENS)
    return Absorbing(TOKENS), oracle.Absorbing(TOKENS)


def noised(graph):
    """Clean tokens, the same noised, and some log-score, 0 at x."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)
    x = graph.sample(x0, SIGMA, generator=generator)
    x[:, 0] = x0[:, 0]  # one that has not moved, at every level
    log_score = torch.randn(BATCH, LENGTH, graph.num_states, generator=generator, dtype=torch.float64)
    return x0, x, log_score.scatter(-1, x[..., None], 0)


def rows(log_score: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return log_score.flatten(0, 1), x.flatten(0, 1)


@pytest.mark.usefixtures("_float64")
class TestAgreement:
    """All in float64 and at noise where its formulas keep their digits: to 1e-10."""

    def test_schedule(self, oracle):
        t = torch.linspace(0, 1, 11)
        ours, theirs = Geometric(sigma_min=1e-3, sigma_max=5.0)(t), oracle.GeometricNoise(1e-3, 5.0)(t)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)

    def test_rates(self, both):
        ours, theirs = both
        x = torch.arange(ours.num_states)
        torch.testing.assert_close(ours.rates_out_of(x).dense(), theirs.rate(x).double(), rtol=1e-10, atol=0)
        torch.testing.assert_close(ours.rates_into(x).dense(), theirs.transp_rate(x).double(), rtol=1e-10, atol=1e-16)

    def test_transitions_into_a_state(self, both):
        ours, theirs = both
        _, x, _ = noised(ours)
        found, expected = ours.transition_into(x, SIGMA).dense(), theirs.transp_transition(x, SIGMA[:, None])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)

    def test_transitions_of_the_uniform_graph(self, oracle):
        ours, theirs = Uniform(TOKENS), oracle.Uniform(TOKENS)
        x0, _, _ = noised(ours)
        found, expected = ours.transition_from(x0, SIGMA).dense(), theirs.transition(x0, SIGMA[:, None])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)

    def test_score_entropy(self, both):
        ours, theirs = both
        x0, x, log_score = noised(ours)
        found = denoising_score_entropy(log_score, ours, x, x0, SIGMA)
        expected = theirs.score_entropy(log_score, SIGMA[:, None], x, x0)
        assert (expected > 0).any()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def test_euler_step(self, both):
        ours, theirs = both
        _, x, log_score = noised(ours)
        dose = 0.01 * SIGMA
        rate = dose[:, None, None] * theirs.reverse_rate(x, log_score.exp())
        found = euler_probs(*rows(log_score, x), ours, dose.repeat_interleave(LENGTH))
        expected = one_hot(x, ours.num_states) + rate
        torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-10, atol=1e-14)

    def test_tweedie_step(self, both):
        """What its analytic predictor draws from."""
        ours, theirs = both
        _, x, log_score = noised(ours)
        dose = 0.3 * SIGMA
        staggered = theirs.staggered_score(log_score.exp(), dose[:, None])
        expected = staggered * theirs.transp_transition(x, dose[:, None])
        found = tweedie_probs(*rows(log_score, x), ours, dose.repeat_interleave(LENGTH))
        torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-10, atol=1e-12)

    def test_final_denoising(self, both):
        ours, theirs = both
        _, x, log_score = noised(ours)
        staggered = theirs.staggered_score(log_score.exp(), SIGMA[:, None])
        expected = (staggered * theirs.transp_transition(x, SIGMA[:, None])).flatten(0, 1)
        found = denoise_probs(*rows(log_score, x), ours, SIGMA.repeat_interleave(LENGTH))
        torch.testing.assert_close(found[:, :TOKENS], expected[:, :TOKENS], rtol=1e-10, atol=1e-12)


class TestDisagreement:
    """What the oracle gets wrong, and that we do not: each test fails on the day that it is mended there."""

    @pytest.mark.parametrize(("n", "share"), [(32_000, 0.18), (50_257, 0.0), (151_936, 0.36)])
    def test_its_uniform_loss_cancels_in_float32(self, oracle, n, share):
        """The ratio as 1 - N / (e^sigma - 1 + N) is rounded to a multiple of 2^-24: 0, or by luck 2^-24.

        The loss is then not finite, for the given share of all times, or wrong by most of itself.
        """
        sigma, _ = Geometric()(torch.linspace(0, 1, 51))
        x0 = torch.zeros(len(sigma), 2, dtype=torch.int64)
        x = torch.tensor([0, 1]).expand(len(sigma), 2)
        log_score = torch.full((1, 1, n), -0.5).expand(len(sigma), 2, n)
        theirs = oracle.Uniform(n).score_entropy(log_score, sigma[:, None], x, x0).double()
        ours, exact = (
            denoising_score_entropy(log_score, Uniform(n), x, x0, level) for level in (sigma, sigma.double())
        )
        lost = ~theirs.isfinite().all(-1)
        assert abs(float(lost.float().mean()) - share) < 0.03
        assert lost.any() or ((theirs / exact - 1).abs() > 0.5).any()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)

    def test_its_uniform_transition_loses_its_digits_at_little_noise(self, oracle):
        """1 - e^-sigma of a sigma of 1e-6 in float32 has one digit."""
        x, sigma = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1e-6])
        expected = -math.expm1(-float(sigma)) / TOKENS
        theirs = float(oracle.Uniform(TOKENS).transition(x, sigma[:, None])[0, 0, 1])
        ours = float(Uniform(TOKENS).transition_from(x, sigma).dense()[0, 0, 1])
        assert abs(theirs / expected - 1) > 0.01
        assert abs(ours / expected - 1) < 1e-6

    def test_its_absorbing_transition_is_the_transpose(self, oracle):
        """A row of the exponential where a column is due: a token keeps e^-sigma, and the rest goes nowhere."""
        x0, sigma = torch.tensor([[0, 3]]), torch.tensor([0.7])
        theirs = oracle.Absorbing(TOKENS).transition(x0, sigma[:, None])
        torch.testing.assert_close(theirs.sum(-1), torch.full((1, 2), math.exp(-0.7)))
        ours = Absorbing(TOKENS).transition_from(x0, sigma)
        torch.testing.assert_close(ours.sum(), torch.ones(1, 2))
        torch.testing.assert_close(ours.at(torch.full((1, 2), TOKENS)), torch.full((1, 2), 1 - math.exp(-0.7)))
        torch.testing.assert_close(Absorbing(TOKENS).transition_into(x0, sigma).dense(), theirs)

    def test_its_absorbing_rates_are_integers(self, oracle):
        x = torch.arange(TOKENS)
        assert not oracle.Absorbing(TOKENS).rate(x).is_floating_point()
        assert Absorbing(TOKENS).rates_out_of(x).value.is_floating_point()

    def test_its_noise_of_one_axis_is_taken_for_positions(self, oracle):
        """With sigma (B,) and B = L each position gets the noise of the sequence of its number, and no error tells."""
        sigma = torch.tensor([0.1, 2.0])
        score = torch.ones(2, 2, TOKENS + 1)
        theirs, right = (oracle.Absorbing(TOKENS).staggered_score(score, s) for s in (sigma, sigma[:, None]))
        assert (theirs - right)[0, 1].abs().max() > 1
        x = torch.full((2, 2), TOKENS)
        ours = Absorbing(TOKENS).propagate(score, -sigma)
        torch.testing.assert_close(ours, right)
        with pytest.raises(ValueError, match=r"sigma must have a shape that is a leading part of x's \(2, 3\)"):
            Absorbing(TOKENS).transition_into(x[:, :1].expand(2, 3), sigma[:, None])

    def test_its_draws_never_find_a_state_of_probability_1e_9(self, oracle, monkeypatch):
        """In a race of float32 exponentials, even with the luckiest numbers that torch.rand can give.

        A million such states are due in a thousandth of the draws. Of 200,000 we expect 200 of them, with a standard
        deviation of 14: a false alarm in 500 million.
        """
        luck = torch.tensor([0.0, 1 - 2.0**-24])
        monkeypatch.setattr(torch, "rand_like", lambda p: luck)
        assert int(oracle.sample_categorical(torch.tensor([1.0, 1e-9]))) == 0
        monkeypatch.undo()
        n, draws = 1_000_001, 200_000
        ones = torch.ones(draws)
        row = Row(1e-9 * ones, torch.zeros(draws, 1, dtype=torch.int64), (0.999 * ones)[:, None], n)
        rare = int((row.sample(generator=torch.Generator().manual_seed(0)) > 0).sum())
        assert abs(rare - 200) < 6 * 14.2
