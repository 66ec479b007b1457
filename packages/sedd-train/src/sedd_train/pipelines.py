"""Text in, text out: a model that writes on, fills blanks, and says how likely a text is.

write = pipeline("runs/tiny")
write("Fellow citizens", num=2)                     two texts that begin so
write("The state of the ____ is ________.")         the blanks filled, an underscore for each token
write(label="comedy", guidance=2.0)                 of a model that was trained on labels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from sedd_nets import bind
from sedd_nets.files import HubOptions
from sedd_samplers import Method, ScoreModel, State, Tweedie, clamped, draw_lengths, trajectory
from sedd_samplers.controls import Control, controlled, temperature, top_k, top_p
from sedd_samplers.guidance import classifier_free
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sedd_train import labels, prompts
from sedd_train.pretrained import Model, load

__all__ = ["pipeline", "Pipeline", "Canvas", "controls_of"]


class Canvas(NamedTuple):
    """What samples begin from."""

    x: Tensor
    """(B, L) int64, the given tokens; 0 at positions that are free."""
    given: Tensor
    """(B, L) bool."""
    lengths: list[int]
    """Of each text; what is behind it means nothing, and the network does not see it."""


@dataclass(frozen=True)
class Pipeline:
    """A model and where it runs.

    Attributes:
        model: network, graph, schedule and tokenizer.
        device: of the network.
    """

    model: Model
    device: torch.device | str

    def __call__(
        self,
        text: str = "",
        *,
        num: int = 1,
        seed: int = 0,
        length: int | None = None,
        label: str | None = None,
        **drawing: Any,
    ) -> list[str]:
        """Texts of the model: those that begin with this one, or this one with its blanks filled.

        Args:
            text: a beginning, or with underscores, one for each token that is wanted in their place, all of the text.
            num: how many.
            seed: of the first; the next one has the next. The same seed gives the same text, whatever `num`.
            length: tokens of the whole, of a text without blanks; see `canvas`.
            label: that the texts are of, of a model that was trained on labels; see `states`.
            drawing: those of `states`.

        Raises:
            ValueError: as `states`; or the text is too long for the model.
        """
        prompt = {"text": text} if "_" in text else {"prefix": text}
        canvas, x = self.canvas(num, seed, length=length, label=label, **prompt), torch.empty(0)
        with torch.inference_mode():
            for state in self.states(canvas, seed=seed, label=label, **drawing):
                x = state.x
        return self.texts(x, canvas.lengths)

    def canvas(
        self,
        num: int = 1,
        seed: int = 0,
        *,
        text: str | None = None,
        prefix: str = "",
        suffix: str = "",
        length: int | None = None,
        label: str | None = None,
    ) -> Canvas:
        """What `num` samples of the seeds from `seed` on begin from.

        Args:
            num: how many.
            seed: of the first.
            text: all of it, with blanks; instead of the other three.
            prefix: what each begins with.
            suffix: what each ends with.
            length: tokens of each. Unless given, as many as the model takes, or where it was trained on rows of many
                lengths, drawn from theirs, or those of the label.
            label: that the texts are of.

        Raises:
            ValueError: a number that makes no sense, or a prompt that is too long or leaves nothing to fill.
        """
        net, tokenizer, seeds = self.model.net, self.model.tokenizer, range(seed, seed + num)
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        if length is not None and not 1 <= length <= net.length:
            raise ValueError(f"length must be 1 to {net.length}, what this model takes; got {length}")
        if text:
            if length is not None:
                raise ValueError("a text with blanks is as long as it is: leave out length")
            own = [prompts.with_blanks(tokenizer, text, net.length)] * num
        else:
            ends, law = {"prefix": prefix, "suffix": suffix}, labels.law_of_lengths(net, label)
            prompt = prompts.around(tokenizer, length or net.length, **ends)
            if law is None or length is not None:
                own = [prompt] * num
            else:
                drawn = _lengths(law, seeds, int(prompt.given.sum()))
                own = [prompts.around(tokenizer, n, **ends) for n in drawn]
        x = pad_sequence([part.x for part in own], batch_first=True)
        given = pad_sequence([part.given for part in own], batch_first=True, padding_value=True)
        return Canvas(x.to(self.device), given.to(self.device), [len(part.x) for part in own])

    def states(
        self,
        canvas: Canvas,
        *,
        seed: int = 0,
        label: str | None = None,
        guidance: float = 1.0,
        steps: int = 128,
        method: Method | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[State]:
        """The states that samples go through, of which the last holds them.

        Args:
            canvas: which positions hold which tokens.
            seed: of the first sample; the next one has the next.
            label: that the samples are of; the model's whole law unless given.
            guidance: the weight of the label, see `sedd_samplers.guidance`: 1 for the law of its texts, more for texts
                that are more clearly of it than the text that the model was trained on.
            steps: reverse steps; more is better and slower.
            method: the reverse step; `Tweedie()` unless given.
            temperature: of each token's law; below 1 for likelier tokens.
            top_k: draw from so many of the likeliest tokens; from all unless given.
            top_p: draw from the likeliest tokens of that mass.

        Raises:
            ValueError: a number that makes no sense, a label that the model does not know, guidance without one, or
                one of the last three for a model that does not mask.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        _, graph, noise, _ = self.model
        controls = controls_of(temperature, top_k, top_p)
        if controls and graph.mask_id is None:
            raise ValueError(
                "temperature, top-k and top-p need a model that masks: they act on p(x0 | x_t), which cannot be told "
                "from this one's score at high noise"
            )
        if guidance != 1 and label is None:
            raise ValueError(f"guidance = {guidance} is the weight of a label: give one")
        x, given, lengths = canvas
        score = self._score(lengths, x.shape[1], label, guidance)
        # What is guided does not sum to 1 of itself, and masks would go at another time than the schedule's.
        whole = guidance in (0, 1) or graph.mask_id is None
        return trajectory(
            score if whole and not controls else controlled(score, graph, *controls),
            graph,
            noise,
            x=x,
            given=given,
            steps=steps,
            method=method or Tweedie(),
            seeds=range(seed, seed + len(x)),
            conditioning=clamped,
        )

    def _score(self, lengths: Sequence[int], longest: int, label: str | None, guidance: float) -> ScoreModel:
        """The score of sequences of these lengths, under a label where one is given."""
        net = self.model.net
        sizes = None if min(lengths) == longest else lengths
        none = torch.full((len(lengths),), labels.NONE) if labels.names_of(net) else None
        plain: ScoreModel = net if sizes is None and none is None else bind(net, lengths=sizes, condition=none)
        if label is None:
            return plain
        told = torch.full((len(lengths),), labels.number_of(net, label))
        score: ScoreModel = bind(net, lengths=sizes, condition=told)
        return score if guidance == 1 else classifier_free(score, plain, guidance, num_states=net.num_states)

    def texts(self, x: Tensor, lengths: Sequence[int]) -> list[str]:
        """The texts of samples (B, L), each of its length."""
        rows = zip(x.tolist(), lengths, strict=True)
        return [str(self.model.tokenizer.decode(tokens[:length])) for tokens, length in rows]


