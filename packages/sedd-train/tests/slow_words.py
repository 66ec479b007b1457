"""The training script, whose last words take a second to begin: meanwhile its launcher asks it to leave."""

from __future__ import annotations

import runpy
import time
import traceback
from typing import Any
from unittest import mock

from held import TRAIN

print_exception = traceback.print_exception


def slowly(*error: Any) -> None:
    """As on a busy machine, which has to read the lines of code that it shows."""
    time.sleep(1)
    print_exception(*error)


mock.patch("sedd_train.distributed.traceback.print_exception", slowly).start()
runpy.run_path(str(TRAIN), run_name="__main__")
