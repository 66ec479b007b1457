"""Write text with a trained score model: unconditionally, after a prefix, before a suffix, or into blanks.

python integration/sample.py --checkpoint runs/tiny/export
python integration/sample.py --checkpoint runs/tiny/export --prefix "Fellow citizens" --num 4
python integration/sample.py --checkpoint runs/tiny/export --text "The state of the ____ is ________."
python integration/sample.py --checkpoint louaaron/sedd-small --steps 256 --length 512 --top-p 0.95
python integration/sample.py --checkpoint runs/tiny/export --watch --page sample.html
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from sedd_samplers import Euler, Method, Tweedie, Unmasking, controlled, live, record, temperature, top_p, trajectory
from sedd_train import load, prompts
from tqdm import tqdm

METHODS: dict[str, Callable[[], Method]] = {"tweedie": Tweedie, "euler": Euler, "unmasking": Unmasking}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--checkpoint",
    required=True,
    help="a folder with config.json and model.safetensors, or a published name such as louaaron/sedd-small",
)
parser.add_argument("--prefix", default="", help="text that every sample begins with")
parser.add_argument("--suffix", default="", help="text that every sample ends with")
parser.add_argument(
    "--text", help='text with blanks to fill, one underscore for each free token: "The ____ of the Union"'
)
parser.add_argument("--num", type=int, default=2, help="how many samples to draw (default: %(default)s)")
parser.add_argument("--length", type=int, help="tokens a sample (default: what the model was trained with)")
parser.add_argument(
    "--steps", type=int, default=128, help="reverse steps; more is better and slower (default: %(default)s)"
)
parser.add_argument(
    "--method",
    choices=METHODS,
    default="tweedie",
    help="the reverse step: tweedie is equation 19, euler equation 17; unmasking is tweedie's for models that mask, "
    "with the network's head only where something moves (default: %(default)s)",
)
parser.add_argument("--temperature", type=float, default=1.0, help="of each token's law (default: %(default)s)")
parser.add_argument(
    "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of that mass (default: %(default)s)"
)
parser.add_argument("--watch", action="store_true", help="show the first sample while it comes to light")
parser.add_argument("--page", help="write a page to step through the samples, such as sample.html")
parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples (default: %(default)s)")
parser.add_argument(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    help="where the network runs (default: %(default)s)",
)
args = parser.parse_args()
if args.text and (args.prefix or args.suffix):
    parser.error("--text holds the whole prompt: it cannot be combined with --prefix or --suffix")
if args.num < 1 or args.steps < 1:
    parser.error(f"--num and --steps must be at least 1, got {args.num} and {args.steps}")

try:
    net, graph, noise, tokenizer = load(args.checkpoint)
    net = net.to(args.device).eval()
    controls = [temperature(args.temperature)] * (args.temperature != 1) + [top_p(args.top_p)] * (args.top_p != 1)
    if args.method == "unmasking" and graph.mask_id is None:
        raise ValueError("--method unmasking needs a model that masks")
    if controls and graph.mask_id is None:
        raise ValueError(
            "--temperature and --top-p need a model that masks: they act on p(x0 | x_t), which cannot be told "
            "from this one's score at high noise"
        )
    length = args.length or net.length
    if length > net.length:
        raise ValueError(f"--length {length} is longer than the {net.length} tokens that this model was trained with")
    if args.text:
        prompt = prompts.with_blanks(tokenizer, args.text, length)
    else:
        prompt = prompts.around(tokenizer, length, prefix=args.prefix, suffix=args.suffix)
except (ValueError, OSError) as error:
    parser.exit(2, f"{parser.prog}: {error}\n")

x, given = (part.to(args.device).expand(args.num, -1) for part in prompt)
states = trajectory(
    controlled(net, graph, *controls) if controls else net,
    graph,
    noise,
    x=x,
    given=given,
    steps=args.steps,
    method=METHODS[args.method](),
    generator=torch.Generator(args.device).manual_seed(args.seed),
)


def text(token: int) -> str:
    """The characters of one token."""
    characters: str = tokenizer.decode([token])
    return characters


if args.page:
    states = record(states, args.page, text, mask_id=graph.mask_id, given=given)
if args.watch:
    states = live(states, text, mask_id=graph.mask_id)
else:
    states = tqdm(states, total=args.steps + 2, desc="sampling", unit="state")
start = time.perf_counter()
with torch.inference_mode():
    for state in states:
        x = state.x
seconds = time.perf_counter() - start

for i, tokens in enumerate(x.tolist(), 1):
    print(f"\n--- sample {i} of {args.num} " + "-" * 50)
    print(tokenizer.decode(tokens))
print(f"\n{x.numel()} tokens in {seconds:.1f} s ({args.steps} steps of {args.method}, seed {args.seed})")
