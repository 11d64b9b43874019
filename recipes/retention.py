"""How far training has moved a model on text of other kinds. See `python recipes/retention.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.evaluation.retention")
