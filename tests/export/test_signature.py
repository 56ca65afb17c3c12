from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnpack_fx.export.signature import DTYPES, ArtefactError, Range, TensorSpec, check

SPECS = (
    TensorSpec("ids", torch.int64, ("batch", "new")),
    TensorSpec("mask", torch.int64, ("batch", "past + new")),
    TensorSpec("window", torch.float32, ("batch", 2, "past", 4)),
)
RANGES = {"batch": Range(1, 4), "past": Range(0, 8), "new": Range(1, 3)}


def tensors(batch: int = 2, past: int = 5, new: int = 1, **changes: Any) -> dict[str, Any]:
    made = {
        "ids": torch.zeros((batch, new), dtype=torch.int64),
        "mask": torch.zeros((batch, past + new), dtype=torch.int64),
        "window": torch.zeros((batch, 2, past, 4)),
    }
    return made | changes


def test_sizes_are_those_of_the_tensors():
    assert check("decode", SPECS, tensors(), RANGES) == {"batch": 2, "past": 5, "new": 1}
    assert check("decode", SPECS, tensors(past=0), RANGES)["past"] == 0
    # A sum may stand before what it is of.
    assert check("decode", SPECS[::-1], tensors(), RANGES) == {"batch": 2, "past": 5, "new": 1}
    # Dimensions without a range may have any size.
    assert check("decode", SPECS, tensors(batch=9), {})["batch"] == 9


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask": None}, r"decode: mask: got NoneType, expected a torch.Tensor"),
        ({"ids": torch.zeros((2, 1))}, r"ids: got float32 \[2, 1\], expected int64 \[batch, new\]"),
        ({"ids": torch.zeros((2, 1), dtype=torch.int32)}, r"ids: got torch.int32 \[2, 1\], expected int64"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, r"ids: got int64 \[2\], expected int64 \[batch, new\]"),
        ({"window": torch.zeros((2, 2, 5, 4), dtype=torch.float16)}, r"window: got float16 \[2, 2, 5, 4\]"),
        ({"window": torch.zeros((2, 3, 5, 4))}, r"window: got float32 \[2, 3, 5, 4\].*with 2 = 2"),
        ({"window": torch.zeros((3, 2, 5, 4))}, r"window: got .*with batch = 2, as in the tensors before it"),
        ({"window": torch.zeros((2, 2, 4, 4))}, r"mask: got int64 \[2, 6\].*with past \+ new = 5"),
        ({"mask": torch.zeros((2, 7), dtype=torch.int64)}, r"mask: got int64 \[2, 7\].*with past \+ new = 6"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(changes, reason):
    with pytest.raises(ArtefactError, match=reason):
        check("decode", SPECS, tensors(**changes), RANGES)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"batch": 5}, r"decode: batch: got 5, expected 1 to 4; export again .*`dims`"),
        ({"batch": 0}, r"batch: got 0, expected 1 to 4"),
        ({"past": 9}, r"past: got 9, expected 0 to 8"),
        ({"new": 0}, r"new: got 0, expected 1 to 3"),
    ],
)
def test_sizes_out_of_range(sizes, reason):
    with pytest.raises(ArtefactError, match=reason):
        check("decode", SPECS, tensors(**sizes), RANGES)


def test_missing_and_unknown_tensors_are_told_together():
    given = tensors(other=torch.zeros(1), more=torch.zeros(1))
    del given["ids"]
    with pytest.raises(ArtefactError, match=r"got 1 missing \(ids\) and 2 unknown \(more, other\) tensors"):
        check("decode", SPECS, given, RANGES)
    many = {f"t{number}": torch.zeros(1) for number in range(9)}
    with pytest.raises(ArtefactError, match=r"9 unknown \(t0, t1, t2, t3, \.\.\.\)"):
        check("decode", SPECS, tensors(**many), RANGES)


def test_sizes_of_other_tensors_count():
    rest = {name: tensor for name, tensor in tensors().items() if name != "window"}
    assert check("decode", SPECS[:2], rest, RANGES, {"past": 5, "batch": 2}) == {"past": 5, "batch": 2, "new": 1}
    with pytest.raises(ArtefactError, match=r"ids: got .*with batch = 3"):
        check("decode", SPECS[:2], rest, RANGES, {"past": 5, "batch": 3})
    known = {"past": 4}
    with pytest.raises(ArtefactError, match=r"mask: got .*past \+ new = 5"):
        check("decode", SPECS[:2], rest, RANGES, known)
    assert known == {"past": 4}


def test_a_sum_of_which_nothing_is_known_is_refused():
    with pytest.raises(ArtefactError, match=r"mask: .*past \+ new.*without tensors that have past"):
        check("decode", SPECS[:2], {name: tensors()[name] for name in ("ids", "mask")}, RANGES)


SIZES = st.one_of(st.integers(0, 2**40), st.sampled_from(["batch_size", "past + new", "a"]))


@given(name=st.text(), dtype=st.sampled_from(list(DTYPES.values())), shape=st.lists(SIZES, max_size=5).map(tuple))
def test_specifications_come_back_from_json(name, dtype, shape):
    spec = TensorSpec(name, dtype, shape)
    assert TensorSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 3},
        {"name": None},
        {"dtype": "float8"},
        {"dtype": []},
        {"dtype": None},
        {"shape": 4},
        {"shape": "ab"},
        {"shape": {"a": 1}},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": [1.5]},
        {"shape": [None]},
        {"shape": [[1]]},
        {"shape": [""]},
        {"shape": ["a +"]},
        {"shape": ["a - b"]},
    ],
)
def test_other_specifications_are_refused(changes):
    with pytest.raises(ArtefactError, match=r"manifest: got .*expected"):
        TensorSpec.from_json({"name": "a", "dtype": "int8", "shape": [1]} | changes)


@pytest.mark.parametrize("value", [None, 3, "name", [], ["name"], {}, {"name": "a", "dtype": "int8"}])
def test_what_is_no_specification_at_all(value):
    with pytest.raises(ArtefactError, match="expected a tensor's name, dtype and shape"):
        TensorSpec.from_json(value)


def test_dimensions_and_shapes():
    spec = TensorSpec("a", torch.int8, ("batch", "past + new", 3))
    assert spec.dims == {"batch", "past", "new"}
    assert spec.resolved({"batch": 2, "past": 5, "new": 1, "other": 9}) == [2, 6, 3]
