"""Generate with an artefact: `PackedGenerator`."""

from attnpack_fx.export.runtime.generator import PackedGenerator

__all__ = ["PackedGenerator"]
