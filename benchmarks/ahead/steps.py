"""What a decode step launches and allocates, counted in the wrapper that Inductor has written for it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from attnpack_fx.kernels.triton import KERNELS

_NAMES = "|".join(kernel.__name__ for kernel in KERNELS)
#: Of a kernel of ours; Inductor numbers them.
_LAUNCH = re.compile(rf"^ +(?P<kernel>{_NAMES})_\d+\.run\(")
#: A buffer is allocated here, or by an operator that is called as it is.
_ALLOCATED = re.compile(r"^ +(?P<buffer>\w+) = (?:empty_strided_cuda|torch\.ops\.|extern_kernels\.)")


class Step(NamedTuple):
    """Of one graph. layers: of which it appends keys and values; launches: of the packed cache's kernels.

    allocations: of device memory, by Inductor or an operator; own: those of them that a kernel of the packed cache is
    the first to use.
    """

    layers: int
    launches: int
    allocations: int
    own: int

    def __str__(self) -> str:
        launches = f"launches of the packed cache's kernels: {self.launches}"
        return f"layers: {self.layers}, {launches}, allocations: {self.allocations} ({self.own} for these)"


def step_of(wrappers: Sequence[str]) -> Step | None:
    """Count in the last graph that appends to a packed cache."""
    for wrapper in reversed(wrappers):
        launched, allocated, own = list[str](), 0, 0
        fresh = set[str]()
        for line in wrapper.splitlines():
            if found := _ALLOCATED.match(line):
                allocated += 1
                fresh.add(found["buffer"])
                continue
            used = fresh & set(re.findall(r"\w+", line))
            fresh -= used
            if found := _LAUNCH.match(line):
                launched.append(found["kernel"])
                own += len(used)
        if "append_kernel" in launched:
            return Step(launched.count("append_kernel"), len(launched), allocated, own)
    return None
