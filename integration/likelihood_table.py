"""The paper's likelihood tables; see `sedd tables --help`, which this is.

python integration/likelihood_table.py text8                      in miniature: six rows of 13 minutes on two CPU cores
"""

from sedd_train.commands import tables

if __name__ == "__main__":
    tables.main(prog="likelihood_table.py")
