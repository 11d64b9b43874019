"""Compare ways of decoding (`s2t eval`). See `python recipes/eval.py --help`."""

from s2t_recipes.commands import run


if __name__ == "__main__":
    run("s2t_recipes.evaluation.run")
