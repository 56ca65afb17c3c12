"""Which policies can be exported: those whose packed state has a fixed structure, and takes no queries to choose."""

import torch

from attnpack_fx.export.layout import KINDS, Layout, Modality
from attnpack_fx.export.model import Parts
from attnpack_fx.passes.asks import acting
from attnpack_fx.passes.method import Stage
from attnpack_fx.passes.storage import both
from attnpack_fx.policy import PackPolicy

#: Largest width of an eigenproblem worth looping over.
_LARGEST_SKETCH = 1024


def exportable(policy: PackPolicy, parts: Parts) -> Layout:
    """The layout of a policy's packed state. Raises `NotImplementedError`, with the reason, where it has none."""
    return layout_of(
        policy,
        layers=parts.layers,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        axes=parts.axes,
        dtype=parts.dtype,
        vision=bool(parts.image_tokens),
    )


def layout_of(
    policy: PackPolicy, *, layers: int, kv_heads: int, head_dim: int, axes: int, dtype: torch.dtype, vision: bool
) -> Layout:
    """As `exportable`, from a model's sizes; vision: whether it takes images."""
    _refuse(policy)
    width = kv_heads * head_dim
    plans = tuple(policy.layer(number, layers, width, width, vision=vision) for number in range(layers))
    names: tuple[Modality, ...] = ("vision", "text")
    modalities = tuple(name for name in names if any(plan.of(name) is not None for plan in plans))
    if "vision" in modalities:
        for number, plan in enumerate(plans):
            if plan.vision is None and plan.text is not None:
                raise NotImplementedError(
                    f"export: got layer {number}, which packs text and not vision, unlike other layers: there vision "
                    "tokens are packed with the text, which takes slots of its own; pack both there, or neither"
                )
    layout = Layout(plans, kv_heads, head_dim, head_dim, modalities, axes, dtype)
    for layer in range(layers):
        for modality in modalities:
            for kind in KINDS:
                columns = layout.columns(layer, modality, kind)
                if columns is None:
                    continue
                if columns.energy is not None:
                    raise NotImplementedError(
                        "export: got ranks by energy, which differ from prompt to prompt, so that no tensor's shape is "
                        "known; calibrate the policy, or give ranks as numbers"
                    )
                if columns.rank > _LARGEST_SKETCH:
                    raise NotImplementedError(
                        f"export: got rank {columns.rank}, expected at most {_LARGEST_SKETCH}, or 'full', which has no "
                        "factors"
                    )
                for _, bits in columns.blocks:
                    if set(both(bits)) - {0, 2, 4, 8}:
                        raise NotImplementedError(
                            "export: got codes in floats of 8 bits, which ONNX Runtime does not convert on a CPU; take "
                            "Quantize(bits=8)"
                        )
    return layout


def _refuse(policy: PackPolicy) -> None:
    if policy.partial is not None:
        raise NotImplementedError(
            "export: got partial, which moves tokens between blocks by what was attended to; leave it out"
        )
    if policy.bases != "sample":
        raise NotImplementedError(
            f"export: got bases={policy.bases!r}, where samples that it does not fit get bases of their own, and no "
            "tensor's shape is known; take bases='sample'"
        )
    if policy.max_fold_error is not None:
        raise NotImplementedError(
            "export: got max_fold_error, which needs the error of each prefill, which no step returns; leave it out"
        )
    for stage in (Stage.TOKENS, Stage.EVICT, Stage.SELECT, Stage.MERGE, Stage.ROWS):
        if names := [type(method).__name__ for method in acting(policy.passes, stage)]:
            raise NotImplementedError(
                f"export: got {', '.join(names)}, which chooses, moves or codes tokens between steps; of passes, an "
                "artefact has Quantize of coefficients and bases alone"
            )
