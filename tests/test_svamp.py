"""recipes/svamp/corpus.py: parts that share no story, prompts, answers, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
NAMES = ("Ann", "Ben", "Cy", "Dot", "Eve", "Fay")
THINGS = ("apples in a red basket", "cars on the long bridge", "books under an old bed", "stones by the cold river")


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("svamp_corpus", ROOT / "recipes" / "svamp" / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of_stories(num_variants=3):
    """Stories with other numbers and questions each, and the story of each row."""
    rows, story = [], []
    for s, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS):
        for n in range(num_variants):
            body = f"{name} had {n + 2} {thing} when {name.lower()}{s} came with {n + 7} more"
            rows.append({"Body": body, "Question": f"How many, asked {n}?", "Answer": 9.0 + 2 * n, "Type": "Addition"})
            story.append(s)
    return rows, story


def test_a_story_is_in_one_part_whatever_its_numbers(corpus):
    rows, story = rows_of_stories()
    sizes = {"test": 30, "label": 42}
    parts = corpus.divide(rows, sizes, seed=0)
    by_prompt = {corpus.to_prompt(row["Body"], row["Question"]): s for row, s in zip(rows, story)}
    found = {name: {by_prompt[problem["prompt"]] for problem in problems} for name, problems in parts.items()}
    assert found["test"].isdisjoint(found["label"]) and len(found["test"]) > 3 < len(found["label"])
    assert all(len(parts[name]) <= size for name, size in sizes.items())
    assert corpus.divide(list(reversed(rows)), sizes, seed=0) == parts  # order is nothing
    assert corpus.divide(rows, sizes, seed=1) != parts


def test_chains_of_like_stories_are_one(corpus):
    bodies = ["a b c d e", "c d e f b a", "f b a g h c d", "x y z"]
    first, second, third, other = corpus.stories(bodies)
    assert first == second == third != other


@pytest.mark.parametrize(
    ("body", "question", "prompt"),
    [
        ("Ann has 3 pens.", "How many?", "Ann has 3 pens. How many?"),
        ("If Ann  has 3 pens", "How many ?", "If Ann has 3 pens, how many ?"),
        ("Ann has 3 pens,", "How many?", "Ann has 3 pens, how many?"),
    ],
)
def test_story_and_question_are_one_text(corpus, body, question, prompt):
    assert corpus.to_prompt(body, question) == prompt


def test_the_command_writes_each_part(corpus, tmp_path, monkeypatch, capsys):
    rows, _ = rows_of_stories()
    rows[0]["Answer"] = 1234567.0
    rows[1]["Answer"] = 2.5
    (tmp_path / "SVAMP.json").write_text(json.dumps(rows))
    command = ["corpus.py", "--source", str(tmp_path), "--output", str(tmp_path / "out"), "--num-test", "72"]
    monkeypatch.setattr(sys, "argv", command)
    corpus.main()
    written = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert len(written) == 72 and {"1234567", "2.5", "9"} <= {problem["answer"] for problem in written}
    monkeypatch.setattr(sys, "argv", [*command, "--num-label", "30", "--only", "label"])
    corpus.main()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["label.jsonl", "test.jsonl"]
    assert "problems" in capsys.readouterr().out


def test_bad_input_is_told(corpus, monkeypatch):
    rows, _ = rows_of_stories(1)
    with pytest.raises(ValueError, match="lacks Type"):
        corpus.divide([{name: rows[0][name] for name in ("Body", "Question", "Answer")}], {"test": 1}, 0)
    with pytest.raises(ValueError, match="leave no story for test"):
        corpus.divide(rows[:1], {"test": 1, "label": 1000}, 0)
    monkeypatch.setattr(sys, "argv", ["corpus.py", "--source", "x", "--output", "y"])
    with pytest.raises(SystemExit):
        corpus.main()
