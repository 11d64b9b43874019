"""Fit fusion weights and thresholds of a selector (`s2t calibrate`). See `python recipes/calibrate.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.training.calibrate")
