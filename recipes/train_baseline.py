"""Train an adapter that imitates the teacher (`s2t imitate`). See `python recipes/train_baseline.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.training.imitate")
