from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.passes.storage import Columns, Stored
from attnpack_fx.policy import PolicyError
from attnpack_fx.ranks import UNROTATED, Energy, Linear, PerLayer, checked_rank, known_place, parts, resolve, to_json


class TestLinear:
    @pytest.mark.parametrize(
        ("schedule", "count", "expected"),
        [
            (Linear(16, 128), 8, [16, 32, 48, 64, 80, 96, 112, 128]),
            (Linear(128, 16), 3, [128, 72, 16]),
            (Linear(1, 2), 3, [1, 2, 2]),
            (Linear(2, 1), 3, [2, 2, 1]),
            (Linear(7, 99), 1, [7]),
            (Linear(5, 5), 4, [5, 5, 5, 5]),
        ],
    )
    def test_at(self, schedule, count, expected):
        assert [schedule.at(number, count) for number in range(count)] == expected

    @given(st.integers(1, 512), st.integers(1, 512), st.integers(2, 80), st.data())
    @settings(max_examples=60, deadline=None)
    def test_is_the_nearest_int(self, first, last, count, data):
        number = data.draw(st.integers(0, count - 1))
        exact = first + Fraction(last - first) * number / (count - 1)
        assert abs(Linear(first, last).at(number, count) - exact) <= Fraction(1, 2)

    @pytest.mark.parametrize("bad", [0, -3, True, 1.5, "full", None])
    def test_ends_are_ranks(self, bad):
        with pytest.raises(PolicyError, match=r"Linear.first: got .*expected an int >= 1; e.g. Linear\(16, 128\)"):
            Linear(bad, 8)
        with pytest.raises(PolicyError, match=r"Linear.last: got"):
            Linear(8, bad)


class TestPerLayer:
    def test_at(self):
        schedule = PerLayer([8, "full", 2])
        assert [schedule.at(number, 3) for number in range(3)] == [8, "full", 2]
        assert hash(schedule) == hash(PerLayer((8, "full", 2)))

    def test_one_rank_for_each_layer(self):
        with pytest.raises(PolicyError, match="PerLayer: got 2 ranks, expected 3, one per decoder layer"):
            PerLayer((1, 2)).at(0, 3)

    @pytest.mark.parametrize("bad", [(), 8, "full", None, {8: 1}])
    def test_is_a_sequence(self, bad):
        with pytest.raises(PolicyError, match=r"PerLayer: got .*expected one rank per layer"):
            PerLayer(bad)

    @pytest.mark.parametrize("bad", [0, True, 2.0, "half", None])
    def test_of_ranks(self, bad):
        with pytest.raises(PolicyError, match=r"PerLayer, layer 1: got .*expected an int >= 1; or 'full'.*skip_layers"):
            PerLayer((4, bad))


class TestEnergy:
    def test_defaults(self):
        assert Energy(1) == Energy(1.0, at_most=128)

    @pytest.mark.parametrize("bad", [0, -0.5, 1.01, float("nan"), float("inf"), True, "0.9", None])
    def test_threshold_is_a_share(self, bad):
        with pytest.raises(PolicyError, match=r"Energy.threshold: got .*expected a share in \(0, 1\]"):
            Energy(bad)

    @pytest.mark.parametrize("bad", [0, True, 2.0, "full", None])
    def test_at_most_is_a_rank(self, bad):
        with pytest.raises(PolicyError, match=r"Energy.at_most: got .*expected an int >= 1"):
            Energy(0.9, at_most=bad)


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        (None, None),
        (64, 64),
        ("full", "full"),
        ([8, "full"], (8, "full")),
        ({"linear": [16, 128]}, Linear(16, 128)),
        ({"per_layer": [64, "full"]}, PerLayer((64, "full"))),
        ({"energy": 0.99, "at_most": 32}, Energy(0.99, 32)),
        ([{"linear": [1, 2]}, {"energy": 0.5, "at_most": 128}], (Linear(1, 2), Energy(0.5))),
    ],
)
def test_json_forms(form, spec):
    assert checked_rank("text_rank", form) == spec
    assert checked_rank("text_rank", spec) == spec
    assert to_json(spec) == form


