"""A pair of models with its data and settings, as a YAML of recipes/paper/pairs says it. Knows no recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from s2t_recipes.splits import CORPUS_PARTS, PROBLEM_PARTS, has_corpus_script


#: How often a sweep halves, or doubles, the learning rate while the last one is the best.
MAX_FURTHER_RATES = 3


@dataclass
class Pair:
    """Two models, their data and the settings that every method shares.

    Args:
        name: name of the YAML file, without its ending.
        title: title in tables.
        model, teacher_model, dataset: Hub ids or local paths; `{data}` and `{models}` in them, and in `part_options`,
            are the folders of `--data` and `--models`.
        sizes: part -> number of problems.
        part_options: part -> further arguments of the script that generates the problems.
        label_problems: number of problems of the part `label`, its first ones, that everything trains on; all by
            default.
        num_seeds: number of selectors, and of trainings of each baseline.
        data_seed: seed of the division into parts.
        has_answers: whether answers can be checked; where not, only agreement can be measured.
        label, train, router, calibrate, evaluate, baseline: further arguments of the recipes.
        selector_label: further arguments of `s2t label` for the texts that selectors learn from; without any,
            they learn from the labels that everything else learns from.
        learning_rates: method -> rates tried first on the tuning problems (see `Sweep`).
        further_rates: how often such a sweep goes beyond them, see `MAX_FURTHER_RATES`.
        learning_rates_by_problems: number of label problems -> method -> the same, where the best are other ones.
        system_prompt: with one, prompts go through the tokenizer's chat template.
        chat_template_kwargs: variables of the template; with some, prompts go through it too.
        zero_shot_text: see `s2t eval`.
        other_text: arguments of recipes/retention.py that name text of another kind; by default the part `words` of
            the generated problems.
    """

    name: str
    title: str
    model: str
    teacher_model: str
    dataset: str
    sizes: dict[str, int]
    part_options: dict[str, list[str]] = field(default_factory=dict)
    label_problems: int | None = None
    num_seeds: int = 3
    data_seed: int = 0
    has_answers: bool = True
    max_new_tokens: int = 256
    batch_size: int = 64
    dtype: str = "auto"
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    label: dict[str, Any] = field(default_factory=dict)
    selector_label: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    calibrate: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    further_rates: int = MAX_FURTHER_RATES
    learning_rates_by_problems: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    zero_shot_text: str | None = None
    other_text: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, data: str | None = None, models: str | None = None) -> Pair:
        """Reads a YAML. `like: NAME` in it takes what it does not say from the pair of that name beside it.

        Args:
            file: YAML of the pair.
            data, models: folders that `{data}` and `{models}` stand for.

        Raises:
            ValueError: for an unknown key, a missing one, an unknown part, or a `like` that names no other pair.
            FileNotFoundError: where the pair wants one of these folders and there is none, or it lacks a file.
        """
        values, names = read_yaml(file), [file.stem]
        while like := values.pop("like", None):  # another pair, but for what this one says
            other = file.with_name(f"{like}.yaml")
            if like in names or not other.is_file():
                raise ValueError(f"{file}: `like` must name another pair beside it, got {like!r}.")
            names.append(like)
            values = read_yaml(other) | values
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{file} has unknown keys {sorted(unknown)}; legal: {[f.name for f in fields(cls)]}.")
        values = fill_in(values, {"data": data, "models": models}, file)
        try:
            pair = cls(name=file.stem, **values)
        except TypeError as error:
            raise ValueError(f"{file}: {error}") from None
        legal = CORPUS_PARTS if has_corpus_script(pair.dataset) else PROBLEM_PARTS
        for name in [*pair.sizes, *pair.part_options]:
            if name not in legal:
                raise ValueError(f"{file}: parts must be among {', '.join(legal)}, got {name!r}.")
        return pair


def read_yaml(file: Path) -> dict[str, Any]:
    with open(file, encoding="utf-8") as text:
        return yaml.safe_load(text)


def fill_in(value: Any, folders: dict[str, str | None], file: Path) -> Any:
    """A value of a YAML with folders in place of `{data}` and `{models}`.

    Args:
        value: text, number, list or mapping.
        folders: name -> path, or `None` where it was not given.
        file: the YAML, for errors.

    Raises:
        FileNotFoundError: for a folder that was not given, or a path that is not there.
    """
    if isinstance(value, dict):
        return {key: fill_in(one, folders, file) for key, one in value.items()}
    if isinstance(value, list):
        return [fill_in(one, folders, file) for one in value]
    for name, folder in folders.items():
        if isinstance(value, str) and f"{{{name}}}" in value:
            path = Path(value.replace(f"{{{name}}}", folder or ""))
            if folder is None or not path.exists():
                raise FileNotFoundError(f"{file} wants {value}: pass its folder as --{name}.")
            return str(path)
    return value
