"""Word problems of SVAMP, in parts that share no story.

    python recipes/svamp/corpus.py --source data/SVAMP.json --output data/svamp \
        --num-test 340 --num-tuning 110 --num-calibration 60 --num-label 490

SVAMP (Patel et al. 2021, https://github.com/arkilpatel/SVAMP, MIT) asks several questions about one story, with other
numbers or other words: 1000 problems tell about 160 stories. A story belongs to one part as a whole, so that no test
problem was seen in training in other words. A hash decides, so a story is in the same part on every machine.

Written as JSON lines with `prompt` (story and question), `answer` and `type` (the arithmetic that SVAMP names).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2t_recipes.commands import run
from s2t_recipes.problems import read_rows
from transformers_s2t.files import atomic_write
from transformers_s2t.labels.folder import share_of


PARTS = ("test", "tuning", "calibration", "label", "fresh")
COLUMNS = ("Body", "Question", "Answer", "Type")
#: Two problems tell one story where so large a part of all words of their stories are in both. Numbers do not count.
SAME_STORY = 0.6


def to_prompt(body: str, question: str) -> str:
    """Story and question as one text: a story that has no full stop of its own ends in a comma."""
    body, question = " ".join(body.split()), " ".join(question.split())
    if body[-1] in ".?!":
        return f"{body} {question}"
    return f"{body.rstrip(',')}, {question[0].lower()}{question[1:]}"


def stories(bodies: Sequence[str]) -> list[int]:
    """The story of each problem, as the index of one of its problems. Chains count: A like B, B like C, all one."""
    words = [frozenset(re.findall(r"[a-z]+", body.lower())) for body in bodies]
    story = list(range(len(bodies)))

    def root(i: int) -> int:
        while story[i] != i:
            story[i] = i = story[story[i]]
        return i

    for i, own in enumerate(words):
        for j in range(i):
            if len(own & words[j]) >= SAME_STORY * len(own | words[j]):
                story[root(i)] = root(j)
    return [root(i) for i in range(len(bodies))]


def divide(rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Part -> its problems, at most as many as `sizes` says, in the order of a hash.

    Raises:
        ValueError: for a missing column, or a part that gets no problem.
    """
    rows = list(rows)
    for row in rows:
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"`source` must have the columns {', '.join(COLUMNS)}, and lacks {', '.join(missing)}.")
    prompts = [to_prompt(row["Body"], row["Question"]) for row in rows]
    ids = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
    members = defaultdict(list)
    for i, story in enumerate(stories([row["Body"] for row in rows])):
        members[story].append(i)
    total = sum(sizes.values())
    parts: dict[str, list[tuple[str, dict[str, str]]]] = {name: [] for name in sizes}
    for story in members.values():
        place, edge = share_of(f"{seed}\t{min(ids[i] for i in story)}"), 0.0
        for name, size in sizes.items():
            edge += size / total
            if place < edge or name == list(sizes)[-1]:
                for i in story:
                    answer = float(rows[i]["Answer"])
                    answer = str(int(answer)) if answer.is_integer() else repr(answer)
                    problem = {"prompt": prompts[i], "answer": answer, "type": str(rows[i]["Type"])}
                    parts[name].append((ids[i], problem))
                break
    if empty := [name for name, found in parts.items() if not found]:
        raise ValueError(f"`sizes` leave no story for {', '.join(empty)}: ask for more of them, got {dict(sizes)}.")
    return {name: [problem for _, problem in sorted(found)][: sizes[name]] for name, found in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, help="SVAMP.json, a folder that holds it, or a Hub id")
    parser.add_argument("--split", help="of a Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0, help="of the division (default: 0)")
    for name in PARTS:
        parser.add_argument(f"--num-{name}", type=int, default=0, help=f"problems of {name}.jsonl, at most")
    parser.add_argument("--only", choices=PARTS, help="write this part alone, divided as with all (default: all)")
    args = parser.parse_args()
    sizes = {name: getattr(args, f"num_{name}") for name in PARTS}
    if min(sizes.values()) < 0 or not any(sizes.values()) or (args.only and not sizes[args.only]):
        parser.error(f"the sizes must be 0 or more, and one of them, or that of --only, above 0, got {sizes}")
    source = Path(args.source) / "SVAMP.json" if Path(args.source).is_dir() else args.source
    parts = divide(read_rows(str(source), args.split), {name: size for name, size in sizes.items() if size}, args.seed)
    for name, problems in parts.items():
        if args.only in (None, name):
            file = args.output / f"{name}.jsonl"
            with atomic_write(file) as out:
                out.write("".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems).encode())
            print(f"{file}: {len(problems)} problems")


if __name__ == "__main__":
    run(main)
