"""Write text with a trained score model: from nothing, after a prefix, before a suffix, or into blanks.

python integration/sample.py --checkpoint runs/tiny/export
python integration/sample.py --checkpoint runs/tiny/export --prefix "Fellow citizens" --num 4
python integration/sample.py --checkpoint runs/tiny/export --text "The state of the ____ is ________."
python integration/sample.py --checkpoint runs/tiny/export --watch --page sample.html
python integration/sample.py --checkpoint louaaron/sedd-small --method unmasking --steps 1024 --top-p 0.95
"""

from sedd_train.commands import sample

if __name__ == "__main__":
    sample.main(prog="sample.py")
