"""Generation as a frontier: how likely a judge finds samples, and their entropy, over steps and temperatures.

python integration/generation.py --checkpoint runs/tiny/export --judge smollm2 --corpus sotu --steps 4 16 64
python integration/generation.py --checkpoint runs/tiny/export --judge smollm2 --steps 16 64 --temperatures .7 .8 .9 1
python integration/generation.py --checkpoint medium=louaaron/sedd-medium small=louaaron/sedd-small --causal gpt2

The perplexity of each sample under the judge, averaged over the samples, as the paper reports it; always beside the
samples' unigram entropy, because a model that repeats itself is likely, too: a lower temperature buys the one with the
other, and systems compare where their entropies are equal. Where judge and model share a tokenizer the sampled tokens
are judged as they stand, else the decoded text is tokenised anew: perplexities a token of different tokenizers do not
compare, bits a character or a byte do. Draws are exact (`sedd_samplers.draw_categorical`, float64): the usual
float32 draws lower the perplexity by a lower temperature, not by better text. (Where positions are masked on the
log-linear schedule and the model's posterior is normalised, Euler's step and Tweedie's are the same.)

Sample n of every row has the seed `--seed` + n, so that rows compare in pairs. The results are kept in OUTPUT.json as
they come; the same command again continues, and a larger --num or more rows add to it. From it are made OUTPUT.md, the
table; OUTPUT.png, the curves by steps; with several temperatures OUTPUT-frontier.png, perplexity against entropy;
OUTPUT-samples.txt, the first texts of each row.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judge import Judge, add_judge_option, load_judge, only_characters, shares_tokens, to_text
from sedd_train import corpora, loading
from sedd_train.tables import Results, fingerprint, markdown, mean_and_error, panels, save_picture, with_error
from sedd_train.tokens import tokenise
from systems import METHODS, Checkpoint, add_model_options, named, read_causal, read_checkpoint
from torch import Tensor
from tqdm import tqdm

__all__ = ["main"]

PUBLISHED = {  # SEDD medium, gpt2-large: mean perplexity with float64 and with float32 draws (Ou et al. 2024)
    32: (159, 125), 64: (113, 85), 128: (94, 62), 256: (87, 51), 512: (84, 41), 1024: (86, 34), 2048: (82, 27),
}  # fmt: skip
EXACT = "first-hitting"
LEFT_TO_RIGHT = "left to right"
HELD_OUT = "held-out text"


@dataclass(frozen=True)
class Row:
    """One row of the table: texts of one kind, the first n of them the same however many are drawn.

    Attributes:
        checkpoint: whose tokens they are.
        method: how they are drawn.
        steps: in which one text is written; None for text that is not.
        heat: the temperature of each token's law.
        draw: the numbers of texts -> their tokens (n, L).
        most: how many there can be.
        source: fingerprint of the text that they are from, where they are not drawn.
    """

    checkpoint: Checkpoint
    method: str
    steps: int | None
    draw: Callable[[range], Tensor]
    heat: float = 1.0
    most: float = math.inf
    source: str = ""

    @property
    def key(self) -> str:
        """What the row is called in the results."""
        steps = [str(self.steps)] if self.steps else []
        heat = [f"temperature {self.heat:g}"] if self.heat != 1 else []
        return " | ".join([self.checkpoint.name, self.method, *steps, *heat])


def main(argv: Sequence[str] | None = None) -> Results:
    """Fill the table and write it; `argv` in place of the command line's."""
    args = arguments(argv)
    results = Results(args.output.with_name(args.output.name + ".json"))
    checkpoints = [read_checkpoint(*named(source)) for source in args.checkpoint]
    checkpoints += [read_causal(*named(source)) for source in args.causal]
    names = [checkpoint.name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError(f"every checkpoint needs a name of its own, got {', '.join(names)}: write NAME=CHECKPOINT")
    rows = [row for checkpoint in checkpoints for row in rows_of(checkpoint, args)]
    judge = load_judge(args.judge, args.device)

    results.agree("judge", judge.name)
    results.agree("seed", args.seed)
    for checkpoint in checkpoints:
        shared = shares_tokens(checkpoint.tokenizer, judge.tokenizer)
        facts = {
            "weights": checkpoint.fingerprint,
            "length": length_of(checkpoint, args),
            "corpus": args.corpus,
            "judged": "the sampled tokens" if shared else "the decoded text, tokenised anew",
            "characters": only_characters(checkpoint.tokenizer),
        }
        results.agree(f"checkpoint {checkpoint.name}", facts)
    results.made_by("generation.py", sys.argv[1:] if argv is None else argv)
    done = sum(min(args.num, len(results.cells.get(row.key, {}).get("nats", []))) for row in rows)
    with tqdm(total=sum(min(args.num, row.most) for row in rows), initial=done, unit="text") as bar:
        for row in rows:
            bar.set_description(row.key)
            fill(row, results, judge, args, bar)
    results.save()
    write(results, args.output)
    return results


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_judge_option(parser)
    parser.add_argument(
        "--steps", nargs="+", type=int, default=list(PUBLISHED), help="from t = 1 to 1e-5 (default: 32, 64, ... 2048)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["tweedie", "euler", EXACT],
        help=f"the reverse step; {EXACT} makes one a token, and is left out where tokens are noised "
        f"(default: tweedie euler {EXACT})",
    )  # fmt: skip
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=[1.0], metavar="T",
        help="of each token's law, for models that mask or write from left to right; each with all steps (default: 1)",
    )  # fmt: skip
    parser.add_argument("--num", type=int, default=1000, help="samples a row (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens a sample (default: what each model was trained with)")
    parser.add_argument("--corpus", help="judge held-out texts of this corpus, too: any that training takes")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples at once (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=2, help="samples a row to show (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/generation"),
        help="where the files go, without their ending (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.causal:
        parser.error("name at least one --checkpoint or --causal model")
    for name in ("num", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if min(args.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(args.steps)}")
    if not all(0 < heat < math.inf for heat in args.temperatures):
        parser.error(f"--temperatures must be positive and finite, got {args.temperatures}")
    return args


def length_of(checkpoint: Checkpoint, args: argparse.Namespace) -> int:
    """Tokens a sample; ValueError if the model does not take so many, or they are fewer than two."""
    length = args.length or checkpoint.length
    if not 2 <= length <= checkpoint.length:
        raise ValueError(f"--length {length}: {checkpoint.name} takes 2 to {checkpoint.length} tokens")
    return int(length)


def rows_of(checkpoint: Checkpoint, args: argparse.Namespace) -> list[Row]:
    """The rows of one checkpoint: held-out text, and each method at each temperature with each number of steps."""
    length = length_of(checkpoint, args)

    def sampled(method: str, steps: int, heat: float) -> Callable[[range], Tensor]:
        fill = checkpoint.filler(args.device, method, steps, heat=heat)

        def draw(numbers: range) -> Tensor:
            free = torch.zeros(len(numbers), length, dtype=torch.bool)
            return fill(free.long(), free, [args.seed + n for n in numbers])

        return draw

    rows = []
    if args.corpus:
        text = tokenise(corpora.load_texts(args.corpus).documents("valid", checkpoint.tokenizer), checkpoint.tokenizer)
        have = text.blocks(length)
        if have == 0:
            raise ValueError(f"the held-out part of {args.corpus} has {len(text)} tokens, less than one of {length}")

        def block(numbers: range) -> Tensor:
            return text.block(loading.order(args.seed, numbers, have), length)

        source = fingerprint(torch.from_numpy(text.flat))
        rows.append(Row(checkpoint, HELD_OUT, None, block, most=have, source=source))
    for heat in sorted(set(args.temperatures), reverse=True):
        if checkpoint.autoregressive:
            rows.append(Row(checkpoint, LEFT_TO_RIGHT, length, sampled("", 1, heat), heat))
            continue
        for method in args.methods:
            if method != EXACT:
                every = sorted(set(args.steps))
                rows += [Row(checkpoint, method, steps, sampled(method, steps, heat), heat) for steps in every]
            elif checkpoint.masks:
                rows.append(Row(checkpoint, method, length, sampled(method, 1, heat), heat))
    return rows


def fill(row: Row, results: Results, judge: Judge, args: argparse.Namespace, bar: Any) -> None:
    """Draw and judge what the row still lacks; each batch is kept as soon as it is judged."""
    if row.source:
        results.agree(f"text of {row.key}", row.source)
    what = {"checkpoint": row.checkpoint.name, "method": row.method, "steps": row.steps, "temperature": row.heat}
    empty = {"nats": [], "bits": [], "byte_bits": [], "entropy": [], "cut": 0, "texts": []}
    cell = results.cells.setdefault(row.key, {**what, **empty})
    while (have := len(cell["nats"])) < min(args.num, row.most):
        numbers = range(have, int(min(have + args.batch_size, args.num, row.most)))
        x = row.draw(numbers)
        verdicts = judge.judge(judge.read(x, row.checkpoint.tokenizer))
        cell["nats"] += [round(verdict.nats, 6) for verdict in verdicts]
        cell["bits"] += [round(verdict.bits, 6) for verdict in verdicts]
        cell["byte_bits"] += [round(verdict.byte_bits, 6) for verdict in verdicts]
        cell["cut"] += sum(verdict.cut for verdict in verdicts)
        cell["entropy"] += [round(unigram_entropy(tokens), 6) for tokens in x.tolist()]
        wanted = max(0, args.texts - len(cell["texts"]))
        cell["texts"] += [to_text(row.checkpoint.tokenizer, tokens) for tokens in x[:wanted].tolist()]
        results.save()
        bar.update(len(numbers))
    row.checkpoint.rest()


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of the tokens' frequencies in one sample, in nats; at most the logarithm of its length."""
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())


