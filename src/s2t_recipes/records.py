"""Finished work on disk: records below a header with the hash of the settings that they were made with.

`read_records` returns them for the same hash and for no other, so nothing is made twice. Knows no policies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers_s2t.files import atomic_write
from transformers_s2t.selector_files import adapter_folder


def fingerprint(source: str) -> str:
    """Name of a model, adapter, data set or labels. For a local folder a digest of its files is added, which changes
    when it is made again."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    suffixes = (".json", ".safetensors", ".bin", ".parquet")
    adapter = adapter_folder(folder)
    files = [*folder.iterdir(), *(adapter.iterdir() if adapter != folder else ())]
    for file in sorted(path for path in files if path.suffix in suffixes):
        digest.update(file.name.encode())
        stat = file.stat()
        small = stat.st_size < 64_000_000
        digest.update(file.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return f"{source} {digest.hexdigest()[:16]}"


def write_records(file: Path, header: dict, records: list[dict]) -> None:
    """One JSON line for the header and one per record, all or nothing."""
    with atomic_write(file) as out:
        for line in (header, *records):
            out.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))


def read_records(file: Path, settings_hash: str | None = None) -> tuple[dict, list[dict]] | None:
    """Header and records of finished work; `None` where there are none, or they were made with other settings."""
    if not file.is_file():
        return None
    with open(file, encoding="utf-8") as lines:
        header = json.loads(next(lines, "{}"))
        if settings_hash is not None and header.get("settings_hash") != settings_hash:
            return None
        return header, [json.loads(line) for line in lines]


def hash_of(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
