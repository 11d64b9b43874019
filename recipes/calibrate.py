"""Calibrates a trained selector on held-out training problems: fusion weights, then trigger thresholds.

See `python recipes/calibrate.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.training.calibrate import main


if __name__ == "__main__":
    run(main)