# What is written


def write(results: Results, output: Path) -> None:
    """The table, the picture and the texts of all that the results hold."""
    output.with_name(output.name + ".md").write_text(table(results), encoding="utf-8")
    picture(results, output.with_name(output.name + ".png"))
    if len({cell["temperature"] for cell in results.cells.values()}) > 1:
        frontier(results, output.with_name(output.name + "-frontier.png"))
    shown = [(key, i, text) for key, cell in results.cells.items() for i, text in enumerate(cell["texts"])]
    texts = "\n".join(f"=== {key}, sample {i}\n\n{text}\n" for key, i, text in shown)
    output.with_name(output.name + "-samples.txt").write_text(texts, encoding="utf-8")


def table(results: Results) -> str:
    """The results in Markdown, with what they were made by, beside the published ones."""
    names = ["checkpoint, method", "temperature", "steps", "samples", "perplexity", "exp of mean nats"]
    names += ["bits a character", "bits a byte", "entropy, nats", "nats a token against the row above"]
    lines: list[list[object]] = []
    before: dict[str, Any] = {"checkpoint": None, "method": None, "temperature": None}
    for cell in results.cells.values():
        same = all(cell[name] == before[name] for name in ("checkpoint", "method", "temperature"))
        pairs = list(zip(cell["nats"], before["nats"], strict=False)) if same else []
        line: list[object] = [f"{cell['checkpoint']}, {cell['method']}"]
        line += [f"{cell['temperature']:g}" if cell["steps"] else "", cell["steps"] or "", len(cell["nats"])]
        line += [with_error(*mean_and_error([math.exp(nats) for nats in cell["nats"]]))]
        line += [f"{math.exp(mean_and_error(cell['nats'])[0]):.1f}"]
        line += [with_error(*mean_and_error(cell[name]), 3) for name in ("bits", "byte_bits", "entropy")]
        line += [with_error(*mean_and_error([now - then for now, then in pairs]), 3) if pairs else ""]
        lines.append(line)
        before = cell
    cut = sum(cell["cut"] for cell in results.cells.values())
    parts = [
        "# Unconditional generation\n",
        "".join(f"    {command}\n" for command in results.commands),
        f"Judge: {results.settings['judge']}. Perplexity: the mean over the samples of each one's, the first token",
        "being a condition; ± is the standard error over the samples. Entropy: of the token frequencies in a sample.",
        "Draws are exact (float64). A temperature is that of each token's law, p(x0 | x_t); at 1 the text is a sample",
        "of the model. A step is one call of the network, and a final denoise is one more; first-hitting",
        f"makes one step a token. Sample n of every row has the seed {results.settings['seed']} + n; the last column",
        "is the mean difference between samples of equal seed.",
        *([f"{cut} texts were longer than the judge's context and are judged by their beginning."] if cut else []),
        "",
        *(f"- {name}: {it['length']} tokens a sample; the judge reads {it['judged']}." for name, it in stated(results)),
        "",
        markdown(names, lines),
        "Published, SEDD medium, 1000 samples of 1024 GPT-2 tokens, judge gpt2-large (Ou et al. 2024; quoted):\n",
        markdown(["steps", "float64 draws", "float32 draws"], [[steps, *both] for steps, both in PUBLISHED.items()]),
    ]
    return "\n".join(parts)


