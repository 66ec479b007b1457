"""Write the report of a run, also of one that is under way: one HTML file that needs no other.

python integration/report.py runs/tiny
python integration/report.py runs/tiny --output tiny.html
"""

from sedd_train.commands import report

if __name__ == "__main__":
    report.main(prog="report.py")
