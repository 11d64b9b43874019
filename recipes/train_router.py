"""Train a router (`s2t route`). See `python recipes/train_router.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.training.router")
