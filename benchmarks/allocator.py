"""Two ways for glibc to deal with freed tensors: give them back, to measure memory, or keep them, to measure time."""

import ctypes
import sys

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def give_back() -> None:
    """Large tensors are mapped, and unmapped when they are freed: resident memory is what is alive."""
    _set({_MMAP_THRESHOLD: 1 << 18, _MMAP_MAX: 1 << 16, _TRIM_THRESHOLD: 1 << 20})


def keep() -> None:
    """Freed memory is kept for the next tensor: no page of it is cleared again at every step."""
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not all(mallopt(option, value) for option, value in options.items()):
        raise RuntimeError("the allocator cannot be told to give memory back, it takes glibc: run this on Linux")
