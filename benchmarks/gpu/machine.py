"""The device that is measured: what it is, its memory, and its clock. A dry run has a CPU in its place."""

import gc
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu.timing import Clock

#: What a dry run pretends to have, so that its tiny inputs rotate and its largest batch is small.
_DRY_MEMORY, _DRY_CACHE = 1 << 30, 1 << 15
#: What decides a result, apart from the device and the versions.
_SOURCES = ("attnpack_fx", "passes", "kernels", "benchmarks/gpu")


class Machine:
    """One device, and everything about it that a measurement has to know.

    Raises RuntimeError without a GPU, unless the run is dry.
    """

    def __init__(self, dry: bool) -> None:
        if not dry and not torch.cuda.is_available():
            raise RuntimeError(
                "no CUDA device: got a PyTorch that sees none, expected one to measure; "
                "--dry --out DIR runs the same code on tiny shapes on a CPU, and its times mean nothing"
            )
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.clock = Clock(self.device)

    @property
    def name(self) -> str:
        return "dry run on a CPU" if self.dry else torch.cuda.get_device_name()

    @property
    def total_bytes(self) -> int:
        return _DRY_MEMORY if self.dry else torch.cuda.get_device_properties(self.device).total_memory

    @property
    def cache_bytes(self) -> int:
        """The L2 cache; inputs that fit into it are measured in it unless several sets take turns."""
        return _DRY_CACHE if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size

    def free_bytes(self) -> int:
        """Device memory that can be allocated now."""
        if self.dry:
            return _DRY_MEMORY
        self.release()
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Give what is no longer used back to the device."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most bytes held by tensors since `reset_peak`; 0 in a dry run."""
        return 0 if self.dry else torch.cuda.max_memory_allocated()

    @contextmanager
    def limited(self, limit: int) -> Iterator[None]:
        """Allow this process no more than `limit` bytes of device memory."""
        if self.dry:
            yield
            return
        self.release()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / self.total_bytes))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def record(self) -> dict[str, Any]:
        """On what, and with what, results are measured: all that must be equal for two of them to stand together."""
        environment = measure.environment()
        versions = environment["versions"] | {"triton": _version("triton"), "cuda": torch.version.cuda}
        if not self.dry:
            versions["cudnn"] = torch.backends.cudnn.version()
        return {
            "device": self.name,
            "memory_bytes": self.total_bytes,
            "l2_bytes": self.cache_bytes,
            "driver": None if self.dry else _driver(),
            "versions": versions,
            "commit": environment["commit"],
            "sources": _digest(),
        }


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else None


def _digest() -> str:
    """Of every source file that decides a result: the commit does not show what was not committed."""
    files = (file for folder in _SOURCES for file in sorted((measure.ROOT / folder).rglob("*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
