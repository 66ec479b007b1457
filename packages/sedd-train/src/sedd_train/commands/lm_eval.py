"""Run tasks of EleutherAI's lm-evaluation-harness on a trained score model (pip install 'sedd-train[eval]').

sedd lm-eval --checkpoint runs/tiny --tasks my_task --include-path my-tasks/
sedd lm-eval --checkpoint louaaron/sedd-small --tasks lambada_openai arc_easy --limit 200 --num-times 64
sedd lm-eval --checkpoint runs/owt --tasks wikitext --output results.json
sedd lm-eval run --model sedd --model_args pretrained=runs/owt --tasks wikitext     # the harness's own command
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sedd_train import loggers
from sedd_train.commands.options import Options

__all__ = ["parser", "main"]

ITS_OWN = ("run", "ls", "validate")  # words of the harness's own command

EPILOG = """\
what is measured
  Likelihoods are the bound of equation 9 with the context given: what a model can be shown to reach, with a measurement
  error that the table does not show and the line below it does. More --num-times make it smaller. Where the model looks
  at unmasked tokens alone (RADD, MDLM), answers of up to six tokens have none. Texts to generate are masks filled in
  after the prompt, one token a step.

the harness's own command
  `sedd lm-eval run`, `ls` and `validate` are those of `lm_eval`, with all their options and with `--model sedd`, whose
  --model_args are pretrained, num_times, exact, steps and seed. Versions after 0.4.13 find the model by themselves, so
  that `lm_eval run --model sedd ...` is the same.
"""


def parser(prog: str = "sedd lm-eval") -> argparse.ArgumentParser:
    """The options."""
    made = Options(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", required=True, help="a run, a folder, or a published name")
    made.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="of the harness, or of --include-path")
    made.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own, in YAML files")
    made.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question (default: the task's)")
    made.add_argument("--limit", type=float, metavar="N", help="documents of each task (default: all)")
    made.add_argument("--num-times", type=int, default=128, help="noise levels a bound (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    made.add_argument("--device", help="where the network runs (default: cuda where there is one)")
    made.add_argument("--output", type=Path, metavar="FILE", help="write what the harness gives into this .json")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd lm-eval") -> None:
    """Run the tasks, and print the harness's table and the error of its numbers."""
    options = parser(prog)
    words = list(sys.argv[1:] if argv is None else argv)
    its_own = bool(words) and words[0] in ITS_OWN
    args = None if its_own else options.parse_args(words)
    if find_spec("lm_eval") is None:
        options.exit(2, f"{prog}: error: this needs lm-evaluation-harness: pip install 'sedd-train[eval]'\n")
    if args is None:
        of_the_harness(words)
        return
    try:
        print(measured(args))
    except (ValueError, OSError, KeyError) as error:
        options.exit(2, f"{prog}: error: {error}\n")


def of_the_harness(words: Sequence[str]) -> None:
    """Run `lm_eval` with these words, and with the model `sedd` for it to find."""
    from lm_eval.__main__ import cli_evaluate

    import sedd_train.harness  # noqa: F401 (registers the model, which 0.4.13 does not look for in other packages)

    sys.argv = ["lm_eval", *words]  # it reads no other
    cli_evaluate()


def measured(args: argparse.Namespace) -> str:
    """The harness's table, and how well its likelihoods are known."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from sedd_train.harness import SeddLM

    if args.output:
        args.output.touch()  # before the work, not after it
    tasks = TaskManager(include_path=args.include_path)
    unknown = [name for name in args.tasks if not tasks.match_tasks([name])]
    if unknown:
        raise ValueError(f"there is no task {', '.join(unknown)}; those of your own are found by --include-path")
    how = {"num_times": args.num_times, "batch_size": args.batch_size, "seed": args.seed, "device": args.device}
    model = SeddLM(args.checkpoint, **how)
    found: Any = simple_evaluate(
        model=model,
        tasks=args.tasks,
        task_manager=tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        log_samples=False,
    )
    if args.output:
        args.output.write_text(loggers.to_json({name: found[name] for name in ("results", "n-samples")}, indent=1))
    return f"{make_table(found)}\n{model.stated_error()}\n"
