"""The paper's likelihood tables, text8 and One Billion Words: every system that can run, beside the published numbers.

sedd tables text8                                             in miniature: six rows of 13 minutes on two CPU cores
sedd tables lm1b --padded                                     rows of one sentence each; without: packed
sedd tables text8 --rows "SEDD absorb" "D3PM absorb" --output runs/glimpse -- --steps 200
sedd tables text8 --scale full --launch "deepspeed --num_gpus 8"                              as published, on GPUs

All rows share text, network sizes, optimiser and tokens seen; they differ in objective, graph and, where the objective
asks for it, in the network's conditioning. A row is trained by `sedd train`, and goes on from its last checkpoint if it
was cut off; one that is done is not trained again, and one that was trained otherwise, a glimpse, is refused. Measured
is the part of the corpus kept for that: the bound with all of its terms, on the same blocks for every row, and the
difference to SEDD absorb block by block, whose error is smaller than that of either. Each number is in
--output/table.json as soon as it is known, then in table.md and table.png.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_train import load_trained, recipes, token_cache
from sedd_train.commands import train as training
from sedd_train.commands.options import Options
from sedd_train.evaluation import bounds
from sedd_train.tables import Results, fingerprint, markdown, mean_and_error, panels, save_picture, with_error

__all__ = ["parser", "main"]

REFERENCE = "SEDD absorb"
ALIKE = (  # in miniature: what every row can begin and learn with
    *("--optimizer", "adamw", "--learning-rate", "1.5e-3", "--zero-stage", "1"),
    "--no-informed-start",
)
D3PM = ("--objective", "d3pm", "--t-min", "1e-6")  # the first of its steps begins at 0
ROWS = {  # whether the graph is the absorbing one, and what a row replaces in the recipe
    "SEDD absorb": (True, ()),
    "SEDD uniform": (False, ()),
    "D3PM absorb": (True, D3PM),
    "D3PM uniform": (False, D3PM),
    "Masked cross-entropy": (True, ("--network", "mdlm")),
    "Autoregressive": (True, ("--objective", "autoregressive", "--network", "causal")),
}


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        recipes: by scale, the recipe with the absorbing graph and the one with the uniform.
        perplexity: whether numbers are perplexities a token rather than bits a character.
        published: by row, Lou, Meng and Ermon 2024 but for the masked cross-entropy, of the MDLM paper.
        quoted: of systems that are not built here.
    """

    recipes: dict[str, tuple[str, str]]
    perplexity: bool
    published: dict[str, float]
    quoted: dict[str, float]


TABLES = {
    "text8": Table(
        {"mini": ("text8-mini", "text8-mini-uniform"), "full": ("sedd-small-absorb-text8", "sedd-small-uniform-text8")},
        perplexity=False,
        published={
            "SEDD absorb": 1.39,
            "SEDD uniform": 1.47,
            "D3PM absorb": 1.45,
            "D3PM uniform": 1.61,
            "Masked cross-entropy": 1.40,
            "Autoregressive": 1.23,
        },
        quoted={
            "IAF/SCF": 1.88,
            "AR Argmax Flow": 1.39,
            "Discrete Flow": 1.23,
            "Multinomial Diffusion": 1.72,
            "MAC": 1.40,
            "BFN": 1.41,
            "MD4": 1.37,
        },
    ),
    "lm1b": Table(
        {"mini": ("lm1b-mini", "lm1b-mini-uniform"), "full": ("sedd-small-absorb-lm1b", "sedd-small-uniform-lm1b")},
        perplexity=True,
        published={"SEDD absorb": 32.79, "SEDD uniform": 40.25, "D3PM absorb": 77.50, "Autoregressive": 31.98},
        quoted={"Diffusion-LM": 118.62, "BERT-Mouth": 142.89, "DiffusionBert": 63.78},
    ),
}

EPILOG = "What stands after -- goes to `sedd train`, for every row."


