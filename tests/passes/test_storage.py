import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.storage import BITS, Columns, LayerPlan, Stored

BLOCKS = st.lists(st.tuples(st.integers(1, 64), st.sampled_from(BITS)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    "bad",
    [
        (),
        None,
        64,
        (64, 0),
        ((0, 0),),
        ((4, 3),),
        ((4, 16),),
        ((4, True),),
        ((True, 4),),
        ((4, 0, 0),),
        (("half", 0),),
        ((4.0, 0),),
        "ab",
    ],
    ids=repr,
)
def test_bad_blocks(bad):
    with pytest.raises(
        ValueError, match=r"blocks: got .*expected .*\(columns, bits\) pairs.*e.g. \(\(16, 8\), \(48, 4\)\)"
    ):
        Columns(bad)


def test_full_stands_alone():
    with pytest.raises(ValueError, match="'full' leaves no column for another block"):
        Columns(((4, 0), ("full", 4)))


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "0.9", float("nan")])
def test_bad_energy(bad):
    with pytest.raises(ValueError, match=r"energy: got .*expected a share in \(0, 1\]"):
        Columns(((4, 0),), bad)


def test_is_a_value():
    assert Columns([[4, 8], [2, 0]], 1) == Columns(((4, 8), (2, 0)), 1.0)
    assert hash(Columns([[4, 8]])) == hash(Columns(((4, 8),)))


def test_rank_and_precision():
    assert Columns(((4, 0), (2, 0))).rank == 6
    assert not Columns(((4, 0), (2, 0))).quantised
    assert Columns(((4, 0), (2, 8))).quantised


def test_full_is_resolved_by_the_width():
    full = Columns((("full", 4),), 0.5)
    assert full.is_full
    with pytest.raises(ValueError, match=r"rank: got 'full'.*Columns.within"):
        _ = full.rank
    assert full.within(48) == Columns(((48, 4),), 0.5)


def test_within_refuses_what_does_not_fit():
    columns = Columns(((4, 0), (4, 2)))
    assert columns.within(8) is columns
    with pytest.raises(ValueError, match=r"rank 8 exceeds H \* D = 7.*use a rank <= 7 or 'full'"):
        columns.within(7)


@given(BLOCKS, st.lists(st.integers(1, 400), max_size=4), st.none() | st.floats(0.1, 1))
@settings(max_examples=60, deadline=None)
def test_cut_changes_no_column(blocks, boundaries, energy):
    columns = Columns(tuple(blocks), energy)
    cut = columns.cut(boundaries)

    def bits(of):
        return [kept for count, kept in of.blocks for _ in range(count)]

    ends = [sum(count for count, _ in cut.blocks[: number + 1]) for number in range(len(cut.blocks))]
    assert bits(cut) == bits(columns)
    assert cut.energy == energy
    assert {boundary for boundary in boundaries if boundary < columns.rank} <= set(ends)
    assert len(cut.blocks) <= len(blocks) + len(set(boundaries))


def test_a_modality_is_stored_whole_or_not():
    columns = Columns(((4, 0),))
    stored = Stored(columns, columns)
    for bad in ((columns, None), (4, columns)):
        with pytest.raises(ValueError, match="expected Columns"):
            Stored(*bad)
    plan = LayerPlan(stored, None, "rotated")
    assert (plan.of("vision"), plan.of("text")) == (stored, None)
    for bad in ((columns, None, "rotated"), (None, 64, "rotated")):
        with pytest.raises(ValueError, match=r"expected Stored\(key, value\) or None"):
            LayerPlan(*bad)
    with pytest.raises(ValueError, match="key_space: got 'auto', expected 'rotated' or 'unrotated'"):
        LayerPlan(stored, None, "auto")
