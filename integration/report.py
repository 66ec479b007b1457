"""Write the report of a run, also of one that is under way: one HTML file that needs no other.

python integration/report.py runs/tiny
python integration/report.py runs/tiny --output tiny.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sedd_train import report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="the folder of the run")
parser.add_argument("--output", type=Path, metavar="FILE", help="(default: report.html in the run's folder)")
args = parser.parse_args()
path = args.output or args.run / "report.html"
try:
    path.write_text(report.page(args.run), encoding="utf-8")
except (ValueError, OSError) as error:
    parser.exit(2, f"{parser.prog}: error: {error}\n")
print(path)
