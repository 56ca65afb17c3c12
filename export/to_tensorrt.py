"""TensorRT: one engine a step, by TensorRT's own ONNX parser or by Torch-TensorRT."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from attnpack_fx.export import engines, profiles, torch_tensorrt_engines
from attnpack_fx.export.artefact import finish, new_folder
from attnpack_fx.export.program import Program, Programs, capture
from attnpack_fx.export.tensorrt_library import library as library_of
from attnpack_fx.export.to_onnx import OPSET, prepare, write_models
from attnpack_fx.policy import PackPolicy

#: What makes an engine of a step.
BUILDERS = ("onnx", "torch_tensorrt")
#: Keys of a manifest's versions beside the library's own name.
CAPABILITIES = "compute_capabilities"


def export_tensorrt(
    model: nn.Module,
    policy: PackPolicy,
    path: str | os.PathLike[str],
    *,
    example: Mapping[str, Any] | None = None,
    processor: Any = None,
    dims: Mapping[str, tuple[int, int]] | None = None,
    builder: str | Mapping[str, str] = "onnx",
    library: str | None = None,
    compute_capabilities: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a model and its packed cache as TensorRT engines, for `PackedGenerator` on a CUDA device.

    model, policy, path, example, processor, progress: as for `export_onnx`. dims: smallest and largest sizes of
    dimensions, by name, instead of `profiles.RANGES`; a decode step takes no more than 16 new tokens at once.
    builder: `"onnx"`: TensorRT parses the ONNX model of a step. `"torch_tensorrt"`: Torch-TensorRT converts the step's
    exported program, which it cannot where there is a loop, as in a prefill that factorises. A mapping says which of
    them for steps by name, `"onnx"` for others.
    library: `"tensorrt"`, which builds for the GPU that is there, or `"tensorrt_rtx"`, which needs none; None: the
    first of them that is installed. compute_capabilities: of the GPUs that a TensorRT-RTX engine is for; None: 8.0,
    8.6, 8.9 and 12.0.

    Returns the folder. Raises `NotImplementedError` for models and policies that cannot be exported, and for operators
    that TensorRT lacks, all of them listed; `ImportError` where a library is missing, which says what to install;
    ValueError for options that make no sense; RuntimeError with TensorRT's errors where it builds no engine.
    """
    tell = progress or (lambda text: None)
    builders = _builders(builder)
    trt = library_of(library)
    capabilities = engines.checked_capabilities(trt, compute_capabilities)
    prepare(model, "export_tensorrt")
    if "torch_tensorrt" in builders.values():
        torch_tensorrt_engines.module(trt)
        if compute_capabilities is not None:
            raise ValueError(
                f"compute_capabilities: got {compute_capabilities!r}, but Torch-TensorRT takes none; leave it out, or "
                "take builder='onnx'"
            )
    converted = {name for name, how in builders.items() if how == "torch_tensorrt"}
    with new_folder(Path(path)) as folder:
        tell("capture")
        programs = capture(model, policy, example, profiles.chosen(dims))
        programs = replace(programs, steps=tuple(_within(each, each.step.name in converted) for each in programs.steps))
        files = {each.step.name: f"{each.step.name}.engine" for each in programs.steps}
        parsed = [each for each in programs.steps if each.step.name not in converted]
        _from_onnx(trt, parsed, folder, files, capabilities, tell)
        for each in programs.steps:
            if each.step.name in converted:
                tell(f"{each.step.name} by Torch-TensorRT")
                (folder / files[each.step.name]).write_bytes(torch_tensorrt_engines.engine(trt, each))
        _finish(trt, folder, programs, files, processor, capabilities)
    return Path(path)


def _within(each: Program, converted: bool) -> Program:
    """A step for the sizes that its engine will be for. Raises `NotImplementedError` where it can be none."""
    each = profiles.within(each)
    if not converted:
        return each
    torch_tensorrt_engines.refuse_loops(each)
    return torch_tensorrt_engines.within(each)


def _from_onnx(
    trt: ModuleType,
    steps: Sequence[Program],
    folder: Path,
    files: Mapping[str, str],
    capabilities: Sequence[str] | None,
    tell: Callable[[str], None],
) -> None:
    """Engines of the ONNX models of steps, which go once they are built."""
    # Beside the engines, not where temporary files are: weights may be larger than there is room.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = write_models(steps, Path(scratch), OPSET, tell)
        for each in steps:
            tell(f"{each.step.name} to an engine")
            parsed = engines.parse(trt, Path(scratch) / models[each.step.name])
            engine = engines.build(trt, parsed, each, capabilities)
            (folder / files[each.step.name]).write_bytes(engine)


def _finish(
    trt: ModuleType,
    folder: Path,
    programs: Programs,
    files: dict[str, str],
    processor: Any,
    capabilities: Sequence[str] | None,
) -> None:
    if capabilities is None:
        major, minor = torch.cuda.get_device_capability()
        capabilities = (f"{major}{minor}",)
    made = {trt.__name__: trt.__version__, CAPABILITIES: " ".join(capabilities)}
    finish(folder, "tensorrt", programs, files, "cuda", processor, "onnx", "onnxscript", more=made)


def _builders(given: str | Mapping[str, str]) -> dict[str, str]:
    """By step. Raises ValueError for unknown ones."""
    steps = ("vision", "prefill", "decode", "angles")
    found = dict.fromkeys(steps, given) if isinstance(given, str) else dict(given)
    if not found.keys() <= set(steps) or any(name not in BUILDERS for name in found.values()):
        raise ValueError(
            f"builder: got {given!r}, expected {' or '.join(map(repr, BUILDERS))}, or one of these for each of "
            f"{', '.join(steps)}"
        )
    return found
