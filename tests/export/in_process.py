"""`PackedGenerator` over the modules that are exported, without exporting them: for tests of what steps compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from attnpack_fx import PackPolicy
from attnpack_fx.export import PackedGenerator, artefact, portable, program
from attnpack_fx.export.manifest import StepFiles
from attnpack_fx.export.model import Parts, exporting
from attnpack_fx.export.runtime import generator as runtime
from attnpack_fx.export.runtime.session import Held, Session
from attnpack_fx.export.steps import Step
from attnpack_fx.kernels import ops


class ModuleSession(Session):
    """Runs a step's module, its attention by the operations that an exported program has."""

    def __init__(self, name: str, step: StepFiles, module: Step, parts: Parts) -> None:
        super().__init__(name, step, torch.device("cpu"))
        self.module, self.parts = module, parts

    def _run(self, tensors: Mapping[str, Tensor], held: Held | None, sizes: Mapping[str, int]) -> Sequence[Tensor]:
        given = tensors if held is None else {**held.tensors, **tensors}
        with exporting(self.parts), patch.object(ops, "attention", portable.attention):
            return self.module([given[spec.name] for spec in self.step.inputs])


def generator(
    model: Any, policy: PackPolicy, folder: Path, example: Mapping[str, Any] | None = None, least: int = 0
) -> PackedGenerator:
    """As from an artefact of the model, which is written to `folder` with empty files for steps."""

    def uncaptured(step: Step, parts: Parts, ranges: Any) -> Any:
        return program.Program(step, None, dict(ranges))  # type: ignore[arg-type]

    with patch.object(program, "_captured", uncaptured):
        programs = program.capture(model, policy, example, least=least)
    modules = {each.step.name: each.step for each in programs.steps}
    for name in modules:
        (folder / name).touch()
    artefact.finish(folder, "onnx", programs, {name: name for name in modules}, "any", None)

    def load(folder: Path, manifest: Any, *options: Any) -> dict[str, Session]:
        return {name: ModuleSession(name, step, modules[name], programs.parts) for name, step in manifest.steps.items()}

    with patch.object(runtime, "load", load):
        return PackedGenerator(folder)
