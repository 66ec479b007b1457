"""Zero-shot perplexity: LAMBADA, WikiText2, PTB, WikiText103 and One Billion Words under models trained on other text.

python integration/zero_shot.py --checkpoint small=louaaron/sedd-small runs/mine/export --causal gpt2
python integration/zero_shot.py --checkpoint runs/tiny/export --data ptb=ptb.test.txt --sets ptb --num-times 64
python integration/zero_shot.py --checkpoint small=louaaron/sedd-small --sets --last-word --choices arc=arc-easy.jsonl

Diffusion models get the bound of eq. 9, autoregressive ones their exact likelihood; each with its standard error over
the blocks. Where noise is masks alone the bound is estimated at random numbers of masks, else at random times; the
table says which (--estimator times for the latter everywhere: the same number, known less well). Every set is written
one document after another, each with an end of text behind it, and cut into blocks of the model's length; there is no
sliding window, and what is left over at the end is not measured.

The texts go through the detokenizers that published numbers were measured with (`sedd_train.detokenizers`). As there,
each row of WikiText is a document, blank ones too (--documents articles joins them), and WikiText2 is its *train* part;
the parts of the others are its held-out ones: validation for PTB and WikiText103, test for LAMBADA and One Billion
Words (--part NAME=PART for another). Blocks do not depend on the number of processes: their fingerprint is given.

--last-word measures -log p of each passage's last word in LAMBADA given the passage, a conditional likelihood, for
which the set is made; --choices NAME=FILE how often the likeliest of several continuations is the right one, by the
likelihood of all of it, a token, and a character (`sedd_train.conditional` says what FILE holds).

A set that cannot be had, for want of a connection say, is named and passed over (HF_HUB_OFFLINE=1 spares the half
minute in which the hub is tried again); the exit code is 2 if that leaves none. The results are kept in OUTPUT.json as
they come, and the same command again continues. From it are made OUTPUT.md, the table beside the published numbers, and
OUTPUT.png.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judge import shares_tokens
from sedd_objectives import Estimate, autoregressive_loss, d3pm_bound
from sedd_train import conditional, corpora, detokenizers, load_trained, randomness
from sedd_train.evaluation import ESTIMATORS, choose_estimator
from sedd_train.objectives import D3PM, Autoregressive
from sedd_train.tables import Results, fingerprint, markdown, mean_and_error, panels, save_picture, with_error
from sedd_train.tokens import Tokens, tokenise
from systems import add_model_options, load_with_start, named, weights_fingerprint
from torch import Generator, Tensor
from tqdm import tqdm

__all__ = ["main"]

PARTS = {"lambada": "test", "wikitext2": "train", "ptb": "valid", "wikitext103": "valid", "lm1b": "test"}
TITLES = {"lambada": "LAMBADA", "wikitext2": "WikiText2", "ptb": "PTB", "wikitext103": "WikiText103", "lm1b": "1BW"}
PUBLISHED = {  # perplexities of the paper's table, in the order of PARTS; small and medium models
    "GPT-2 small": (45.04, 42.43, 138.43, 41.60, 75.20),
    "SEDD absorb small": (50.92, 41.84, 114.24, 40.62, 79.29),
    "SEDD uniform small": (65.40, 50.27, 140.12, 49.60, 101.37),
    "D3PM small": (93.47, 77.28, 200.82, 75.16, 138.92),
    "PLAID small": (57.28, 51.80, 142.60, 50.86, 91.12),
    "GPT-2 medium": (35.66, 31.80, 123.14, 31.39, 55.72),
    "SEDD absorb medium": (42.77, 31.04, 87.12, 29.98, 61.19),
    "SEDD uniform medium": (51.28, 38.93, 102.28, 36.81, 79.12),
}
GPT2_TOKENS = 50257
LAST_WORD = "LAMBADA's last word"


@dataclass(frozen=True)
class System:
    """A model to measure, on the CPU until its turn comes.

    Attributes:
        name: for the table.
        net: the network, in evaluation mode.
        tokenizer: the one it was trained with.
        length: the longest block that it takes.
        estimator: how its bound is estimated, or "exact" where that is the likelihood itself.
        bound: (blocks (B, L), which positions are given (B, L) or None, a generator) -> nats of the others, (B,), and
            their standard errors.
    """

    name: str
    net: Any
    tokenizer: Any
    length: int
    estimator: str
    bound: Callable[[Tensor, Tensor | None, Generator], conditional.Estimated]


def main(argv: Sequence[str] | None = None) -> Results:
    """Fill the table and write it; `argv` in place of the command line's.

    Raises:
        ValueError, OSError: a model cannot be had, or does not fit the options or the results; or no set can.
    """
    args = arguments(argv)
    results = Results(args.output.with_name(args.output.name + ".json"))
    systems = [read_checkpoint(*named(source), args.num_times, args.estimator) for source in args.checkpoint]
    systems += [read_causal(*named(source)) for source in args.causal]
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise ValueError(f"every model needs a name of its own, got {', '.join(names)}: write NAME=MODEL")
    for name in ("num_times", "blocks", "batch_size", "seed", "documents"):
        results.agree(name, getattr(args, name))
    for system in systems:
        facts = {"weights": weights_fingerprint(system.net), "length": length_of(system, args)}
        results.agree(f"model {system.name}", {**facts, "estimator": system.estimator, "tokens": len(system.tokenizer)})
    refused: dict[str, str] = {}
    for title, measure_task in tasks(args):
        try:
            for system in systems:
                measure_task(system, results, args)
        except (ValueError, OSError) as error:
            refused[title] = str(error)
            tqdm.write(f"{title} is not measured: {error}", file=sys.stderr)
    for name in args.sets:
        try:
            measure_set(name, systems, results, args)
        except (ValueError, OSError) as error:
            refused[TITLES[name]] = str(error)
            tqdm.write(f"{TITLES[name]} is not measured: {error}", file=sys.stderr)
    if results.cells:
        write(results, refused, args, argv)
    if len(refused) == len(set(args.sets)) + len(tasks(args)):
        raise OSError("none of the sets could be measured; each one's reason is above")
    return results


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--sets", nargs="*", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--last-word", action="store_true", help="of LAMBADA's passages, given what comes before it")
    parser.add_argument(
        "--choices", nargs="*", default=[], metavar="NAME=FILE",
        help="questions: JSON lines with context, choices and answer, from 0 on",
    )  # fmt: skip
    parser.add_argument(
        "--estimator", choices=["best", *ESTIMATORS], default="best", help="of the bound (default: %(default)s)"
    )
    parser.add_argument(
        "--data", nargs="*", default=[], metavar="NAME=PATH",
        help="a set's files on this machine: a file that is all of it, or a folder of files with train, valid or test "
        "in their names; else it comes from the Hugging Face hub",
    )  # fmt: skip
    parser.add_argument(
        "--part", nargs="*", default=[], metavar="NAME=PART",
        help=f"train, valid or test (default: {', '.join(f'{name}={part}' for name, part in PARTS.items())})",
    )  # fmt: skip
    parser.add_argument(
        "--documents", choices=["rows", "articles"], default="rows", help="of WikiText (default: %(default)s)"
    )
    parser.add_argument("--num-times", type=int, default=1000, help="random times a block (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens a block (default: what each model was trained with)")
    parser.add_argument("--blocks", type=int, help="how many of each set, from its start (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of times and noise (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/zero-shot"),
        help="where the files go, without their ending (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.causal:
        parser.error("name at least one --checkpoint or --causal model")
    for option, default in [("data", {}), ("part", PARTS)]:
        given = dict(value.partition("=")[::2] for value in getattr(args, option))
        for name, value in given.items():
            allowed = value in ("train", "valid", "test") if option == "part" else bool(value)
            if name not in PARTS or not allowed:
                parser.error(f"--{option} {name}={value}: expected NAME=VALUE with NAME one of {', '.join(PARTS)}")
        setattr(args, option, {**default, **given})
    args.choices = [value.partition("=")[::2] for value in args.choices]
    if not all(name and path for name, path in args.choices):
        parser.error("--choices: expected NAME=FILE")
    if not args.sets and not args.last_word and not args.choices:
        parser.error("nothing to measure: name --sets, --last-word or --choices")
    if args.num_times < 2 or args.num_times % 2:
        parser.error(f"--num-times must be even and at least 2, got {args.num_times}")
    if args.batch_size < 1 or (args.blocks is not None and args.blocks < 1):
        parser.error("--batch-size and --blocks must be at least 1")
    return args


# Models


def read_checkpoint(name: str, source: str, num_times: int, estimator: str) -> System:
    """A checkpoint of this project, or a published SEDD, RADD or MDLM one, by folder or name on the hub.

    Raises:
        ValueError, OSError: as `sedd_train.load_trained`.
    """
    net, objective, tokenizer = load_trained(source)
    if isinstance(objective, Autoregressive):
        return autoregressive(name, net, net, tokenizer, objective.start, net.length)
    graph, noise, how = objective.graph, objective.noise, dict[str, Any](num_times=num_times)
    measure: Callable[..., conditional.Estimated]
    if isinstance(objective, D3PM):
        chosen, measure = f"{objective.num_steps} steps", d3pm_bound
        how["num_steps"] = objective.num_steps
    else:
        chosen = choose_estimator(estimator, graph, torch.arange(graph.num_states))
        measure = ESTIMATORS[chosen]

    def bound(x: Tensor, given: Tensor | None, generator: Generator) -> conditional.Estimated:
        return measure(net, graph, noise, x, given=given, generator=generator, **how)

    return System(name, net, tokenizer, net.length, chosen, bound)


def read_causal(name: str, source: str) -> System:
    """A causal language model of transformers; its end-of-text token stands before every block, and all of it counts.

    Raises:
        ValueError: the folder holds no such model, or its tokenizer has no end of text.
        ConnectionError: the hub cannot be reached.
    """
    model, tokenizer, start, length = load_with_start(source)
    return autoregressive(name, model, lambda ids: model(input_ids=ids).logits, tokenizer, start, length)


def autoregressive(
    name: str, net: Any, logits: Callable[[Tensor], Tensor], tokenizer: Any, start: int, length: int
) -> System:
    """A model that reads from left to right: its likelihood is exact."""

    def bound(x: Tensor, given: Tensor | None, _: Generator) -> conditional.Estimated:
        nats = autoregressive_loss(logits, x, start=start, given=given)
        return Estimate(nats, torch.zeros_like(nats))

    return System(name, net, tokenizer, length, "exact", bound)


def length_of(system: System, args: argparse.Namespace) -> int:
    """Tokens a block; ValueError if the model does not take so many."""
    length = args.length or system.length
    if not 1 <= length <= system.length:
        raise ValueError(f"--length {length}: {system.name} takes 1 to {system.length} tokens")
    return int(length)


# Sets


def texts_of(name: str, args: argparse.Namespace) -> tuple[str, Iterable[str]]:
    """What is measured of a set, in words, and its documents.

    Raises:
        ValueError, OSError: it cannot be had, or has no text.
    """
    part, path = args.part[name], args.data.get(name)
    rows = args.documents == "rows"
    source = corpora.load_texts(f"{name}:{path}" if path else name, rows=rows, streaming=True)
    if path and Path(path).is_file():
        held_out = all(part.split != "train" for part in source.parts())
        texts = source.test() if held_out else itertools.chain(source.train(), source.valid())
        return f"all of {Path(path).name}", texts
    return part, {"train": source.train, "valid": source.valid, "test": source.test}[part]()


def measure_set(name: str, systems: Sequence[System], results: Results, args: argparse.Namespace) -> None:
    """Measure a set with every model that has not been through all of it; the text is only read if there is one.

    Raises:
        ValueError, OSError: the set cannot be had, is too short, or is another one than what the results hold.
    """
    read: list[tuple[Any, str, Tokens]] = []  # by tokenizer: most models share one
    for system in systems:
        cell = results.cells.get(f"{system.name} | {name}")
        if cell is not None and len(cell["nats"]) == cell["blocks"]:
            continue
        found = next((it for it in read if shares_tokens(it[0], system.tokenizer)), None)
        if found is None:
            part, texts = texts_of(name, args)
            found = (system.tokenizer, part, tokenise(texts, system.tokenizer))
            read.append(found)
        measure(name, system, *found[1:], results, args)


def measure(name: str, system: System, part: str, text: Tokens, results: Results, args: argparse.Namespace) -> None:
    """Measure the blocks that a model still lacks; each batch is kept as soon as it is done.

    Raises:
        ValueError: the text is shorter than a block, or is another one than what the results hold.
    """
    length = length_of(system, args)
    have = text.blocks(length)
    if have == 0:
        raise ValueError(f"it has {len(text)} tokens of {system.name}, less than one block of {length}")
    blocks = text.block(range(min(have, args.blocks or have)), length)
    detokenizer = detokenizers.of_corpus(name)
    fresh: dict[str, Any] = {
        "model": system.name,
        "set": name,
        "part": part,
        "detokenizer": detokenizer.__name__ if detokenizer else "none",
        "documents": args.documents if name.startswith("wikitext") else "rows",
        "fingerprint": fingerprint(blocks),
        "blocks": len(blocks),
        "length": length,
        "characters_per_token": round(text.characters_per_token, 4),
        "nats": [],
        "errors": [],
    }
    cell = results.cells.get(f"{system.name} | {name}", fresh)
    if cell["fingerprint"] != fresh["fingerprint"]:
        raise ValueError(
            f"{results.path} has begun with another text (fingerprint {cell['fingerprint']}, now "
            f"{fresh['fingerprint']}): give another --output, or remove the file"
        )
    system.net.to(args.device)
    done = len(cell["nats"])
    bar = tqdm(total=len(blocks), initial=done, unit="block", desc=f"{system.name}, {TITLES[name]}")
    with bar, torch.no_grad():
        for start in range(done, len(blocks), args.batch_size):
            x = blocks[start : start + args.batch_size].to(args.device)
            number = start // args.batch_size
            random = randomness.generator(args.seed, randomness.EVALUATION, number, device=x.device)
            found = system.bound(x, None, random)
            for field, values in (("nats", found.value), ("errors", found.standard_error)):
                cell[field] += [round(value, 8) for value in (values.double() / length).tolist()]
            results.cells[f"{system.name} | {name}"] = cell
            results.save()
            bar.update(len(x))
    system.net.to("cpu")


# What follows a text


def tasks(args: argparse.Namespace) -> list[tuple[str, Callable[[System, Results, argparse.Namespace], None]]]:
    """The conditional likelihoods to measure, by their titles."""
    wanted: list[tuple[str, Callable[[System, Results, argparse.Namespace], None]]] = []
    if args.last_word:
        wanted.append((LAST_WORD, measure_last_words))
    for name, path in args.choices:
        wanted.append((name, functools.partial(measure_choices, name, Path(path))))
    return wanted


def measure_rest(system: System, texts: list[tuple[str, str]], args: argparse.Namespace) -> conditional.Conditional:
    """-log p(continuation | context) of texts under a model."""
    system.net.to(args.device)
    found = conditional.conditional(
        system.bound,
        conditional.token_pairs(texts, system.tokenizer),
        length=length_of(system, args),
        device=args.device,
        seed=args.seed,
        chunk=args.batch_size,
        progress=True,
    )
    system.net.to("cpu")
    return found


def measure_last_words(system: System, results: Results, args: argparse.Namespace) -> None:
    """LAMBADA's last words under a model that has not been through them.

    Raises:
        ValueError, OSError: the set cannot be had, or is another one than what the results hold.
    """
    part, documents = texts_of("lambada", args)
    texts = [conditional.last_word(text) for text in itertools.islice(documents, args.blocks)]
    fresh = {"model": system.name, "part": part, "fingerprint": of_texts(texts), "words": len(texts)}
    if measured_before(f"{system.name} | last word", fresh, results):
        return
    found = measure_rest(system, texts, args)
    nats, error = found.per(len(texts))
    fresh |= {"nats": nats, "error": found.spread, "measurement_error": error, "tokens": int(found.tokens.sum())}
    results.cells[f"{system.name} | last word"] = fresh
    results.save()


def measure_choices(name: str, path: Path, system: System, results: Results, args: argparse.Namespace) -> None:
    """Questions under a model that has not been asked them.

    Raises:
        ValueError, OSError: the file cannot be read or holds none, or others than the results do.
    """
    questions = conditional.read_questions(path)[: args.blocks]
    texts = conditional.questions_pairs(questions)
    right = [(str(question.answer), "") for question in questions]
    fresh = {"model": system.name, "questions": name, "fingerprint": of_texts([*texts, *right])}
    if measured_before(f"{system.name} | choices {name}", fresh, results):
        return
    found = conditional.answers(measure_rest(system, texts, args), questions)
    results.cells[f"{system.name} | choices {name}"] = {**fresh, **vars(found)}
    results.save()


def of_texts(texts: Sequence[tuple[str, str]]) -> str:
    """A fingerprint of texts."""
    return hashlib.sha256(repr(list(texts)).encode()).hexdigest()[:16]


def measured_before(key: str, fresh: dict[str, Any], results: Results) -> bool:
    """Whether the results have this cell; ValueError if it is of another text."""
    held = results.cells.get(key)
    if held is not None and held["fingerprint"] != fresh["fingerprint"]:
        raise ValueError(
            f"{results.path} holds another text (fingerprint {held['fingerprint']}, now {fresh['fingerprint']}): give "
            "another --output, or remove the file"
        )
    return held is not None


# What is written


def perplexity(cell: dict[str, Any]) -> tuple[float, float]:
    """Exp of the mean nats a token, and its standard error over the blocks, to first order."""
    nats, error = mean_and_error(cell["nats"])
    return math.exp(nats), math.exp(nats) * error


def write(results: Results, refused: dict[str, str], args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """The table and the picture of all that the results hold."""
    argv = sys.argv[1:] if argv is None else argv
    args.output.with_name(args.output.name + ".md").write_text(table(results, refused, argv), encoding="utf-8")
    picture(results, args.output.with_name(args.output.name + ".png"))


def models_of(results: Results) -> dict[str, dict[str, Any]]:
    """What the results say of each model, by its name."""
    settings = results.settings.items()
    return {name.removeprefix("model "): facts for name, facts in settings if name.startswith("model ")}


def table(results: Results, refused: dict[str, str], argv: Sequence[str]) -> str:
    """The results in Markdown beside the published ones, with what they were made by and of."""
    lines: list[list[object]] = []
    facts_of = models_of(results)
    for model, facts in facts_of.items():
        cells = [results.cells.get(f"{model} | {name}") for name in PARTS]
        sign = "" if facts["estimator"] == "exact" else "≤ "
        lines.append([model, *(sign + with_error(*perplexity(cell)) if cell else "" for cell in cells)])
    foreign = [name for name, facts in facts_of.items() if facts["tokens"] != GPT2_TOKENS]
    measured = [
        [
            *(f"{cell['model']}, {TITLES[cell['set']]}", cell["part"], cell["detokenizer"], cell["documents"]),
            f"{len(cell['nats'])} of {cell['blocks']}",
            *(cell["length"], with_error(*mean_and_error(cell["nats"])), f"{measurement_error(cell):.1g}"),
            *(facts_of[cell["model"]]["estimator"], cell["characters_per_token"], f"`{cell['fingerprint']}`"),
        ]
        for cell in results.cells.values()
        if "set" in cell
    ]
    quoted = [[name, *(f"{value:.2f}" for value in row)] for name, row in PUBLISHED.items()]
    columns = ["part", "detokenizer", "documents", "blocks", "tokens each", "nats a token", "of the measurement"]
    columns += ["estimator", "characters a token"]
    parts = [
        "# Zero-shot perplexity\n",
        f"    python integration/zero_shot.py {shlex.join(argv)}\n",
        "≤: a bound (eq. 9), for models without an exact likelihood. ± is the standard error over the blocks; that of",
        f"a bound has its {results.settings['num_times']} random times and noise a block in it, seed "
        f"{results.settings['seed']}, whose own part is the error of the measurement. No sliding window.",
        *([f"Not in GPT-2's tokens, and not to be compared with the others: {', '.join(foreign)}."] if foreign else []),
        *(f"{title} was not measured: {why}" for title, why in refused.items()),
        "",
        markdown(["model", *TITLES.values()], lines),
        "Published, GPT-2 tokens, blocks of 1024 (Lou et al. 2023; quoted):\n",
        markdown(["model", *TITLES.values()], quoted),
        "What was measured:\n",
        markdown(["model, set", *columns, "fingerprint"], measured),
        *after_a_text(results),
    ]
    return "\n".join(parts)


def measurement_error(cell: dict[str, Any]) -> float:
    """Of the mean nats a token of a cell, over random times and noise alone."""
    return math.sqrt(math.fsum(error**2 for error in cell["errors"])) / len(cell["errors"])


def after_a_text(results: Results) -> list[str]:
    """The tables of what follows a text that is given, where there are any."""
    signs = {name: "" if facts["estimator"] == "exact" else "≤ " for name, facts in models_of(results).items()}
    words = [
        [
            cell["model"],
            signs[cell["model"]] + with_error(math.exp(cell["nats"]), math.exp(cell["nats"]) * cell["error"]),
            *(with_error(cell["nats"], cell["error"]), f"{cell['measurement_error']:.1g}"),
            *(cell["words"], cell["tokens"], cell["part"], f"`{cell['fingerprint']}`"),
        ]
        for cell in results.cells.values()
        if "words" in cell
    ]
    asked = [
        [
            f"{cell['model']}, {cell['questions']}",
            *(
                with_error(share, math.sqrt(share * (1 - share) / cell["number"]), 3)
                for share in (cell["accuracy"], cell["per_token"], cell["per_character"])
            ),
            *(f"{cell['undecided']:.3f}", cell["number"], f"`{cell['fingerprint']}`"),
        ]
        for cell in results.cells.values()
        if "questions" in cell
    ]
    columns = ["perplexity a word", "nats a word", "of the measurement", "words", "tokens", "part", "fingerprint"]
    parts = [f"{LAST_WORD}, given what comes before it:\n", markdown(["model", *columns], words)] if words else []
    if asked:
        parts.append(
            "How often the likeliest continuation is the right one, by its likelihood, that a token, and that a "
            "character; undecided: the share whose two likeliest differ by less than 2 standard errors.\n"
        )
        columns = ["right", "a token", "a character", "undecided", "questions", "fingerprint"]
        parts.append(markdown(["model, questions", *columns], asked))
    return parts


def picture(results: Results, path: Path) -> None:
    """Perplexity on each set, the published ones in grey."""
    figure, (axes,) = panels(1, width=8)
    places = [i - 0.12 for i in range(len(PARTS))]
    for (name, row), marker in zip(PUBLISHED.items(), "s^vDPs^v", strict=True):
        style = {"color": "0.7", "markersize": 5, "markerfacecolor": "none" if name.endswith("medium") else "0.7"}
        axes.plot(places, row, marker, label=f"{name}, published", **style)
    models = list(models_of(results))
    for number, model in enumerate(models):
        cells = [(i, results.cells.get(f"{model} | {name}")) for i, name in enumerate(PARTS)]
        points = [(i, *perplexity(cell)) for i, cell in cells if cell]
        shift = 0.05 + 0.08 * number
        where, means, errors = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(
            [i + shift for i in where],
            means,
            yerr=[0.0 if math.isnan(error) else error for error in errors],
            fmt="o",
            color=f"C{number}",
            capsize=2.5,
            label=model,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xticks(range(len(PARTS)), TITLES.values())
    axes.set_xlim(-0.5, len(PARTS) - 0.5)
    axes.set_ylabel("perplexity a token")
    axes.set_title("Zero-shot perplexity, bounds where it is not exact", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_picture(figure, path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as failure:
        print(f"zero_shot.py: error: {failure}", file=sys.stderr)
        sys.exit(2)
