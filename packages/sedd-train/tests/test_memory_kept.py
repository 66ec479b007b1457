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
print(*(faults() for _ in range(50)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator is left alone")
def test_what_is_freed_is_used_again():
    returned, kept = page_faults("returned"), page_faults("kept")
    assert min(returned) > 20  # pages, huge ones perhaps
    assert kept[0] > 20
    # The median: where small blocks bite into the freed one the heap grows once more, some times among the first.
    assert statistics.median(kept) < min(returned) / 10


def page_faults(how):
    """Of fifty times 100 MB, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", AGAIN, how], check=True, capture_output=True, text=True)
    return [int(count) for count in done.stdout.split()]
