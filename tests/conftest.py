"""Set before anything is imported: no network, one thread. Helpers live in tests/tiny.py."""

import os
from zlib import crc32


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the four ways of selecting, `setup`, each test runs two in `make test` and the others in `make nightly`.

    Which two depends on the test's name, so that half of the tests run each of them. A test with more parameters runs
    each combination of those with one of the two, in turn. Those that compare with a naive decoder, on which the
    others rest, run all.
    """
    found = {}
    for item in items:
        if hasattr(item, "callspec") and "setup" in item.callspec.params:
            params = dict(item.callspec.params)
            setups = found.setdefault((item.path, item.originalname), {})
            setups.setdefault(repr(params.pop("setup")), {})[repr(params)] = item
    for (_, name), setups in found.items():
        if len(setups) < 3 or "naive" in name:
            continue
        first = crc32(name.encode()) % len(setups)
        order = [*setups.values()]
        by_day = [order[first], order[(first + 1) % len(order)]]
        combinations = [*dict.fromkeys(params for setup in by_day for params in setup)]
        kept = []
        for i, params in enumerate(combinations):
            with_both = len(combinations) == 1 or not all(params in setup for setup in by_day)
            kept += [setup.get(params) for setup in (by_day if with_both else [by_day[(i + i // 2) % 2]])]
        for item in (item for setup in order for item in setup.values()):
            if item not in kept:
                item.add_marker(pytest.mark.slow)
