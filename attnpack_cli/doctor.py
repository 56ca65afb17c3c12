"""`attnpack doctor`: what is installed, what the machine has, and whether compiling works, each with the way out."""

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from attnpack_cli.errors import installed

_PACKAGES = ("attnpack-fx", "torch", "triton", "transformers", "numpy")
#: Modules that come with the extras.
EXTRAS = {
    "hf": ("transformers",),
    "distributed": ("transformers", "accelerate"),
    "ray": ("transformers", "PIL", "tqdm", "ray", "pandas", "pyarrow"),
    "demo": ("transformers", "sklearn", "PIL", "matplotlib", "tqdm"),
    "serve": ("transformers", "fastapi", "uvicorn", "h11", "PIL", "prometheus_client"),
    "export": ("transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    "tensorrt": ("torch_tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "torch_tensorrt"),
}
#: What is asked of PyTorch, in a process of its own that prints JSON.
_ASKED = [sys.executable, "-m", "attnpack_fx.selftest"]
_PARTS = ("compiler", "devices", "registered", "selftest")
_PATIENCE = 300
#: What to do where a part fails.
_WAYS_OUT = {
    "torch": "pip install --force-reinstall torch, and attnpack-fx again",
    "compiler": "install a C++ compiler that PyTorch's Inductor takes, e.g. apt install g++, or name one in CXX",
    "devices": "python -c 'import torch; print(torch.cuda.is_available())' says more",
    "registered": "its entry point is missing: install again, pip install -e . or pip install attnpack-fx",
    "selftest": "TORCH_LOGS=dynamo,inductor attnpack doctor says where; without a compiler it cannot pass",
}


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the installation, and compile a small model",
        description="Print versions, the C++ compiler, devices and whether the backend is registered; then compile a "
        "small model with it, some seconds, and compare it with eager. The exit code is 1 where something fails.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    found: dict[str, Any] = {"versions": _versions(), "missing_of_extras": _extras()}
    if not arguments.json:
        print(_installed_text(found), flush=True)
    told, failed = _asked()
    found |= told
    if arguments.json:
        print(json.dumps({**found, "failed": failed}, indent=2))
    else:
        shown = {part: _text(part, value) for part, value in told.items()}
        lines = {**shown, **{part: f"FAILED  {why}" for part, why in failed.items()}}
        print("\n".join([_line(part, text) for part, text in lines.items()] + ["", "failed" if failed else "ok"]))
    return 1 if failed else 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _extras() -> dict[str, list[str]]:
    """Modules of each extra that are missing."""
    return {extra: [name for name in names if not installed(name)] for extra, names in EXTRAS.items()}


def _asked() -> tuple[dict[str, Any], dict[str, str]]:
    """What each part found; what went wrong, by part, and the way out."""
    try:
        done = subprocess.run(_ASKED, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        printed, said = done.stdout, done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    except subprocess.TimeoutExpired as error:
        printed, said = (error.stdout or b"").decode(errors="replace"), [f"not through after {_PATIENCE} seconds"]
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    # Libraries may print lines of their own between.
    for line in filter(lambda line: line.startswith('{"part"'), printed.splitlines()):
        told = json.loads(line)
        if "error" in told:
            failed[told["part"]] = told["error"]
        else:
            found[told["part"]] = told["found"]
    if found.get("registered") is False:
        failed["registered"] = "got no backend 'attnpack', expected it among torch.compile's"
    left = [part for part in _PARTS if part not in found and part not in failed]
    if left:
        # None of them: PyTorch itself, or this package, cannot be imported.
        failed["torch" if left == list(_PARTS) else left[0]] = said[-1]
    return found, {part: f"{why}; {_WAYS_OUT[part]}" for part, why in failed.items()}


def _installed_text(found: dict[str, Any]) -> str:
    lines = [_line(name, number or "not installed") for name, number in found["versions"].items()]
    for extra, missing in found["missing_of_extras"].items():
        how = f"without {', '.join(missing)}: pip install 'attnpack-fx[{extra}]'" if missing else "present"
        lines.append(_line(f"[{extra}]", how))
    return "\n".join(lines)


def _text(part: str, found: Any) -> str:
    match part:
        case "compiler":
            return f"{found['version']} ({found['path']})"
        case "devices":
            cpu = f"CPU {found['cpu']['capability']}, {found['cpu']['threads']} threads"
            gpus = [f"{each['name']}, {each['capability']}, {each['memory'] / 1e9:.1f} GB" for each in found["cuda"]]
            return "; ".join([cpu, *(gpus or ["no CUDA device"])])
        case "selftest":
            return f"ok, {found['difference']:.0e} from eager"
        case _:
            return "ok"


def _line(name: str, text: str) -> str:
    return f"  {name:<14}  {text}"
