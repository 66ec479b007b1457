"""Bound the negative log-likelihood of held-out text under a trained score model (equation 9), with its standard error.

sedd evaluate --checkpoint runs/tiny                                       on what it was not trained on of its text
sedd evaluate --checkpoint louaaron/sedd-small --corpus my-texts/ --blocks 100 --num-times 1000
sedd evaluate --checkpoint louaaron/sedd-small --corpus lambada --split test --last-word
sedd evaluate --checkpoint louaaron/sedd-small --choices questions.jsonl
sedd evaluate --checkpoint runs/plays                                      of a model with labels: each under its own

--last-word and --choices measure what follows a text that is given: see `sedd_train.conditional`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sedd_train import conditional, corpora, evaluate, labels, load, loggers, plotting, provenance, storage, token_cache
from sedd_train.commands.options import Options
from sedd_train.evaluation import ESTIMATORS, bounds, by_noise_level, choose_estimator, mean_of
from sedd_train.objectives import ScoreEntropy
from sedd_train.tokenizers import identity
from sedd_train.tokens import Tokens, numbered, tokenise, unigram_entropy

__all__ = ["parser", "main"]

Results = dict[str, Any]


def parser(prog: str = "sedd evaluate") -> argparse.ArgumentParser:
    """The options."""
    made = Options(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--checkpoint",
        required=True,
        help="a run, a folder with config.json and model.safetensors, or a published name such as louaaron/sedd-small",
    )
    made.add_argument(
        "--corpus",
        help="any corpus that training takes, and lambada (default: what the checkpoint's run was trained on)",
    )
    made.add_argument("--column", default="", help="the column of its text, as in training")
    made.add_argument(
        "--label-column", default="", help="the column of its labels, of a model that was trained on labels"
    )
    made.add_argument("--revision", default="", help="commit, tag or branch of a data set of the hub, as in training")
    made.add_argument("--encoding", default="", help="of text that is neither UTF-8 nor marked, as in training")
    made.add_argument(
        "--split",
        choices=["train", "valid", "test", "all"],
        default="valid",
        help="which part of the corpus; test is valid where it has no such part. Of text that is not divided, "
        "valid is the 5 %% that training would hold out, and all is the whole, for text that the model was not trained "
        "on (default: %(default)s)",
    )
    made.add_argument("--length", type=int, help="tokens a block (default: what the model was trained with)")
    made.add_argument(
        "--blocks", type=int, help="how many blocks, documents or questions, from the start (default: all)"
    )
    made.add_argument("--num-times", type=int, default=128, help="noise levels a block (default: %(default)s)")
    made.add_argument(
        "--estimator",
        choices=["best", *ESTIMATORS],
        default="best",
        help="of the bound: at random times, or at random numbers of masks, which deviates less, where noise is "
        "masks alone; best is the latter where it can be had (default: %(default)s)",
    )
    made.add_argument("--batch-size", type=int, default=8, help="blocks at once (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the times and the noise (default: %(default)s)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    what = made.add_mutually_exclusive_group()
    what.add_argument(
        "--last-word", action="store_true", help="of each document, given what comes before it, as LAMBADA is meant"
    )
    what.add_argument(
        "--choices",
        metavar="FILE",
        type=Path,
        help="take the likeliest of several continuations: JSON lines with context, choices and answer, from 0 on",
    )
    what.add_argument("--levels", metavar="FILE", help="draw where in time the loss comes from into this .png or .svg")
    made.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd evaluate") -> None:
    """Measure, and print what was found."""
    options = parser(prog)
    args = options.parse_args(argv)
    try:
        if args.levels:
            storage.check_output(Path(args.levels))
        net, graph, noise, tokenizer = load(args.checkpoint)
        length = args.length or net.length
        if not 1 <= length <= net.length:
            raise ValueError(f"--length {length}: the model takes 1 to {net.length} tokens")
        if args.split == "all" and (args.corpus is None or args.label_column):
            raise ValueError("--split all is for a --corpus that the model was not trained on, read without labels")
        if args.num_times < 2 or args.num_times % 2:
            raise ValueError(f"--num-times must be even and at least 2, got {args.num_times}")
        if args.choices:
            result, said = _choices(args, net.to(args.device), graph, noise, tokenizer, length)
        elif args.last_word:
            result, said = _last_words(args, net.to(args.device), graph, noise, tokenizer, length)
        elif args.label_column or (args.corpus is None and labels.names_of(net)):
            result, said = _labelled(args, net.to(args.device), graph, noise, tokenizer, length)
        else:
            result, said = _blocks(args, net.to(args.device), graph, noise, tokenizer, length)
    except (ValueError, OSError) as error:
        options.exit(2, f"{options.prog}: error: {error}\n")
    print(loggers.to_json(result) if args.json else said)


def _texts(args: argparse.Namespace) -> corpora.Texts:
    options = {name: getattr(args, name) for name in ("column", "label_column", "revision", "encoding")}
    if args.corpus is None:
        recipe, _ = provenance.trained_on(args.checkpoint)
        args.corpus = recipe.corpus
        options = {name: value for name, value in recipe.texts.items() if name != "eos"}
    return corpora.load_texts(args.corpus, **options)


def _documents(args: argparse.Namespace, tokenizer: Any) -> Iterable[str]:
    """The documents of the part that is asked for. Says so where valid is a cut of undivided text."""
    another, texts = args.corpus is not None, _texts(args)
    if args.split != "all":
        yield from texts.documents(args.split, tokenizer)
        if another and args.split == "valid" and _undivided(texts):
            said = f"note: {args.corpus} is not divided; valid is the 5 % of it that training would hold out"
            print(f"{said}, --split all the whole", file=sys.stderr)
        return
    yield from texts.documents("train", tokenizer)
    if not _undivided(texts):
        raise ValueError(f"--split all: {args.corpus} has parts of its own; name one, train, valid or test")
    yield from texts.documents("valid", tokenizer)


def _undivided(texts: corpora.Texts) -> bool:
    """Whether all files are of one split, so that what is held out is a cut. Known once documents have been read."""
    return {part.split for part in texts.parts() if part.split != "left out"} == {"train"}


def _tokens(args: argparse.Namespace, tokenizer: Any) -> Tokens:
    """The text to measure; of the checkpoint's own run as that read it, where its cache is there still."""
    if args.corpus is None:
        recipe, folder = provenance.trained_on(args.checkpoint)
        if (found := token_cache.read(folder)) is not None and identity(found.tokenizer) == identity(tokenizer):
            args.corpus = recipe.corpus
            return {"train": found.train, "valid": found.valid, "test": found.test}[str(args.split)]
    return tokenise(_documents(args, tokenizer), tokenizer)


