"""Reads problems for every recipe: from a local file or folder, or from the Hub, and turns prompts into token ids.

Knows files, columns and tokenizers; knows nothing of models, labels or what an answer means.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from transformers_s2t.labels.folder import share_of


#: How prompts are put, in the arguments of the recipes and in the header of labels.
PROMPT_SETTINGS = ("chat_template", "system_prompt", "chat_template_kwargs")

SUFFIXES = (".jsonl", ".json", ".parquet")
DEFINED = ("defined", "undefined", "default", "d")  # Jinja's tests and filters for what may not be given
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Problem:
    """One problem. `id` is a hash of the prompt, the same in every file and data set: evaluation refuses ids that were
    labelled."""

    id: str
    prompt: str
    answer: str | None


def load_problems(
    source: str,
    split: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str | None = "answer",
    limit: int | None = None,
) -> list[Problem]:
    """The problems of one split, in the order of the file, without repeated prompts (the first one stays).

    Args:
        source: a `.jsonl`, `.json` (a list of objects) or `.parquet` file; a folder with `{split}` files of these
            kinds; or a Hub id, with its configuration behind a colon where it has several (`openai/gsm8k:main`).
        split: which file of a folder, or which split on the Hub.
        prompt_column: where the prompt's text is.
        answer_column: where the reference answer is; `None` for problems without answers. An empty cell (null, NaN,
            empty text) is no answer.
        limit: at most so many problems, the first ones.

    Returns:
        Problems; `id` is 16 hex digits of the prompt's SHA-256. A column `id` is not read: numbers in one file say
        nothing of those in another.

    Raises:
        FileNotFoundError: where there is no such file, folder or data set.
        ValueError: for a missing column or split, a row without a prompt, an empty data set, a limit below 1.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"`limit` must be an integer of at least 1, or None for all problems, got {limit!r}.")
    rows = read_rows(source, split)
    problems: dict[str, Problem] = {}
    where = source if split is None else f"{source} ({split})"
    for number, row in enumerate(rows):
        problem = _to_problem(row, number, where, prompt_column, answer_column)
        problems.setdefault(problem.id, problem)
        if limit is not None and len(problems) == limit:
            break
    if not problems:
        raise ValueError(f"`dataset`: {where} is empty, it holds no problem.")
    return list(problems.values())


def _to_problem(
    row: Mapping[str, Any], number: int, where: str, prompt_column: str, answer_column: str | None
) -> Problem:
    for argument, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column is not None and column not in row:
            raise ValueError(f"`{argument}`={column!r} is not in row {number} of {where}; columns there: {list(row)}.")
    prompt = row[prompt_column]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"column {prompt_column!r} must hold text, got {prompt!r} in row {number} of {where}.")
    answer = None if answer_column is None else row[answer_column]
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, (str, int, float))):
        what = f"got {answer!r} in row {number} of {where}"
        raise ValueError(f"column {answer_column!r} must hold text or a number, {what}.")
    return Problem(hashlib.sha256(prompt.encode()).hexdigest()[:16], prompt, _answer_text(answer))


def _answer_text(answer: str | int | float | None) -> str | None:
    """`None` for what stands for no answer: null, NaN (how pandas writes a missing number) and empty text."""
    if answer is None or answer != answer or not str(answer).strip():
        return None
    # 1e+16 is a number to Python only
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) and math.isfinite(answer) else str(answer)


def read_rows(source: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_of_split(path, split)
    if path.is_file():
        return _read_file(path)
    if path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"`dataset`: there is no file or folder {source!r}.")
    return _read_hub(source, split)


def _file_of_split(folder: Path, split: str | None) -> Path:
    there = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    for suffix in SUFFIXES:
        if split is not None and (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    names = ", ".join(there) or "none"
    if split is None:
        raise ValueError(f"`split` is required for the folder {folder}; its data files: {names}.")
    raise FileNotFoundError(f"`split`: {folder} holds no {split}.jsonl, .json or .parquet; its data files: {names}.")


def _read_file(file: Path) -> list[Mapping[str, Any]]:
    if file.suffix not in SUFFIXES:
        raise ValueError(f"`dataset` must be a {', '.join(SUFFIXES)} file or a folder of them, got {str(file)!r}.")
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid {file.suffix}: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} must hold {'a list of' if file.suffix == '.json' else 'one'} JSON objects a row.")
    return rows


def _read_hub(source: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"`dataset`: {source!r} is neither a local file or folder nor a data set that the Hub or its local cache "
            f"gives: {str(error).splitlines()[0]}"
        ) from None
    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"`split` is required for {source!r}; it has: {', '.join(data)}.")
        data = next(iter(data.values()))
    return data


