"""EleutherAI's lm-evaluation-harness with a model of ours: `sedd lm-eval`, or its own `--model sedd`.

    loglikelihood           -log p(continuation | context), whose context is given and does not move: the bound of eq. 9
    loglikelihood_rolling   of a whole text, in windows of the model's length; each follows the half of a window before
    generate_until          what follows the context: masks filled in, cut where the task says so

A bound is a number with an error, and the harness takes numbers alone: the errors are in `SeddLM.measured`, in its log
and in what `sedd lm-eval` prints. Where the network looks at the unmasked tokens alone and masks are all the noise
(RADD, MDLM), the bound is a mean over orders, and of n <= 6 tokens (`exact`) the sum over all sets of masks, without an
error,

    bound = sum over M != {} of  1 / (|M| binom(n, |M|))  sum_{i in M} -log p(x_i | the tokens outside M).

`is_greedy`, which some tasks count, is whether each token is the likeliest, given those before it and masks behind it.
"""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from sedd_nets import MDLM, RADD
from sedd_objectives import Estimate
from sedd_samplers import ConfidenceUnmasking, clamped, infill
from sedd_samplers.controls import temperature as at_temperature
from sedd_samplers.controls import top_k
from sedd_samplers.masked import confidence
from torch import Generator, Tensor
from tqdm import tqdm

from sedd_train import conditional
from sedd_train.evaluation import bound_by, choose_estimator
from sedd_train.pretrained import Model, load

__all__ = ["SeddLM", "subsets_bound"]

log = logging.getLogger("lm_eval.sedd")  # beneath the harness's own, and shown where that is


def subsets_bound(net: Any, x0: Tensor, given: Tensor, mask_id: int) -> Tensor:
    """The bound of the free positions given the others, by every set of masks: 2^n - 1 calls, and no error.

    Args:
        net: a network that looks at the unmasked tokens alone; `log_conditional(x, sigma)` is the law of clean tokens.
        x0: (B, L) int64, tokens.
        given: (B, L) bool; n positions of each row are not given, the same n in all.
        mask_id: the mask.

    Returns:
        (B,) nats, float64.
    """
    batch = len(x0)
    free = (~given).nonzero()[:, 1].view(batch, -1)
    rows, n = torch.arange(batch, device=x0.device), free.shape[1]
    total = torch.zeros(batch, dtype=torch.float64, device=x0.device)
    for size in range(1, n + 1):
        for chosen in itertools.combinations(range(n), size):
            at = free[:, list(chosen)]
            x = x0.scatter(1, at, mask_id)
            where = torch.zeros_like(given).scatter(1, at, True)
            law = net.log_conditional(x, torch.ones(batch, device=x0.device), where).view(batch, size, -1)
            nats = -law.gather(-1, x0[rows[:, None], at][..., None]).double().sum((1, 2))
            total += nats / (size * math.comb(n, size))
    return total


