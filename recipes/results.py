"""Write the Markdown tables of docs/results, the README and docs. See `python recipes/results.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.paper.results")