def test_at_most_may_be_left_out():
    assert checked_rank("text_rank", {"energy": 0.99}) == Energy(0.99)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"linaer": [1, 2]}, "text_rank: a rank: got the key 'linaer'.*did you mean 'linear'"),
        ({"at_most": 3}, "text_rank: a rank: got no 'energy'"),
        ({"linear": [1, 2], "at_most": 3}, "text_rank: a linear rank: got the key 'at_most', expected linear"),
        ({"linear": 3}, r"text_rank: linear: got 3, expected \[first, last\]"),
        ({"linear": [1, 2, 3]}, r"text_rank: linear: got \[1, 2, 3\], expected \[first, last\]"),
        ({"linear": [0, 2]}, "text_rank: Linear.first: got 0"),
        ({"per_layer": 3}, "text_rank: PerLayer: got 3"),
        ({"per_layer": [3], "energy": 1}, "text_rank: a rank per layer: got the key 'energy'"),
        ({"energy": 2}, "text_rank: Energy.threshold: got 2"),
        ([4, {"energy": 2}], "text_rank: Energy.threshold: got 2"),
        ([[1, 2], 3], r"text_rank: got \[\[1, 2\], 3\] \(list\), expected an int >= 1"),
        ([1, 2, 3], r"text_rank: got \[1, 2, 3\], expected .*PerLayer\(\(...\)\)"),
    ],
)
def test_bad_json_forms(form, message):
    with pytest.raises(PolicyError, match=message):
        checked_rank("text_rank", form)


def test_parts():
    assert parts(None) == ()
    assert parts(3) == (3, 3)
    assert parts((3, Energy(0.5))) == (3, Energy(0.5))


def test_known_place():
    assert known_place("layers", 0, 1) == (0, 1)
    with pytest.raises(
        PolicyError, match="layers depends on the layer, but this graph does not show which layers it has"
    ):
        known_place("layers", None, 1)
    with pytest.raises(PolicyError, match=r"layers needs the number of decoder layers.*attnpack_fx.compile"):
        known_place("layers", 0, None)


def columns(rank, energy=None):
    return Columns(((rank, 0),), energy)


class TestResolve:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            (None, None),
            (7, (columns(7), columns(7))),
            (("full", 3), (columns(32), columns(3))),
            (Linear(2, 6), (columns(4), columns(4))),
            ((PerLayer((1, "full", 1)), PerLayer((1, 5, 1))), (columns(32), columns(5))),
            (Energy(0.9), (columns(32, 0.9), columns(16, 0.9))),
            ((Energy(0.9, 20), Energy(0.5, 10)), (columns(20, 0.9), columns(10, 0.5))),
        ],
    )
    @pytest.mark.parametrize("modality", ["vision", "text"])
    def test_to_numbers(self, modality, spec, expected):
        found = resolve(modality, spec, 1, 3, 32, 16)
        assert found == (None if expected is None else Stored(*expected))

    def test_auto_is_by_where_keys_are_packed(self):
        assert resolve("vision", "auto", None, None, 128, 128) == Stored(columns(UNROTATED), columns(64))
        assert resolve("vision", "auto", None, None, 128, 128, "rotated") == Stored(columns(64), columns(64))

    def test_what_is_clipped(self):
        assert resolve("vision", 64, None, None, 128, 48) == Stored(columns(64), columns(48))
        assert resolve("vision", "auto", None, None, 8, 48) == Stored(columns(8), columns(48))
        for modality, spec in [("text", 64), ("vision", (64, 64)), ("vision", 65), ("vision", PerLayer((64,)))]:
            with pytest.raises(PolicyError, match=rf"{modality}_rank=6. exceeds H \* D = 48"):
                resolve(modality, spec, 0, 1, 128, 48)

    @pytest.mark.parametrize("spec", [9, Linear(1, 17), PerLayer((1, 9))])
    def test_a_rank_above_the_width_is_named_with_its_layer(self, spec):
        message = (
            r"text_rank=\d+ exceeds H \* D = 8, the largest rank a value of layer 1 has; use a rank <= 8 or 'full'"
        )
        with pytest.raises(PolicyError, match=message):
            resolve("text", spec, 1, 2, 32, 8)

    def test_a_schedule_of_another_length_names_its_field(self):
        with pytest.raises(PolicyError, match="vision_rank: PerLayer: got 1 ranks, expected 2"):
            resolve("vision", PerLayer((1,)), 0, 2, 8, 8)

    @pytest.mark.parametrize("spec", [Linear(1, 2), PerLayer((1, 2))])
    def test_a_schedule_needs_its_place(self, spec):
        name = type(spec).__name__
        with pytest.raises(PolicyError, match=rf"text_rank={name}\(...\) depends on the layer"):
            resolve("text", spec, None, 2, 8, 8)
        with pytest.raises(PolicyError, match=rf"text_rank={name}\(...\) needs the number of decoder layers"):
            resolve("text", spec, 0, None, 8, 8)
