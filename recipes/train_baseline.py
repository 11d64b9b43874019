"""Trains what S2T-Local has to be compared with, on the same problems: a LoRA of the small model that imitates.

See `python recipes/train_baseline.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.training.imitate import main


if __name__ == "__main__":
    run(main)
