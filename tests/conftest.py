"""Set before anything is imported: no network, one thread. Helpers live in tests/tiny.py."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture
def batch():
    """Three left-padded prompts."""
    from tiny import prompts

    return prompts()
