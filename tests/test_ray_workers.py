"""How machines are shared, and what a worker makes of rows that end it."""

import warnings

import pytest

from attnpack_cli.errors import UserError
from attnpack_fx import PolicyError, ray_workers
from attnpack_fx.ray_workers import Begun, Worker, share
from attnpack_fx.warning import AttnpackWarning


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "workers", "shared"),
    [
        ([node(2)], None, (1, 2, 0)),
        ([node(2)], 2, (2, 1, 0)),
        ([node(16)], 3, (3, 5, 0)),
        ([node(4), node(4), node(4)], 2, (2, 4, 0)),
        ([node(4), node(8)], 3, (3, 4, 0)),
        ([node(4), node(8, alive=False)], 1, (1, 4, 0)),
        ([node(16, 2), node(64)], None, (2, 8, 1)),
        ([node(16, 2), node(64)], 1, (1, 16, 1)),
        ([node(16, 2)], 3, (3, 5, 0.5)),
    ],
)
def test_every_worker_finds_room(nodes, workers, shared):
    assert share(nodes, workers) == shared


def test_more_workers_than_cpus_are_refused():
    with pytest.raises(UserError, match="--workers 5: got 4 CPUs, expected one for each; ask for fewer workers"):
        share([node(2), node(2)], 5)


class Dead(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def worker(monkeypatch):
    """Makes workers that count by one `Begun`, with answers of the given function."""
    begun = Begun()
    monkeypatch.setattr(Worker, "_begin", lambda self, name: begun.begin(name))
    monkeypatch.setattr(Worker, "_end", lambda self, name: begun.end(name))

    def make(answer, options=None):
        class Answers:
            def __init__(self, **options):
                if "wrong" in options:
                    raise PolicyError("got wrong, expected right")

            def __call__(self, rows):
                return answer(rows)

        monkeypatch.setattr(ray_workers, "Answers", Answers)
        return Worker(options or {}, None)

    return make


def rows(*numbers: int) -> dict:
    return {"number": list(numbers), "images": [[]] * len(numbers), "prompt": [f"p{number}" for number in numbers]}


def answered(given: dict) -> dict:
    return given | {"answer": [each.upper() for each in given["prompt"]], "error": [""] * len(given["prompt"])}


def test_rows_come_back_with_their_numbers(worker):
    told = worker(answered)(rows(3, 1))
    assert told["number"] == [3, 1] and told["answer"] == ["P3", "P1"] and told["error"] == ["", ""]
    assert told["refused"] == ["", ""] and told["warned"] == [[], []] and len(set(told["worker"])) == 1


def test_a_row_that_ends_every_worker_is_given_up_and_the_others_are_answered(worker):
    sizes = []

    def deadly(given):
        sizes.append(len(given["number"]))
        if 2 in given["number"]:
            raise Dead
        return answered(given)

    for _ in range(4):
        with pytest.raises(Dead):
            worker(deadly)(rows(1, 2, 3))
    told = worker(deadly)(rows(1, 2, 3))
    assert sizes == [3, 3, 1, 1, 1, 1, 1, 1]
    assert told["answer"] == ["P1", "", "P3"]
    assert told["error"][1].startswith("the worker died 2 times over this row alone")


def test_a_worker_that_was_killed_once_starts_its_rows_again_together(worker):
    sizes = []

    def killed_once(given):
        sizes.append(len(given["number"]))
        if len(sizes) == 1:
            raise Dead
        return answered(given)

    with pytest.raises(Dead):
        worker(killed_once)(rows(1, 2))
    assert worker(killed_once)(rows(1, 2))["answer"] == ["P1", "P2"] and sizes == [2, 2]


def test_refusals_and_warnings_travel_with_the_rows(worker):
    assert worker(answered, {"wrong": 1})(rows(1))["refused"] == ["got wrong, expected right"]

    def refusing(given):
        raise PolicyError("vision_rank=9 exceeds 8")

    told = worker(refusing)(rows(1, 2))
    assert told["refused"] == ["vision_rank=9 exceeds 8"] * 2 and told["answer"] == ["", ""]
    with pytest.raises(UserError, match="vision_rank=9 exceeds 8"):
        ray_workers._told(told)

    def warning(given):
        for text in ("layer 1 stays dense", "layer 1 stays dense"):
            warnings.warn(text, AttnpackWarning, stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)
        return answered(given)

    told = worker(warning)(rows(1))
    assert [each.warned for each in ray_workers._told(told)] == [("layer 1 stays dense",)]
