"""A process that keeps the memory it frees has no new pages to clear when it asks for as much again."""

import platform
import statistics
import subprocess
import sys

import pytest

AGAIN = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from sedd_train.distributed import keep_memory
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)  # 100 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(10)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator is left alone")
def test_what_is_freed_is_used_again():
    returned = page_faults("returned")
    assert min(returned) > 20  # pages, huge ones perhaps
    for _ in range(3):  # in one process of many a small block lies in the freed one's place, and the heap grows again
        kept = page_faults("kept")
        assert kept[0] > 20
        # The median: the heap may grow once more in one of the first.
        if statistics.median(kept) < min(returned) / 10:
            break
    assert statistics.median(kept) < min(returned) / 10


def page_faults(how):
    """Of ten times 100 MB, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", AGAIN, how], check=True, capture_output=True, text=True)
    return [int(count) for count in done.stdout.split()]
