"""Train a score-entropy discrete diffusion model on text, with DeepSpeed.

sedd train --recipe tiny                                a small model on two CPU cores, in minutes
sedd train --recipe tiny --corpus my-texts/ --output runs/mine
sedd train --recipe tiny --resume                       continue from the last checkpoint
deepspeed --module sedd_train train                     the paper's SEDD small, absorbing, on OpenWebText
deepspeed --num_gpus 8 --module sedd_train train --zero-stage 2      on eight GPUs, with ZeRO 2
torchrun --standalone --nproc_per_node 2 -m sedd_train train --recipe tiny --steps 500
sedd train --plan 8                                     what each of 8 ranks would hold, for each stage
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from sedd_train import SetupError, TrainingError, distributed, plan, recipes, train
from sedd_train.commands.options import Options
from sedd_train.distributed import say

__all__ = ["parser", "main"]


def parser(prog: str = "sedd train") -> argparse.ArgumentParser:
    """The options."""
    made = Options(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --checkpoint is an option of other commands, and not short for --checkpoint-every
    )
    made.add_argument(
        "--recipe",
        default="sedd-small-absorb-owt",
        metavar="NAME",
        help=f"{', '.join(recipes.recipe_names())}, or the path of a .toml file (default: %(default)s)",
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE)")
    made.add_argument(
        "--resume",
        nargs="?",
        const="always",
        choices=["always", "auto"],
        help="continue the run in that folder from its last checkpoint; auto: if it has one, else begin. That line a "
        "scheduler may repeat",
    )
    made.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/cache"),
        metavar="DIR",
        help="folder of tokenised text, shared by runs (default: %(default)s)",
    )
    made.add_argument(
        "--plan",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="say what the run would do and hold, on so many ranks, and stop (default: as many as are started)",
    )
    made.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the log's numbers for TensorBoard too, if it is installed (default: yes)",
    )
    made.add_argument(
        "--wandb", metavar="PROJECT", default="", help="send them to this project of Weights & Biases too"
    )
    made.add_argument(
        "--peak-tflops",
        type=float,
        default=0.0,
        metavar="X",
        help="what one device can do at best, 10^12 operations a second, for the utilisation (MFU); known of most GPUs",
    )
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    recipes.add_arguments(made)
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd train") -> None:
    """Train, or say what a run would do; ends the process, with 2 where something is wrong beforehand and 1 later."""
    run(parser(prog).parse_args(argv), prog=prog)


def run(args: argparse.Namespace, *, prog: str) -> None:
    """What `main` does with the options that were given."""
    output = args.output or Path("runs") / Path(args.recipe).stem
    given = {name: value for name, value in vars(args).items() if name in recipes.Recipe.__dataclass_fields__}

    resume: bool | Literal["auto"] = "auto" if args.resume == "auto" else args.resume == "always"

    try:
        recipe = recipes.for_run(output, args.recipe, given, resume=resume)
        if args.plan is not None:
            say(plan.describe(recipe, args.plan or distributed.place()[1], args.cache))
            sys.exit(0)
    except (ValueError, OSError) as error:
        _refuse(f"{prog}: error: {distributed.agree(str(error))}")

    try:
        result = train(
            recipe,
            output=output,
            resume=resume,
            cache=args.cache,
            tensorboard=args.tensorboard,
            wandb=args.wandb,
            peak_tflops=args.peak_tflops,
        )
    except SetupError as error:
        _refuse(f"{prog}: error: {error}")
    except TrainingError as error:
        say(f"{prog}: error: {error}")
        distributed.finish(1)
    if recipe.objective == "score-entropy" and not result.stopped:
        say(f"sample from it with     sedd sample --checkpoint {shlex.quote(str(output / 'export'))}")
    distributed.finish()


def _refuse(error: str) -> NoReturn:
    """Say what is wrong, once, and end every rank."""
    say(error)
    if distributed.place()[1] > 1:
        distributed.finish(2)
    sys.exit(2)
