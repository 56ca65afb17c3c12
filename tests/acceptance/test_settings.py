"""The acceptance grid itself: nothing is missing in it, and what it asserts can fail. Nothing is compiled here."""

from dataclasses import replace

import pytest

from attnpack_fx.passes.catalogue import METHODS as CATALOGUE
from attnpack_fx.passes.method import Stage
from tests.acceptance import promises
from tests.acceptance.cells import Record, problems, shape
from tests.acceptance.families import FAMILIES
from tests.acceptance.settings import (
    CALIBRATED_FAMILIES,
    COMPOSED,
    GRID,
    KINDS,
    METHODS,
    OFF,
    OFF_PRUNED,
    OWN_DECODER,
    SETTINGS,
    fast,
    tested,
)


@pytest.mark.parametrize("method", CATALOGUE, ids=lambda method: method.__name__)
def test_every_method_is_in_the_grid(method) -> None:
    assert method in METHODS, "say in tests/acceptance/settings.py how it is used and what it promises"
    assert method in OFF, "say in tests/compositions.py where it changes nothing"
    columns = [setting for setting in SETTINGS.values() if setting.methods == (method,)]
    assert [setting.exact for setting in columns] == [False, True]


def test_every_family_has_every_setting_but_where_that_is_said() -> None:
    assert len(set(GRID)) == len(GRID)
    for setting in SETTINGS.values():
        some = OWN_DECODER, KINDS, OFF_PRUNED, COMPOSED, CALIBRATED_FAMILIES, *((name,) for name in KINDS)
        assert setting.families in (tuple(FAMILIES), *some)
        assert {family for family, name in GRID if name == setting.name} == set(setting.families)


def test_every_setting_and_family_is_tested() -> None:
    cells = tested()
    assert set(cells) <= set(GRID)
    for name, setting in SETTINGS.items():
        families = {family for family, each in cells if each == name}
        least = 1 if setting.families == OFF_PRUNED else min(3, len(setting.families))
        assert len(families) >= least, name
    for method in METHODS:
        seen = {family for family, name in cells if method in SETTINGS[name].methods}
        assert len(seen) >= 3, method
    for family in FAMILIES:
        assert sum(family == each for each, _ in cells) >= 4


def test_fast_cells_have_every_stage() -> None:
    cells = fast()
    assert set(cells) <= set(tested())
    methods = [METHODS[method].used for _, name in cells for method in SETTINGS[name].methods]
    assert {stage for method in methods for stage in method.stages} == set(Stage)
    assert len(cells) <= 8


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_must_save_bytes(name: str) -> None:
    """Where something is packed at all; full rank is there to be exact."""
    family = FAMILIES[name]
    for setting in SETTINGS.values():
        if (
            setting.promise is None
            or setting.name == "full rank"
            or name not in setting.families
            or setting.unmerged(family)
        ):
            continue
        described = shape(family, setting)
        if described.layers and (family.vision or setting.name != "AVL"):  # whose default keeps all text
            assert setting.promise(described) < 0.95 * promises.dense(described), setting.name


def test_policies_are_strict() -> None:
    for setting in SETTINGS.values():
        assert setting.policy is None or all(setting.policy(FAMILIES[name]).strict for name in setting.families)


_GOOD = Record(
    "llava-mha", "H2O", (0, 1, 2), bytes=10, dense_bytes=100, promised=20.0, decode_graphs=2, finite=True, repeats=True
)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"raised": "ValueError: no"}, "raises ValueError"),
        ({"packed": (0, 1)}, "are packed"),
        ({"bytes": 21}, "holds 21 bytes, 0.210"),
        ({"finite": False}, "finite"),
        ({"repeats": False}, "something else"),
        ({"decode_graphs": 3}, "3 graphs"),
        ({"later_graphs": 1}, "1 more graphs"),
        ({"warned": frozenset(["slow"])}, "unexpected: slow"),
        ({"dense": frozenset(["odd mask"])}, "unexpected: odd mask"),
        ({"setting": "H2O, off", "same": False}, "other tokens"),
        ({"setting": "H2O, off", "same": True, "error": 2e-4}, "differ by 2.0e-04"),
        ({"family": "gemma3", "packed": (1, 2)}, "'sliding window'"),
        ({"family": "gemma3", "setting": "default options", "packed": (1, 2)}, "expected (0, 1, 2)"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found(change: dict, word: str) -> None:
    assert problems(_GOOD) == []
    assert any(word in problem for problem in problems(replace(_GOOD, **change)))
