"""Checks of labels before training begins."""

from __future__ import annotations

import os
import warnings

from datasets import Dataset, DatasetDict, IterableDataset
from transformers import (
    PreTrainedTokenizerBase,
)

from transformers_s2t.fingerprints import same_weights, weights_name
from transformers_s2t.labels.folder import read_held_out_labels, read_labels
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.reserved_tokens import vocab_hash
from transformers_s2t.training.s2t_config import S2TConfig


def load_labels(
    source: Dataset | str | os.PathLike, name: str, header: TrajectoryHeader | None = None
) -> tuple[Dataset, TrajectoryHeader | None]:
    if isinstance(source, (str, os.PathLike)):
        source, header = read_labels(source) if name == "train_dataset" else read_held_out_labels(source)
    if isinstance(source, DatasetDict):
        raise TypeError(f"`{name}` must be one split, got all of {sorted(source)}: pass e.g. labels[{min(source)!r}].")
    if isinstance(source, IterableDataset):
        raise TypeError(
            f"`{name}` must be a datasets.Dataset, got {type(source)}: labels are checked and cut to blocks before "
            "training. `Dataset.from_generator(lambda: iter(labels), features=labels.features)` makes one, on disk."
        )
    if not isinstance(source, Dataset):
        raise TypeError(f"`{name}` must be a datasets.Dataset, a folder of labels or a Hub id, got {type(source)}.")
    if len(source) == 0:
        raise ValueError(f"`{name}` is empty: label some problems first (s2t label).")
    return source.with_format(None), header


def warn_of_overlap(train_dataset: Dataset, held_out: dict[str, Dataset]) -> None:
    """Warns where held-out labels share problems with the training labels. No error: to try whether a model can learn
    a few rows by heart, one passes the same rows twice."""
    for name, labels in held_out.items():
        if "problem_id" in labels.column_names and "problem_id" in train_dataset.column_names:
            shared = set(train_dataset["problem_id"]) & set(labels["problem_id"])
            if shared:
                warnings.warn(
                    f"`{name}` shares {len(shared)} problems with `train_dataset`: its figures are not held out.",
                    stacklevel=3,
                )


def problems_of(train_dataset: Dataset, held_out: dict[str, Dataset]) -> dict[str, set[str]]:
    """Stage -> ids of its problems, for stages whose labels have a column of ids."""
    seen: dict[str, set[str]] = {}
    for stage, parts in (("training", [train_dataset]), ("tuning", held_out.values())):
        for labels in parts:
            if "problem_id" in labels.column_names:
                seen.setdefault(stage, set()).update(map(str, labels["problem_id"]))
    return seen


def check_weights_fit(headers: dict[str, TrajectoryHeader | None], ours: str, args: S2TConfig) -> None:
    """Raises a ValueError where labels were written by a model with other weights than the fingerprint `ours`."""
    if args.allow_labels_of_other_model:
        return
    for name, header in headers.items():
        if header and not same_weights(header.model_hash, ours):
            raise ValueError(
                f"The labels of `{name}` are trajectories of {header.model!r} (weights "
                f"{weights_name(header.model_hash)}), but `model` has weights {weights_name(ours)}: its own proposals "
                "differ. Label with this model (s2t label --model), or pass `allow_labels_of_other_model=True`."
            )


def check_labels_fit(
    headers: dict[str, TrajectoryHeader | None], processing_class: PreTrainedTokenizerBase, name_or_path: str
) -> None:
    """Raises a ValueError where labels were made with another tokenizer."""
    ours = vocab_hash(processing_class)
    for name, header in headers.items():
        if header and header.vocab_hash != ours:
            raise ValueError(
                f"The labels of `{name}` were made with the tokenizer of {header.model!r} (vocabulary "
                f"{header.vocab_hash}), but `model` {name_or_path!r} has vocabulary {ours}: label with this model "
                "(s2t label --model)."
            )
