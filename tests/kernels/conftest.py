import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Problems this small lose more to starting threads than they gain from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
