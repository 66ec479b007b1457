"""What writes text in the tables of samples, one interface for all: fill the free positions of token sequences.

Score models fill them in many steps, autoregressive ones from left to right. With nothing given this is writing from
scratch. A sequence's sample depends on its own seed and on nothing else in its batch.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from judge import load_causal
from sedd_samplers import Ancestral, Euler, FirstHitting, Method, ScoreModel, Tweedie, clamped, infill
from sedd_samplers.adapters import from_logits
from sedd_samplers.autoregressive import continue_left_to_right
from sedd_samplers.controls import Control, controlled, temperature, top_p
from sedd_train import load_trained
from sedd_train.objectives import D3PM, Autoregressive
from torch import Tensor

__all__ = [
    *("METHODS", "Checkpoint", "Filler", "add_model_options", "named", "read_checkpoint"),
    *("read_causal", "load_with_start", "weights_fingerprint"),
]

Filler = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""(x (B, L), given (B, L) bool, B seeds) -> (B, L), equal to x where given."""

METHODS: dict[str, Callable[[], Method]] = {
    "tweedie": Tweedie,
    "euler": Euler,
    "ancestral": Ancestral,
    "first-hitting": FirstHitting,
}


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, on the CPU until it is asked.

    Attributes:
        name: for the tables.
        tokenizer: the one it was trained with.
        length: the longest sequence it takes.
        masks: whether its tokens come to light one by one, and `first-hitting` is open to it.
        autoregressive: whether it writes from left to right; then there are no methods and steps.
        fingerprint: of its weights.
    """

    name: str
    tokenizer: Any
    length: int
    masks: bool
    autoregressive: bool
    fingerprint: str
    _net: Any
    _fill: Callable[..., Tensor]

    def filler(self, device: str, method: str = "", steps: int = 1, nucleus: float = 1.0, heat: float = 1.0) -> Filler:
        """What fills free positions with this model.

        Args:
            device: where the network computes.
            method: one of `METHODS`, for a score model.
            steps: from t = 1 to t_min, for a score model; the final denoise comes on top.
            nucleus: the mass of the likeliest tokens that each is drawn from, for an autoregressive model.
            heat: the temperature of each token's law, p(x0 | x_t) or that of the next token.

        Raises:
            ValueError: a temperature for a model whose tokens are noised: p(x0 | x_t) cannot be told from its score.
        """
        if heat != 1 and not (self.masks or self.autoregressive):
            raise ValueError(
                f"temperature {heat} needs a model that masks or writes from left to right: {self.name} is neither"
            )
        controls = [] if heat == 1 else [temperature(heat)]
        if self.autoregressive:
            how: dict[str, Any] = {"controls": controls if nucleus == 1 else [*controls, top_p(nucleus)]}
        else:
            how = {"method": METHODS[method](), "steps": steps, "controls": controls}

        def fill(x: Tensor, given: Tensor, seeds: Sequence[int]) -> Tensor:
            self._net.to(device)
            return self._fill(x=x.to(device), given=given.to(device), seeds=seeds, **how).cpu()

        return fill

    def rest(self) -> None:
        """Take the network off the device."""
        self._net.to("cpu")


def add_model_options(parser: argparse.ArgumentParser, causal: str = "") -> None:
    """The options --checkpoint and --causal; `causal` is what else there is to say of the latter."""
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], metavar="[NAME=]CHECKPOINT",
        help="runs, folders or published names such as louaaron/sedd-small, under a name for the table if so wished",
    )  # fmt: skip
    parser.add_argument(
        "--causal", nargs="*", default=[], metavar="[NAME=]MODEL",
        help=f"causal language models of transformers, by name or folder, such as gpt2{causal}",
    )  # fmt: skip


def named(source: str) -> tuple[str, str]:
    """The name and the source in NAME=SOURCE; a source alone is its own name."""
    name, _, rest = source.partition("=")
    return (name, rest) if rest else (source, source)


def read_checkpoint(name: str, source: str) -> Checkpoint:
    """A checkpoint of this project, or a published SEDD, RADD or MDLM one, by folder or name on the hub.

    Raises:
        ValueError, OSError: as `sedd_train.load_trained`.
    """
    net, objective, tokenizer = load_trained(source)
    common = (name, tokenizer, net.length)
    if isinstance(objective, Autoregressive):
        start, only_tokens = objective.start, objective.only_tokens

        def write(x: Tensor, given: Tensor, seeds: Sequence[int], controls: Sequence[Control]) -> Tensor:
            states = net.num_states
            controls = [only_tokens(states, x.shape[1], x.device), *controls]
            return continue_left_to_right(
                net, x=x, given=given, start=start, num_states=states, seeds=seeds, controls=controls
            )

        return Checkpoint(
            *common, masks=False, autoregressive=True, fingerprint=weights_fingerprint(net), _net=net, _fill=write
        )
    graph, noise = objective.graph, objective.noise

    def fill(
        x: Tensor, given: Tensor, seeds: Sequence[int], method: Method, steps: int, controls: Sequence[Control]
    ) -> Tensor:
        if isinstance(objective, D3PM):
            score: ScoreModel = from_logits(net, graph, controls=controls)
        else:
            score = controlled(net, graph, *controls) if controls else net
        return infill(
            score, graph, noise, x=x, given=given, seeds=seeds, method=method, steps=steps, conditioning=clamped
        )

    masks = graph.mask_id is not None
    return Checkpoint(
        *common, masks=masks, autoregressive=False, fingerprint=weights_fingerprint(net), _net=net, _fill=fill
    )


def load_with_start(source: str) -> tuple[Any, Any, int, int]:
    """A causal language model of transformers, its tokenizer, the token that texts begin with, and the longest one.

    Raises:
        ValueError: the folder holds no such model, or its tokenizer has no end of text.
        ConnectionError: the hub cannot be reached.
    """
    model, tokenizer = load_causal(source)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: the tokenizer has no end-of-text token, which texts begin and end with")
    return model, tokenizer, int(tokenizer.eos_token_id), int(model.config.max_position_embeddings)


def read_causal(name: str, source: str) -> Checkpoint:
    """A causal language model of transformers, such as GPT-2; its end-of-text token begins every text.

    Raises:
        ValueError: the folder holds no such model, or its tokenizer has no end of text.
        ConnectionError: the hub cannot be reached.
    """
    model, tokenizer, start, length = load_with_start(source)

    def logits(x: Tensor) -> Tensor:
        answer: Tensor = model(input_ids=x).logits
        return answer

    def write(x: Tensor, given: Tensor, seeds: Sequence[int], controls: Sequence[Control]) -> Tensor:
        states = model.config.vocab_size
        return continue_left_to_right(
            logits, x=x, given=given, start=start, num_states=states, seeds=seeds, controls=controls
        )

    return Checkpoint(
        *(name, tokenizer, length),
        masks=False,
        autoregressive=True,
        fingerprint=weights_fingerprint(model),
        _net=model,
        _fill=write,
    )


def weights_fingerprint(net: torch.nn.Module) -> str:
    """Of the weights' names and bytes."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
