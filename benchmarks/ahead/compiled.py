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
from triton.backends.compiler import GPUTarget

from benchmarks.ahead.pretend import pretending, targeting

#: A compute capability, 90 for 9.0, or what AMD calls an architecture.
Capability = int | str


class Limits(NamedTuple):
    """Of the GPUs of one capability.

    Shared memory in bytes, of a block and of a multiprocessor, and what is set aside for each block. Registers of a
    multiprocessor, each as wide as a warp; `step`: in units of which a warp gets them.
    """

    block_shared: int
    shared: int
    warps: int = 64
    registers: int = 2048
    blocks: int = 32
    step: int = 8
    aside: int = 1024
    lanes: int = 32

    def target(self, capability: Capability) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda" if isinstance(capability, int) else "hip", capability, self.lanes)


#: Compute capabilities (CUDA programming guide, technical specifications by compute capability): A100, H100 and H200,
#: B200, GeForce RTX 50. Architectures of AMD (LLVM, AMDGPUBaseInfo.cpp): Instinct MI300 and MI200; Radeon RX 7900, of
#: which two compute units are one multiprocessor.
LIMITS: dict[Capability, Limits] = {
    80: Limits(163 << 10, 164 << 10),
    90: Limits(227 << 10, 228 << 10),
    100: Limits(227 << 10, 228 << 10),
    120: Limits(99 << 10, 100 << 10, warps=48, blocks=24),
    "gfx942": Limits(64 << 10, 64 << 10, warps=32, blocks=16, aside=0, lanes=64),
    "gfx90a": Limits(64 << 10, 64 << 10, warps=32, blocks=16, aside=0, lanes=64),
    "gfx1100": Limits(64 << 10, 128 << 10, registers=6144, step=24, aside=0),
}
#: What the commands compile for unless told otherwise.
USUAL: tuple[Capability, ...] = (80, 90, 100)
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
    capability: Capability
    error: str = ""
    threads: int = 0
    registers: int = 0
    spilled: int = 0  # bytes of a thread in memory of its own
    shared: int = 0  # bytes of a block
    occupancy: float = 0.0  # resident warps over the most there can be
    matrix: int = 0  # tensor-core instructions
    warpgroup: int = 0  # those of them that a whole warpgroup issues: wgmma, tcgen05
    wide_loads: int = 0  # loads and asynchronous copies of 16 bytes from device memory
    loads: int = 0  # all of them
    double: int = 0  # instructions on float64


def capability_of(text: str) -> Capability:
    """The capability that an argument of a command names."""
    return int(text) if text.isdecimal() else text


def compiled(name: str, source: str, capability: Capability) -> Facts:
    """Compile a kernel that Inductor has written, in its first configuration, as Inductor compiles it."""
    binaries: list[Any] = []
    compile_, plain, target = triton.compile, Facts(name, capability), LIMITS[capability].target(capability)

    def kept(*arguments: Any, **options: Any) -> Any:
        binaries.append(compile_(*arguments, **options))
        return binaries[-1]

    with (
        pretending(),
        targeting(target),
        mock.patch.object(triton_heuristics.triton, "compile", kept),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        tuner = getattr(PyCodeCache.load(source), name)
        major = capability // 10 if isinstance(capability, int) else int(capability[3:-2])
        tuner.device_props = tuner.device_props._replace(
            type=target.backend, cc=capability, major=major, warp_size=target.warp_size
        )
        tuner.triton_meta["device"] = tuner.device_props
        try:
            tuner._precompile_config(tuner.configs[0])
        except Exception as error:
            cause: BaseException = error  # Triton's own say where alone
            while cause.__cause__ is not None:
                cause = cause.__cause__
            return replace(plain, error=f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}")
    return facts_of(plain, binaries[-1])


def facts_of(plain: Facts, binary: Any) -> Facts:
    """`plain` with what a compiled kernel takes."""
    limits, warps, shared = LIMITS[plain.capability], binary.metadata.num_warps, binary.metadata.shared
    code = binary.asm
    found = _of_amd(code["amdgcn"]) if "amdgcn" in code else _of_nvidia(plain.capability, code["cubin"])
    resident = occupancy(plain.capability, warps, found["registers"], shared)
    return replace(plain, threads=limits.lanes * warps, shared=shared, occupancy=resident, **found)


def _of_nvidia(capability: Capability, cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name) if capability in (80, 90) else _run("cuobjdump", "-sass", file.name)
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "spilled": stack + local,
        "matrix": _count("HMMA|HGMMA|UTCHMMA", code),
        "warpgroup": _count("HGMMA|UTCHMMA", code),
        "wide_loads": _count(r"(?:LDG|LDGSTS)\.[\w.]*128", code),
        "loads": _count("LDG|LDGSTS", code),
        "double": _count("DADD|DMUL|DFMA|F2F.F64.F32|F2F.F32.F64", code),
    }


def _of_amd(code: str) -> dict[str, int]:
    registers, scratch = (
        int(re.findall(rf"\.{key}:\s+(\d+)", code)[-1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return {
        "registers": registers,  # accumulators among them
        "spilled": scratch,
        "matrix": _count(r"v_(?:mfma|wmma)_\w+", code),
        "wide_loads": _count("(?:global|buffer)_load_(?:dwordx4|b128)", code),
        "loads": _count(r"(?:global|buffer)_load_\w+", code),
        "double": _count(r"v_\w+_f64(?:_\w+)?", code),
    }


def _count(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b(?:{instruction})\b", code))


def occupancy(capability: Capability, warps: int, registers: int, shared: int) -> float:
    """Warps of such blocks that are resident on a multiprocessor, over the most there can be."""
    limits = LIMITS[capability]
    if shared > limits.block_shared:
        return 0.0
    by_registers = limits.registers // (-(-registers // limits.step) * limits.step) // warps
    by_shared = limits.shared // max(shared + limits.aside, 1)
    blocks = min(limits.warps // warps, by_registers, by_shared, limits.blocks)
    return blocks * warps / limits.warps


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout
