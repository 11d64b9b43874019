"""The whole method in one command. See `python recipes/demo.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.demo")