def _check_number(args: argparse.Namespace, have: int, what: str) -> int:
    """How many to measure, of so many that there are."""
    if args.blocks is not None and not 1 <= args.blocks <= have:
        raise ValueError(f"--blocks {args.blocks}: there are {have} {what}")
    return int(args.blocks or have)


def _blocks(
    args: argparse.Namespace, net: Any, graph: Any, noise: Any, tokenizer: Any, length: int
) -> tuple[Results, str]:
    text = _tokens(args, tokenizer)
    have = text.blocks(length)
    where = f"the {args.split} part of {args.corpus}"
    if have == 0:
        raise ValueError(f"{where} has {len(text)} tokens, less than one block of {length}")
    blocks = text.block(range(_check_number(args, have, f"blocks of {length} in {where}")), length)
    bound = evaluate(
        net,
        graph,
        noise,
        blocks,
        characters_per_token=text.characters_per_token,
        num_times=args.num_times,
        seed=args.seed,
        chunk=args.batch_size,
        progress=True,
        estimator=args.estimator,
    )
    if args.levels:
        levels = by_noise_level(net, graph, noise, blocks, seed=args.seed, chunk=args.batch_size)
        line = {name: value.tolist() for name, value in vars(levels).items()}
        plotting.noise_levels({args.checkpoint: line}, Path(args.levels))
    unigram = unigram_entropy(text.flat) / math.log(2) / text.characters_per_token
    result = {
        "nats_per_token": bound.nats_per_token,
        "standard_error": bound.standard_error,
        "measurement_error": bound.measurement_error,
        "perplexity": bound.perplexity,
        "bits_per_character": bound.bits_per_character,
        "bits_per_byte": bound.bits_per_character / text.bytes_per_character,
        "unigram_bits_per_character": unigram,
        "blocks": len(blocks),
        "length": length,
        "num_times": args.num_times,
        "estimator": bound.estimator,
    }
    bits = bound.measurement_error / math.log(2) / text.characters_per_token
    return result, (
        f"{len(blocks)} blocks of {length} tokens of {args.corpus}, {args.num_times} noise levels each, by "
        f"{bound.estimator}\n"
        f"bound            {bound.nats_per_token:.4f} ± {bound.measurement_error:.4f} nats a token (standard error of "
        f"the measurement; over such blocks {bound.standard_error:.4f})\n"
        f"perplexity       {bound.perplexity:.2f} ± {bound.perplexity * bound.measurement_error:.2f}\n"
        f"bits a character {bound.bits_per_character:.4f} ± {bits:.4f}  (unigram entropy of the text: {unigram:.4f})\n"
        f"bits a byte      {result['bits_per_byte']:.4f} ± {bits / text.bytes_per_character:.4f}  (of UTF-8)"
    )


