"""Draw the documentation's pictures into docs/img; `nox -s docs` runs this first."""

from __future__ import annotations

from pathlib import Path

import torch
from sedd_graphs import Absorbing, Cosine, Geometric, LogLinear, Uniform
from sedd_graphs.plotting import draw_schedules, draw_sentence

FOLDER = Path(__file__).parent / "img"
WORDS = "the state of the union is strong because the people of the states are free"


def main() -> None:
    """Write the pictures of the page on the idea."""
    FOLDER.mkdir(exist_ok=True)
    words = sorted(set(WORDS.split()))
    x0 = torch.tensor([words.index(word) for word in WORDS.split()])
    generator = torch.Generator().manual_seed(1)
    absorbing = draw_sentence(Absorbing(len(words)), LogLinear(), x0, [*words, "[MASK]"], generator=generator)
    uniform = draw_sentence(Uniform(len(words)), Geometric(1e-3, 3.0), x0, words, generator=generator)
    schedules = draw_schedules({"log-linear": LogLinear(), "cosine": Cosine(), "geometric": Geometric()})
    for name, figure in {"absorbing": absorbing, "uniform": uniform, "schedules": schedules}.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
