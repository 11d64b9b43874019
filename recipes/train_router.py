"""Trains a router: a light head on the small model that says at which tokens to ask the selector, without a teacher.

See `python recipes/train_router.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.training.router import main


if __name__ == "__main__":
    run(main)
