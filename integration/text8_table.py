"""The text8 table: train and measure every system of the paper's comparison that can run, beside the published numbers.

python integration/text8_table.py                        in miniature: six rows of 13 minutes on two CPU cores
python integration/text8_table.py --rows "SEDD absorb" "D3PM absorb" -- --steps 200       a glimpse
python integration/text8_table.py --scale full --launch "deepspeed --num_gpus 8"          as published, on GPUs

All rows share text, network sizes, optimiser and tokens seen; they differ in objective, graph and, where the objective
asks for it, in the network's conditioning. A row is trained by train_owt.py, and goes on from its last checkpoint if it
was cut off; one that is done is not trained again. Measured is the part of the corpus kept for that: the bound with all
of its terms, on the same blocks for every row, and the difference to SEDD absorb block by block, whose error is smaller
than that of either. Each number is in --output/text8.json as soon as it is known, then in text8.md and text8.png.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sedd_train import data, load_trained, recipes
from sedd_train.evaluation import bounds
from tables import Results, fingerprint, markdown, mean_and_error, panels, save_picture, with_error
from torch import Tensor

TRAIN = Path(__file__).with_name("train_owt.py")
REFERENCE = "SEDD absorb"


@dataclass(frozen=True)
class Row:
    """A system: whether its graph is the absorbing one, what it replaces in the recipe, and its published number."""

    absorbs: bool
    options: tuple[str, ...]
    published: float | None


D3PM = ("--objective", "d3pm", "--t-min", "1e-6")  # the first of its steps begins at 0
ROWS = {
    "SEDD absorb": Row(True, (), 1.39),
    "SEDD uniform": Row(False, (), 1.47),
    "D3PM absorb": Row(True, D3PM, 1.45),
    "D3PM uniform": Row(False, D3PM, 1.61),
    "Masked cross-entropy (MDLM)": Row(True, ("--network", "mdlm"), 1.40),
    "Autoregressive": Row(True, ("--objective", "autoregressive", "--network", "causal"), 1.23),
}
RECIPES = {  # with the absorbing graph, with the uniform one
    "mini": ("text8-mini", "text8-mini-uniform"),
    "full": ("sedd-small-absorb-text8", "sedd-small-uniform-text8"),
}
QUOTED = {  # bits a character, of systems that are not built here
    "IAF/SCF": 1.88,
    "AR Argmax Flow": 1.39,
    "Discrete Flow": 1.23,
    "Multinomial Diffusion": 1.72,
    "MAC": 1.40,
    "BFN": 1.41,
    "MD4": 1.37,
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--scale", choices=RECIPES, default="mini", help="which recipes (default: %(default)s)")
parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
parser.add_argument("--output", type=Path, metavar="DIR", help="folder of table and runs (default: runs/text8-SCALE)")
parser.add_argument(
    "--launch", default=sys.executable, help='what starts train_owt.py, such as "deepspeed" or "torchrun"'
)
parser.add_argument("--corpus", help="text8 itself from a file, text8:PATH (default: the recipe's)")
parser.add_argument("--blocks", type=int, default=512, help="blocks measured; 0 for all (default: %(default)s)")
parser.add_argument("--num-times", type=int, default=64, help="noise levels for each of them (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of training, times and noise (default: %(default)s)")
parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="tokenised text (default: %(default)s)")
parser.add_argument("training", nargs="*", metavar="-- OPTION", help="after --, options of train_owt.py for every row")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")


def main() -> None:
    """Train and measure the rows that are not done, then draw the table."""
    args = parser.parse_args()
    folder: Path = args.output or Path("runs") / f"text8-{args.scale}"
    try:
        recipe = recipes.read_recipe(RECIPES[args.scale][0])
        corpus = data.prepare(args.corpus or recipe.corpus, recipe.tokenizer, args.cache, say)
        have = corpus.test.blocks(recipe.length)
        if not 0 <= args.blocks <= have:
            raise ValueError(f"--blocks {args.blocks}: {recipe.corpus} has {have} to measure; 0 for all of them")
        if args.num_times < 2 or args.num_times % 2:
            raise ValueError(f"--num-times {args.num_times}: expected an even number")
        blocks = corpus.test.block(range(args.blocks or have), recipe.length)
        results = Results(folder / "text8.json")
        results.agree("corpus", args.corpus or recipe.corpus)
        results.agree("blocks", {"count": len(blocks), "length": recipe.length, "fingerprint": fingerprint(blocks)})
        results.agree("num_times", args.num_times)
        results.agree("seed", args.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for name in args.rows:
        run = folder / name.split(" (")[0].lower().replace(" ", "-")
        trained = train(name, run, args)
        if results.cells.get(name, {}).get("trained") == trained:
            continue
        say(f"measuring {name} on {len(blocks)} blocks of {recipe.length}")
        results.cells[name] = {"trained": trained, "bits": measure(run, blocks, args)}
        results.save()
    write_table(folder, results, args.scale)
    say(f"{(folder / 'text8.md').read_text()}\nwritten to {folder / 'text8.md'}, .json and .png")


def train(name: str, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train a row to its end, unless it is there; what it was trained with."""
    row = ROWS[name]
    if not (run / "summary.json").exists():
        recipe = RECIPES[args.scale][0 if row.absorbs else 1]
        options = ["--recipe", recipe, *row.options, "--seed", str(args.seed), *args.training]
        options += ["--corpus", args.corpus] if args.corpus else []
        if any((run / "checkpoints").glob("step-*")):
            options = ["--resume"]
        command = [*shlex.split(args.launch), str(TRAIN), *options, "--output", str(run), "--cache", str(args.cache)]
        say(f"\n{name}: {shlex.join(command)}")
        if code := subprocess.run(command, check=False).returncode:
            parser.exit(
                1, f"{parser.prog}: error: {name} was not trained to its end ({TRAIN.name}: {code}), see above\n"
            )
    done = recipes.read_recipe(run / "recipe.toml")
    names = ("objective", "network", "graph", "noise", "steps", "batch_size", "length", "width", "depth", "seed")
    return {value: getattr(done, value) for value in names}


