"""Steps compiled by AOTInductor."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnpack_fx.export.manifest import StepFiles
from attnpack_fx.export.runtime.session import Held, Session
from attnpack_fx.export.signature import ArtefactError


class AotiSession(Session):
    """A package holds native code, so that it is to be trusted like a program; what else it holds is not run.

    `torch._inductor.aoti_load_package` is not called for that: it also unpickles whatever a package has besides.
    """

    def __init__(self, name: str, step: StepFiles, path: Path, device: torch.device) -> None:
        super().__init__(name, step, device)
        try:
            self._package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise ArtefactError(f"{path}: PyTorch {torch.__version__} cannot load it: {error}") from error

    def _run(self, tensors: Mapping[str, Tensor], held: Held | None, sizes: Mapping[str, int]) -> Sequence[Tensor]:
        given = tensors if held is None else {**held.tensors, **tensors}
        made: Sequence[Tensor] = self._package.run([given[spec.name] for spec in self.step.inputs])
        return made
