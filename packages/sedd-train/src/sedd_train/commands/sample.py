"""Write text with a trained score model: from nothing, after a prefix, before a suffix, or into blanks.

sedd sample --checkpoint runs/tiny/export
sedd sample --checkpoint runs/tiny/export --prefix "Fellow citizens" --num 4
sedd sample --checkpoint runs/tiny/export --text "The state of the ____ is ________."
sedd sample --checkpoint runs/tiny/export --watch --page sample.html
sedd sample --checkpoint runs/plays --label comedy --guidance 2
sedd sample --checkpoint louaaron/sedd-small --method unmasking --steps 1024 --top-p 0.95
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from sedd_samplers import (
    Ancestral,
    ConfidenceUnmasking,
    Euler,
    FirstHitting,
    Method,
    PredictorCorrector,
    Remasking,
    State,
    TauLeaping,
    Trapezoidal,
    Tweedie,
    Uniformization,
    Unmasking,
    at_rate,
)
from sedd_samplers.views import live, record
from torch import Tensor
from tqdm import tqdm

from sedd_train import load, pipeline, storage
from sedd_train.commands.options import Options
from sedd_train.pipelines import controls_of

__all__ = ["parser", "main"]

METHODS: dict[str, Method] = {
    "tweedie": Tweedie(),
    "euler": Euler(),
    "tau-leaping": TauLeaping(),
    "ancestral": Ancestral(),
    "trapezoidal": Trapezoidal(),
    "corrected": PredictorCorrector(),
    "uniformization": Uniformization(),
    "unmasking": Unmasking(),
    "first-hitting": FirstHitting(),
    "remasking": Remasking(at_rate(1.0)),
    "confidence": ConfidenceUnmasking(),
}

EPILOG = """\
how it works
  A sample begins as noise (all masks, or random tokens: as the model was trained) and is denoised in --steps steps from
  t = 1 to 0. A prompt is a set of positions that hold their tokens all the while; the others are filled in given these,
  on both sides. --watch shows it happen. For a model whose tokens are noised, not masked, a prompt that holds still is
  an approximation; from Python, sedd_samplers.Particles is exact as particles grow.

methods
  tweedie         each position by its own exact law; what it costs is that positions of one step do not see each other.
                  The default. More steps, less of that
  euler           the reverse rates held still over the step; cruder, the paper's first
  tau-leaping     the same rates, without probabilities below 0
  ancestral       tweedie, after the model's law of the clean token is made to sum to 1
  trapezoidal     two evaluations a step, a smaller error for the same work
  corrected       tweedie and a corrector step, which makes up for errors: two evaluations a step
  uniformization  exact on any model, some four evaluations a jump whatever --steps says
  for models that mask:
  unmasking       tweedie's law at a lower price: the head runs only where a token appears. With many steps the fastest
  first-hitting   exact, one evaluation a token whatever --steps says
  remasking       tweedie that also takes tokens back: a second thought for each
  confidence      the likeliest token first, as masked language models are decoded; not a sample of the model's law

