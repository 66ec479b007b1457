"""How far the bound of one sequence is off on ordered states, by where its times lie: the exact score, one position.

    python benchmarks/ordinal_bound.py [--states 256] [--sequences 400] [--times 16]

For two lower ends of the integral, the default and the one at which one token in a thousand has moved, and for even
times and times of which half lie evenly in the noise: how far the bound lies above -log p(x0) in the mean, how far a
sequence's deviates from that, what its own standard error says in the median, and the reconstruction term; all in nats.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from sedd_graphs import LogLinear, Ordinal
from sedd_objectives import likelihood_bound
from torch import Tensor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {"states": 256, "sequences": 400, "times": 16}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
args = parser.parse_args()
warnings.filterwarnings("ignore", category=UserWarning)  # of the very things that are measured here

graph, noise = Ordinal(args.states), LogLinear()
random = torch.Generator().manual_seed(0)
p = torch.rand(args.states, generator=random, dtype=torch.float64) ** 3
p /= p.sum()


def score(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact one, in float32."""
    log_q = graph.propagate(p.expand(len(sigma), -1), sigma.double()).log()[:, None]
    return (log_q - log_q.gather(-1, x[..., None])).float()


x0 = torch.multinomial(p, args.sequences, replacement=True, generator=random)[:, None]
truth = -p[x0[:, 0]].log()
early = float(noise.inverse(torch.tensor(1e-3 / graph.max_rate(), dtype=torch.float64)))
print(f"N = {args.states}, {args.times} times, {args.sequences} sequences, entropy {-(p * p.log()).sum():.2f} nats\n")
print("t_min      share   above the truth   deviation   own standard error   reconstruction")
for t_min in (1e-3, early):
    for share in (0.0, 0.5):
        bound = likelihood_bound(
            *(score, graph, noise, x0), num_times=args.times, t_min=t_min, small_noise_share=share, generator=random
        )
        over = bound.value - truth
        mean = f"{over.mean():.2f} +- {over.std() / len(over) ** 0.5:.2f}"
        print(f"{t_min:.1e}    {share:.1f}   {mean:>15} {over.std():11.2f} {bound.standard_error.median():20.2f} "
              f"{bound.reconstruction.mean():16.3f}")  # fmt: skip
