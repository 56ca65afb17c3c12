"""Fixtures shared by the tests of the backend."""

import pytest
import torch

from attnpack_fx import backend


@pytest.fixture(scope="module")
def one_thread():
    """Problems this small lose more to starting threads than they gain from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
