"""Keeps quiet what PEFT lets transformers say while it puts an adapter into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Leaves out the FutureWarning for a name of transformers that PEFT still uses: no user can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
