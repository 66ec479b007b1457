"""Recipes: all the numbers of a training run, in one flat table, read from TOML and overridden on the command line.

A recipe file groups its values in sections for the reader; the names are unique, and the sections carry no meaning.
A value that a file leaves out has the default of `Recipe`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sedd_train import checkpoint
from sedd_train.deepspeed_options import check_options
from sedd_train.sections import MASKING, described
from sedd_train.toml import as_toml

__all__ = ["Recipe", "recipe_names", "read_recipe", "for_run", "check_run", "add_arguments", "override", "to_toml"]

OPTIMIZERS = ("adamw", "muon")
OBJECTIVES = ("score-entropy", "d3pm", "autoregressive")
NETWORKS = {"sedd": "", "radd": "absorb", "mdlm": "absorb", "udlm": "uniform", "causal": "absorb"}  # and their graphs
ATTENTIONS = ("sdpa", "flex", "flash", "flash-4")


def _value(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """The values of one training run; `check` says which combinations make no sense."""

    corpus: str = _value(
        "sotu",
        "what to train on: a file or folder (text, Markdown, JSON, CSV, FASTA, parquet, arrow, compressed or not), "
        "'sotu', 'sotu-text8' (the same speeches in text8's alphabet), 'openwebtext', 'text8', 'lm1b', 'wikitext2', "
        "'wikitext103', 'ptb' (with ':PATH' from files here, else from the hub), or 'hub:NAME[:CONFIG]'",
    )
    column: str = _value("", "the column of the text; by default the one called text, content, sentence, sequence, ...")
    label_column: str = _value("", "the column of labels, on which the network is conditioned; needs --no-packing")
    drop_labels: float = _value(0.1, "share of the samples trained without their label, for guidance")
    revision: str = _value("", "commit, tag or branch of a data set of the hub; by default its main branch as of now")
    valid: str = _value("", "a file or folder to watch; by default what the corpus calls so, or some documents of it")
    encoding: str = _value("", "of text that is neither UTF-8 nor marked as UTF-16, such as cp1252 or shift_jis")
    tokenizer: str = _value(
        "gpt2",
        "'gpt2', 'bpe:SIZE' (trained on the corpus), 'bytes', 'characters' (text8's), 'characters:ALPHABET', 'dna', "
        "'protein', a folder, a tokenizer.json, or a name on the hub (with '@REVISION')",
    )
    eos: str = _value("", "the token put after every document, or none; by default the tokenizer's end of text")
    length: int = _value(1024, "tokens a block; 0: what the checkpoint of --init takes")
    packing: bool = _value(
        True, "cut blocks out of all documents one after another; false: one document a row, cut or padded"
    )
    streaming: bool = _value(False, "tokenise a data set of the hub as it comes, without storing it first")
    crops: bool = _value(False, "train on crops that begin anywhere, in place of the text cut into blocks once")

    objective: str = _value("score-entropy", "what is trained for: score-entropy, or d3pm or autoregressive to compare")
    network: str = _value(
        "sedd",
        "sedd; radd or mdlm, normalised, so that score entropy is masked cross-entropy; udlm, the same for the "
        "uniform graph; causal (autoregressive)",
    )
    d3pm_steps: int = _value(1000, "T, the steps of the d3pm objective")
    init: str = _value(
        "",
        "begin from this checkpoint (--resume goes on with a run): a run, a folder, or NAME[@REVISION] on the hub, "
        "ours or one of SEDD, RADD, MDLM, UDLM or Duo. Tokenizer, graph, noise and sizes are then its own",
    )
    train_layers: str = _value(
        "", "train only the weights that one of these patterns fits, such as 'blocks.3.*,output_layer.*'; needs --init"
    )
    lora: int = _value(0, "rank of LoRA: train two thin matrices beside each of the blocks' in its place; needs --init")
    lora_alpha: float = _value(16.0, "LoRA adds alpha / rank times their product")
    graph: str = _value(
        "absorb",
        "forward process: absorb, uniform, ordinal, hybrid:uniform_rate=X,mask_rate=X, or "
        "masked:tokens=ordinal,rate=X,mask_rate=X; those that mask also take mask_id=N",
    )
    noise: str = _value(
        "loglinear", "noise schedule: loglinear, cosine, polynomial:power=X (each may say eps=X), geometric or linear"
    )
    sigma_min: float = _value(1e-4, "least total noise of the geometric and the linear schedule")
    sigma_max: float = _value(20.0, "largest total noise of the geometric and the linear schedule")
    width: int = _value(768, "features a position")
    depth: int = _value(12, "transformer blocks")
    heads: int = _value(12, "attention heads")
    cond_dim: int = _value(128, "features of the noise embedding")
    dropout: float = _value(0.1, "dropout probability")
    scale_by_sigma: bool = _value(True, "subtract log(expm1 sigma) and log(N - 1) from the logits (graphs that mask)")
    informed_start: bool = _value(
        False,
        "begin with the tokens' frequencies and with attention on the neighbours (absorb); from a checkpoint, with its "
        "head moved to the frequencies of the new text",
    )

    steps: int = _value(400_000, "optimiser steps")
    batch_size: int = _value(512, "blocks a step, over all ranks")
    micro_batch_size: int = _value(0, "blocks a rank takes at once; 0: its whole share, without accumulation")
    optimizer: str = _value(
        "adamw", "adamw, or muon: orthogonal steps for the matrices of the blocks, AdamW for the rest (zero_stage 0)"
    )
    learning_rate: float = _value(3e-4, "learning rate after the warm-up")
    decay_to: float = _value(1.0, "the learning rate's last value, as a fraction; 1 keeps it constant (else cosine)")
    beta1: float = _value(0.9, "AdamW's first decay rate")
    beta2: float = _value(0.999, "AdamW's second decay rate")
    eps: float = _value(1e-8, "AdamW's epsilon")
    weight_decay: float = _value(0.0, "weight decay, of matrices")
    warmup: int = _value(2500, "steps over which the learning rate rises linearly")
    clip: float = _value(1.0, "largest norm of the gradient; 0: no clipping")
    ema: float = _value(0.9999, "decay of the weights' moving average")
    t_min: float = _value(1e-3, "least time in training")
    precision: str = _value("fp32", "fp32, bf16, or fp16 where a card has no bf16 (autocast over float32 weights)")
    zero_stage: int = _value(1, "ZeRO stage 0 to 3: what several ranks share (1 optimiser, 2 gradients, 3 weights)")
    offload: bool = _value(
        False, "keep masters and moments, in stage 3 weights too, in the machine's memory (ZeRO 1 to 3)"
    )
    activation_checkpointing: bool = _value(False, "recompute each block in the backward pass, to save memory")
    compile: bool | None = _value(
        None, "compile the network by torch.compile: a slow first step, then faster ones; by default on a GPU"
    )
    attention: str = _value("sdpa", "what attends: sdpa, or on a GPU flex, flash (flash-attn 2) or flash-4, with bf16")
    deepspeed: dict[str, Any] = field(default_factory=dict, metadata={"help": "more options of DeepSpeed's config"})
    seed: int = _value(0, "seed of everything random")
    max_skipped: int = _value(10, "non-finite steps in a row after which training stops")

    log_every: int = _value(10, "steps between lines of the log")
    evaluate_every: int = _value(5000, "steps between validation bounds and samples")
    evaluate_blocks: int = _value(256, "validation blocks for the bound")
    evaluate_times: int = _value(16, "noise levels for each of these blocks")
    checkpoint_every: int = _value(5000, "steps between checkpoints")
    keep: int = _value(2, "checkpoints kept, besides the best")
    keep_every: int = _value(0, "keep the checkpoint of every multiple of so many steps for ever; 0: none")
    sample_steps: int = _value(128, "steps of the sampler for samples while training")

    def check(self) -> Recipe:
        """The recipe itself.

        Raises:
            ValueError: a value, or a pair of them, makes no sense; the message names it and says what would.
        """
        positive = ["width", "depth", "heads", "cond_dim", "steps", "batch_size", "learning_rate", "eps"]
        positive += ["max_skipped", "log_every", "evaluate_every", "evaluate_blocks", "evaluate_times"]
        positive += ["checkpoint_every", "keep", "sample_steps", "lora_alpha"]
        for name, value in dataclasses.asdict(self).items():
            _require(not isinstance(value, float) or math.isfinite(value), name, value, "a finite number")
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ["length", "lora", "micro_batch_size", "keep_every", "warmup", "clip", "weight_decay", "seed"]:
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ["dropout", "drop_labels", "ema", "beta1", "beta2"]:
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        _require(0 < self.t_min < 1, "t_min", self.t_min, "a time in (0, 1)")
        _require(0 <= self.decay_to <= 1, "decay_to", self.decay_to, "a fraction in [0, 1]")
        _require(
            0 < self.sigma_min < self.sigma_max, "sigma_min", self.sigma_min, f"in (0, sigma_max = {self.sigma_max})"
        )
        graph, _ = described("graph", self.graph)["type"], described("noise", self.noise)
        for name in ("train_layers", "lora"):
            value = getattr(self, name)
            _require(bool(self.init) or not value, name, value, "a checkpoint to begin from (--init), too")
        _require(not (self.lora and self.train_layers), "train_layers", self.train_layers, "nothing beside lora")
        _require(self.precision in ("fp32", "bf16", "fp16"), "precision", self.precision, "fp32, bf16 or fp16")
        _require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "0, 1, 2 or 3")
        _require(not (self.offload and self.zero_stage == 0), "offload", True, "false without ZeRO (zero_stage = 0)")
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, ", ".join(OPTIMIZERS))
        muon = self.optimizer == "muon"
        why = f"adamw with zero_stage = {self.zero_stage}, whose pieces cut matrices apart; muon needs --zero-stage 0"
        _require(not (muon and self.zero_stage), "optimizer", self.optimizer, why)
        _require(not (muon and self.lora), "optimizer", self.optimizer, "adamw for LoRA's thin matrices")
        _require(self.packing or not self.crops, "crops", True, "false without packing")
        labels = bool(self.label_column)
        _require(
            not (labels and self.packing), "label_column", self.label_column, "rows of one document, --no-packing, too"
        )
        free = self.network in ("radd", "causal")
        _require(not (labels and free), "label_column", self.label_column, f"none for {self.network}, which takes none")
        _require(self.packing or not self.compile, "compile", True, "false without packing: rows have many lengths")
        _require(self.attention in ATTENTIONS, "attention", self.attention, ", ".join(ATTENTIONS))
        flash = self.attention.startswith("flash")
        _require(not (flash and self.precision != "bf16"), "attention", self.attention, "sdpa or flex with fp32")
        other = self.attention != "sdpa" and self.network == "causal"
        _require(not other, "attention", self.attention, "sdpa for causal, which attends to what came before")
        check_options(self.deepspeed)
        _require(self.objective in OBJECTIVES, "objective", self.objective, ", ".join(OBJECTIVES))
        _require(self.network in NETWORKS, "network", self.network, ", ".join(NETWORKS))
        _require(self.d3pm_steps > 0, "d3pm_steps", self.d3pm_steps, "a positive number")
        causal = self.objective == "autoregressive"
        _require((self.network == "causal") == causal, "network", self.network, "causal if and only if autoregressive")
        theirs = NETWORKS[self.network]
        _require(graph == theirs or not theirs, "graph", self.graph, f"{theirs} for {self.network}")
        informed = self.informed_start and graph != "absorb"
        _require(not informed, "informed_start", True, "false for another graph than absorb")
        scaled = self.scale_by_sigma and graph not in (*MASKING, "own")
        _require(
            not scaled, "scale_by_sigma", True, f"false for the graph {self.graph}, whose scores have no such factor"
        )
        _require(self.width % self.heads == 0, "width", self.width, f"a multiple of heads = {self.heads}")
        return self

    @property
    def texts(self) -> dict[str, Any]:
        """What the recipe says of its text, as options of `token_cache.prepare`."""
        names = ("column", "label_column", "revision", "valid", "encoding", "streaming", "eos")
        return {name: getattr(self, name) for name in names}

    def micro_batches(self, world_size: int) -> int:
        """How many micro-batches all ranks together run in a step.

        Raises:
            ValueError: the ranks cannot divide the batch into micro-batches of this size.
        """
        micro = self.micro_batch_size or self.batch_size // world_size
        if micro == 0 or self.batch_size % (micro * world_size):
            size = f"micro-batches of {micro}" if self.micro_batch_size else "equal shares"
            raise ValueError(
                f"batch_size = {self.batch_size} cannot be divided over {world_size} ranks in {size}; "
                f"{self._division(world_size)}"
            )
        return self.batch_size // micro

    def stage(self, world_size: int) -> int:
        """The ZeRO stage on so many ranks. One has nobody to share with: unless it offloads, it goes without ZeRO.

        The numbers are the same to rounding, without the copies of weights and gradients that are there to be shared.
        """
        return self.zero_stage if world_size > 1 or self.offload else 0

    def _division(self, world_size: int) -> str:
        """What makes the batch divisible: first what leaves the experiment as it is."""
        share, rest = divmod(self.batch_size, world_size)
        if share and not rest:
            micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= self.micro_batch_size)
            return f"choose --micro-batch-size {micro}, which changes no number of the run"
        ranks = max(count for count in range(1, world_size) if self.batch_size % count == 0)
        near = world_size * max(1, round(self.batch_size / world_size))
        return (
            f"start {ranks} ranks, or choose a multiple of {world_size}, for instance --batch-size {near}, which is "
            "another experiment"
        )


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: expected {expected} (--{name.replace('_', '-')})")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    files = resources.files("sedd_train").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_recipe(name: str | Path) -> Recipe:
    """A recipe of the package by its name, or of a file by its path (which ends in .toml).

    Raises:
        ValueError: no such recipe, not TOML, an unknown key, a value of the wrong type.
    """
    if str(name).endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"no recipe file {path}; the package has the recipes {', '.join(recipe_names())}")
        text = path.read_text(encoding="utf-8")
    elif str(name) in recipe_names():
        text = resources.files("sedd_train").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"unknown recipe {str(name)!r}: the package has {', '.join(recipe_names())}; a file's name ends in .toml"
        )
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {name} is not TOML: {error}") from None
    values: dict[str, Any] = {}
    for key, value in sections.items():
        values.update(value if isinstance(value, dict) and key != "deepspeed" else {key: value})
    return override(Recipe(), values, source=f"recipe {name}")


FIXED = (  # what a run keeps to its end: another value would make it another run
    *("corpus", "column", "label_column", "drop_labels", "revision", "valid", "encoding", "tokenizer", "eos", "length"),
    *("init", "train_layers", "lora", "lora_alpha", "objective", "network", "d3pm_steps", "graph", "noise"),
    *("sigma_min", "sigma_max", "width", "depth", "heads", "cond_dim", "scale_by_sigma"),
    *("batch_size", "seed", "crops", "packing", "optimizer"),
)
OF_A_CHECKPOINT = (  # what a run that begins from one takes from it
    *("objective", "network", "d3pm_steps", "graph", "noise", "sigma_min", "sigma_max"),
    *("width", "depth", "heads", "cond_dim", "scale_by_sigma"),
)


def for_run(output: Path, name: str | Path, values: dict[str, Any], *, resume: bool | Literal["auto"]) -> Recipe:
    """The recipe of a run: a new one's by name, a resumed one's as it was started, each with values replaced.

    Args:
        output: the run's folder, where a run that has started has its `recipe.toml`.
        name: the recipe of a new run.
        values: what the command line replaces.
        resume: whether to continue the run in `output`; "auto": if it has a checkpoint.

    Raises:
        ValueError: as `check_run`; or a value is wrong.
    """
    resume = checkpoint.exist(output / "checkpoints") if resume == "auto" else resume
    theirs = [value for value in OF_A_CHECKPOINT if value in values]
    if not resume and values.get("init") and theirs:
        options = ", ".join(f"--{value.replace('_', '-')}" for value in theirs)
        raise ValueError(f"with --init the checkpoint says what {options} would: leave it out")
    recipe = override(_started(output) if resume else read_recipe(name), values)
    check_run(recipe, output, resume=resume)
    return recipe


def check_run(recipe: Recipe, output: Path, *, resume: bool) -> None:
    """A run of this recipe may begin in this folder, or go on there.

    Raises:
        ValueError: there is no run to continue, or one that would be overwritten; or a value is another than the run
            was started with, and one that a run cannot change on its way.
    """
    if not recipe.init and not (recipe.length and recipe.tokenizer):
        raise ValueError("length and tokenizer are those of a checkpoint to begin from: give it, --init NAME_OR_FOLDER")
    if not resume:
        if checkpoint.exist(output / "checkpoints"):
            raise ValueError(
                f"{output} holds a run with checkpoints: continue it with --resume, or give another --output; "
                "--resume auto begins where there is none and goes on where there is one"
            )
        return
    started = _started(output)
    for value in FIXED:
        before, after = getattr(started, value), getattr(recipe, value)
        if before != after:
            raise ValueError(f"{value} = {after!r}, but the run in {output} was started with {before!r}: leave it out")


def _started(output: Path) -> Recipe:
    """The recipe that the run in this folder was started with."""
    stored = output / "recipe.toml"
    if not stored.is_file():
        raise ValueError(f"there is no run to continue in {output} (no recipe.toml); start it without --resume")
    return read_recipe(stored)


def override(recipe: Recipe, values: dict[str, Any], source: str = "command line") -> Recipe:
    """The recipe with some values replaced. With another graph come its scale_by_sigma, informed_start and network.

    Raises:
        ValueError: an unknown name or a value of the wrong type.
    """
    types = get_type_hints(Recipe)
    if values.get("graph", recipe.graph) != recipe.graph:  # what depends on the graph follows it, unless it is told
        kind = str(values["graph"]).partition(":")[0]
        informed = recipe.informed_start and kind == "absorb"
        fits = NETWORKS[recipe.network] in ("", kind) or recipe.objective == "autoregressive"
        network = recipe.network if fits else "sedd"
        values = {"scale_by_sigma": kind in MASKING, "informed_start": informed, "network": network} | values
    if values.get("init", recipe.init) != recipe.init:  # whose tokenizer it then is, unless it is told
        values = {"tokenizer": ""} | values
    for name, value in values.items():
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            raise ValueError(f"{source}: unknown value {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if types[name] is float and type(value) is int:
            values = values | {name: float(value)}
        elif type(value) is not _kind(types[name]):
            raise ValueError(f"{source}: {name} = {value!r} should be of type {_kind(types[name]).__name__}")
    return dataclasses.replace(recipe, **values).check()


def _kind(hint: Any) -> type:
    """The type of a value: of bool | None and dict[str, Any] bool and dict."""
    kind: type = get_origin(hint) or hint
    return next(part for part in get_args(hint) if part is not type(None)) if kind is UnionType else kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each of a recipe's values, absent from the result unless given; `deepspeed` is a file's alone."""
    types = get_type_hints(Recipe)
    group = parser.add_argument_group("recipe values", "each overrides the recipe's")
    for value in dataclasses.fields(Recipe):
        option = f"--{value.name.replace('_', '-')}"
        help = value.metadata["help"].replace("%", "%%")
        kind = _kind(types[value.name])
        if kind is dict:
            continue
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction
            group.add_argument(option, default=argparse.SUPPRESS, action=action, help=help)
        else:
            metavar = {int: "N", float: "X", str: "S"}[kind]
            group.add_argument(option, default=argparse.SUPPRESS, type=kind, metavar=metavar, help=help)


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML text that `read_recipe` reads back; `compile` is left out where nothing was said of it."""
    return as_toml(dataclasses.asdict(recipe))
