"""Quality and cost of five triggers on two pairs of models, apart from what the selector then chooses.

    python benchmarks/triggers.py --json runs/benchmarks/triggers.json --plot runs/benchmarks/triggers.png
    python benchmarks/triggers.py --quick                                  # under a minute, on a finished `make demo`
    python benchmarks/triggers.py --babyllama weak strong --babyllama_data gsm8k --json FILE     # the second pair too
    python benchmarks/triggers.py --from_json FILE --markdown              # the tables again

Prints seven tables: how well a trigger's value tells the tokens at which the larger model would choose another
candidate (AUC and average precision on held-out test labels), accuracy, helped and hurt at each rate, what fires, what
fusion changes, how close achieved rates come to their targets, and what one reading of a router costs.

    embedded    selectors and routers of `make demo` (which is run where it is missing), calibrated on 1000 fresh
                problems, because 0.5 % of the demo's 300 is a handful of tokens, decode its test problems with every
                trigger at every rate. Accuracy is that of the answers; `helped` and `hurt` are problems
    babyllama   two pretrained story models that solve nothing, so no text is generated: at the tokens of stored texts
                at which a trigger fires the selector may replace the small model's first token. Accuracy is the share
                of all tokens that are the larger model's best candidate; `helped` and `hurt` are tokens

All models and labels are kept (RUN/triggers, BABYLLAMA_RUN): started again, this goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import setting
from trigger_study.measure import measure
from trigger_study.picture import draw
from trigger_study.prepare import read_json
from trigger_study.tables import format_report

from s2t_recipes.commands import CommandFailed
from transformers_s2t.calibration.scored_points import TARGET_RATES
from transformers_s2t.files import write_json


QUICK = {"num_seeds": 1, "rates": [0.02, 0.1], "num_test": 100, "num_calibration": 200, "cost_layers": 2, "turns": 3}


def make_parser() -> setting.Parser:
    parser = setting.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--quick", help="one seed, two rates, fewer problems; flags given beside it win")
    add("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`; made where missing [%(default)s]")
    add("--babyllama", type=Path, nargs=2, metavar=("WEAK", "STRONG"), help="the second pair's models [not measured]")
    add("--babyllama_data", type=Path, metavar="DIR", help="with GSM8K's train.jsonl and test.jsonl, to label")
    add("--babyllama_run", type=Path, default=Path("runs/babyllama"), metavar="DIR",
        help="labels and adapters; what is there is used, what is not is made [%(default)s]")  # fmt: skip
    add("--num_seeds", least=1, default=3, help="selectors of each pair [%(default)s]")
    add("--rates", type=setting.share, nargs="+", default=list(TARGET_RATES), help="shares of tokens %(default)s")
    add("--num_test", least=1, default=500, help="test problems, embedded pair [%(default)s]")
    add("--num_calibration", least=20, default=1000, help="fresh calibration problems, embedded pair [%(default)s]")
    add("--cost", action=argparse.BooleanOptionalAction, default=True, help="time the router [yes]")
    add("--cost_layers", least=1, help="layers of the random model [all 24]")
    add("--turns", default=5, help="how often the router is timed [%(default)s]")
    add("--json")
    add("--plot")
    add("--from_json", type=Path, metavar="FILE", help="measure nothing: tables and picture of these figures")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings; leaves with status 2 and one line where one is wrong."""
    parser = make_parser()
    args = parser.read(argv, QUICK)
    args.rates = sorted(set(args.rates))
    for name in ("run", "babyllama_run"):
        if getattr(args, name).is_file():
            parser.error(f"--{name} must be a folder, got {str(getattr(args, name))!r}.")
    for name, folders in {"babyllama": args.babyllama or [], "babyllama_data": [args.babyllama_data]}.items():
        for folder in folders:
            if folder is not None and not folder.is_dir():
                parser.error(f"--{name}: there is no folder {str(folder)!r}.")
    if args.babyllama_data is not None and args.babyllama is None:
        parser.error("--babyllama must be given with --babyllama_data.")
    if args.from_json is not None and not args.from_json.is_file():
        parser.error(f"--from_json: there is no file {str(args.from_json)!r}.")
    if args.from_json is not None and args.json is not None:
        parser.error("--from_json measures nothing: --json must not be given.")
    return args


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # PEFT's
    args = parse_arguments(argv)
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


if __name__ == "__main__":
    main()
