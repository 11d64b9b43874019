"""Files that appear under their name complete, or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
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
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(file: Path, data: Any) -> Path:
    """Writes `data` as JSON, whole or not at all, and returns `file`."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(file) as out:
        out.write(text.encode("utf-8"))
    return file
