"""A process that keeps the memory it frees has no new pages to clear when it asks for as much again."""

import json
import platform
import statistics
import subprocess
import sys

import pytest

AGAIN = """
import json, resource, torch
from sedd_train.distributed import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)  # 100 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
returned = [faults() for _ in range(5)]
keep_memory()
print(json.dumps([returned, [faults() for _ in range(20)]]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator is left alone")
def test_what_is_freed_is_used_again():
    done = subprocess.run([sys.executable, "-c", AGAIN], check=True, capture_output=True, text=True)
    returned, kept = json.loads(done.stdout)
    assert min(returned) > 20  # pages, huge ones perhaps
    assert kept[0] > 20
    # The median: where small blocks bite into the freed one the heap grows once more, some times among the first.
    assert statistics.median(kept) < min(returned) / 10
