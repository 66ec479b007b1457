"""Bound the negative log-likelihood of held-out text under a trained score model (equation 9), with its standard error.

python integration/evaluate.py --checkpoint runs/tiny/export
python integration/evaluate.py --checkpoint louaaron/sedd-small --corpus my-texts/ --blocks 100 --num-times 1000
"""

from sedd_train.commands import evaluate

if __name__ == "__main__":
    evaluate.main(prog="evaluate.py")
