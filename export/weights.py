"""Weights of several ONNX models in one file, each tensor once: prefill and decode have the same."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

#: The file, beside the models.
NAME = "weights.bin"
#: Runtimes map tensors into memory where they begin at a page.
_ALIGNMENT = 4096
#: Smaller tensors stay in the model: shapes and scalars, which graph optimisers look into.
_LEAST = 1024


class SharedWeights:
    """Writes models whose larger tensors go to one file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / NAME).open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def save(self, model: "onnx_ir.Model", name: str) -> None:
        """Write a model, as `name` in the folder."""
        import onnx_ir

        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _LEAST:
                    continue
                offset, length = self._placed(tensor.tobytes())
                value.const_value = onnx_ir.ExternalTensor(
                    NAME, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=self._folder
                )
        onnx_ir.save(model, self._folder / name)

    def close(self) -> None:
        self._file.close()

    def _placed(self, content: bytes) -> tuple[int, int]:
        """Offset and length of these bytes in the file."""
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[digest] = self._file.tell(), len(content)
            self._file.write(content)
            self._file.flush()
        return self._places[digest]
