"""Trains an S2T-Local selector on labelled trajectories. See `python recipes/train.py --help`."""

from s2t_recipes.commands import run
from s2t_recipes.training.train import main


if __name__ == "__main__":
    run(main)
