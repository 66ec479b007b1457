"""Train on from a checkpoint, on text of your own: `sedd train` with --init, and a recipe of smaller steps.

sedd finetune --init runs/tiny --corpus my-texts/ --output runs/mine
sedd finetune --recipe finetune-tiny --init runs/tiny --corpus sonnets/               from `tiny`, on little text
sedd finetune --init louaaron/sedd-small --corpus my-texts/ --length 512
sedd finetune --init kuleshov-group/mdlm-owt --corpus my-texts/ --lora 8               (pip install 'sedd-train[lora]')
sedd finetune --init runs/tiny --corpus my-texts/ --train-layers 'blocks.3.*,output_layer.*'
deepspeed --num_gpus 8 --module sedd_train finetune --init ... --resume auto          on eight GPUs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sedd_train.commands import train

__all__ = ["parser", "main"]

EPILOG = """\
what is kept and what is not
  Tokenizer, graph, noise schedule, network and objective are the checkpoint's; options that would say otherwise are
  refused. Its averaged weights are where training begins. AdamW begins anew, and so does the moving average. The length
  may be another: positions are told apart by rotary embeddings, of which there is one for every length. With
  --informed-start the head begins with the frequencies of the new text's tokens (absorbing processes).

how much to train
  all of it       the best for a small model, and for much text
  --lora R        two thin matrices beside each matrix of the blocks: a hundredth of the gradients and moments, for
                  large models. What is published has them added in; --learning-rate wants to be five times as large
  --train-layers  the weights that fit a pattern, the rest stays as it is, and a pattern that fits none names them
"""


def parser(prog: str = "sedd finetune") -> argparse.ArgumentParser:
    """The options of `train`, with another recipe unless told."""
    made = train.parser(prog)
    made.description, made.epilog = __doc__, EPILOG
    made.set_defaults(recipe="finetune")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "sedd finetune") -> None:
    """Train; ends the process as `sedd train` does."""
    train.run(parser(prog).parse_args(argv), prog=prog)
