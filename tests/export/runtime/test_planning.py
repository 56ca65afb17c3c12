"""Where the host puts tokens: as the operator does it in a compiled graph, and positions as transformers has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import Columns, LayerPlan, PackPolicy, Stored, pack
from attnpack_fx.export.layout import Layout
from attnpack_fx.export.policies import layout_of
from attnpack_fx.export.runtime.planning import mrope_positions, plan
from attnpack_fx.export.signature import ArtefactError
from attnpack_fx.kernels import ops
from tests.kernels.inputs import SEEDS
from tests.zoo import IMAGE, ZOO

HEADS, DIM = 2, 16


def layout(policy: PackPolicy, layers: int = 2) -> Layout:
    sizes = {"layers": layers, "kv_heads": HEADS, "head_dim": DIM}
    return layout_of(policy, **sizes, axes=1, dtype=torch.float32, vision=True)


def prompt(seed: int, batch: int, tokens: int, share: float) -> tuple[Tensor, Tensor]:
    """Which tokens are vision tokens, and which are no padding (on the left; sample 0 has none)."""
    random = torch.Generator().manual_seed(seed)
    vision = torch.rand((batch, tokens), generator=random) < share
    padding = torch.randint(tokens, (batch, 1), generator=random) * (torch.arange(batch)[:, None] > 0)
    return vision, torch.arange(tokens) >= padding


POLICIES = st.builds(
    PackPolicy,
    vision_rank=st.sampled_from([None, 1, 4, (8, 3), 32, "full"]),
    text_rank=st.sampled_from([None, 1, 4, (3, 8), "full"]),
)


@given(
    policy=POLICIES,
    seed=SEEDS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_tokens_go_where_pack_puts_them(policy, seed, batch, tokens, share):
    vision, real = prompt(seed, batch, tokens, share)
    found = plan(policy, layout(policy), vision, real)
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn((batch, HEADS, tokens, DIM), generator=random)
    key, _ = pack(dense, dense, policy, modality=vision, real=real)
    expected = {
        "dense": found.index["prompt"],
        **{name: index for name, index in found.index.items() if name != "prompt"},
    }
    sizes = {name: index.shape[1] for name, index in expected.items()}
    assert {name: size for name, size in sizes.items() if size} == {
        name: size for name, size in key.tokens.items() if size
    }
    together = [found.index[name] for name in ("vision", "text", "prompt") if name in found.index]
    assert torch.equal(torch.cat(together, 1), key.placement.index)


@given(seed=SEEDS, batch=st.integers(1, 3), tokens=st.integers(1, 40), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_every_token_has_one_slot_and_padding_none(seed, batch, tokens, share):
    policy = PackPolicy(vision_rank=2, text_rank=2)
    vision, real = prompt(seed, batch, tokens, share)
    found = plan(policy, layout(policy), vision, real)
    masks = found.masks()
    assert masks.keys() == {"vision_mask", "text_mask", "prompt_mask"}
    for sample in range(batch):
        placed = [place for index in found.index.values() for place in index[sample].tolist() if place >= 0]
        assert sorted(placed) == real[sample].nonzero().flatten().tolist()
        for name, index in found.index.items():
            assert masks[f"{name}_mask"].dtype == torch.int64
            assert masks[f"{name}_mask"][sample].tolist() == [int(place >= 0) for place in index[sample].tolist()]


def test_vision_tokens_that_are_not_worth_packing_go_where_text_goes():
    vision, real = torch.zeros((1, 40), dtype=torch.bool), torch.ones((1, 40), dtype=torch.bool)
    vision[:, 2:5] = True
    few = plan(PackPolicy(vision_rank=8), layout(PackPolicy(vision_rank=8)), vision, real)
    assert few.index["vision"].shape == (1, 0) and few.index["prompt"].tolist() == [list(range(40))]
    policy = PackPolicy(vision_rank=8, text_rank=4)
    few = plan(policy, layout(policy), vision, real)
    assert [few.index[name].shape[1] for name in ("vision", "text", "prompt")] == [0, 40, 0]


def test_most_layers_decide():
    """Columns of one layer in three would not be worth it for so few tokens."""

    def policy(*ranks: int) -> PackPolicy:
        stored = [Stored(*[Columns(((rank, 0),))] * 2) for rank in ranks]
        return PackPolicy(layers=tuple(LayerPlan(each, None, "rotated") for each in stored))

    vision = torch.ones((1, 12), dtype=torch.bool)
    for ranks, packed in (((2, 2, 12), 12), ((2, 12, 12), 0), ((2, 12), 12), ((12, 12), 0)):
        found = plan(policy(*ranks), layout(policy(*ranks), len(ranks)), vision, vision)
        assert found.index["vision"].shape[1] == packed, ranks


def test_text_that_is_folded_is_packed_however_little_it_is():
    policy = PackPolicy(vision_rank=None, text_rank=8, fold_every=4)
    real = torch.ones((1, 3), dtype=torch.bool)
    assert plan(policy, layout(policy), ~real, real).index["text"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("axes", [1, 3])
def test_positions_of_slots(axes):
    policy = PackPolicy(vision_rank=2, text_rank=2)
    vision, real = prompt(0, 2, 30, 0.5)
    found = plan(policy, layout(policy), vision, real)
    positions = torch.randint(99, (3, 2, 30), generator=torch.Generator().manual_seed(0))
    made = found.positions(positions if axes == 3 else positions[0], ["text", "prompt"])
    assert made.keys() == {"text_position_ids", "prompt_position_ids"}
    index = found.index["text"]
    for sample in range(2):
        for slot, place in enumerate(index[sample].tolist()):
            if place >= 0:
                expected = positions[:, sample, place] if axes == 3 else positions[0, sample, place]
                assert torch.equal(made["text_position_ids"][..., sample, slot], expected)


def test_the_operator_is_asked_with_the_same_flags():
    """Rows of filler in samples with fewer tokens, as `ops.plan` has them."""
    policy = PackPolicy(vision_rank=2, text_rank=2)
    vision, real = prompt(3, 3, 40, 0.5)
    like = torch.zeros((3, HEADS, 40, DIM))
    *indices, _ = ops.plan(vision, real, like, True, [], [])
    found = plan(policy, layout(policy), vision, real)
    for name, index in zip(("vision", "text", "prompt"), indices, strict=True):
        assert torch.equal(found.index[name], index)
    assert (found.index["text"] < 0).any()


MODELS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")


@pytest.fixture(scope="module")
def models():
    return {name: ZOO[name].build("eager").model for name in MODELS}


def spans(*pieces: int | tuple[int, int, int]) -> list[int]:
    """Token ids of numbers of text tokens and of images by their merged grids, with their marks around them."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids += range(10, 10 + piece)
        else:
            ids += [317, *[IMAGE] * (piece[0] * piece[1] * piece[2]), 316]
    return ids


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "prompts",
    [
        [[5]],
        [[3, (1, 2, 3), 4]],
        [[(1, 4, 2)]],
        [[2, (1, 2, 3), (1, 5, 1), 1]],
        [[3, (1, 2, 2), 2, (1, 3, 4), 1, (1, 1, 1), 7]],
        [[3, (1, 2, 3), 4], [1, (1, 6, 6), 2, (1, 2, 2)], [9]],
    ],
)
def test_positions_are_those_of_transformers(models, name, prompts):
    rows = [spans(*pieces) for pieces in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    grids = [piece for pieces in prompts for piece in pieces if not isinstance(piece, int)]
    grid = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in grids]).reshape(-1, 3)
    expected, _ = models[name].get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=grid if len(grid) else None,
        attention_mask=mask,
    )
    found = mrope_positions(ids, mask > 0, ids == IMAGE, grid, 2)
    real = (mask > 0).expand_as(found)
    assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize(
    "grid",
    [
        [],
        [[1, 4, 4]],
        [[1, 4, 4], [1, 4, 6]],
        [[1, 4, 4], [1, 4, 4], [1, 4, 4]],
        [[1, 8, 4], [1, 4, 4]],
        [[1, 4, 4], [0, 4, 4]],
        [[4, 1, 4, 4]],
    ],
)
def test_grids_of_other_images_are_refused(grid):
    ids = torch.tensor([spans(2, (1, 2, 2), 3, (1, 2, 2), 1)])
    grids = torch.tensor(grid, dtype=torch.int64).reshape(len(grid), -1 if grid else 3)
    with pytest.raises(ArtefactError, match="image_grid_thw: got"):
        mrope_positions(ids, torch.ones_like(ids) > 0, ids == IMAGE, grids, 2)
