"""What the benchmark needs on a machine where nothing is installed, and the command that installs it.

Imports the standard library alone: packages are looked for, and not imported.
"""

from __future__ import annotations  # a Python that is too old must get as far as being told so

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MODULES = ("torch", "transformers", "hypothesis", "numpy")
#: Arguments of a run that measures on no device.
_WITHOUT_A_DEVICE = {"--dry", "--render", "--help", "-h"}


def prepared(arguments: Sequence[str]) -> int | None:
    """Say what has to be installed, or with `--install` do it and start anew; None where nothing is missing."""
    device = _WITHOUT_A_DEVICE.isdisjoint(arguments)
    unfit = _unfit(device)
    if unfit:
        print(f"benchmarks.gpu: {unfit}", file=sys.stderr)
        return 2
    problem, parts = _problem(device)
    if not problem:
        return None
    command = [sys.executable, "-m", "pip", "install", *parts]
    if "--install" not in arguments:
        line = " ".join(f'"{part}"' if re.search(r"[][<> ,]", part) else part for part in command)
        print(
            f"benchmarks.gpu: {problem}. In {ROOT}, run\n\n    {line}\n\nor this command with --install, which does "
            "so. PyPI's PyTorch for Linux is a CUDA build.",
            file=sys.stderr,
        )
        return 2
    print(f"benchmarks.gpu: {problem}; installing", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        print(
            "benchmarks.gpu: pip failed, see above; where it refuses this environment, make one: "
            "python3 -m venv .venv && . .venv/bin/activate",
            file=sys.stderr,
        )
        return 2
    # Anew, because what pip installed as editable is found from the start of a process on.
    os.execv(sys.executable, [sys.executable, *(each for each in sys.orig_argv[1:] if each != "--install")])


def _unfit(device: bool) -> str:
    """What pip cannot install: empty if it is all there."""
    if sys.version_info < (3, 11):  # noqa: UP036  nothing has been installed that would have refused
        return f"this is Python {sys.version.split()[0]}, expected 3.11 or newer"
    if device and not (shutil.which("gcc") or shutil.which("clang") or "CC" in os.environ):
        return "no C compiler, with which Triton builds what launches its kernels: install gcc and g++"
    if device and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h, which Triton builds against: install Python's headers (python3-dev)"
    return ""


def _problem(device: bool) -> tuple[str, list[str]]:
    """What is missing, and what pip has to be given to install it; both empty if nothing is."""
    needed = (*_MODULES, *(("triton",) if device else ()))  # on a CPU ATen does the work
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    # Not `find_spec`: the repository's own folder is found without being installed, and lacks what is mapped into it.
    if not any(each.read_text("RECORD") for each in distributions(name="attnpack-fx")):
        missing.append("attnpack-fx")
    allowed = next(each for each in _dependencies() if each.startswith("torch"))
    found = None if "torch" in missing else _torch()
    if missing:
        return f"not installed: {', '.join(missing)}", [*_replacing(found, device), allowed, "-e", ".[dev]"]
    assert found is not None
    if not _within(found[0], allowed):
        return f"PyTorch {found[0]} is installed, expected {allowed}", [allowed, "-e", ".[dev]"]
    if _replacing(found, device):
        return f"PyTorch {found[0]} is installed, a build without CUDA", [*_replacing(found, device), allowed]
    return "", []


def _replacing(found: tuple[str, bool] | None, device: bool) -> list[str]:
    """What makes pip replace a PyTorch whose version is right."""
    return ["--force-reinstall"] if device and found is not None and not found[1] else []


def _dependencies() -> list[str]:
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["dependencies"]


def _torch() -> tuple[str, bool]:
    """Version of the PyTorch that is installed, and whether it is a CUDA build. Read, because importing takes long."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    text = (Path(found.origin).parent / "version.py").read_text()
    version = re.search(r"^__version__\s*=\s*['\"](.*)['\"]", text, re.MULTILINE)
    return version.group(1) if version else "of unknown version", not re.search(
        r"^cuda\b.*=\s*None", text, re.MULTILINE
    )


def _within(version: str, allowed: str) -> bool:
    """Whether a version such as `2.13.0+cpu` is in a range such as `torch>=2.11,<2.14`."""
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    (low,), (high,) = (re.findall(rf"{sign}(\d+\.\d+)", allowed) for sign in (">=", "<"))
    least, most = (tuple(map(int, bound.split("."))) for bound in (low, high))
    return least <= found < most
