"""Names, dtypes and shapes of a packed cache: a convention that artefacts and other hosts rely on."""

import pytest
import torch

from attnpack_fx import Columns, LayerPlan, PackPolicy, Quantize, Stored
from attnpack_fx.export.layout import Layout
from attnpack_fx.export.policies import layout_of
from attnpack_fx.passes.storage import Count
from attnpack_fx.ranks import PerLayer

B, H, D = "batch_size", 2, 16


def layout(policy: PackPolicy, layers: int = 2, axes: int = 1, vision: bool = True) -> Layout:
    sizes = {"layers": layers, "kv_heads": H, "head_dim": D}
    return layout_of(policy, **sizes, axes=axes, dtype=torch.float16, vision=vision)


def named(specs) -> dict[str, tuple]:
    found = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    return found


def plan(vision: Count | None, text: Count | None, key_space="unrotated") -> LayerPlan:
    stored = [None if rank is None else Stored(*[Columns(((rank, 0),))] * 2) for rank in (vision, text)]
    return LayerPlan(*stored, key_space)


def test_vision_tokens_packed_and_text_as_it_is():
    found = layout(PackPolicy(vision_rank=(8, 4)), layers=1)
    half = torch.float16
    assert named(found.packed()) == {
        "packed.0.key": (half, (B, "vision_length", 8)),
        "basis.0.key": (half, (B, H, 8, D)),
        "packed.0.value": (half, (B, "vision_length", 4)),
        "basis.0.value": (half, (B, H, 4, D)),
        "prompt.0.key": (half, (B, H, "prompt_length", D)),
        "prompt.0.value": (half, (B, H, "prompt_length", D)),
    }
    assert named(found.places()) == {
        "vision_mask": (torch.int64, (B, "vision_length")),
        "prompt_mask": (torch.int64, (B, "prompt_length")),
        "vision_position_ids": (torch.int64, (B, "vision_length")),
    }
    assert found.modalities == ("vision",) and found.ranks() == {"vision": 8}


