"""What the bytes of a packed cache are."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from attnpack_fx import PackedTensor, cache_bytes
from attnpack_fx.kernels.parts import Block, Rows, tensors_of

#: Kinds that stand for numbers of keys and values; all others are kept to read these.
NUMBERS = ("coefficients", "bases", "text coefficients", "text bases", "codes", "dense", "retained")

_ROWS = {
    "codes": "codes",
    "scale": "scales",
    "zero": "zero points",
    "group_of": "groups",
    "codebook": "codebook",
    "outliers": "outliers",
    "places": "places of outliers",
    "left": "residual",
    "right": "residual",
    "part_of": "groups",
    "norm": "norms",
}


def by_kind(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of keys and values by what they are, every storage once; they add up to `cache_bytes`.

    coefficients, bases: of vision tokens, "text coefficients" and "text bases" of all others. codes: of coded rows, or
    rows themselves where a merged pair shares them. dense: tail rows that hold tokens, resting ones too, and tensors
    that are not packed; retained: tail rows that merged layers keep as they are; spare: tail rows that hold none yet.
    placement: which token is where. observed: attention of stored tokens. drafts: what a crop of the last call would go
    back to, until the next one begins.
    """
    found: dict[str, int] = {}
    seen: set[int] = set()
    tensors = list(tensors)
    for tensor in tensors:
        for kind, part in _parts(tensor):
            storage = part.untyped_storage()
            if storage.nbytes() == 0 or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            used = storage.nbytes()
            if isinstance(tensor, PackedTensor) and part is tensor.lease.buffer.rows:
                used, retained = part[: tensor.lease.length].nbytes, part[: tensor.held.pinned].nbytes
                found["retained"] = found.get("retained", 0) + retained
                found["spare"] = found.get("spare", 0) + storage.nbytes() - used
                used -= retained
            found[kind] = found.get(kind, 0) + used
    assert sum(found.values()) == cache_bytes(tensors), "a part of a packed tensor has no name here"
    return {kind: size for kind, size in found.items() if size}


def numbers(tensors: Iterable[Tensor]) -> int:
    """Bytes of those that stand for numbers of keys and values."""
    return sum(size for kind, size in by_kind(tensors).items() if kind in NUMBERS)


def _parts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(tensor, PackedTensor):
        yield "dense", tensor
        return
    held = tensor.held
    yield "dense", tensor.lease.buffer.rows
    yield from (("placement", each) for each in held.placement.tensors)
    for modality, segment in zip(held.modalities, held.segments, strict=True):
        for block in segment.blocks:
            yield from _of_rows(block) if isinstance(block, Rows) else _of_block(block, modality)
    if tensor.importance is not None:
        yield "observed", tensor.importance
    if held.angles is not None:
        yield from (("cos, sin", each) for each in held.angles.tensors)
    resting = held.resting
    if resting is not None:
        yield "dense", resting.tail
        yield from (("coefficients", each) for each in resting.coefficients)
        yield "placement", resting.index
        yield from (("cos, sin", each) for each in (resting.axes,) if each is not None)
        yield from (("observed", each) for each in (resting.importance,) if each is not None)
    yield from (("other", each) for each in held.tensors)
    yield from (("drafts", each) for each in tensor.tensors)


def _of_block(block: Block[Tensor], modality: str) -> Iterator[tuple[str, Tensor]]:
    text = "" if modality == "vision" else "text "
    yield f"{text}coefficients", block.coefficient
    yield f"{text}bases", block.basis
    yield from (("scales", each) for each in (block.scale,) if each is not None)


def _of_rows(block: Rows[Tensor]) -> Iterator[tuple[str, Tensor]]:
    # Of a merged pair of layers without codes, what is called scale are the lengths of rows.
    names = _ROWS | {"scale": "norms"} if block.form.bits == 0 else _ROWS
    yield from ((names[name], each) for name, each in tensors_of(block).items())
