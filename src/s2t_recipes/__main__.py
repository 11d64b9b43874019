"""`python -m s2t_recipes` is `s2t`."""

from s2t_recipes.cli import main


main()
