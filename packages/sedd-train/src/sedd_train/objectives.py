"""What a network is trained for: the paper's loss and those it is compared with, behind one interface.

    ScoreEntropy     denoising score entropy (eq. 10), and the bound of eq. 9; for SEDD, RADD and MDLM. The latter two
                     output p(x0 | x), and the denoising score entropy of their score is the cross-entropy they are
                     known for (see `sedd_objectives.cross_entropy`): a masked-cross-entropy run is this with `MDLM`.
    D3PM             the divergences of T discrete steps; any score network, whose row's softmax is p(x0 | x). An entry
                     that a score holds at 0, its own state's, takes nothing from a softmax.
    Autoregressive   -log p of each token given those before it; for `Causal`.

Where each document has a row of its own, `lengths` (B,) says how many of a row's tokens are the document's. The rest,
padding, enters neither attention nor the loss. Numbers are nats a sequence, of the document alone.

An objective says how a batch is noised (`noised`), its loss (`losses`), what is reported of held-out text (`bound`),
and how to sample (`sample`): all three have these methods, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from sedd_nets import Documents
from sedd_objectives import (
    autoregressive_loss,
    d3pm_bound,
    d3pm_loss,
    denoising_loss,
    fused_cross_entropy_loss,
    fused_denoising_loss,
    likelihood_bound,
)
from sedd_objectives.jumps import RatesInto
from sedd_samplers import Ancestral, sample
from sedd_samplers.adapters import from_logits
from sedd_samplers.autoregressive import sample_left_to_right
from sedd_samplers.controls import Control, allowed_tokens
from torch import Generator, Tensor

from sedd_train import randomness
from sedd_train.tokens import inside

__all__ = ["Objective", "ScoreEntropy", "D3PM", "Autoregressive", "has_head"]

Losses = tuple[Tensor, Tensor]
"""Of a batch: the sum over its sequences, (), to be differentiated, and without a gradient each sequence's, (B,) nats.
A sequence whose loss is NaN does not raise: on one of several ranks the others would wait for it."""


class Objective(Protocol):
    """What a run trains for. Any object with these methods will do; the three below are those of the paper."""

    def noised(self, x0: Tensor, t: Tensor, seed: int, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x_t (B, L) int64 of x0 at times t (B,), and the times that it is noised to, a function of the last three."""

    def losses(
        self,
        net: Any,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        *,
        lengths: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Losses:
        """The loss to train by."""

    def bound(
        self, net: Any, x0: Tensor, *, num_times: int, generator: Generator, lengths: Tensor | None = None
    ) -> Tensor:
        """What is reported of held-out text, (B,) nats a sequence, with so many random times for each."""

    def sample(
        self, net: Any, shape: tuple[int, int], *, steps: int, generator: Generator, device: torch.device | str
    ) -> Tensor:
        """Sequences of the model, (B, L) int64."""


@dataclass(frozen=True)
class ScoreEntropy:
    """The paper's. Head and loss are one operation, which never holds a batch's log-scores.

    Attributes:
        graph: the forward process.
        noise: its schedule.
    """

    graph: Any
    noise: Any

    def noised(self, x0: Tensor, t: Tensor, seed: int, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x_t ~ p(. | x0) at the times given."""
        return randomness.noised(self.graph, x0, self.noise(t)[0], seed, step, samples), t

    def positions(self, xt: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(M,) int64: the places in xt.flatten() that the loss is a sum over: they can move, and are no padding."""
        live = RatesInto.of(self.graph, xt).can_move(xt, self.graph.num_states)
        if lengths is not None:
            live = live & (inside(lengths, xt.shape[1]) > 0)
        return live.flatten().nonzero()[:, 0]

    def losses(
        self,
        net: Any,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        *,
        lengths: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Losses:
        """The integrand of eq. 10 at times t; of a network with `hidden` and `head`, as one operation with its head.

        `positions`, as that method gives them, spare a GPU the question how many they are.
        """
        sigma, dsigma = self.noise(t)
        if not has_head(net):
            loss = denoising_loss(net, self.graph, self.noise, x0, t, xt=xt, refuse_nan=False)
            return loss.sum(), loss.detach()
        hidden = net.hidden(xt, sigma, documents=_documents(lengths, x0), dropout_seeds=dropout_seeds)
        given: dict[str, Any] = {"weight": _inside(lengths, x0), "positions": positions, "refuse_nan": False}
        if hasattr(net, "posterior_head"):  # the same number of a normalised network, by three products or a kernel
            return fused_cross_entropy_loss(hidden, net.posterior_head(), self.graph, xt, x0, sigma, dsigma, **given)
        head = net.linear_head(xt, sigma) if hasattr(net, "linear_head") else None
        if head is None:
            head = net.head
        return fused_denoising_loss(hidden, head, self.graph, xt, x0, sigma, dsigma, **given)

    def loss(self, net: Any, x0: Tensor, t: Tensor, *, generator: Generator, lengths: Tensor | None = None) -> Tensor:
        """The integrand of eq. 10 at times t (B,), with noise of the generator's; refuses NaN. For measuring."""
        score, weight = _within(net, lengths, x0), _inside(lengths, x0)
        return denoising_loss(score, self.graph, self.noise, x0, t, weight=weight, generator=generator)

    def bound(
        self, net: Any, x0: Tensor, *, num_times: int, generator: Generator, lengths: Tensor | None = None
    ) -> Tensor:
        """Eq. 9, with prior and reconstruction, by `num_times` draws of each sequence's time."""
        score, weight = _within(net, lengths, x0), _inside(lengths, x0)
        return likelihood_bound(
            score, self.graph, self.noise, x0, num_times=num_times, weight=weight, generator=generator
        ).value

    def sample(
        self, net: Any, shape: tuple[int, int], *, steps: int, generator: Generator, device: torch.device | str
    ) -> Tensor:
        """By Tweedie tau-leaping (eq. 19)."""
        return sample(net, self.graph, self.noise, shape=shape, steps=steps, generator=generator, device=device)


@dataclass(frozen=True)
class D3PM:
    """Austin et al. 2021, in T steps of the same process.

    Attributes:
        graph: the forward process.
        noise: its schedule, looked at at t = 1/T, 2/T, ..., 1.
        num_steps: T.
    """

    graph: Any
    noise: Any
    num_steps: int = 1000

    def noised(self, x0: Tensor, t: Tensor, seed: int, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x_i ~ p(. | x0) at the first of the T steps that is not before t."""
        t = self._number(t) / self.num_steps
        return randomness.noised(self.graph, x0, self.noise(t)[0], seed, step, samples), t

    def losses(
        self,
        net: Any,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        *,
        lengths: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Losses:
        """T times the divergence of the step at t, a multiple of 1 / T."""
        model = _within(net, lengths, x0, dropout_seeds=dropout_seeds)
        loss = d3pm_loss(
            model,
            self.graph,
            self.noise,
            x0,
            self._number(t),
            num_steps=self.num_steps,
            xt=xt,
            weight=_inside(lengths, x0),
            refuse_nan=False,
        )
        return loss.sum(), loss.detach()

    def bound(
        self, net: Any, x0: Tensor, *, num_times: int, generator: Generator, lengths: Tensor | None = None
    ) -> Tensor:
        """The bound of T steps, with the prior's term and the first step's."""
        return d3pm_bound(
            _within(net, lengths, x0),
            self.graph,
            self.noise,
            x0,
            num_steps=self.num_steps,
            num_times=num_times,
            weight=_inside(lengths, x0),
            generator=generator,
        ).value

    def sample(
        self, net: Any, shape: tuple[int, int], *, steps: int, generator: Generator, device: torch.device | str
    ) -> Tensor:
        """By D3PM's ancestral steps."""
        return sample(
            from_logits(net, self.graph),
            self.graph,
            self.noise,
            shape=shape,
            steps=steps,
            method=Ancestral(),
            generator=generator,
            device=device,
        )

    def _number(self, t: Tensor) -> Tensor:
        """The step i in 1..T at or behind t; a multiple of 1/T in float32 is its own."""
        return (t.double() * self.num_steps - 1e-4).ceil().clamp(1, self.num_steps).long()


@dataclass(frozen=True)
class Autoregressive:
    """Left to right. The likelihood is exact: nothing is noised, and times do not count.

    Attributes:
        start: the state that a sequence begins behind.
    """

    start: int

    def only_tokens(self, num_states: int, length: int, device: torch.device | str = "cpu") -> Control:
        """What keeps the state `start`, which is no token, out of sequences of this length."""
        tokens = torch.arange(num_states, device=device) != self.start
        return allowed_tokens(tokens.expand(length, -1))

    def noised(self, x0: Tensor, t: Tensor, seed: int, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The clean sequence."""
        return x0, t

    def losses(
        self,
        net: Any,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        *,
        lengths: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Losses:
        """-log p(x0)."""
        model = partial(net, dropout_seeds=dropout_seeds) if has_head(net) else net
        loss = autoregressive_loss(model, x0, start=self.start, weight=_inside(lengths, x0), refuse_nan=False)
        return loss.sum(), loss.detach()

    def bound(
        self, net: Any, x0: Tensor, *, num_times: int, generator: Generator, lengths: Tensor | None = None
    ) -> Tensor:
        """-log p(x0) itself."""
        return autoregressive_loss(net, x0, start=self.start, weight=_inside(lengths, x0))

    def sample(
        self, net: Any, shape: tuple[int, int], *, steps: int, generator: Generator, device: torch.device | str
    ) -> Tensor:
        """Token by token; the number of steps does not count."""
        return sample_left_to_right(
            net,
            shape=shape,
            start=self.start,
            num_states=net.num_states,
            controls=[self.only_tokens(net.num_states, shape[1], device)],
            generator=generator,
            device=device,
        )


def _documents(lengths: Tensor | None, x: Tensor) -> Documents | None:
    return None if lengths is None else Documents.padded(lengths, x.shape[1])


def _inside(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    return None if lengths is None else inside(lengths, x.shape[1])


def has_head(net: Any) -> bool:
    """Whether a network's `hidden` and `head` can be called apart, and take documents and dropout's seeds.

    Those of sedd_nets do. Any other is a score model: `net(x, sigma)`, and nothing else.
    """
    return hasattr(net, "hidden") and hasattr(net, "head")


def _within(net: Any, lengths: Tensor | None, x: Tensor, **given: Any) -> Any:
    """The network, attending within documents; as it is where there is nothing to tell it."""
    if not has_head(net):
        return net
    given |= {"documents": _documents(lengths, x)}
    given = {name: value for name, value in given.items() if value is not None}
    return partial(net, **given) if given else net
