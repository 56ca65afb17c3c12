"""How fast this device copies, reads, multiplies and launches: what every other figure is held against."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Part, Result, Run, markdown
from benchmarks.gpu.timing import Contender, compare, spread

_COPY_BYTES, _MATRIX = 1 << 31, 8192
_DRY_COPY_BYTES, _DRY_MATRIX = 1 << 16, 64
_LAUNCHES = 200


def ceilings(machine: Machine) -> dict[str, float]:
    """The two that other parts need: copied bytes (read plus written) and bf16 operations per second."""
    return {
        "copy": copy(machine)["per_second"],
        "matmul": matmul(machine, torch.bfloat16)["per_second"],
    }


def copy(machine: Machine) -> Result:
    """A device-to-device copy; bytes read plus bytes written, per second."""
    # Random bits, as everywhere here: zeros can run faster than real data.
    source = _random(machine, (_bytes(machine) // 2,), torch.bfloat16)
    target = torch.empty_like(source)
    return _rate(machine, lambda: target.copy_(source), 2 * source.nbytes)


def read(machine: Machine) -> Result:
    """A sum over a tensor: bytes read, per second."""
    source = _random(machine, (_bytes(machine) // 4,), torch.float32)
    return _rate(machine, source.sum, source.nbytes)


def matmul(machine: Machine, dtype: torch.dtype) -> Result:
    """A large square matrix product: multiplications and additions, per second."""
    size = _DRY_MATRIX if machine.dry else _MATRIX
    left, right = (_random(machine, (size, size), dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _rate(machine, lambda: torch.matmul(left, right, out=out), 2 * size**3)


def launch(machine: Machine) -> Result:
    """Seconds per launch of a kernel that does next to nothing, one after another from Python and in one CUDA graph."""
    x = torch.ones(1, device=machine.device)
    launches = Contender([lambda: x.add_(1)] * _LAUNCHES)
    return compare(machine.clock, {"launch": launches})["launch"]


def _rate(machine: Machine, call: Callable[[], object], amount: int) -> Result:
    for _ in range(3):
        call()
    seconds = spread([machine.clock.seconds(call) for _ in range(10)])
    return {"seconds": seconds, "amount": amount, "per_second": amount / seconds["median"]}


def _random(machine: Machine, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, device=machine.device, dtype=dtype)


def _bytes(machine: Machine) -> int:
    # A small device copies what fits.
    return _DRY_COPY_BYTES if machine.dry else min(_COPY_BYTES, machine.free_bytes() // 8)


def _cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    functions: dict[str, Callable[[], Result]] = {
        "copy": partial(copy, run.machine),
        "read": partial(read, run.machine),
        "launch": partial(launch, run.machine),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        functions[f"matmul {str(dtype).removeprefix('torch.')}"] = partial(matmul, run.machine, dtype)
    return functions


def _table(cases: Mapping[str, Result]) -> list[str]:
    rows = []
    for name, case in cases.items():
        if name == "launch":
            graph = case.get("graph")
            rows.append(("launch, from Python", f"{case['eager']['median'] * 1e6:.2f} us"))
            rows.append(("launch, in a CUDA graph", f"{graph['median'] * 1e6:.2f} us" if graph else case["no_graph"]))
        elif name.startswith("matmul"):
            rows.append((name, f"{case['per_second'] / 1e12:.1f} TFLOP/s"))
        else:
            rows.append((name, f"{case['per_second'] / 1e9:.0f} GB/s"))
    return markdown(("ceiling", "measured"), rows)


PART = Part(
    "ceilings",
    "Ceilings",
    "A large copy (bytes read plus bytes written), a large read, large square matrix products, and the launch of a "
    "kernel that does next to nothing. Everything below is held against these, not against a data sheet.",
    _cases,
    _table,
)
