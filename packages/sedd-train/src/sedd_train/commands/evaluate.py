"""Bound the negative log-likelihood of held-out text under a trained score model (equation 9), with its standard error.

sedd evaluate --checkpoint runs/tiny/export
sedd evaluate --checkpoint louaaron/sedd-small --corpus my-texts/ --blocks 100 --num-times 1000
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from sedd_train import corpora, evaluate, load, loggers, plotting
from sedd_train.evaluation import by_noise_level
from sedd_train.tokens import tokenise, unigram_entropy

__all__ = ["parser", "main"]


def parser(prog: str = "sedd evaluate") -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--checkpoint",
        required=True,
        help="a run, a folder with config.json and model.safetensors, or a published name such as louaaron/sedd-small",
    )
    made.add_argument(
        "--corpus",
        default="sotu",
        help="any corpus that training takes, and lambada (default: %(default)s)",
    )
    made.add_argument(
        "--split",
        choices=["train", "valid", "test"],
        default="valid",
        help="which part of the corpus; test is valid where it has no such part (default: %(default)s)",
    )
    made.add_argument("--length", type=int, help="tokens a block (default: what the model was trained with)")
    made.add_argument("--blocks", type=int, help="how many blocks, from the start of the text (default: all)")
    made.add_argument("--num-times", type=int, default=128, help="noise levels a block (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=8, help="blocks at once (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the times and the noise (default: %(default)s)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    made.add_argument("--levels", metavar="FILE", help="draw where in time the loss comes from into this .png or .svg")
    made.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd evaluate") -> None:
    """Measure, and print what was found."""
    options = parser(prog)
    args = options.parse_args(argv)

    try:
        net, graph, noise, tokenizer = load(args.checkpoint)
        length = args.length or net.length
        if not 1 <= length <= net.length:
            raise ValueError(f"--length {length}: the model takes 1 to {net.length} tokens")
        source = corpora.load_texts(args.corpus)
        text = tokenise({"train": source.train, "valid": source.valid, "test": source.test}[args.split](), tokenizer)
        have = text.blocks(length)
        if have == 0:
            raise ValueError(
                f"the {args.split} part of {args.corpus} has {len(text)} tokens, less than one block of {length}"
            )
        if args.blocks is not None and not 1 <= args.blocks <= have:
            raise ValueError(
                f"--blocks {args.blocks}: the {args.split} part of {args.corpus} has {have} blocks of {length}"
            )
    except (ValueError, OSError) as error:
        options.exit(2, f"{options.prog}: error: {error}\n")

    blocks = text.block(range(args.blocks or have), length)
    bound = evaluate(
        net.to(args.device),
        graph,
        noise,
        blocks,
        characters_per_token=text.characters_per_token,
        num_times=args.num_times,
        seed=args.seed,
        chunk=args.batch_size,
        progress=True,
    )
    if args.levels:
        levels = by_noise_level(net, graph, noise, blocks, seed=args.seed, chunk=args.batch_size)
        line = {name: value.tolist() for name, value in vars(levels).items()}
        plotting.noise_levels({args.checkpoint: line}, Path(args.levels))
    unigram = unigram_entropy(text.flat) / math.log(2) / text.characters_per_token
    if args.json:
        result = {
            "nats_per_token": bound.nats_per_token,
            "standard_error": bound.standard_error,
            "perplexity": bound.perplexity,
            "bits_per_character": bound.bits_per_character,
            "unigram_bits_per_character": unigram,
            "blocks": len(blocks),
            "length": length,
            "num_times": args.num_times,
        }
        print(loggers.to_json(result))
    else:
        print(
            f"{len(blocks)} blocks of {length} tokens of {args.corpus}, {args.num_times} noise levels each\n"
            f"bound            {bound.nats_per_token:.4f} ± {bound.standard_error:.4f} nats a token (standard error)\n"
            f"perplexity       {bound.perplexity:.2f}\n"
            f"bits a character {bound.bits_per_character:.4f}  (unigram entropy of the text: {unigram:.4f})"
        )
