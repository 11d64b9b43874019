"""Which problems a selector has seen, and in which stage: `seen_problems.json`, which travels with the adapter.

Labels stay where they were made, but others evaluate the adapter. So it carries the ids of its problems (16 hex digits
of the prompt's SHA-256), and the recipes refuse to calibrate or measure it on problems that must be new to it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers_s2t.config import SEEN_PROBLEMS_NAME, check_choice
from transformers_s2t.files import write_json


#: Stages that use problems: training the adapter, choosing among checkpoints and settings, a router, calibration.
STAGES = ("training", "tuning", "router", "calibration")


def write_seen_problems(folder: str | os.PathLike, stage: str, ids: Iterable[str]) -> Path:
    """Writes the ids of a stage in place of those that it had; other stages keep theirs.

    Args:
        folder: the adapter's folder.
        stage: "training", "tuning", "router" or "calibration".
        ids: ids of the problems, in any order, repeated or not.

    Returns:
        the file that was written.

    Raises:
        ValueError: for another stage, or where the present file is damaged.
    """
    check_choice("stage", stage, STAGES)
    file = Path(folder) / SEEN_PROBLEMS_NAME
    seen = _read(file) if file.is_file() else {}
    seen[stage] = set(map(str, ids))
    return write_json(file, {name: sorted(seen[name]) for name in STAGES if name in seen})


def read_seen_problems(path: str | os.PathLike, **hub_kwargs) -> dict[str, set[str]]:
    """Stage -> ids of its problems, for the stages that were written. Empty for an older adapter without the file.

    Args:
        path: the adapter's folder, or its repository on the Hub.
        hub_kwargs: `revision`, `token`, `cache_dir` ... as in `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: where the file is damaged.
        OSError: where there is no such repository.
    """
    if Path(path).is_dir():
        file = Path(path) / SEEN_PROBLEMS_NAME
        return _read(file) if file.is_file() else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _read(Path(hf_hub_download(str(path), SEEN_PROBLEMS_NAME, **hub_kwargs)))
    except LocalEntryNotFoundError:  # there may be one on the Hub: not the same as none
        warnings.warn(
            f"The {SEEN_PROBLEMS_NAME} of {str(path)!r} is not in the local cache and the Hub cannot be asked for it: "
            "what that adapter has seen is not checked. Download it while there is a connection (hf download).",
            stacklevel=2,
        )
        return {}
    except EntryNotFoundError:
        return {}


def check_unseen(path: str | os.PathLike, problem_ids: Iterable[str], stages: Sequence[str], what: str) -> None:
    """Refuses problems that an adapter has seen.

    Args:
        path: the adapter's folder, or its repository on the Hub.
        problem_ids: ids of the problems that must be new to it.
        stages: the stages whose problems are refused.
        what: name of the argument that gave the problems, for the message.

    Raises:
        ValueError: naming the argument, how many problems are shared, the first of them, and the stages.
    """
    for stage in stages:
        check_choice("stages", stage, STAGES)
    ids, seen = set(map(str, problem_ids)), read_seen_problems(path)
    shared = {stage: ids & seen[stage] for stage in stages if ids & seen.get(stage, set())}
    if shared:
        every = sorted(set.union(*shared.values()))
        raise ValueError(
            f"`{what}` shares {len(every)} of its {len(ids)} problems with those that {str(path)!r} has seen (ids "
            f"{', '.join(every[:3])}{', ...' if len(every) > 3 else ''}), in "
            f"{', '.join(f'{stage} ({len(found)})' for stage, found in shared.items())}: take problems that are new "
            "to it, or train and calibrate it again without these."
        )


def _read(file: Path) -> dict[str, set[str]]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or set(data) - set(STAGES) or any(type(ids) is not list for ids in data.values()):
        raise ValueError(f"{file} must hold lists of ids of {', '.join(STAGES)}: it is spoilt, or of a newer version.")
    return {stage: set(ids) for stage, ids in data.items()}
