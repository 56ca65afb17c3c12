"""Timing several contenders in turn, and saying on what they ran."""

import ctypes
import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

#: glibc otherwise maps and unmaps every large tensor, and half of the time goes to page faults. More than any case
#: allocates: where memory is given back all the same, some later, unrelated call pays for it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "100000000000", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

#: Largest difference between contenders that compute the same, as a part of the largest number compared.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_PACKAGES = ("torch", "transformers", "attnpack-fx", "onnxruntime", "optimum-quanto", "hqq")


def restart_with_malloc_settings() -> None:
    """Start this command again with `MALLOC`, unless the environment has it: glibc reads it at start."""
    missing = {name: value for name, value in MALLOC.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})


def release_free_memory() -> None:
    """Give the pages that `MALLOC` makes glibc keep back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def tidy() -> None:
    """Give back to the system all that is not alive."""
    gc.collect()
    release_free_memory()


def resident(peak: bool = False) -> int:
    """Bytes of this process that lie in memory now, or lay there at most since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the peak of `resident` begin anew. Raises RuntimeError where the system cannot: it takes Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"peak memory cannot be measured here, it takes Linux with /proc: {error}") from error


def in_turn(
    contenders: Mapping[str, Callable[[], object]], rounds: int, repeats: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one sample per round: A B C, B C A, C A B, ...

    So a slow moment of the machine falls on all of them. repeats: calls per sample, after one that is not timed, so
    that nobody pays for what the contender before left behind; None: one call, timed.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            function, count = contenders[name], repeats[name] if repeats else 1
            if repeats:
                function()
            began = time.perf_counter()
            for _ in range(count):
                function()
            samples[name].append((time.perf_counter() - began) / count)
    return samples


def repeats_for(function: Callable[[], object], seconds: float) -> int:
    """How often to call `function` for a sample to last about `seconds`."""
    function()
    began = time.perf_counter()
    function()
    return max(1, math.ceil(seconds / max(time.perf_counter() - began, 1e-9)))


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Samples in seconds, with their minimum, median and maximum."""
    return {
        "min": min(samples),
        "median": statistics.median(samples),
        "max": max(samples),
        "samples": list(samples),
    }


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the largest number expected."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).abs().max() / expected.abs().max())


def low_rank(
    batch: int, heads: int, tokens: int, dim: int, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Random `[B, H, T, D]` with unit variance whose `[T, H * D]` matrices have rank `rank`."""
    basis = torch.randn(rank, heads * dim, generator=generator) / math.sqrt(rank)
    dense = torch.empty((batch, heads, tokens, dim), dtype=dtype)
    for sample in dense:
        coefficient = torch.randn(tokens, rank, generator=generator)
        sample.copy_((coefficient @ basis).view(tokens, heads, dim).transpose(0, 1))
    return dense


def environment() -> dict[str, Any]:
    """Versions, processor, threads and commit, for the record."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    return {
        "versions": versions | {"torch": str(torch.__version__)},  # with its build
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "commit": commit(ROOT),
        "malloc": {name: os.environ.get(name) for name in MALLOC},
    }


def commit(root: Path) -> str | None:
    """The commit checked out at `root`, or None. Read from files: git need not be installed."""
    folder = root / ".git"
    try:
        if folder.is_file():  # of a work tree beside the repository, which has its branches
            folder = Path(folder.read_text().strip().removeprefix("gitdir: "))
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (folder / "commondir").exists():
            folder = folder / (folder / "commondir").read_text().strip()
        if (folder / name).exists():
            return (folder / name).read_text().strip()
        lines = (folder / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
