"""Fixtures shared by the tests of the backend, and how tests share a machine."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from attnpack_fx import backend, step_cost


def pytest_configure() -> None:
    """One thread a process: problems this small lose more to threads than they gain, and pytest-xdist has the cores."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_finish() -> None:
    """Modules that are there for good are not looked through for garbage, and Dynamo's many objects less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries count what is left when Python ends


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """`-n` alone means `--dist worksteal`: what one file shares is made once, and nobody waits for a queue of Inductor.

    Not in pytest's `addopts`, which would then ask for pytest-xdist everywhere.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def fresh_dynamo():
    """No graph compiled by an earlier test is reused."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(fresh_dynamo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graphs run op by op: for tests whose point is the rewrite, not the code made from it."""
    monkeypatch.setattr(backend, "_inductor", lambda module, examples, patches: module)


@pytest.fixture(params=["op by op", pytest.param("Inductor", marks=pytest.mark.slow)])
def either_way(request: pytest.FixtureRequest) -> None:
    """Op by op, which fails soonest, in the fast suite; and as users run it, through Inductor, in the slow one."""
    request.getfixturevalue("without_inductor" if request.param == "op by op" else "fresh_dynamo")


@pytest.fixture(scope="session", autouse=True)
def quick_steps() -> Iterator[None]:
    """`explain` measures in next to no time, and not well: no test asserts how long something takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_cost, "_EVICTING", 4096)
        patch.setattr(step_cost, "_CALLS", 1)
        yield
