"""What the scripts of benchmarks/ share: how `--help` begins, limits of flags, figures over turns, tables."""

import re
from pathlib import Path

import pytest
import setting


SCRIPTS = [
    file
    for file in sorted((Path(setting.__file__).parent).glob("*.py"))
    if "__main__" in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_help_opens_with_one_sentence_and_an_example(script):
    source = script.read_text(encoding="utf-8")
    assert "setting.Parser(__file__, __doc__)" in source
    doc = re.match(r'"""(.*?)"""', source, re.DOTALL)[1]
    told = setting.Parser(str(script), doc).format_help()
    sentence, example, *rest = told.split("\n\n")
    assert re.fullmatch(r"[A-Z][^\n]*\.", sentence)
    assert example.startswith(f"    python benchmarks/{script.name} --")
    assert rest[0].startswith("Prints ") and f"usage: {script.name}" in told


def parser():
    parser = setting.Parser("some/script.py", "Time of something.")
    for flag in ("--quick", "--turns", "--json", "--plot", "--device"):
        parser.add_argument(flag)
    parser.add_argument("--sizes", least=2, most=9, nargs="+")
    parser.add_argument("--rates", type=setting.share, nargs="+")
    parser.add_argument("--tolerance", type=float, least=0)
    return parser


@pytest.mark.parametrize(
    "flags, message",
    {
        "--turns 0": "--turns must be at least 1, got 0.",
        "--turns x": "argument --turns: invalid int value: 'x'",
        "--sizes 2 1": "--sizes must be at least 2, got 1.",
        "--sizes 10": "--sizes must be at most 9, got 10.",
        "--rates 0.5 0": "--rates must be in (0, 1], got 0.0.",
        "--tolerance -0.5": "--tolerance must be at least 0, got -0.5.",
        "--json .": "--json must name a file that can be written, got '.'.",
        "--plot a.pdf": "--plot must end in .png, got 'a.pdf'.",
        "--device cuda": "--device cuda: torch sees no CUDA device here.",
    }.items(),
)
def test_a_flag_beyond_its_limits_is_told_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(setting.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        parser().read(flags.split(), {})
    assert error.value.code == 2 and capsys.readouterr().err == f"script.py: {message}\n"


def test_a_preset_holds_where_no_flag_says_otherwise():
    quick = {"turns": 2, "sizes": [3]}
    args = parser().read(["--quick", "--turns", "5"], quick)
    assert (args.turns, args.sizes) == (5, [3])
    assert parser().read(["--turns", "5"], quick).sizes is None


def test_figures_over_turns_are_rounded_and_may_be_missing():
    assert setting.median([3.00006, 1, 2]) == 2 and setting.median([1.23456, 1.23456], 2) == 1.23
    assert setting.median([1.0, None]) is None
    assert setting.edges([3.00006, 1, 2]) == [1, 3.0001]


def test_a_clock_reads_processor_time_on_a_cpu():
    with setting.Clock() as clock:
        sum(range(10_000))
    assert clock.wall > 0 and clock.cpu is not None


def test_columns_are_as_wide_as_their_cells_but_for_the_end_of_a_short_line():
    lines = setting.align([["", "a", "b"], ["one", "1", "22"], ["longer", "as long as it likes"]])
    assert lines == ["        a  b", "one     1  22", "longer  as long as it likes"]
    assert setting.markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
