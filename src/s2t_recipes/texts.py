"""Texts of an evaluation, beside its numbers: prompts, right answers, and the text of each token.

`s2t eval` writes them as `texts.json`, so its folder can be read without the model and the data set. For older folders
they are looked up in the data set and the tokenizer. Knows tokenizers and problems; knows no models and no policies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from s2t_recipes.answers import extract_answer


TEXTS_NAME = "texts.json"
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to


def collect_texts(problems: Iterable, tokenizer, runs: Iterable[list[dict]]) -> dict:
    """The content of `texts.json`.

    Args:
        problems: problems of the evaluation, in order.
        tokenizer: tokenizer of the small model; `None` leaves the tokens out.
        runs: records of each policy and seed.

    Returns:
        `problems` (rows of id, prompt, right answer), `tokens` (id -> text), `special` (ids that are no text) and
        `joined`: several tokens, ids separated by spaces, may be one character between them.
    """
    rows = [[p.id, p.prompt, p.answer and (extract_answer(p.answer, "hash") or p.answer)] for p in problems]
    texts = {"problems": rows, "tokens": {}, "special": [], "joined": {}}
    if tokenizer is None:
        return texts
    records = [record for run in runs for record in run if "tokens" in record]
    ids = sorted({id for record in records for id in ids_of(record)})
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1]  # some tokenizers drop a first token's space
    start = len(tokenizer.decode([before]))
    special = set(tokenizer.all_special_ids)
    pieces = {id: tokenizer.decode([id]) if id in special else tokenizer.decode([before, id])[start:] for id in ids}
    joined = {tuple(run) for record in records for run in broken_runs(record["tokens"], pieces)}
    texts["tokens"] = {str(id): text for id, text in pieces.items()}
    texts["special"] = [id for id in ids if id in special]
    texts["joined"] = {" ".join(map(str, run)): tokenizer.decode([before, *run])[start:] for run in sorted(joined)}
    return texts


def ids_of(record: dict) -> Iterator[int]:
    """Every token that a record names."""
    yield from record["tokens"]
    yield from record.get("student_tokens", {}).values()
    for _, candidates in record.get("asked", {}).values():
        yield from (candidate[0] for candidate in candidates)


def broken_runs(ids: list[int], pieces: dict[int, str]) -> Iterator[list[int]]:
    """Neighbouring tokens that are each a part of a character."""
    for is_broken, run in groupby(ids, key=lambda id: BROKEN in pieces[id]):
        if is_broken:
            yield list(run)


def find_texts(folder: Path, meta: dict, runs: list[list[dict]]) -> tuple[dict, list[str]]:
    """Content of the `texts.json` of a run; without that file, what data set and tokenizer of `meta` still give.

    Returns:
        Texts, and a sentence for each thing that is missing.
    """
    file = folder / TEXTS_NAME
    if file.is_file():
        try:
            texts = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`report`: {file} is not JSON ({error}).") from None
        if not isinstance(texts, dict) or not {"problems", "tokens", "special", "joined"} <= texts.keys():
            raise ValueError(f"`report`: {file} does not hold the texts of `s2t eval`.")
        return texts, []
    from transformers import AutoTokenizer

    from s2t_recipes.problems import load_problems

    notes, settings = [], meta.get("settings", {})
    problems, tokenizer = [], None
    try:
        problems = load_problems(
            str(locate(folder, meta["dataset"])),
            split=meta.get("split"),
            prompt_column=settings.get("prompt_column", "prompt"),
            answer_column=settings.get("answer_column", "answer"),
            limit=settings.get("limit"),
        )
    except (OSError, ValueError):
        notes.append(f"The prompts are not shown: the data set {meta.get('dataset')} is not at hand.")
    for source in (meta["model"], *meta.get("adapters", [])):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(locate(folder, source)), local_files_only=True)
            break
        except (OSError, ValueError):
            continue
    if tokenizer is None:
        notes.append(f"Texts are not shown token by token: the tokenizer of {meta.get('model')} is not at hand.")
    return collect_texts(problems, tokenizer, runs), notes


def locate(folder: Path, name: str) -> Path | str:
    """The path `name` of a report as it is found below its folder, which may have been moved; else `name` itself."""
    parts = Path(name).parts
    for start in range(len(parts)):
        if parts[start] not in ("/", "..") and (inside := folder.joinpath(*parts[start:])).exists():
            return inside
    return name
