"""README.md, CONTRIBUTING.md and docs/: their Python runs, their commands exist, their links point to something.

The blocks of a page run in order, as one script, in a folder that looks like a clone after `make demo`: `recipes` and
`benchmarks`, and `runs/demo` with labels, adapters and problems, all made small. A ```text block behind Python is what
it prints. Shell blocks are parsed by the real parsers and not run. A block that can be neither run nor parsed says why
in a comment above it, `<!-- not run: reason -->`.
"""

import argparse
import importlib.util
import inspect
import json
import math
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from s2t_recipes.cli import LAUNCHED, split_arguments


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Whose links are checked too.
MORE_PAGES = [ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").glob("*/README.md"))]
#: What links of the README begin with.
BASE = "https://github.com/transformers-s2t/transformers-s2t/blob/main/"
#: Command of `s2t` -> the script of recipes/ with the same options.
S2T = {"route": "train_router", "imitate": "train_baseline"}
S2T |= {name: name for name in ("label", "train", "calibrate", "eval", "report", "merge")}
#: Blocks that hold no code.
PLAIN = ("text",)
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run: (\S.*?) -->\n*\Z", re.DOTALL)


@dataclass
class Block:
    """A fenced block: its language, code, first line in the page, and why it is not run ("" where it is)."""

    language: str
    code: str
    line: int
    why_not: str


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text[: match.start()])
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(match[1], match[2], line, mark[1] if mark else ""))
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(language: str) -> list:
    return [
        pytest.param(page, id=name_of(page))
        for page in PAGES
        if any(block.language == language for block in blocks_of(page.read_text(encoding="utf-8")))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Python


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder like a clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def clone(tree):
    """A clone after `make demo`, with a few problems and a selector that has hardly learned."""
    import corpus

    from s2t_recipes.labeling import label
    from s2t_recipes.training import calibrate
    from s2t_recipes.training import router as train_router
    from transformers_s2t import S2TConfig, S2TTrainer
    from transformers_s2t.labels.folder import read_labels

    student, teacher = str(ROOT / "recipes" / "embedded" / "student"), str(ROOT / "recipes" / "embedded" / "teacher")
    run = tree / "runs" / "demo"
    (run / "data").mkdir(parents=True)
    for part, number in (("label", 8), ("tuning", 4), ("calibration", 20)):
        corpus.write_jsonl(corpus.build_split(part, number, seed=0), run / "data" / f"{part}.jsonl")
        label.main(
            ["--model", student, "--teacher_model", teacher, "--dtype", "float32", "--max_new_tokens", "72"]
            + ["--dataset", str(run / "data" / f"{part}.jsonl"), "--output_dir", str(run / "labels" / part)]
        )
    adapter = str(run / "adapter-seed0")
    settings = {"learning_rate": 2e-3, "num_train_epochs": 1, "use_cpu": True, "report_to": "none"}
    args = S2TConfig(output_dir=adapter, save_strategy="no", **settings)
    trainer = S2TTrainer(model=student, args=args, train_dataset=str(run / "labels" / "label"))
    trainer.train()
    trainer.save_model()
    train_router.main(
        ["--adapter", adapter, "--labels", str(run / "labels" / "label"), "--eval_labels"]
        + [str(run / "labels" / "tuning"), "--num_epochs", "2", "--layers", "4", "--dtype", "float32"]
    )
    calibrate.main(
        ["--adapter", adapter, "--labels", str(run / "labels" / "calibration"), "--deployed", "false"]
        + ["--dtype", "float32", "--check_share", "0"]
    )
    shutil.copytree(adapter, run / "adapter-seed1")

    # what the authors' script writes, of the same texts
    rows, _ = read_labels(run / "labels" / "label")
    lines = []
    for number, row in enumerate(rows):
        for n, position in enumerate(row["positions"]):
            group = {"problem_id": number, "step": position - row["prompt_length"]}
            group |= {"context_ids": row["input_ids"][:position], "cand_ids": row["candidate_ids"][n][::-1]}
            group["teacher_prob_abs"] = [math.exp(value) for value in row["teacher_logprobs"][n]][::-1]
            lines.append(json.dumps(group) + "\n")
    (tree / "s2t_samples.jsonl").write_text("".join(lines + lines[:3]), encoding="utf-8")
    return tree


def run_page(page: Path, output) -> dict:
    """Runs the Python blocks of a page as one script; returns its names. `output()`: what was printed since."""
    names = {"__name__": "page"}
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    for block, behind in zip(blocks, [*blocks[1:], None]):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")  # errors name the page's line
        if block.why_not:
            continue
        output()
        exec(code, names)
        printed = output()
        if behind is not None and behind.language == "text" and not behind.why_not:
            assert behind.code in printed, f"{name_of(page)}, line {behind.line}: it prints\n{printed}"
    return names


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs(page, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    run_page(page, lambda: capsys.readouterr().out)


def test_migrated_labels_are_those_that_the_groups_came_from(clone, monkeypatch, capsys):
    from transformers_s2t import S2TConfig, S2TTrainer
    from transformers_s2t.labels.folder import read_labels

    monkeypatch.chdir(clone)
    shutil.rmtree("runs/migrated", ignore_errors=True)
    run_page(ROOT / "docs" / "migration.md", lambda: capsys.readouterr().out)
    wanted, _ = read_labels("runs/demo/labels/label")
    found, header = read_labels("runs/migrated")
    assert header.complete and len(found) == len(wanted)
    for row, other in zip(found, wanted):
        last = len(row["input_ids"]) - 1
        assert row["input_ids"][:last] == other["input_ids"][:last] and row["prompt_length"] == other["prompt_length"]
        assert row["positions"] == other["positions"] and row["candidate_ids"] == other["candidate_ids"]
        for name in ("student_logprobs", "teacher_logprobs"):
            torch.testing.assert_close(torch.tensor(row[name]), torch.tensor(other[name]), atol=1e-3, rtol=1e-3)
        for name in ("entropy", "margin"):
            ours, theirs = torch.tensor(row[name]), torch.tensor(other[name][: len(row[name])])
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for position, top, theirs in zip(row["positions"], row["teacher_top_id"], other["teacher_top_id"]):
            at = position - row["prompt_length"]
            assert row["divergence"][at] <= other["divergence"][at] + 1e-3 and top in (-1, theirs)
    assert max(map(max, found["divergence"])) > 0.5
    args = S2TConfig(output_dir="runs/from-migrated", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    S2TTrainer(model="recipes/embedded/student", args=args, train_dataset="runs/migrated").train()


# ---------------------------------------------------------------------------------------------------------------------
# Shell


class Parsed(BaseException):
    """A script has parsed its arguments: all that is asked of it here."""


@contextmanager
def parsing_only(monkeypatch):
    """Inside, a script ends as soon as its own parser has read all of its arguments."""
    from trl import TrlParser

    parse, parse_all = argparse.ArgumentParser.parse_args, TrlParser.parse_args_and_config

    def parse_args(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    def parse_args_and_config(self, *args, **kwargs):
        raise Parsed(parse_all(self, *args, **(kwargs | {"fail_with_unknown_args": True})))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(TrlParser, "parse_args_and_config", parse_args_and_config)
        yield patch


def parse_script(script: Path, arguments: list[str], monkeypatch) -> None:
    """Raises an AssertionError where a script does not take these arguments."""
    if script.name == "train.py" and script.parent.name == "recipes":
        arguments = [*arguments, "--use_cpu", "true", "--bf16", "false"]  # of YAMLs for GPUs
    with parsing_only(monkeypatch) as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def parse_launch(arguments: list[str]) -> list[str]:
    """What `accelerate launch` would run, after its own options."""
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(arguments)
    assert args.config_file is None or (ROOT / args.config_file).is_file(), args.config_file
    return [args.training_script, *args.training_script_args]


def check_command(words: list[str], monkeypatch) -> None:
    """Raises an AssertionError for a command or an option that there is not."""
    match words:
        case ["s2t", "env"]:
            pass
        case ["s2t", command, *arguments]:
            assert command in S2T, f"s2t {command}"
            if command in LAUNCHED:
                flags, arguments = split_arguments(arguments)
                parse_launch([*flags, command])
            parse_script(ROOT / "recipes" / f"{S2T[command]}.py", arguments, monkeypatch)
        case ["accelerate", "launch", *arguments]:
            check_command(["python", *parse_launch(arguments)], monkeypatch)
        case ["python", "-m", module, *arguments]:
            parse_script(Path(importlib.util.find_spec(module).origin), arguments, monkeypatch)
        case ["transformers", "serve", _, *flags]:
            from transformers.cli.serve import Serve

            known = inspect.signature(Serve.__init__).parameters
            assert all(flag.removeprefix("--").replace("-", "_") in known for flag in flags if flag.startswith("--"))
        case ["python", script, *arguments]:
            assert (ROOT / script).is_file(), script
            parse_script(ROOT / script, arguments, monkeypatch)
        case ["make", target, *variables]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
            for variable in variables:
                assert f"$({variable.split('=')[0]})" in makefile, variable
        case ["pip", "install", *_]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= set(project["optional-dependencies"]), extra
        case _:
            raise AssertionError(f"no test knows the command {words[0]!r}; mark its block with <!-- not run: why -->")


def commands_of(code: str) -> list[list[str]]:
    """The words of each command of a shell block; comments and continued lines are dealt with as a shell does."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_of_a_page_exist_with_their_options(page, tree, monkeypatch):
    monkeypatch.chdir(tree)
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language != "bash":
            continue
        for words in commands_of(block.code):
            ours = words[0] in ("s2t", "accelerate", "python", "make", "pip")
            if block.why_not and not ours:
                continue
            try:
                check_command(words, monkeypatch)
            except (AssertionError, SystemExit, pytest.fail.Exception) as error:
                pytest.fail(f"{name_of(page)}, block of line {block.line}: {shlex.join(words)}: {error!r}")


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("s2t label --model m --teacher_model t --dataset d --output_dir o", "--no_such_option 1"),
        ("s2t train --model m --labels l --output_dir o", "--no_such_option 1"),
        ("s2t train --model m --labels l --output_dir o", "--config_file recipes/accelerate_configs/none.yaml"),
        ("s2t train --model m --labels l --output_dir o --num_processes 2", "--no_such_option 1"),
        ("s2t label --model m --teacher_model t --dataset d --output_dir o --num_processes 2", "--no_such_option 1"),
        ("s2t route --adapter a --labels l", "--num_processes 2"),
        ("s2t report runs", "--no_such_option"),
        ("accelerate launch recipes/train.py --model m --labels l --output_dir o", "--no_such_option 1"),
        ("python recipes/paper.py --dry_run", "--no_such_option"),
        ("python benchmarks/decode.py --quick", "--no_such_option"),
        ("make demo MODEL=x", "MODLE=x"),
        ("pip install 'transformers-s2t[train]'", "'transformers-s2t[all]'"),
    ],
)
def test_an_option_that_there_is_not_is_noticed(right, wrong, tree, monkeypatch):
    monkeypatch.chdir(tree)
    check_command(shlex.split(right), monkeypatch)
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(shlex.split(f"{right} {wrong}"), monkeypatch)


@pytest.mark.parametrize(
    "command", ["s2t evaluate --model m", "python recipes/evaluate.py", "make everything", "vllm serve x"]
)
def test_a_command_that_there_is_not_is_noticed(command, tree, monkeypatch):
    monkeypatch.chdir(tree)
    with pytest.raises(AssertionError):
        check_command(shlex.split(command), monkeypatch)


def test_blocks_are_told_apart():
    text = "```python\na\n```\n<!-- not run: needs b -->\n\n```bash\nb \\\n  --c 1  # d\n```\n```text\ne\n```\n"
    blocks = [Block("python", "a\n", 2, ""), Block("bash", "b \\\n  --c 1  # d\n", 7, "needs b")]
    assert blocks_of(text) == [*blocks, Block("text", "e\n", 11, "")]
    assert commands_of(blocks[1].code) == [["b", "--c", "1"]]
    assert blocks_of("<!-- not run: -->\n```bash\n```\n")[0].why_not == ""  # a mark gives a reason


# ---------------------------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_code_that_is_checked(page):
    text = page.read_text(encoding="utf-8")
    for block in blocks_of(text):
        assert block.language in ("python", "bash", *PLAIN), f"line {block.line}: ```{block.language}"
    assert text.count("```") == 2 * len(blocks_of(text))


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = _FENCE.sub("", text)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text)))


@pytest.mark.parametrize("page", PAGES + MORE_PAGES, ids=name_of)
def test_links_point_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for link in links_of(text):
        if link.startswith(BASE):
            target, at = link.removeprefix(BASE), ROOT
        elif link.startswith(("https://", "http://")):
            continue
        else:
            target, at = link, page.parent
            assert page.name != "README.md" or page.parent != ROOT, f"{link}: the README's links are absolute"
        path, _, anchor = target.partition("#")
        file = (at / path.removesuffix("?raw=true")).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors_of(file.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1000