def _labelled(
    args: argparse.Namespace, net: Any, graph: Any, noise: Any, tokenizer: Any, length: int
) -> tuple[Results, str]:
    """The documents of each label under it, and under none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("rows of one document are filled up with the end of text, and this tokenizer has none")
    names, texts = labels.names_of(net), _texts(args).cut_for(tokenizer)
    if texts.labels is None:
        raise ValueError(f"{args.corpus} is read without labels: name their column by --label-column")
    numbers = {name: number for number, name in enumerate(names)}
    text = tokenise(texts.documents(args.split), tokenizer)
    found = torch.from_numpy(numbered(texts.labels(args.split), numbers)).long()
    if strangers := list(numbers)[len(names) :]:
        raise ValueError(f"the text has the label {strangers[0]!r}, and this model knows {', '.join(names[:20])}")
    count = _check_number(args, text.documents, f"documents in the {args.split} part of {args.corpus}")
    rows, found = text.rows(range(count), length, tokenizer.eos_token_id), found[:count]
    sizes = text.lengths(range(count), length)
    options: dict[str, Any] = {"num_times": args.num_times, "seed": args.seed, "chunk": args.batch_size}
    options |= {"lengths": sizes, "progress": True}
    objective = ScoreEntropy(graph, noise)
    under = [bounds(net, objective, rows, labels=told, **options) for told in (found, found.new_full((count,), -1))]

    def of(which: torch.Tensor) -> Results:
        share = sizes[which] / length
        mine, none = (mean_of(values[which], text.characters_per_token, share) for values in under)
        gain = mean_of((under[1] - under[0])[which], text.characters_per_token, share)
        return {
            "documents": int(which.sum()),
            "nats_per_token": mine.nats_per_token,
            "standard_error": mine.standard_error,
            "nats_per_token_without": none.nats_per_token,
            "gain": gain.nats_per_token,
            "gain_error": gain.standard_error,
        }

    results = {name: of(found == number) for number, name in enumerate(names) if (found == number).any()}
    whole = of(torch.ones_like(found, dtype=torch.bool))
    lines = [
        f"{name:<20}{each['documents']:>10}{each['nats_per_token']:>12.4f} ± {each['standard_error']:.4f}"
        f"{each['nats_per_token_without']:>16.4f}{each['gain']:>12.4f} ± {each['gain_error']:.4f}"
        for name, each in [*results.items(), ("all", whole)]
    ]
    head = f"{'label':<20}{'documents':>10}{'nats a token':>21}{'without it':>16}{'gain':>21}"
    said = f"{count} documents of {args.corpus}, {args.num_times} noise levels each; errors are over such documents"
    result = {"labels": results, "all": whole, "length": length, "num_times": args.num_times}
    return result, "\n".join([said, head, *lines])


def _measured(
    args: argparse.Namespace,
    net: Any,
    graph: Any,
    noise: Any,
    tokenizer: Any,
    length: int,
    texts: list[tuple[str, str]],
) -> tuple[conditional.Conditional, str]:
    """-log p of the texts' continuations, and the estimator."""
    pairs = conditional.token_pairs(texts, tokenizer)
    tokens = torch.tensor([token for pair in pairs for part in pair for token in part])
    estimator = choose_estimator(args.estimator, graph, tokens)
    bound = conditional.score_bound(net, graph, noise, num_times=args.num_times, estimator=estimator)
    found = conditional.conditional(
        bound, pairs, length=length, device=args.device, seed=args.seed, chunk=args.batch_size, progress=True
    )
    return found, estimator