--temperature, --top-k and --top-p act on the law of the clean token at each position, in this order, and need a model
that masks. Below 1, or with few tokens, text gets plainer and repeats itself: look at several samples before you judge.
"""


def parser(prog: str = "sedd sample") -> argparse.ArgumentParser:
    """The options."""
    made = Options(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint(made)
    prompt = made.add_argument_group("prompt")
    prompt.add_argument("--prefix", default="", metavar="TEXT", help="text that every sample begins with")
    prompt.add_argument("--suffix", default="", metavar="TEXT", help="text that every sample ends with")
    prompt.add_argument(
        "--text",
        help=r'text with blanks, one underscore for each free token: "The ____ of the Union"; \_ is an underscore',
    )
    prompt.add_argument(
        "--length",
        type=int,
        help="tokens a sample (default: what the model was trained with; where that were rows of many lengths, lengths "
        "drawn from theirs)",
    )
    add_drawing(made)
    return made


def add_checkpoint(made: argparse.ArgumentParser) -> None:
    """Add the option that says which model."""
    made.add_argument(
        "--checkpoint",
        required=True,
        help="a run's folder, a folder with config.json and model.safetensors, or a published name such as "
        "louaaron/sedd-small",
    )


def add_drawing(made: argparse.ArgumentParser) -> None:
    """Add the options that say how, and how many, samples are drawn and shown."""
    drawing = made.add_argument_group("drawing")
    drawing.add_argument("--num", type=int, default=2, help="how many samples to draw (default: %(default)s)")
    drawing.add_argument(
        "--method", choices=METHODS, default="tweedie", help="the reverse step, see below (default: %(default)s)"
    )
    drawing.add_argument(
        "--steps", type=int, default=128, help="reverse steps; more is better and slower (default: %(default)s)"
    )
    drawing.add_argument("--label", help="that the samples are of, of a model that was trained on labels")
    drawing.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="weight of the label: 1 for the law of its texts, more for texts that are more clearly of it (default: 1)",
    )
    drawing.add_argument(
        "--temperature", type=float, default=1.0, help="of each token's law; below 1 for likelier tokens (default: 1)"
    )
    drawing.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens (default: from all)")
    drawing.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of that mass (default: 1, from all)"
    )
    drawing.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first sample, the next one has the next seed; the same seed gives the same sample, whatever --num "
        "(default: %(default)s)",
    )
    drawing.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the network runs (default: %(default)s)",
    )
    views = made.add_argument_group("views")
    views.add_argument("--watch", action="store_true", help="show the first sample while it comes to light")
    views.add_argument("--page", metavar="FILE", help="write a page to step through the samples, such as sample.html")


def check(args: argparse.Namespace) -> None:
    """ValueError for options that contradict each other, before anything is loaded."""
    if args.text and (args.prefix or args.suffix):
        raise ValueError("--text holds the whole prompt: it cannot be combined with --prefix or --suffix")
    if args.text and args.length:
        raise ValueError("--text is as long as it is: it cannot be combined with --length")
    for name in ("num", "steps", "length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.guidance != 1 and args.label is None:
        raise ValueError(f"--guidance {args.guidance} is the weight of a label: give --label, too")
    if not 0 <= args.guidance < math.inf:
        raise ValueError(f"--guidance must be 0 or more, got {args.guidance}")
    controls_of(args.temperature, args.top_k, args.top_p)


def run(args: argparse.Namespace) -> tuple[Tensor, list[str], int, float]:
    """The samples (B, L), their texts, how many tokens these have, and the seconds that they took."""
    check(args)
    if args.page:
        storage.check_output(Path(args.page))
    write = pipeline(load(args.checkpoint), device=args.device)
    longest = write.model.net.length
    if args.length is not None and args.length > longest:
        raise ValueError(f"--length {args.length} is longer than the {longest} tokens that this model was trained with")
    prompt = {name: getattr(args, name) for name in ("text", "prefix", "suffix", "length", "label")}
    canvas = write.canvas(args.num, args.seed, **prompt)
    names = ("seed", "label", "guidance", "steps", "temperature", "top_k", "top_p")
    drawing = {name: getattr(args, name) for name in names}
    states = write.states(canvas, method=METHODS[args.method], **drawing)
    mask_id = write.model.graph.mask_id

    def text(token: int) -> str:
        characters: str = write.model.tokenizer.decode([token])
        return characters

    views: Iterator[State] = states
    if args.page:
        views = record(views, args.page, text, mask_id=mask_id, given=canvas.given)
    if args.watch:
        views = live(views, text, mask_id=mask_id)
    else:
        views = tqdm(views, total=args.steps + 2, desc="sampling", unit="state")
    start = time.perf_counter()
    with torch.inference_mode():
        for state in views:
            x = state.x
    seconds = time.perf_counter() - start
    return x, write.texts(x, canvas.lengths), sum(canvas.lengths), seconds


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd sample") -> Tensor:
    """Draw the samples and print them; also returns them, (B, L); what is behind the length of one means nothing."""
    return draw(parser(prog), argv)


def draw(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> Tensor:
    """What `main` does, for options that may be another command's."""
    args = options.parse_args(argv)
    try:
        x, texts, count, seconds = run(args)
    except (ValueError, OSError) as error:
        options.exit(2, f"{options.prog}: {error}\n")
    for i, text in enumerate(texts, 1):
        print(f"\n--- sample {i} of {args.num} " + "-" * 50)
        print(text)
    print(f"\n{count} tokens in {seconds:.1f} s ({args.steps} steps of {args.method}, seed {args.seed})")
    return x
