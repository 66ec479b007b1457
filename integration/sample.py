"""Write text with a trained score model: unconditionally, after a prefix, before a suffix, or into blanks.

python integration/sample.py --checkpoint runs/tiny/export
python integration/sample.py --checkpoint runs/tiny/export --prefix "Fellow citizens" --num 4
python integration/sample.py --checkpoint runs/tiny/export --text "The state of the ____ is ________."
python integration/sample.py --checkpoint louaaron/sedd-small --steps 256 --length 512
"""

from __future__ import annotations

import argparse
import time

import torch
from sedd_samplers import Euler, Tweedie, infill, sample
from sedd_train import load, prompts

METHODS = {"tweedie": Tweedie, "euler": Euler}

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
    help="the reverse step: tweedie is equation 19, euler equation 17 (default: %(default)s)",
)
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
how = {
    "steps": args.steps,
    "method": METHODS[args.method](),
    "generator": torch.Generator(args.device).manual_seed(args.seed),
    "progress": True,
}
start = time.perf_counter()
with torch.inference_mode():
    if given.any():
        x = infill(net, graph, noise, x=x, given=given, **how)
    else:
        x = sample(net, graph, noise, shape=(args.num, x.shape[1]), device=args.device, **how)
seconds = time.perf_counter() - start

for i, tokens in enumerate(x.tolist(), 1):
    print(f"\n--- sample {i} of {args.num} " + "-" * 50)
    print(tokenizer.decode(tokens))
print(f"\n{x.numel()} tokens in {seconds:.1f} s ({args.steps} steps of {args.method}, seed {args.seed})")
