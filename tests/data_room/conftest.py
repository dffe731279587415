import pytest

from unigendet.data.quickstart import build_quickstart_data


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    return build_quickstart_data(tmp_path_factory.mktemp("quickstart"), seed=0)


@pytest.fixture(scope="session")
def tokenizer(quickstart):
    return quickstart.tokenizer()
