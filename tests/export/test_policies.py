"""Which policies can be exported; all others are refused, and why is said."""

from dataclasses import MISSING, fields

import pytest
import torch

from attnpack_fx import (
    AVL,
    GEAR,
    H2O,
    KIVI,
    Columns,
    FastV,
    LayerPlan,
    MiniCache,
    PackPolicy,
    Partial,
    Quantize,
    Stored,
)
from attnpack_fx.export.layout import Layout
from attnpack_fx.export.policies import layout_of
from attnpack_fx.kernels.parts import E4M3
from attnpack_fx.passes.catalogue import METHODS
from attnpack_fx.passes.method import Stage
from attnpack_fx.ranks import Energy, Linear, PerLayer

FULL = Stored(Columns((("full", 0),)), Columns((("full", 0),)))


def layout(policy: PackPolicy, kv_heads: int = 2, head_dim: int = 16, layers: int = 2) -> Layout:
    sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    return layout_of(policy, **sizes, axes=1, dtype=torch.float32, vision=True)


REFUSED = {
    "partial": (PackPolicy(vision_rank=8, partial=Partial()), "partial, which moves tokens"),
    "one basis a batch": (PackPolicy(vision_rank=8, bases="batch"), "bases='batch'.*take bases='sample'"),
    "one basis a model": (PackPolicy(vision_rank=8, bases="a.safetensors"), "bases='a.safetensors'.*'sample'"),
    "energy": (PackPolicy(vision_rank=Energy(0.9)), "ranks by energy.*give ranks as numbers"),
    "energy of keys": (PackPolicy(vision_rank=(Energy(0.9), 4)), "ranks by energy"),
    "energy of text": (PackPolicy(vision_rank=8, text_rank=Energy(0.9, at_most=4)), "ranks by energy"),
    "energy of a plan": (
        PackPolicy(
            layers=(
                LayerPlan(None, None, "rotated"),
                LayerPlan(Stored(*[Columns(((8, 0),), 0.9)] * 2), None, "rotated"),
            )
        ),
        "ranks by energy",
    ),
    "a bound on folds": (
        PackPolicy(vision_rank=8, text_rank=8, fold_every=16, max_fold_error=0.1),
        "max_fold_error.*leave it out",
    ),
    "H2O": (PackPolicy(vision_rank=8, passes=(H2O(),)), "H2O.*Quantize of coefficients and bases alone"),
    "AVL": (PackPolicy(vision_rank=8, passes=(AVL(),)), "AVL, which chooses, moves or codes tokens"),
    "FastV": (PackPolicy(vision_rank=8, passes=(FastV(),)), "FastV"),
    "MiniCache": (PackPolicy(vision_rank=8, passes=(MiniCache(),)), "MiniCache"),
    "KIVI": (PackPolicy(vision_rank=8, passes=(KIVI(),)), "KIVI"),
    "GEAR": (PackPolicy(vision_rank=None, passes=(GEAR(),)), "GEAR"),
    "codes of the tail": (PackPolicy(vision_rank=8, passes=(Quantize(target="tail"),)), "Quantize.*of passes"),
    "codes of all": (PackPolicy(vision_rank=8, passes=(Quantize(target=("bases", "tail")),)), "Quantize"),
    "floats of 8 bits": (
        PackPolicy(vision_rank=8, passes=(Quantize(bits="e4m3"),)),
        r"floats of 8 bits.*Quantize\(bits=8\)",
    ),
    "floats in some columns": (
        PackPolicy(vision_rank=8, passes=(Quantize(bits=((4, "e5m2"), (None, 4))),)),
        "floats of 8 bits",
    ),
    "floats in a plan": (
        PackPolicy(layers=(LayerPlan(None, Stored(Columns(((8, (0, E4M3)),)), Columns(((8, 0),))), "rotated"),) * 2),
        "floats of 8 bits",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_fixed_structure_is_refused(name):
    policy, reason = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"export: got .*{reason}"):
        layout(policy)


def test_every_method_but_codes_of_factors_is_refused():
    """Whatever is in the catalogue: a new method is refused until it is known to export."""
    for method in METHODS:
        made = method(**{field.name: 0.5 for field in fields(method) if field.default is MISSING})
        if made.stages == {Stage.FACTORS}:
            layout(PackPolicy(vision_rank=8, passes=(made,)))
            continue
        with pytest.raises(NotImplementedError, match=method.__name__):
            layout(PackPolicy(vision_rank=8, passes=(made,)))


def test_ranks_too_high_to_factorise_are_refused():
    with pytest.raises(NotImplementedError, match=r"rank 1025.*at most 1024, or 'full'"):
        layout(PackPolicy(vision_rank=1025), kv_heads=16, head_dim=128)
    # As it is, there are no factors.
    assert layout(PackPolicy(vision_rank="full"), kv_heads=16, head_dim=128).ranks() == {}
    assert layout(PackPolicy(vision_rank=1024), kv_heads=16, head_dim=128).ranks() == {"vision": 1024}


@pytest.mark.parametrize(
    "policy",
    [
        PackPolicy(),
        PackPolicy(vision_rank=None),
        PackPolicy(vision_rank="full", text_rank="full"),
        PackPolicy(vision_rank=(8, 4), text_rank=3, skip_layers=(0,)),
        PackPolicy(vision_rank=Linear(4, 8), text_rank=PerLayer((3, "full"))),
        PackPolicy(vision_rank=8, key_space="rotated"),
        PackPolicy(vision_rank=8, text_rank=8, fold_every=16, recent=4),
        PackPolicy(vision_rank=8, passes=(Quantize(bits=2, symmetric=False),)),
        PackPolicy(vision_rank=8, passes=(Quantize(bits=((2, 8), (None, 4)), target="coefficients"),)),
        PackPolicy(layers=(LayerPlan(FULL, FULL, "rotated"), LayerPlan(FULL, None, "unrotated"))),
        PackPolicy(vision_rank=8, strict=True, layer_count=2),
    ],
)
def test_what_can_be_exported(policy):
    found = layout(policy)
    assert len(found.plans) == 2 and (found.key_dim, found.value_dim, found.heads) == (16, 16, 2)


def test_a_rank_that_no_matrix_has_is_an_error_of_the_policy():
    with pytest.raises(ValueError, match=r"exceeds H \* D = 32"):
        layout(PackPolicy(vision_rank=33))
