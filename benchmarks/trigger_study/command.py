"""The command line of the study."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

from setting import Parser, check_file, check_range

from s2t_recipes.commands import CommandFailed
from transformers_s2t.calibration.scored_points import TARGET_RATES
from transformers_s2t.files import write_json
from trigger_study.measure import measure
from trigger_study.picture import draw
from trigger_study.prepare import read_json
from trigger_study.tables import format_report


QUICK = {"num_seeds": 1, "rates": [0.02, 0.1], "num_test": 100, "num_calibration": 200, "cost_layers": 2, "turns": 3}


def make_parser(description: str | None) -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="triggers.py", description=description, formatter_class=layout)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, two rates, fewer problems; flags given beside it win")
    add("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`; made where missing [%(default)s]")
    add("--babyllama", type=Path, nargs=2, metavar=("WEAK", "STRONG"), help="the second pair's models [not measured]")
    add("--babyllama_data", type=Path, metavar="DIR", help="with GSM8K's train.jsonl and test.jsonl, to label")
    add("--babyllama_run", type=Path, default=Path("runs/babyllama"), metavar="DIR",
        help="labels and adapters; what is there is used, what is not is made [%(default)s]")  # fmt: skip
    add("--num_seeds", type=int, default=3, help="selectors of each pair [%(default)s]")
    add("--rates", type=float, nargs="+", default=list(TARGET_RATES), help="shares of tokens %(default)s")
    add("--num_test", type=int, default=500, help="test problems, embedded pair [%(default)s]")
    add("--num_calibration", type=int, default=1000, help="fresh calibration problems, embedded pair [%(default)s]")
    add("--cost", action=argparse.BooleanOptionalAction, default=True, help="time the router [yes]")
    add("--cost_layers", type=int, help="of the random model [all 24]")
    add("--turns", type=int, default=5, help="how often the router is timed [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE.png", help="draw them")
    add("--from_json", type=Path, metavar="FILE", help="measure nothing: tables and picture of these figures")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for what could not be measured."""
    if not all(0 < rate <= 1 for rate in args.rates):
        raise ValueError(f"--rates must be in (0, 1], got {args.rates}.")
    least = {"num_seeds": 1, "num_test": 1, "num_calibration": 20, "cost_layers": 1, "turns": 1}
    check_range(args, least, {})
    for name in ("json", "plot"):
        check_file(f"--{name}", getattr(args, name))
    for name in ("run", "babyllama_run"):
        if getattr(args, name).is_file():
            raise ValueError(f"--{name} must be a folder, got {str(getattr(args, name))!r}.")
    for name in ("babyllama", "babyllama_data"):
        value = getattr(args, name)
        for folder in value if isinstance(value, list) else [value]:
            if folder is not None and not folder.is_dir():
                raise ValueError(f"--{name}: there is no folder {str(folder)!r}.")
    if args.babyllama_data is not None and args.babyllama is None:
        raise ValueError("--babyllama must be given with --babyllama_data.")
    if args.from_json is not None and not args.from_json.is_file():
        raise ValueError(f"--from_json: there is no file {str(args.from_json)!r}.")
    if args.from_json is not None and args.json is not None:
        raise ValueError("--from_json measures nothing: --json must not be given.")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ValueError(f"--plot must end in .png, got {str(args.plot)!r}.")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.")


def parse_arguments(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser(description)
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None, description: str | None = None) -> None:
    """Measures or reads a report, prints its tables, writes and draws it."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's
    args = parse_arguments(argv, description)
    try:
        report = measure(args) if args.from_json is None else read_json(args.from_json)
    except (ValueError, OSError, CommandFailed) as error:
        sys.exit(f"triggers.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntriggers.py: stopped. The same command goes on from here.")
    if args.from_json is None:
        print()
    print(format_report(report, args.markdown))
    if args.json is not None:
        write_json(args.json, report)
        print(f"\nwritten to {args.json}")
    if args.plot is not None:
        draw(report, args.plot)
        if not args.markdown:
            print(f"\ndrawn in {args.plot}")
