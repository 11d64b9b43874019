"""Folders and Hub data sets of labels: shards, header and card."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, get_dataset_split_names, load_dataset
from huggingface_hub import DatasetCardData

from transformers_s2t.config import check_choice
from transformers_s2t.files import HUB_ID, atomic_write, write_json
from transformers_s2t.labels.schema import FEATURES, HEADER_NAME, TrajectoryHeader, check_columns, validate_row


CARD_NAME = "README.md"
#: The splits of a folder of labels. A problem, with all its rollouts, is in one of them (`split_of`).
SPLITS = ("train", "validation")
_SHARD = re.compile(r"(train|validation)-(\d{5,})\.parquet")


def card_metadata(splits: Sequence[str], license: str | None = None) -> str:
    """The metadata of a card. Without `data_files`, `datasets` would read the commonest type of file, which is JSON
    where shards are few."""
    files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
    data = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        tags=["transformers-s2t", "s2t", "arxiv:2604.26940"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return f"{data.to_yaml()}\n"


def write_header(folder: str | os.PathLike, header: TrajectoryHeader, splits: Sequence[str] = ("train",)) -> None:
    """Writes `s2t_labels.json` and the `README.md` that makes `datasets.load_dataset(folder)` read these splits."""
    folder = Path(folder)
    write_json(folder / HEADER_NAME, header.to_dict())
    card = (
        f"---\n{card_metadata(splits)}---\n\n"
        f"# Select to Think labels\n\nStudent `{header.model}`, teacher `{header.teacher_model}`: rollouts of the "
        "student, and at its decision points the candidates it proposes with the teacher's log-probabilities of them "
        f"(arXiv 2604.26940). `{HEADER_NAME}` says how they were made; `transformers_s2t.labels.folder.read_labels` "
        "reads them.\n"
    )
    file = folder / CARD_NAME
    # Not rewritten where it is right: after the header of a finished run nothing follows that a kill could cut short.
    if not file.is_file() or file.read_text(encoding="utf-8") != card:
        with atomic_write(file) as out:
            out.write(card.encode("utf-8"))


def read_header(folder: str | os.PathLike) -> TrajectoryHeader | None:
    """The header of a local folder, `None` where it has none."""
    return _header_from(Path(folder) / HEADER_NAME)


def _header_from(file: Path) -> TrajectoryHeader | None:
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    return TrajectoryHeader.from_dict(data, where=str(file))


def split_of(problem_id: str, validation_share: float) -> str:
    """Which split a problem belongs to. This depends on its id alone, so it is the same in every folder of labels with
    this share, and a larger share moves no problem from the validation split back to training."""
    return "validation" if share_of(f"validation\t{problem_id}") < validation_share else "train"


def share_of(text: str) -> float:
    """A number in [0, 1) that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shard_files(folder: str | os.PathLike, split: str | None = None) -> list[Path]:
    """The shards of a folder in order: those of one split, or all for `None`."""
    found = [(match, file) for file in Path(folder).glob("*.parquet") if (match := _SHARD.fullmatch(file.name))]
    return [file for _, file in sorted((int(match[2]), file) for match, file in found if split in (None, match[1]))]


def next_shard_index(folder: str | os.PathLike) -> int:
    """One above the last shard's number."""
    files = shard_files(folder)
    return int(_SHARD.fullmatch(files[-1].name)[2]) + 1 if files else 0


def write_shard(
    folder: str | os.PathLike, index: int, rows: Sequence[Mapping[str, Any]], split: str = "train"
) -> Path:
    """Writes `{split}-{index}.parquet`, all rows or nothing: a temporary file, flushed to disk, then renamed.

    Raises:
        ValueError: for an illegal row or split, no rows, or a rollout that occurs twice.
        FileExistsError: where there is such a shard.
    """
    check_choice("split", split, SPLITS)
    folder = Path(folder)
    file = folder / f"{split}-{index:05d}.parquet"
    if not rows:
        raise ValueError("`rows` must hold one row at least, got none.")
    for row in rows:
        validate_row(row)
    if len({(row["problem_id"], row["rollout"]) for row in rows}) != len(rows):
        raise ValueError("`rows` must differ in `problem_id` or `rollout`; one occurs twice.")
    if file.exists():
        raise FileExistsError(f"{file} exists.")
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=FEATURES.arrow_schema)
    with atomic_write(file) as out:
        pq.write_table(table, out)
    return file


