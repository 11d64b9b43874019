"""Write disjoint parts of a data set. See `python recipes/splits.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.splits")
