"""Silences warnings that PEFT causes while it puts an adapter into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Silences the FutureWarning for a name of transformers that PEFT still uses, which no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