def _lengths(law: Sequence[float], seeds: Sequence[int], shortest: int) -> list[int]:
    """The length of each seed's text by the law of those that a model was trained on, where `shortest` are given."""
    possible = torch.tensor(law, dtype=torch.float64)
    possible[:shortest] = 0
    if not possible.any():
        raise ValueError(
            f"the prompt has {shortest} tokens, and no text that this model was trained on is longer: shorten it, or "
            "say a length"
        )
    lengths: list[int] = draw_lengths(possible, seeds).tolist()
    return lengths


def pipeline(
    folder_or_name: str | Path | Model, *, device: torch.device | str | None = None, **hub: Unpack[HubOptions]
) -> Pipeline:
    """A model of texts from a checkpoint.

    Args:
        folder_or_name: as for `sedd_train.load`; or what that gave.
        device: where the network runs; a GPU where there is one.
        hub: see `sedd_nets.files.HubOptions`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `sedd_train.load`.
    """
    model = folder_or_name if isinstance(folder_or_name, Model) else load(folder_or_name, **hub)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.net.to(where).eval()
    return Pipeline(model, where)


def controls_of(heat: float, most: int | None, mass: float) -> Sequence[Control]:
    """The controls asked for, in their order: of temperature, top-k and top-p, of which 1, None and 1 ask for none."""
    controls = [temperature(heat)] if heat != 1 else []
    controls += [] if most is None else [top_k(most)]
    return controls + ([top_p(mass)] if mass != 1 else [])