def half_written_files(folder: str | os.PathLike) -> list[Path]:
    """Temporary files that a killed run left behind, see `atomic_write`."""
    patterns = (*(f".{split}-*.parquet.*" for split in SPLITS), f".{HEADER_NAME}.*", f".{CARD_NAME}.*")
    return [file for pattern in patterns for file in Path(folder).glob(pattern)]


def remove_labels(folder: str | os.PathLike) -> None:
    """Removes what a labeling run wrote into a folder, half-written files included, and nothing else.

    The header goes last: without it, files that a kill leaves behind would look like somebody else's.
    """
    folder = Path(folder)
    for file in [*half_written_files(folder), *shard_files(folder), folder / CARD_NAME, folder / HEADER_NAME]:
        file.unlink(missing_ok=True)


def done_problem_ids(folder: str | os.PathLike) -> set[str]:
    """Ids of the problems that the shards of a folder hold; empty where there is no folder."""
    done: set[str] = set()
    for file in shard_files(folder):
        done.update(_read_parquet(file, columns=["problem_id"]).column("problem_id").to_pylist())
    return done


def _read_parquet(file: Path, columns: list[str]) -> pa.Table:
    try:
        check_columns(pq.read_schema(file).names, str(file))
        return pq.read_table(file, columns=columns)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from None


def read_labels(path_or_hub_id: str | os.PathLike, split: str = "train") -> tuple[Dataset, TrajectoryHeader | None]:
    """Labels and their header.

    Args:
        path_or_hub_id: a folder that `s2t label` wrote, or a data set on the Hub.
        split: "train", "validation" (problems held out by `s2t label --validation_share`) or "all".

    Returns:
        the rows, and the header (`None` where a data set on the Hub or a folder has none).

    Raises:
        FileNotFoundError: where there is no such folder or data set.
        ValueError: where it holds no shards, no rows or other columns, or the header is illegal.
    """
    name = os.fspath(path_or_hub_id)
    folder = Path(name)
    if folder.is_dir():
        return _read_folder(folder, split)
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"There is no folder of labels {name!r} (s2t label makes one).")
    return _read_hub(name, split)


def label_splits(path_or_hub_id: str | os.PathLike) -> list[str]:
    """Which splits a folder of labels, or a data set on the Hub, has."""
    name = os.fspath(path_or_hub_id)
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        return [split for split in SPLITS if shard_files(name, split)]
    try:
        return get_dataset_split_names(name)
    except (FileNotFoundError, ConnectionError):
        return []  # `read_labels` raises the error


def read_held_out_labels(path_or_hub_id: str | os.PathLike) -> tuple[Dataset, TrajectoryHeader | None]:
    """[`read_labels`] of held-out labels: the split "validation", or all of labels that have none."""
    return read_labels(path_or_hub_id, "validation" if "validation" in label_splits(path_or_hub_id) else "train")


def _read_folder(folder: Path, split: str) -> tuple[Dataset, TrajectoryHeader | None]:
    if not shard_files(folder):
        raise ValueError(f"{folder} holds no train-*.parquet: it is not a folder of labels (s2t label).")
    check_choice("split", split, (*label_splits(folder), "all"))
    files = shard_files(folder, None if split == "all" else split)
    header = read_header(folder)
    num_rows = sum(_read_parquet(file, columns=["problem_id"]).num_rows for file in files)
    if num_rows == 0:
        raise ValueError(f"{folder} holds no labelled trajectory.")
    if header is not None and not header.complete:
        warnings.warn(
            f"{folder} is incomplete: {len(done_problem_ids(folder))} of {header.num_problems} problems; the same "
            "`s2t label` command goes on with the rest.",
            stacklevel=3,
        )
    return Dataset.from_parquet([str(file) for file in files], features=FEATURES), header


def _read_hub(name: str, split: str) -> tuple[Dataset, TrajectoryHeader | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        dataset = load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is neither a local folder of labels nor a data set that the Hub or its local cache gives: "
            f"{reason}"
        ) from None
    check_columns(dataset.column_names, name)
    if len(dataset) == 0:
        raise ValueError(f"{name} ({split}) holds no labelled trajectory.")
    if dataset.features != FEATURES:
        dataset = dataset.select_columns(list(FEATURES)).cast(FEATURES)
    try:
        file = hf_hub_download(name, HEADER_NAME, repo_type="dataset")
    except EntryNotFoundError:
        return dataset, None
    return dataset, _header_from(Path(file))
