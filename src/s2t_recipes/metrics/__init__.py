"""Metrics for the `evaluate` library: `evaluate.load(str(FOLDER / "math_answer"))`, without a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from evaluate import EvaluationModule

FOLDER = Path(__file__).parent


@cache
def load_metric(name: str) -> EvaluationModule:
    """A metric of this folder, loaded once; what it is given stays in memory."""
    import evaluate

    return evaluate.load(str(FOLDER / name), keep_in_memory=True)
