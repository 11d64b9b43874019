"""Writes disjoint parts of a data set, one .jsonl each: for labels, tuning, calibration, tests and later rounds.

See `python recipes/splits.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.splits import main


if __name__ == "__main__":
    run(main)