def parser(prog: str = "sedd tables") -> argparse.ArgumentParser:
    """The options."""
    made = Options(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", choices=list(TABLES))
    made.add_argument("--scale", choices=["mini", "full"], default="mini", help="which recipes (default: %(default)s)")
    made.add_argument(
        "--padded", action="store_true", help="each document a row of its own; its numbers do not compare"
    )
    made.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}"
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of table and runs (default: runs/TABLE-SCALE)")
    made.add_argument("--launch", default="", help='what starts the training, such as "deepspeed --num_gpus 8"')
    made.add_argument("--corpus", help="in place of the recipe's, for instance from files: text8:PATH, lm1b:FOLDER")
    made.add_argument("--blocks", type=int, default=512, help="blocks measured; 0 for all (default: %(default)s)")
    made.add_argument("--num-times", type=int, default=64, help="noise levels for each of them (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of training, times and noise (default: %(default)s)")
    made.add_argument("--cache", type=Path, default=Path("runs/cache"), help="tokenised text (default: %(default)s)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd tables") -> None:
    """Train and measure the rows that are not done, then draw the table."""
    options, given = parser(prog), list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args = options.parse_args(given[:cut], argparse.Namespace(training=given[cut + 1 :]))
    table = TABLES[args.table]
    folder: Path = args.output or Path("runs") / f"{args.table}-{args.scale}{'-padded' * args.padded}"
    try:
        results = Results(folder / "table.json")
        recipe = recipes.read_recipe(table.recipes[args.scale][0])
        if args.num_times < 2 or args.num_times % 2:
            raise ValueError(f"--num-times {args.num_times}: expected an even number")
        if args.padded and recipe.crops:
            raise ValueError(f"--padded: {args.table} is cut into crops of one text, and has no documents")
        source = args.corpus or recipe.corpus
        corpus = token_cache.prepare(source, recipe.tokenizer, args.cache, say)
        corpus.check_length(recipe.length, packing=not args.padded)
        have = corpus.test.documents if args.padded else corpus.test.blocks(recipe.length)
        if not 0 <= args.blocks <= have:
            raise ValueError(f"--blocks {args.blocks}: {source} has {have} to measure; 0 for all of them")
        end = corpus.tokenizer.eos_token_id if args.padded else None
        blocks, lengths = corpus.test.first(args.blocks or None, recipe.length, end)
        tokens = torch.full((len(blocks),), recipe.length) if lengths is None else lengths
        results.agree("table", args.table)
        results.agree("corpus", source)
        results.agree("padded", args.padded)
        results.agree("blocks", {"count": len(blocks), "length": recipe.length, "fingerprint": fingerprint(blocks)})
        results.agree("tokens", int(tokens.sum()))
        results.agree("num_times", args.num_times)
        results.agree("seed", args.seed)
        runs = {name: folder / name.lower().replace(" ", "-") for name in args.rows}
        for name, run in runs.items():
            check_row(name, run, table, args)
    except (ValueError, OSError) as error:
        with suppress(OSError):  # but for what is in it already, nothing is left of a table that is not begun
            folder.rmdir()
        options.exit(2, f"{prog}: error: {error}\n")
    for name, run in runs.items():
        try:
            trained = train(name, run, table, args)
        except RuntimeError as error:
            options.exit(1, f"{prog}: error: {error}\n")
        if results.cells.get(name, {}).get("trained") != trained:
            say(f"measuring {name} on {len(blocks)} blocks of {recipe.length}")
            results.cells[name] = {"trained": trained, "nats": measure(run, blocks, lengths, args)}
            results.save()
    write_table(folder, results, table, tokens, args)
    say(f"{(folder / 'table.md').read_text()}\nwritten to {folder / 'table.md'}, .json and .png")


def options_of(name: str, table: Table, args: argparse.Namespace) -> list[str]:
    """What `sedd train` is given for a row."""
    absorbs, more = ROWS[name]
    alike = ALIKE if args.scale == "mini" else ()
    given = ["--recipe", table.recipes[args.scale][0 if absorbs else 1], *alike, *more, "--seed", str(args.seed)]
    given += [*args.training, *(["--corpus", args.corpus] if args.corpus else [])]
    return given + (["--no-packing"] if args.padded else [])


def recipe_of(name: str, table: Table, args: argparse.Namespace) -> recipes.Recipe:
    """The recipe that these options make."""
    wanted = vars(training.parser().parse_args(options_of(name, table, args)))
    values = {value: wanted[value] for value in recipes.Recipe.__dataclass_fields__ if value in wanted}
    return recipes.override(recipes.read_recipe(wanted["recipe"]), values)


def check_row(name: str, run: Path, table: Table, args: argparse.Namespace) -> None:
    """A run that is there already is the one that would be trained now, or its beginning.

    Raises:
        ValueError: it is another.
    """
    if not (run / "recipe.toml").exists():
        return
    recipe, done = recipe_of(name, table, args), recipes.read_recipe(run / "recipe.toml")
    kept = [value for value in recipes.FIXED if value != "revision"]  # which a run may have learnt
    for value in kept + (["steps"] if done.steps > recipe.steps else []):
        if getattr(recipe, value) != getattr(done, value):
            raise ValueError(
                f"{run} was trained with {value} = {getattr(done, value)!r}, and {name} is asked for with "
                f"{getattr(recipe, value)!r}: choose another --output, or remove that folder"
            )


def train(name: str, run: Path, table: Table, args: argparse.Namespace) -> dict[str, Any]:
    """Train a row to its end, unless it is there; what it was trained with. One that ended earlier goes on.

    Raises:
        RuntimeError: training did not come to its end.
    """
    steps = recipe_of(name, table, args).steps
    if not (run / "summary.json").exists() or recipes.read_recipe(run / "recipe.toml").steps < steps:
        begun = any((run / "checkpoints").glob("step-*"))
        given = ["--resume", "--steps", str(steps)] if begun else options_of(name, table, args)
        launcher = shlex.split(args.launch) or [sys.executable]
        module = "--module" if Path(launcher[0]).name == "deepspeed" else "-m"
        where = ["--output", str(run), "--cache", str(args.cache)]
        command = [*launcher, module, "sedd_train", "train", *given, *where]
        say(f"\n{name}: {shlex.join(command)}")
        if code := subprocess.run(command, check=False).returncode:
            raise RuntimeError(f"{name} was not trained to its end (it ended with {code})")
    done = recipes.read_recipe(run / "recipe.toml")
    names = ("objective", "network", "graph", "noise", "steps", "batch_size", "length", "width", "depth", "seed")
    return {value: getattr(done, value) for value in names}


