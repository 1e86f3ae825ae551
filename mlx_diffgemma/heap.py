"""The heap of the C library, which keeps freed memory for later use.

This module does not need MLX, because workers without MLX trim their heaps too.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # the value in <malloc.h>
LARGE = 4 * 2**20


def trim_heap() -> None:
    """Return freed memory of the C heap to the system.  It takes a few milliseconds.

    Without this, a process stays as large as its largest moment.  It does nothing if the C library
    has no such function.
    """
    if sys.platform == "win32":
        return
    library = ctypes.CDLL(None)
    if trim := getattr(library, "malloc_trim", None):  # glibc
        trim(ctypes.c_size_t(0))
    elif relieve := getattr(library, "malloc_zone_pressure_relief", None):  # macOS
        relieve.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        relieve(None, 0)


def map_large_blocks() -> None:
    """Make glibc take every block of LARGE bytes or more from the system, and return it when freed.

    By default glibc raises that bound to the largest block that was ever freed, up to 32 MiB.
    Later blocks of that size then leave holes in the heap that are never returned.
    """
    if sys.platform != "win32" and (option := getattr(ctypes.CDLL(None), "mallopt", None)):
        option(M_MMAP_THRESHOLD, LARGE)
