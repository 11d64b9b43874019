"""The kinds of tables: which jobs each needs, and what it reads from their reports.

A kind is a function of a [`Pipeline`] and the table's own settings. It adds jobs and returns a function that, once
they have run, gives a [`Result`]. The YAMLs of recipes/paper name a kind; recipes/paper.py runs everything. Nothing
here measures: every number comes from a report that a recipe wrote.
"""

from __future__ import annotations

from collections.abc import Callable

from s2t_recipes.paper.pipeline import Pipeline
from s2t_recipes.paper.tables.accuracy import policies
from s2t_recipes.paper.tables.hits import sufficiency
from s2t_recipes.paper.tables.result import Collect, Result
from s2t_recipes.paper.tables.single_report import fidelity, latency, objective, retention
from s2t_recipes.paper.tables.trainings import efficiency, stacking, variants


__all__ = ["KINDS", "Collect", "Result"]

KINDS: dict[str, Callable[[Pipeline, dict], Collect]] = {
    "sufficiency": sufficiency,
    "policies": policies,
    "fidelity": fidelity,
    "variants": variants,
    "efficiency": efficiency,
    "stacking": stacking,
    "retention": retention,
    "objective": objective,
    "latency": latency,
}
