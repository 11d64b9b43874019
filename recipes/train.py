"""Train a selector (`s2t train`). See `python recipes/train.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.training.train")
