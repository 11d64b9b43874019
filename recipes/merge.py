"""Merges a LoRA adapter into its model, so that a selector can be trained on top of the tuned model.

See `python recipes/merge.py --help`.
"""

from s2t_recipes.commands import run
from s2t_recipes.training.merge import main


if __name__ == "__main__":
    run(main)
