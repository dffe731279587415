import pytest
import torch
from watched_run import write_data


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster without a thread pool, and sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def watched_data(tmp_path_factory):
    """The folder of ``write_data``'s images and annotations."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder
