"""Files that appear under their name complete, or not at all."""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


#: A repository of the Hub, as its owner and name.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def atomic_write(file: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name complete or not at all: temporary file, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary, handle = _new_file(file.parent, file.name)
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    """A hidden file that nobody else has, with the mode that the process's umask gives, and its descriptor."""
    file = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    return file, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def give_plain_mode(folder: Path) -> None:
    """Gives the weights in a folder and those below it the mode of any other file: safetensors keeps them from other
    users, so that a shared folder would hold an adapter that nobody else can load."""
    probe, handle = _new_file(folder, "mode")
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def write_json(file: Path, data: Any) -> Path:
    """Writes `data` as JSON, whole or not at all, and returns `file`."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(file) as out:
        out.write(text.encode("utf-8"))
    return file
