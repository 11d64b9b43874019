"""Label problems (`s2t label`). See `python recipes/label.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.labeling.label")