@pytest.mark.parametrize("name", ["past_key_values", "present"])
def test_the_window_has_the_names_that_others_use(name):
    found = named(layout(PackPolicy(), layers=3).window(name, "past_sequence_length"))
    assert list(found) == [f"{name}.{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
    assert set(found.values()) == {(torch.float16, (B, H, "past_sequence_length", D))}


def test_text_beside_vision_has_names_of_its_own():
    found = layout(PackPolicy(vision_rank=8, text_rank=4), layers=1)
    assert found.modalities == ("vision", "text") and found.ranks() == {"vision": 8, "text": 4}
    packed = named(found.packed())
    assert packed["packed_text.0.key"] == (torch.float16, (B, "text_length", 4))
    assert packed["basis_text.0.value"] == (torch.float16, (B, H, 4, D))
    assert {"text_mask", "text_position_ids"} <= named(found.places()).keys()


@pytest.mark.parametrize("vision", [True, False])
def test_text_alone_has_the_plain_names(vision):
    found = layout(PackPolicy(vision_rank=None if vision else 8, text_rank=4), layers=1, vision=vision)
    assert found.modalities == ("text",)
    packed = named(found.packed())
    assert packed["packed.0.key"] == (torch.float16, (B, "text_length", 4)) and "packed_text.0.key" not in packed
    assert not any("vision" in name for name in named(found.places()))


def test_nothing_packed_leaves_the_prompt():
    found = layout(PackPolicy(vision_rank=None), layers=1)
    assert list(named(found.packed())) == ["prompt.0.key", "prompt.0.value"]
    assert named(found.places()).keys() == {"prompt_mask"}
    assert found.turns == () and found.ranks() == {}


@pytest.mark.parametrize("rank", ["full", H * D])
def test_full_rank_is_stored_as_rows(rank):
    found = layout(PackPolicy(vision_rank=(rank, 4)), layers=1)
    packed = named(found.packed())
    assert packed["packed.0.key"] == (torch.float16, (B, H, "vision_length", D)) and "basis.0.key" not in packed
    assert packed["packed.0.value"] == (torch.float16, (B, "vision_length", 4))
    # Keys in rows are as they are attended.
    assert found.turned(0) == () and found.turns == ()


def test_full_rank_in_codes_is_not():
    found = layout(PackPolicy(vision_rank="full", passes=(Quantize(bits=4),)), layers=1)
    assert named(found.packed())["packed.0.key"] == (torch.uint8, (B, "vision_length", H * D // 2))


def test_layers_that_pack_less_have_rows_in_the_same_slots():
    policy = PackPolicy(layers=(plan(8, None), plan("full", 4), plan(None, None)))
    found = layout(policy, layers=3)
    assert found.modalities == ("vision", "text")
    packed = named(found.packed())
    rows = {
        layer: {name for name in packed if len(packed[name][1]) == 4 and f".{layer}." in name} for layer in range(3)
    }
    rows = {
        layer: {name for name in names if "basis" not in name and "prompt" not in name} for layer, names in rows.items()
    }
    assert rows == {
        0: {"packed_text.0.key", "packed_text.0.value"},
        1: {"packed.1.key", "packed.1.value"},
        2: {f"packed{ending}.2.{kind}" for ending in ("", "_text") for kind in ("key", "value")},
    }
    # Rows in front of factors that are rotated as they are read are too.
    assert [found.turned(layer) for layer in range(3)] == [("vision",), ("vision", "text"), ()]
    assert found.turns == ("vision", "text")


@pytest.mark.parametrize("space", ["rotated", "unrotated", "auto"])
def test_keys_before_rotary_embedding_need_positions(space):
    found = layout(PackPolicy(vision_rank=8, text_rank=4, key_space=space))
    turned = () if space == "rotated" else ("vision", "text")
    assert found.turned(0) == found.turned(1) == found.turns == turned
    assert ("vision_position_ids" in named(found.places())) == bool(turned)


def test_positions_of_three_axes():
    found = layout(PackPolicy(vision_rank=8), axes=3)
    assert named(found.places())["vision_position_ids"] == (torch.int64, (3, B, "vision_length"))
    assert found.positions("prompt_length") == (3, B, "prompt_length")


def test_blocks_of_columns_in_codes():
    key = Columns(((8, (8, 4)), (4, 2), (3, 0)))
    value = Columns(((5, (2, 8)),), asymmetric=True)
    policy = PackPolicy(layers=(LayerPlan(Stored(key, value), None, "rotated"),))
    packed = named(layout(policy, layers=1).packed())
    unsigned, signed, half = torch.uint8, torch.int8, torch.float16
    expected = {
        "packed.0.key": (signed, (B, "vision_length", 8)),
        "basis.0.key": (unsigned, (B, H, 8, D // 2)),
        "scale.0.key": (torch.float32, (B, 2, 8)),
        "packed.0.key.1": (unsigned, (B, "vision_length", 1)),
        "basis.0.key.1": (unsigned, (B, H, 4, D // 4)),
        "scale.0.key.1": (torch.float32, (B, 2, 4)),
        "packed.0.key.2": (half, (B, "vision_length", 3)),
        "basis.0.key.2": (half, (B, H, 3, D)),
        "packed.0.value": (unsigned, (B, "vision_length", 2)),
        "basis.0.value": (unsigned, (B, H, 5, D)),
        "scale.0.value": (torch.float32, (B, 4, 5)),
    }
    assert {name: spec for name, spec in packed.items() if not name.startswith("prompt")} == expected
    assert list(packed)[: len(expected)] == list(expected)


def test_ranks_are_the_highest_of_any_layer():
    found = layout(PackPolicy(vision_rank=PerLayer((8, "full", 12)), text_rank=(3, 5)), layers=3)
    assert found.ranks() == {"vision": 12, "text": 5}


def test_every_name_stands_once():
    policy = PackPolicy(vision_rank=8, text_rank=4, passes=(Quantize(bits=4),))
    found = layout(policy, layers=3)
    specs = [*found.packed(), *found.places(), *found.window("past_key_values", "past_sequence_length")]
    assert len({spec.name for spec in specs}) == len(specs)