def measure(run: Path, blocks: Tensor, lengths: Tensor | None, args: argparse.Namespace) -> list[float]:
    """The bound of each block, nats."""
    net, objective, _ = load_trained(run)
    found = bounds(
        net.to(args.device),
        objective,
        blocks,
        num_times=args.num_times,
        seed=args.seed,
        chunk=16,
        progress=True,
        lengths=lengths,
    )
    return [round(value, 5) for value in (found * blocks.shape[1]).tolist()]


def write_table(folder: Path, results: Results, table: Table, lengths: Tensor, args: argparse.Namespace) -> None:
    """The Markdown table and the picture."""
    nats = {name: results.cells[name]["nats"] for name in ROWS if name in results.cells}
    reference = nats.get(REFERENCE)
    lines = []
    for name, values in nats.items():
        apart = "" if name == REFERENCE or reference is None else with_error(*bits_a_token(values, lengths, reference))
        published = table.published.get(name)
        shown = with_error(*number(values, lengths, table))
        lines.append([name, shown, apart, "–" if published is None else f"{published:.2f}"])
    lines += [[f"{name} (quoted)", "–", "–", f"{value:.2f}"] for name, value in table.quoted.items()]
    unit = "perplexity" if table.perplexity else "bits a character"
    cells = list(results.cells.values())
    seen = {cell["trained"]["steps"] * cell["trained"]["batch_size"] * cell["trained"]["length"] for cell in cells}
    how, blocks = results.settings, results.settings["blocks"]
    notes = (
        f"`sedd tables {args.table} --scale {args.scale}{' --padded' * args.padded} "
        f"--blocks {args.blocks} --num-times {args.num_times} --seed {args.seed}"
        f"{' -- ' * bool(args.training)}{shlex.join(args.training)}`",
        f"trained on {' or '.join(f'{n:,}' for n in sorted(seen))} tokens of {how['corpus']}, seed {how['seed']}, "
        + ("padded: a document a row" if args.padded else "packed"),
        f"measured on {blocks['count']} blocks of {blocks['length']} ({how['tokens']:,} tokens of text, fingerprint "
        f"{blocks['fingerprint']}), {how['num_times']} noise levels each",
        "± is one standard error over the blocks, for differences over pairs",
        "autoregressive is a likelihood, the others are upper bounds",
        *(() if table.perplexity else ("a character of text8 is a byte: bits a byte are the same",)),
        "published: Lou, Meng and Ermon 2024; of the masked cross-entropy and MD4, their own papers",
    )
    names = ["", unit, f"bits a token above {REFERENCE}", f"published, {args.table}"]
    (folder / "table.md").write_text(
        markdown(names, lines) + "\n" + "".join(f"- {note}\n" for note in notes), encoding="utf-8"
    )
    picture(folder / "table.png", nats, lengths, table, unit)


def bits_a_token(values: list[float], lengths: Tensor, reference: list[float] | None = None) -> tuple[float, float]:
    """All nats over all tokens, in bits, and the standard error; of the difference to a reference on these blocks."""
    nats = torch.tensor(values, dtype=torch.float64) / math.log(2)
    if reference is not None:
        nats -= torch.tensor(reference, dtype=torch.float64) / math.log(2)
    ratio = float(nats.sum() / lengths.sum())
    return ratio, mean_and_error(((nats - ratio * lengths) / lengths.double().mean()).tolist())[1]


def number(values: list[float], lengths: Tensor, table: Table) -> tuple[float, float]:
    """What the table shows, and its standard error."""
    bits, error = bits_a_token(values, lengths)
    return (2**bits, math.log(2) * error * 2**bits) if table.perplexity else (bits, error)


def picture(path: Path, nats: dict[str, list[float]], lengths: Tensor, table: Table, unit: str) -> None:
    """The rows as points, ours with two standard errors to both sides, and the published ones beside them."""
    figure, (ours, theirs) = panels(2, height=0.45 * len(nats) + 1.6)
    found = {name: number(values, lengths, table) for name, values in nats.items()}
    names = sorted(found, key=lambda name: -found[name][0])
    for y, name in enumerate(names):
        mean, error = found[name]
        color = "#c8501e" if name.startswith("SEDD") else "#1f4e8c"
        ours.errorbar(mean, y, xerr=2 * error, color=color, marker="o", markersize=5, capsize=3)
        if name in table.published:
            theirs.plot(table.published[name], y, color=color, marker="D", markersize=5)
    for axes, title in ((ours, "here, ± 2 standard errors"), (theirs, "published")):
        axes.set_yticks(range(len(names)), names if axes is ours else [""] * len(names))
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(unit)
        axes.set_title(title, loc="left", fontsize=11)
    save_picture(figure, path)


def say(line: str) -> None:
    """Tell whoever waits."""
    print(line, flush=True)
