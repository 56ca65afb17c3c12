"""Sessions of an artefact's steps, by its target."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnpack_fx.export.manifest import Manifest
from attnpack_fx.export.runtime.session import Session
from attnpack_fx.export.signature import ArtefactError

_STEPS = {"vision", "prefill", "decode", "angles"}


def load(folder: Path, manifest: Manifest, threads: int | None, providers: Sequence[Any] | None) -> dict[str, Session]:
    """A session for every step. Raises `ArtefactError` for missing steps, ImportError for a missing runtime."""
    if not {"prefill", "decode"} <= manifest.steps.keys() <= _STEPS:
        raise ArtefactError(
            f"{folder}: got steps {sorted(manifest.steps)}, expected prefill, decode and at most vision, angles"
        )
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise ArtefactError(f"{folder}: made for a CUDA device, and there is none here; export on the CPU for one")
    if manifest.target == "onnx":
        from attnpack_fx.export.runtime.onnxruntime_session import OnnxRuntimeSession

        return {
            name: OnnxRuntimeSession(name, step, folder / step.file, threads, providers)
            for name, step in manifest.steps.items()
        }
    if manifest.target == "aoti":
        from attnpack_fx.export.runtime.aoti_session import AotiSession

        device = torch.device(manifest.device)
        return {name: AotiSession(name, step, folder / step.file, device) for name, step in manifest.steps.items()}
    if manifest.target == "tensorrt":
        from attnpack_fx.export.runtime.tensorrt_session import TensorRTSession

        device = torch.device("cuda", torch.cuda.current_device())
        return {
            name: TensorRTSession(name, step, folder / step.file, device, manifest.versions)
            for name, step in manifest.steps.items()
        }
    raise ArtefactError(f"{folder}: got target {manifest.target!r}, expected onnx, tensorrt or aoti")