def _last_words(
    args: argparse.Namespace, net: Any, graph: Any, noise: Any, tokenizer: Any, length: int
) -> tuple[Results, str]:
    documents = [text for text in _documents(args, tokenizer) if text.strip()]
    number = _check_number(args, len(documents), f"documents in the {args.split} part of {args.corpus}")
    texts = [conditional.last_word(text) for text in documents[:number]]
    found, estimator = _measured(args, net, graph, noise, tokenizer, length, texts)
    nats, error = found.per(number)
    per_token, token_error = found.per(float(found.tokens.sum()))
    result = {
        "nats_per_word": nats,
        "standard_error": found.spread,
        "measurement_error": error,
        "perplexity": math.exp(min(nats, 700.0)),
        "nats_per_token": per_token,
        "words": number,
        "num_times": args.num_times,
        "estimator": estimator,
    }
    return result, (
        f"the last words of {number} documents of {args.corpus}, given what comes before them, {args.num_times} noise "
        f"levels each, by {estimator}\n"
        f"bound      {nats:.4f} ± {error:.4f} nats a word (standard error of the measurement; over such words "
        f"{found.spread:.4f}), {per_token:.4f} ± {token_error:.4f} a token\n"
        f"perplexity {result['perplexity']:.2f} ± {result['perplexity'] * error:.2f} a word"
    )


def _choices(
    args: argparse.Namespace, net: Any, graph: Any, noise: Any, tokenizer: Any, length: int
) -> tuple[Results, str]:
    questions = conditional.read_questions(args.choices)
    questions = questions[: _check_number(args, len(questions), f"questions in {args.choices}")]
    texts = conditional.questions_pairs(questions)
    found, estimator = _measured(args, net, graph, noise, tokenizer, length, texts)
    taken = conditional.answers(found, questions)
    result = {**vars(taken), "num_times": args.num_times, "estimator": estimator}
    return result, (
        f"{taken.number} questions of {args.choices}, the likeliest choice given the context, {args.num_times} noise "
        f"levels each, by {estimator}\n"
        f"right         {taken.accuracy:.4f} ± {taken.error(taken.accuracy):.4f}\n"
        f"  a token     {taken.per_token:.4f} ± {taken.error(taken.per_token):.4f}\n"
        f"  a character {taken.per_character:.4f} ± {taken.error(taken.per_character):.4f}\n"
        f"undecided     {taken.undecided:.4f}  (the two likeliest differ by less than 2 standard errors of measurement)"
    )
