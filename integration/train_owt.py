"""Train a score-entropy discrete diffusion model on text, with DeepSpeed.

deepspeed integration/train_owt.py                                  the paper's SEDD small, absorbing, on OpenWebText
deepspeed integration/train_owt.py --recipe tiny                    a small model on two CPU cores, in minutes
deepspeed --num_gpus 8 integration/train_owt.py --zero-stage 2      on eight GPUs, with ZeRO 2
torchrun --standalone --nproc_per_node 2 integration/train_owt.py --recipe tiny --steps 500
python integration/train_owt.py --recipe tiny --corpus my-texts/ --output runs/mine
python integration/train_owt.py --plan 8                            what each of 8 ranks would hold, for each stage
python integration/train_owt.py --recipe tiny --resume              continue from the last checkpoint

The run, from top to bottom, is `sedd_train.training.train`.
"""

from sedd_train.commands import train

if __name__ == "__main__":
    train.main(prog="train_owt.py")
