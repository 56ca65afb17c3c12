"""Kernels compiled ahead of time for one compute capability, and what they take of a multiprocessor."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers, triton_heuristics

from benchmarks.ahead.pretend import pretending, targeting


class Limits(NamedTuple):
    """Of one compute capability. Shared memory in bytes, of a block and of a multiprocessor."""

    block_shared: int
    shared: int
    warps: int = 64
    registers: int = 65536
    blocks: int = 32


#: By compute capability: A100, H100 and H200, B200.
LIMITS = {
    80: Limits(163 << 10, 164 << 10),
    90: Limits(227 << 10, 228 << 10),
    100: Limits(227 << 10, 228 << 10),
}
#: Kernels whose work is matrix products. `combine` has them too, where a KV head has several query rows.
MATRIX = (
    "absorb_coded_kernel",
    "absorb_kernel",
    "fused_kernel",
    "rebuilt_coded_kernel",
    "rebuilt_kernel",
    "split_kernel",
    "tables_kernel",
    "tokens_coded_kernel",
    "tokens_kernel",
)
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Facts:
    """What one kernel takes, and which instructions it has; error: why it did not compile, all else is 0 then."""

    kernel: str
    capability: int
    error: str = ""
    threads: int = 0
    registers: int = 0
    spilled: int = 0  # bytes of local memory of a thread
    shared: int = 0  # bytes of a block
    occupancy: float = 0.0  # resident warps over the most there can be
    matrix: int = 0  # tensor-core instructions
    warpgroup: int = 0  # those of them that a whole warpgroup issues: wgmma, tcgen05
    wide_loads: int = 0  # loads and asynchronous copies of 16 bytes from device memory
    loads: int = 0  # all of them
    double: int = 0  # instructions on float64


def compiled(name: str, source: str, capability: int) -> Facts:
    """Compile a kernel that Inductor has written, in its first configuration, as Inductor compiles it."""
    binaries: list[Any] = []
    compile_, plain = triton.compile, Facts(name, capability)

    def kept(*arguments: Any, **options: Any) -> Any:
        binaries.append(compile_(*arguments, **options))
        return binaries[-1]

    with (
        pretending(),
        targeting(capability),
        mock.patch.object(triton_heuristics.triton, "compile", kept),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        tuner = getattr(PyCodeCache.load(source), name)
        tuner.device_props = tuner.device_props._replace(cc=capability, major=capability // 10)
        tuner.triton_meta["device"] = tuner.device_props
        try:
            tuner._precompile_config(tuner.configs[0])
        except Exception as error:
            return replace(plain, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    return facts_of(plain, binaries[-1])


def facts_of(plain: Facts, binary: Any) -> Facts:
    """`plain` with what a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name) if plain.capability < 100 else _run("cuobjdump", "-sass", file.name)
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    warps, shared = binary.metadata.num_warps, binary.metadata.shared

    def count(instruction: str) -> int:
        return len(re.findall(rf"\b(?:{instruction})\b", code))

    return replace(
        plain,
        threads=32 * warps,
        registers=registers,
        spilled=stack + local,
        shared=shared,
        occupancy=occupancy(plain.capability, warps, registers, shared),
        matrix=count("HMMA|HGMMA|UTCHMMA"),
        warpgroup=count("HGMMA|UTCHMMA"),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128\b", code)),
        loads=count("LDG|LDGSTS"),
        double=count("DADD|DMUL|DFMA|F2F.F64.F32|F2F.F32.F64"),
    )


def occupancy(capability: int, warps: int, registers: int, shared: int) -> float:
    """Warps of such blocks that are resident on a multiprocessor, over the most there can be."""
    limits = LIMITS[capability]
    if shared > limits.block_shared:
        return 0.0
    # Registers are handed out to warps in units of 256; each block also takes 1 KiB of shared memory.
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    blocks = min(limits.warps // warps, by_registers, limits.shared // (shared + 1024), limits.blocks)
    return blocks * warps / limits.warps


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout
