"""Draw an evaluation (`s2t report`). See `python recipes/report.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.report.report")
