"""Set before anything is imported: no network, one thread. Helpers live in tests/tiny.py."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--tries",
        type=int,
        help="random tries of each test of threads and interrupts, in place of the few of CI: at night 200 and more",
    )


@pytest.fixture
def tries(request):
    """How many random tries a test makes: `tries(3)` is 3, or what `--tries` says."""
    option = request.config.getoption("--tries")
    return lambda number: number if option is None else option


@pytest.fixture
def batch():
    """Three left-padded prompts."""
    from tiny import prompts

    return prompts()
