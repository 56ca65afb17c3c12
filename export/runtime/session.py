"""One step of an artefact, loaded: what every runtime has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.export.manifest import StepFiles
from attnpack_fx.export.runtime.filler import filled, unfilled
from attnpack_fx.export.signature import check


@dataclass(frozen=True)
class Held:
    """Tensors that a step is given again and again, checked once.

    sizes: of their dimensions. bound: what a runtime keeps about them.
    """

    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    bound: Any


class Session(ABC):
    """Runs one step. Subclasses say how; every tensor is checked here before, and filled up where that is too short.

    device: where tensors have to be.
    """

    def __init__(self, name: str, step: StepFiles, device: torch.device) -> None:
        self.name, self.step, self.device = name, step, device

    def hold(self, tensors: Mapping[str, Tensor]) -> Held:
        """Check some of the step's inputs, for many calls of `run`. Raises `ArtefactError`."""
        specs = [spec for spec in self.step.inputs if spec.name in tensors]
        moved, _ = filled(self.step, self._moved(tensors))
        sizes = check(self.name, specs, moved, self.step.ranges)
        return Held(moved, sizes, self._bind(moved))

    def run(self, tensors: Mapping[str, Tensor], held: Held | None = None) -> dict[str, Tensor]:
        """The step's outputs by name. held: of `hold`, for all inputs that `tensors` lacks.

        Raises `ArtefactError` for inputs that are missing, unknown, or not of the manifest's dtype and shape.
        """
        have = held.tensors if held is not None else {}
        specs = [spec for spec in self.step.inputs if spec.name not in have]
        moved, short = filled(self.step, self._moved(tensors))
        sizes = check(self.name, specs, moved, self.step.ranges, held.sizes if held is not None else {})
        made = self._run(moved, held, sizes)
        named = {spec.name: tensor for spec, tensor in zip(self.step.outputs, made, strict=True)}
        check(f"{self.name}, what it returned", self.step.outputs, named, self.step.ranges, sizes)
        return {spec.name: unfilled(spec, named[spec.name], short) for spec in self.step.outputs}

    def allocated(self, sizes: Mapping[str, int]) -> list[Tensor] | None:
        """Room for the outputs; None where their sizes do not follow from those of the inputs."""
        if any(not spec.dims <= sizes.keys() for spec in self.step.outputs):
            return None
        return [torch.empty(spec.resolved(sizes), dtype=spec.dtype, device=self.device) for spec in self.step.outputs]

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            name: tensor.to(self.device).contiguous() if isinstance(tensor, Tensor) else tensor
            for name, tensor in tensors.items()
        }

    def _bind(self, tensors: Mapping[str, Tensor]) -> Any:
        """What the runtime can prepare about tensors that stay."""
        return None

    @abstractmethod
    def _run(self, tensors: Mapping[str, Tensor], held: Held | None, sizes: Mapping[str, int]) -> Sequence[Tensor]:
        """The outputs, in order; sizes: of all dimensions."""