def split_by_id(
    problems: Iterable[Problem], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[Problem]]:
    """Parts of a data set, disjoint by construction: a hash of the id and the seed says where a problem belongs.

    Which other problems there are, and in what order, changes nothing.

    Args:
        problems: in any order.
        fractions: part -> share of the problems, each above 0, together at most 1 (the rest belongs to no part).
        seed: another one gives another division.
    """
    shares = list(fractions.values())
    if not shares or any(not share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ValueError(f"`fractions` must be above 0 and sum to at most 1, got {dict(fractions)}.")
    parts: dict[str, list[Problem]] = {name: [] for name in fractions}
    for problem in problems:
        place = share_of(f"{seed}\t{problem.id}")
        edge = 0.0
        for name, share in fractions.items():
            edge += share
            if place < edge or (math.isclose(edge, 1.0) and place >= edge):
                parts[name].append(problem)
                break
    return parts


def read_template_kwargs(value: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """`chat_template_kwargs` as a command line (a JSON object) or a YAML file (a mapping) gives it; `None` for none.

    Raises:
        ValueError: where it is neither.
    """
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = given
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            "`chat_template_kwargs` must be a JSON object, e.g. '{\"enable_thinking\": false}', or a mapping in YAML, "
            f"got {given!r}."
        )
    return dict(value) if value else None


def template_variables(tokenizer: PreTrainedTokenizerBase) -> set[str] | None:
    """Variables of a tokenizer's template that `chat_template_kwargs` can set; `None` where it cannot be parsed."""
    own_tag = r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}"  # transformers', which Jinja does not know
    source = re.sub(own_tag, "", tokenizer.get_chat_template())
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError:
        return None
    names = jinja2.meta.find_undeclared_variables(tree)
    # what a template sets itself, in one branch and not in another, is only asked for where it says "is defined"
    asked = [node for node in tree.find_all((nodes.Test, nodes.Filter)) if node.name in DEFINED]
    names -= {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"} - {
        node.node.name for node in asked if isinstance(node.node, nodes.Name)
    }
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
    return names - {"messages", "raise_exception", "strftime_now", *environment.globals, *taken}


def check_template_kwargs(kwargs: Mapping[str, Any] | None, *tokenizers: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError for a key that no template of these tokenizers uses: a template would ignore it silently."""
    legal = [template_variables(tokenizer) for tokenizer in tokenizers]
    if not kwargs or None in legal:
        return
    used = set().union(*legal)
    if unknown := [key for key in kwargs if key not in used]:
        raise ValueError(
            f"`chat_template_kwargs` must name variables of the tokenizer's chat template "
            f"({', '.join(sorted(used)) or 'it has none to set'}), got {', '.join(map(repr, unknown))}."
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    chat_template: bool = False,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, ready to be continued.

    Args:
        tokenizer, prompts: tokenizer of the model that continues them, and their texts.
        chat_template: whether each is put into the tokenizer's chat template, up to where the assistant begins.
            Otherwise the text is encoded as it is, less an end-of-sequence token that the tokenizer may append.
        system_prompt, chat_template_kwargs: system message and variables of the template.

    Raises:
        ValueError: for a tokenizer without a template, a system prompt or variables without one, a template that
            cannot be filled, or ignores the system prompt or a variable, a prompt without tokens.
    """
    if chat_template and tokenizer.chat_template is None:
        raise ValueError("`chat_template` needs a tokenizer that has one; this one has none: pass false.")
    if system_prompt is not None and not chat_template:
        raise ValueError("`system_prompt` needs `chat_template`: without one, write it into the prompts.")
    if chat_template_kwargs and not chat_template:
        got = dict(chat_template_kwargs)
        raise ValueError(f"`chat_template_kwargs` needs `chat_template`, got {got} without: pass true.")
    if chat_template:
        check_template_kwargs(chat_template_kwargs, tokenizer)
    encoded = []
    for prompt in prompts:
        if chat_template:
            text = _fill_template(tokenizer, prompt, system_prompt, chat_template_kwargs, is_first=not encoded)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
            plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if _trailing(ids, tokenizer.eos_token_id) > _trailing(plain, tokenizer.eos_token_id):
                ids = ids[:-1]
        if not ids:
            raise ValueError(f"`prompts` must have at least one token each, got none for {prompt!r}.")
        encoded.append(list(ids))
    return encoded


def _fill_template(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system_prompt: str | None,
    kwargs: Mapping[str, Any] | None,
    is_first: bool,
) -> str:
    """The prompt in the tokenizer's chat template; with `is_first`, checks that the system prompt is there too."""

    def fill(system_prompt: str | None, kwargs: Mapping[str, Any] | None) -> str:
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        messages.append({"role": "user", "content": prompt})
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs or {})

    def fails(*arguments) -> bool:
        try:
            fill(*arguments)
        except (jinja2.TemplateError, TypeError):
            return True
        return False

    try:
        text = fill(system_prompt, kwargs)
    except (jinja2.TemplateError, TypeError) as error:
        reason = " ".join(str(error).split())
        if system_prompt is not None and not fails(None, kwargs):
            raise ValueError(
                f"`system_prompt` must be left out, got {system_prompt!r}: the tokenizer's chat template refuses it "
                f"({reason}). Write it into the prompts."
            ) from None
        if kwargs and not fails(system_prompt, None):
            what = f"`chat_template_kwargs` {dict(kwargs)}"
            raise ValueError(f"{what} does not suit the tokenizer's chat template ({reason}).") from None
        raise ValueError(
            f"`chat_template`: that of the tokenizer cannot be filled with the prompt {prompt[:60]!r} ({reason}); "
            "pass false to do without."
        ) from None
    if is_first and system_prompt is not None and system_prompt.strip() not in text and text == fill(None, kwargs):
        raise ValueError(
            f"`system_prompt` must be left out, got {system_prompt!r}: the tokenizer's chat template ignores it. "
            "Write it into the prompts."
        )
    return text


def _trailing(ids: list[int], id: int | None) -> int:
    """How often `id` stands at the end."""
    return next((count for count, last in enumerate(reversed(ids)) if last != id), len(ids))
