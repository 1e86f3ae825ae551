"""What a process holds after large blocks were freed between small ones that stay."""

import platform
import subprocess
import sys

import pytest

FRAGMENTED = """
import os
from pathlib import Path
from mlx_diffgemma.heap import map_large_blocks, trim_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

{before}
del_me = bytearray(30 * 2**20)  # glibc's own bound rises to its size
del del_me
level, large, small = resident(), [], []
for _ in range(10):
    large.append(bytearray(b"x") * (6 * 2**20))
    small.append(bytearray(b"x") * 70_000)
del large
{after}
print(resident() - level)
"""
is_glibc = platform.libc_ver()[0] == "glibc"


def left(before="pass", after="pass"):
    """Bytes that a fresh process keeps of 60 MiB of freed blocks."""
    program = FRAGMENTED.format(before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not is_glibc, reason="only glibc keeps freed blocks of this size")
class TestFreedBlocks:
    def test_stay_with_the_process_by_default(self):
        assert left() > 40 * 2**20

    def test_return_to_the_system_when_large_blocks_are_mapped(self):
        assert left(before="map_large_blocks()") < 5 * 2**20

    def test_return_to_the_system_when_the_heap_is_trimmed(self):
        assert left(after="trim_heap()") < 5 * 2**20
