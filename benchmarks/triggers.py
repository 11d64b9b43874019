"""When to ask the selector: five triggers on two pairs of models, apart from what the selector then chooses.

    python benchmarks/triggers.py --json runs/benchmarks/triggers.json --plot runs/benchmarks/triggers.png
    python benchmarks/triggers.py --quick                                  # under a minute, on a finished `make demo`
    python benchmarks/triggers.py --babyllama weak strong --babyllama_data gsm8k --json FILE     # the second pair too
    python benchmarks/triggers.py --from_json FILE --markdown              # the tables again

Embedded pair. Takes the selectors and routers of `make demo` (and runs it where it is not there), calibrates copies of
them on 1000 fresh problems, because 0.5 % of the demo's 300 is a handful of tokens, and decodes the demo's test
problems with every trigger at every rate. Accuracy is that of the final answers. `helped` and `hurt` are problems,
against greedy decoding.

Babyllama pair. Two pretrained story models that solve nothing, so no text is generated: at every token of stored texts
of the small model the trigger fires or does not, by thresholds from the calibration labels, and where it fires the
selector may replace the small model's first token. Accuracy is the share of all those tokens that are the larger
model's best candidate above the floor. `helped` and `hurt` are tokens.

Both: how well a trigger's value tells the tokens at which the larger model would choose another candidate (AUC and
average precision on held-out test labels, behind the warm-up), what fusion changes at the points with a choice, how
close achieved rates come to their targets, and what one reading of a router costs.

All models and labels are kept (RUN/triggers, BABYLLAMA_RUN): started again, this goes on where it stopped.
"""

from trigger_study.command import main


if __name__ == "__main__":
    main(description=__doc__)
