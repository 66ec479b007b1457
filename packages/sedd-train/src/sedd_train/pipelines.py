"""Text in, text out: a model that writes on, fills blanks, and says how likely a text is.

write = pipeline("runs/tiny")
write("Fellow citizens", num=2)                     two texts that begin so
write("The state of the ____ is ________.")         the blanks filled, an underscore for each token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from sedd_nets.files import HubOptions
from sedd_samplers import Method, State, Tweedie, clamped, trajectory
from sedd_samplers.controls import Control, controlled, temperature, top_k, top_p
from torch import Tensor

from sedd_train import prompts
from sedd_train.pretrained import Model, load
from sedd_train.prompts import Prompt

__all__ = ["pipeline", "Pipeline", "controls_of"]


@dataclass(frozen=True)
class Pipeline:
    """A model and where it runs.

    Attributes:
        model: network, graph, schedule and tokenizer.
        device: of the network.
    """

    model: Model
    device: torch.device | str

    def __call__(self, text: str = "", *, length: int | None = None, **drawing: Any) -> list[str]:
        """Texts of the model: those that begin with this one, or this one with its blanks filled.

        Args:
            text: a beginning, or with underscores, one for each token that is wanted in their place, all of the text.
            length: tokens of the whole, of a text without blanks; as many as the model takes unless given.
            drawing: those of `states`, `num` among them.

        Raises:
            ValueError: as `states`; or the text is too long for the model.
        """
        longest = self.model.net.length
        if "_" in text:
            if length is not None:
                raise ValueError("a text with blanks is as long as it is: leave out length")
            prompt = prompts.with_blanks(self.model.tokenizer, text, longest)
        else:
            length = longest if length is None else length
            if not 1 <= length <= longest:
                raise ValueError(f"length must be 1 to {longest}, what this model takes; got {length}")
            prompt = prompts.around(self.model.tokenizer, length, prefix=text)
        x = torch.empty(0)
        with torch.inference_mode():
            for state in self.states(prompt, **drawing):
                x = state.x
        return self.texts(x)

    def states(
        self,
        prompt: Prompt,
        *,
        num: int = 1,
        seed: int = 0,
        steps: int = 128,
        method: Method | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[State]:
        """The states that samples go through, of which the last holds them.

        Args:
            prompt: which positions hold which tokens.
            num: how many samples.
            seed: of the first; the next one has the next. The same seed gives the same sample, whatever `num`.
            steps: reverse steps; more is better and slower.
            method: the reverse step; `Tweedie()` unless given.
            temperature: of each token's law; below 1 for likelier tokens.
            top_k: draw from so many of the likeliest tokens; from all unless given.
            top_p: draw from the likeliest tokens of that mass.

        Raises:
            ValueError: a number that makes no sense, or one of the last three for a model that does not mask.
        """
        for name, value in {"num": num, "steps": steps}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        net, graph, noise, _ = self.model
        controls = controls_of(temperature, top_k, top_p)
        if controls and graph.mask_id is None:
            raise ValueError(
                "temperature, top-k and top-p need a model that masks: they act on p(x0 | x_t), which cannot be told "
                "from this one's score at high noise"
            )
        x, given = (part.to(self.device).expand(num, -1) for part in prompt)
        return trajectory(
            controlled(net, graph, *controls) if controls else net,
            graph,
            noise,
            x=x,
            given=given,
            steps=steps,
            method=method or Tweedie(),
            seeds=range(seed, seed + num),
            conditioning=clamped,
        )

    def texts(self, x: Tensor) -> list[str]:
        """The texts of samples (B, L)."""
        return [str(self.model.tokenizer.decode(tokens)) for tokens in x.tolist()]


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
