"""Merge a LoRA adapter into its model (`s2t merge`). See `python recipes/merge.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.training.merge")