@register_model("sedd")
class SeddLM(TemplateLM):  # type: ignore[misc]
    """A score model of ours, or a published one, as the harness wants one.

    Args:
        pretrained: a run, a folder, or a name on the hub, as for `sedd_train.load`; or a `Model`.
        num_times: noise levels of a bound; more is less error.
        exact: continuations of so many tokens at most are summed over all sets of masks, where that applies.
        steps: reverse steps of a generation; 0 for one a token.
        seed: of noise.
        batch_size: sequences at once.
        device: where the network runs.

    Attributes:
        measured: what `loglikelihood` and `loglikelihood_rolling` have given, with errors, in their order.

    Raises:
        ValueError, OSError: as `sedd_train.load`.
    """

    backend = "causal"  # the context's tokens are the first of those of both together

    def __init__(
        self,
        pretrained: Any,
        *,
        num_times: int = 128,
        exact: int = 6,
        steps: int = 0,
        seed: int = 0,
        batch_size: int = 8,
        device: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        for name in set(more) - {"max_batch_size"}:
            raise ValueError(f"{name} is none of sedd's options pretrained, num_times, exact, steps, seed")
        net, self.graph, self.noise, self.tokenizer = (
            pretrained if isinstance(pretrained, Model) else load(str(pretrained))
        )
        self.device_name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.net: Any = net.to(self.device_name).eval()
        self.num_times, self.exact, self.steps, self.seed = num_times, exact, steps, seed
        self.chunk = int(batch_size) if str(batch_size).isdigit() else 8
        self.estimator = choose_estimator("best", self.graph, torch.arange(self.graph.num_states))
        self.measured: list[conditional.Conditional] = []

    @property
    def eot_token_id(self) -> int:
        """The token between documents; what has nothing before it follows this one."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise ValueError("the tokenizer has no end-of-text token, for a text without context to follow: give one")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, without any that stand for no text."""
        return list(self.tokenizer.encode(string, add_special_tokens=False, split_special_tokens=True))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        pairs = [(list(context), list(rest)) for _, context, rest in requests]
        greedy = [self._is_greedy(*pair) for pair in tqdm(pairs, desc="greedy?", disable=disable_tqdm)]
        nats = self._nats(pairs, disable_tqdm).value
        log.info(self.stated_error())
        return list(zip((-nats).tolist(), greedy, strict=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: the first window by itself, each half of one given the half before it."""
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            half = max(1, self.net.length // 2)
            pairs: list[conditional.Pair] = [([], tokens[: self.net.length])]
            for start in range(self.net.length, len(tokens), half):
                pairs.append((tokens[:start], tokens[start : start + half]))
            found.append(-float(self._nats(pairs, disable_tqdm).value.sum()) if tokens else 0.0)
        log.info(self.stated_error())
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What follows each context; the likeliest tokens first unless the task draws (`do_sample`, `temperature`)."""
        found = []
        for number, request in enumerate(tqdm(requests, desc="generating", disable=disable_tqdm)):
            context, options = request.args
            stops = options.get("until") or []
            text = self._continued(context, dict(options), self.seed + number)
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            found.append(text)
        return found

    def _nats(self, pairs: list[conditional.Pair], quiet: bool) -> conditional.Conditional:
        """Bounds of what follows, with errors, which are kept."""

        def bound(x0: Tensor, given: Tensor, random: Generator) -> conditional.Estimated:
            free = (~given).sum(-1)
            values, errors = torch.zeros(2, len(x0), dtype=torch.float64, device=x0.device)
            for n in sorted(set(free.tolist())):
                rows = free == n
                if n <= self.exact and self._looks_at_tokens_alone():
                    values[rows] = subsets_bound(self.net, x0[rows], given[rows], self.graph.mask_id)
                else:
                    found = by_time(x0[rows], given[rows], random)
                    values[rows], errors[rows] = found.value.double(), found.standard_error.double()
            return Estimate(values, errors)

        def by_time(x0: Tensor, given: Tensor, random: Generator) -> conditional.Estimated:
            how: dict[str, Any] = {"num_times": self.num_times, "generator": random, "given": given}
            if self.estimator == "masks":  # of a few tokens, three draws of the last step are too often all the same
                how["num_reconstructions"] = 16
            return bound_by(self.estimator, self.net, self.graph, self.noise, x0, **how)

        given: dict[str, Any] = {"device": self.device_name, "seed": self.seed, "chunk": self.chunk}
        found = conditional.conditional(bound, pairs, length=self.net.length, progress=not quiet, **given)
        self.measured.append(found)
        return found

    def stated_error(self) -> str:
        """How well the log-likelihoods of `measured` are known, in words."""
        errors = [float(error) for part in self.measured for error in part.standard_error]
        if not any(errors):
            return "no measurement error: sums over all sets of masks" if errors else "no log-likelihood was measured"
        rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
        return f"measurement error of a log-likelihood, from noise: {rms:.3g} nats, {max(errors):.3g} at most"

    def _looks_at_tokens_alone(self) -> bool:
        """Whether the network's law of clean tokens is of the unmasked ones, whatever the noise."""
        timeless = isinstance(self.net, RADD) or (isinstance(self.net, MDLM) and not self.net.time_conditioning)
        return timeless and self.estimator == "masks"

    @torch.no_grad()
    def _is_greedy(self, context: list[int], rest: list[int]) -> bool:
        """Whether each token is the likeliest, given those before it, under masks; False where noise is none."""
        if self.estimator != "masks":
            return False
        mask, n = self.graph.mask_id, len(rest)
        row = torch.tensor([*context[max(0, len(context) - self.net.length + n) :], *rest], device=self.device_name)
        first = len(row) - n
        at = torch.arange(first, len(row), device=self.device_name)
        for part in torch.split(at, self.chunk):
            x = torch.where(torch.arange(len(row), device=self.device_name) >= part[:, None], mask, row)
            share = (len(row) - part) / len(row)
            most = self.noise(torch.ones(len(part), device=self.device_name))[0]
            sigma = torch.minimum(-torch.log1p(-share), most)
            law = self.net(x, sigma)[torch.arange(len(part)), part].index_fill(-1, torch.tensor([mask]), -math.inf)
            if bool((law.argmax(-1) != row[part]).any()):
                return False
        return True

    def _continued(self, context: str, options: dict[str, Any], seed: int) -> str:
        """A continuation of the context, of `max_gen_toks` tokens at most."""
        wanted = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
        length, tokens = self.net.length, self.tok_encode(context)
        room = min(wanted, length - min(len(tokens), length // 2))  # half of the length is kept for a long context
        tokens = tokens[max(0, len(tokens) + room - length) :]
        x = torch.tensor([[*tokens, *([0] * room)]], device=self.device_name)
        given = torch.arange(x.shape[1], device=self.device_name)[None] < len(tokens)
        heat = float(options.get("temperature") or 0.0)
        controls = (at_temperature(heat),) if options.get("do_sample") and heat else (top_k(1),)
        how: dict[str, Any] = {"steps": self.steps or room, "seeds": [seed]}
        if self.estimator == "masks":
            how["method"] = ConfidenceUnmasking(confidence, controls=controls)
        else:
            how["conditioning"] = clamped
        filled = infill(self.net, self.graph, self.noise, x=x, given=given, **how)[0, len(tokens) :].tolist()
        if self.tokenizer.eos_token_id in filled:
            filled = filled[: filled.index(self.tokenizer.eos_token_id)]
        return str(self.tokenizer.decode(filled))
