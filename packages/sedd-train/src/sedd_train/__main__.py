"""`python -m sedd_train`: the command `sedd`, for launchers that take a module."""

from sedd_train.commands import main

main()
