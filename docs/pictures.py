"""Draw the documentation's pictures into docs/img, and bring those of the results there, before the site is built."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from sedd_graphs import Absorbing, Cosine, Geometric, LogLinear, Uniform
from sedd_graphs.plotting import draw_schedules, draw_sentence

FOLDER = Path(__file__).parent / "img"
RESULTS = Path(__file__).parents[1] / "integration" / "results"
WORDS = "the state of the union is strong"  # short: a phone shows it, too


def main() -> None:
    """Write the pictures of the page on the idea, and copy those of the page of numbers."""
    FOLDER.mkdir(exist_ok=True)
    words = sorted(set(WORDS.split()))
    x0 = torch.tensor([words.index(word) for word in WORDS.split()])
    generator = torch.Generator().manual_seed(35)
    absorbing = draw_sentence(Absorbing(len(words)), LogLinear(), x0, [*words, "[MASK]"], generator=generator)
    uniform = draw_sentence(Uniform(len(words)), Geometric(1e-3, 3.0), x0, words, generator=generator)
    schedules = draw_schedules({"log-linear": LogLinear(), "cosine": Cosine(), "geometric": Geometric()})
    for name, figure in {"absorbing": absorbing, "uniform": uniform, "schedules": schedules}.items():
        figure.savefig(FOLDER / f"{name}.svg")
    for path in RESULTS.glob("*.png"):
        shutil.copy(path, FOLDER)


if __name__ == "__main__":
    main()