def measure(run: Path, blocks: Tensor, args: argparse.Namespace) -> list[float]:
    """The bound of each block, bits a character."""
    net, objective, _ = load_trained(run)
    found = bounds(
        net.to(args.device), objective, blocks, num_times=args.num_times, seed=args.seed, chunk=16, progress=True
    )
    return [round(value, 6) for value in (found / math.log(2)).tolist()]


def write_table(folder: Path, results: Results, scale: str) -> None:
    """The Markdown table and the picture."""
    bits = {name: results.cells[name]["bits"] for name in ROWS if name in results.cells}
    lines = []
    for name, values in bits.items():
        apart = "" if name == REFERENCE or REFERENCE not in bits else difference(values, bits[REFERENCE])
        published = ROWS[name].published
        lines.append([name, with_error(*mean_and_error(values)), apart, published or "–"])
    lines += [[f"{name} (quoted)", "–", "–", f"{value:.2f}"] for name, value in QUOTED.items()]
    names = ["", "bits a character", f"minus {REFERENCE}", "published, text8"]
    cells = list(results.cells.values())
    seen = {cell["trained"]["steps"] * cell["trained"]["batch_size"] * cell["trained"]["length"] for cell in cells}
    how = results.settings
    (folder / "text8.md").write_text(
        f"{markdown(names, lines)}\n"
        f"`python integration/text8_table.py --scale {scale}`: trained on "
        f"{' or '.join(f'{n:,}' for n in sorted(seen))} characters of {how['corpus']}, seed {how['seed']}; measured on "
        f"{how['blocks']['count']} blocks of {how['blocks']['length']} (fingerprint {how['blocks']['fingerprint']}), "
        f"{how['num_times']} noise levels each. ± is one standard error over the blocks. Autoregressive is a "
        "likelihood, the others are upper bounds. Published: Lou, Meng and Ermon 2024; the masked cross-entropy's and "
        "MD4's numbers are of their own papers.\n",
        encoding="utf-8",
    )
    picture(folder / "text8.png", bits)


def difference(values: list[float], reference: list[float]) -> str:
    """Of two systems on the same blocks, with the error of the pairs."""
    return with_error(*mean_and_error([a - b for a, b in zip(values, reference, strict=True)]))


def picture(path: Path, bits: dict[str, list[float]]) -> None:
    """The rows as points, ours with two standard errors to both sides, and the published ones beside them."""
    figure, (ours, theirs) = panels(2, height=0.5 * len(bits) + 1.4)
    names = sorted(bits, key=lambda name: -mean_and_error(bits[name])[0])
    for y, name in enumerate(names):
        mean, error = mean_and_error(bits[name])
        color = "#c8501e" if name.startswith("SEDD") else "#1f4e8c"
        ours.errorbar(mean, y, xerr=2 * error, color=color, marker="o", markersize=5, capsize=3)
        published = ROWS[name].published
        if published:
            theirs.plot(published, y, color=color, marker="D", markersize=5)
    for axes, title in ((ours, "here, ± 2 standard errors"), (theirs, "published, text8")):
        axes.set_yticks(range(len(names)), names if axes is ours else [""] * len(names))
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("bits a character")
        axes.set_title(title, loc="left", fontsize=11)
    save_picture(figure, path)


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
