"""The tokens of a tokenizer as bytes."""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NOT_UTF8 = re.compile("[\udc80-\udcff]+")  # what "surrogateescape" makes of bytes that are not UTF-8


@functools.lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins of bytes in byte-level BPE files (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _types(node) -> set[str]:
    """Every "type" in a part of tokenizer.json."""
    if isinstance(node, dict):
        return {str(node.get("type"))}.union(*map(_types, node.values()))
    return set().union(*map(_types, node)) if isinstance(node, list) else set()


def _as_written(node):
    """A part of tokenizer.json that puts no space in front of the text and keeps its characters."""
    if isinstance(node, list):
        return [_as_written(one) for one in node if one.get("type") not in ("Prepend", "NFC", "NFKC", "NFD", "NFKD")]
    if not isinstance(node, dict):
        return node
    if node.get("type") in ("Prepend", "NFC", "NFKC", "NFD", "NFKD"):
        return None
    changed = {"add_prefix_space": False, "prepend_scheme": "never"}
    whole = {name: _as_written(value) if isinstance(value, list) else value for name, value in node.items()}
    return whole | {name: value for name, value in changed.items() if name in node}


class VocabularyRow(NamedTuple):
    """One row of next-token probabilities, by id and in the order of the sorted vocabulary (0 for ids above it)."""

    p_V: np.ndarray
    p_W: np.ndarray


class ByteVocabulary:
    """The tokens of one tokenizer as bytes, sorted, so that those that start with a string are a range."""

    def __init__(self, processing_class: PreTrainedTokenizerBase, name: str):
        backend = getattr(processing_class, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"`{name}` must be a fast tokenizer (with `backend_tokenizer`), to know tokens as bytes.")
        spec = json.loads(backend.to_str())
        cutting = {"WordPiece", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}
        if found := cutting & (_types(spec["pre_tokenizer"]) | _types(spec["model"])):
            raise ValueError(f"`{name}` must have tokens that join to text, but it drops spaces ({min(found)}).")
        self.byte_level = "ByteLevel" in _types(spec["decoder"]) | _types(spec["pre_tokenizer"])
        metaspace = "▁" in json.dumps([spec["decoder"], spec["pre_tokenizer"], spec["normalizer"]], ensure_ascii=False)
        byte_fallback = bool(spec["model"].get("byte_fallback")) or "ByteFallback" in _types(spec["decoder"])
        added = processing_class.added_tokens_decoder
        self.special_ids = {id for id, token in added.items() if token.special} | set(processing_class.all_special_ids)
        self.id_of_token = processing_class.get_vocab()
        self.token_of_id = {id: token for token, id in self.id_of_token.items()}
        self.bytes_of_id: dict[int, bytes] = {}
        for id, token in self.token_of_id.items():
            if id in self.special_ids:
                continue
            if id in added:
                data = token.encode()
            elif self.byte_level:
                data = bytes(_byte_of_char()[char] for char in token)
            elif byte_fallback and (match := _FALLBACK_BYTE.fullmatch(token)):
                data = bytes([int(match[1], 16)])
            else:
                data = (token.replace("▁", " ") if metaspace else token).encode()
            if data:
                self.bytes_of_id[id] = data
        entries = sorted((data, id) for id, data in self.bytes_of_id.items())
        self.sorted_bytes = [data for data, _ in entries]
        self.sorted_ids = np.array([id for _, id in entries], dtype=np.int64)
        self.ids_of_bytes: dict[bytes, list[int]] = {}
        for data, id in entries:
            self.ids_of_bytes.setdefault(data, []).append(id)
        self.num_rows = max(self.bytes_of_id, default=-1) + 1
        self.longest = max(map(len, self.sorted_bytes), default=0)
        self.range = functools.lru_cache(maxsize=1 << 16)(self._range)
        spec["normalizer"] = _as_written(spec["normalizer"]) if not self.byte_level else None
        spec["pre_tokenizer"] = _as_written(spec["pre_tokenizer"])
        self._spec = spec | {"padding": None, "truncation": None}

    @functools.cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer without what changes the text; only the teacher's is used, and it takes seconds to build."""
        backend = Tokenizer.from_str(json.dumps(self._spec))
        backend.encode_special_tokens = True  # the text "</s>" is text
        return backend

    def row(self, logits_V: torch.Tensor) -> VocabularyRow:
        """Probabilities from one row of logits, on the CPU."""
        p_V = torch.softmax(logits_V.double(), dim=-1).cpu().numpy()
        if self.num_rows <= len(p_V):
            return VocabularyRow(p_V, p_V[self.sorted_ids])
        return VocabularyRow(p_V, np.append(p_V, 0.0)[np.minimum(self.sorted_ids, len(p_V))])

    def _range(self, start: bytes) -> tuple[int, int]:
        """The range of the sorted vocabulary that starts with `start`: first index, and the one after the last."""
        after = start.rstrip(b"\xff")
        after = after[:-1] + bytes([after[-1] + 1]) if after else None
        low = bisect_left(self.sorted_bytes, start)
        return low, bisect_left(self.sorted_bytes, after, low) if after else len(self.sorted_bytes)

    def prefixes(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The tokens that `data` starts with, shortest first."""
        for end in range(1, min(len(data), self.longest) + 1):
            for id in self.ids_of_bytes.get(data[:end], ()):
                yield id, data[:end]

    def encode(self, data: bytes) -> list[int]:
        """Canonical tokens of some text; bytes that are no UTF-8 become their one-byte tokens.

        Raises:
            ValueError: where the tokens do not give the same bytes back.
        """
        text, ids, at = data.decode("utf-8", "surrogateescape"), [], 0
        for match in [*_NOT_UTF8.finditer(text), None]:
            part = text[at : match.start() if match else None]
            if part:
                ids += self._encode_text(part)
            if match:
                ids += self._longest_match(match[0].encode("utf-8", "surrogateescape"), longest=1)
                at = match.end()
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        data = text.encode()
        if b"".join(self.bytes_of_id.get(id, b"") for id in ids) == data:
            return ids
        return self._longest_match(data)  # a normalizer, or an added space in front

    def _longest_match(self, data: bytes, longest: int | None = None) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            found = list(self.prefixes(data[at : at + (longest or self.longest)]))
            if not found:
                raise ValueError(f"The teacher's tokenizer has no token for {data[at : at + 8]!r}.")
            ids.append(found[-1][0])
            at += len(found[-1][1])
        return ids
