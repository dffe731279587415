import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster without a thread pool, and sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