def stated(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """What the results say of each checkpoint, by its name."""
    settings = results.settings
    return [(name.removeprefix("checkpoint "), settings[name]) for name in settings if name.startswith("checkpoint ")]


def picture(results: Results, path: Path) -> None:
    """Perplexity (bits a character for models of characters) and entropy against the number of steps."""
    figure, (left, right) = panels(2)
    levels: list[float] = []  # of the samples' lines; real text may be far below, and is named with its number
    for number, (label, cells) in enumerate(lines_of(results, "temperature").items()):
        cells = sorted(cells, key=lambda cell: cell["steps"] or 0)
        steps = [cell["steps"] for cell in cells]
        levels += draw_line(left, steps, [likely(cell, results) for cell in cells], f"C{number}", label)
        draw_line(right, steps, [cell["entropy"] for cell in cells], f"C{number}", label)
    if results.settings["judge"].rpartition("/")[2] == "gpt2-large" and not characters(results):
        for which, style in [(0, "-"), (1, ":")]:
            label = f"published, SEDD medium, {('float64', 'float32')[which]} draws"
            quoted = [float(both[which]) for both in PUBLISHED.values()]
            left.plot(list(PUBLISHED), quoted, "0.6", linestyle=style, label=label)
            levels += quoted
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("steps")
    if levels and max(levels) > 5 * min(levels):
        left.set_yscale("log")
        for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            axis("{x:.0f}")
    if levels:
        left.set_ylim(0.85 * min(levels), 1.15 * max(levels))
    left.set_ylabel("bits a character" if characters(results) else "perplexity")
    left.set_title(f"Judge: {results.settings['judge']}", loc="left", fontsize=10)
    right.set_ylabel("unigram entropy, nats a token")
    right.set_title("Entropy of the same samples", loc="left", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_picture(figure, path)


def frontier(results: Results, path: Path) -> None:
    """Likelihood against entropy, a line through the temperatures; lower and further right is better."""
    figure, [axes] = panels(1, width=6.2, height=5.0)
    lines = lines_of(results, "steps")
    named = next((label for label, cells in lines.items() if cells[0]["steps"]), "")
    for number, (label, cells) in enumerate(lines.items()):
        cells = sorted(cells, key=lambda cell: cell["temperature"])
        points = [(*mean_and_error(cell["entropy"]), *mean_and_error(likely(cell, results))) for cell in cells]
        x, wide, y, high = zip(*points, strict=True)
        text = cells[0]["steps"] is None
        style: dict[str, Any] = {"marker": "*" if text else "o", "markersize": 9 if text else 4, "capsize": 2}
        style |= {"color": "0.2" if text else f"C{number}", "linewidth": 1.4}
        axes.errorbar(x, y, xerr=wide, yerr=high, label=label, **style)
        if label == named:  # the others have the same temperatures in the same order
            for cell, at in zip(cells, zip(x, y, strict=True), strict=True):
                heat = f"{cell['temperature']:g}"
                axes.annotate(heat, at, xytext=(-4, 9), textcoords="offset points", fontsize=8, color=f"C{number}")
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.0f}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("unigram entropy of a sample, nats a token")
    axes.set_ylabel("bits a character" if characters(results) else "perplexity")
    axes.set_title(f"Judge: {results.settings['judge']}; small numbers: temperatures", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_picture(figure, path)


def lines_of(results: Results, one: str) -> dict[str, list[dict[str, Any]]]:
    """The cells of each line, by its label: those of one 'temperature', or of one number of 'steps'."""
    several, found = len(stated(results)) > 1, dict[str, list[dict[str, Any]]]()
    for cell in results.cells.values():
        label = f"{cell['checkpoint']}, {cell['method']}" if several else str(cell["method"])
        if one == "steps" and cell["steps"]:
            label += f", {cell['steps']} steps"
        elif one == "temperature" and cell["temperature"] != 1:
            label += f", temperature {cell['temperature']:g}"
        found.setdefault(label, []).append(cell)
    return found


def characters(results: Results) -> bool:
    """Whether some model's tokens are characters, so that bits a character say more than a perplexity."""
    return any(it["characters"] for _, it in stated(results))


def likely(cell: dict[str, Any], results: Results) -> list[float]:
    """What the judge says of each sample of a cell: its perplexity, or its bits a character."""
    return list(cell["bits"]) if characters(results) else [math.exp(nats) for nats in cell["nats"]]


def draw_line(
    axes: Any, steps: list[int | None], values: list[list[float]], color: str, label: str
) -> tuple[float, ...]:
    """Means and standard errors against the steps, and the means; as a level where there are no steps."""
    means, errors = zip(*map(mean_and_error, values), strict=True)
    errors = tuple(0.0 if math.isnan(error) else error for error in errors)
    if steps[0] is None:
        axes.axhline(means[0], color="0.45", linestyle=(0, (5, 4)), linewidth=1, label=f"{label}: {means[0]:.3g}")
        axes.axhspan(means[0] - errors[0], means[0] + errors[0], color="0.93", zorder=0)
        return ()
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.4}
    axes.errorbar(steps, means, yerr=errors, color=color, label=label, **style)
    return means


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"generation.py: error: {error}") from error
