"""Fingerprints of a model's weights: strings that are stored with labels, adapters and routers.

A checkpoint has one fingerprint, whichever type it is loaded in (float32, bfloat16, float16), with or without adapters
or added vocabulary rows, tied or untied. Merging an adapter into the weights, or any other training, changes it, even
if most values differ by a thousandth only.

It is built from the last bit of single weights' significands after rounding to bfloat16: small updates change that
bit, and the types agree on it, except for values that float16 rounds to the middle between two of bfloat16 (an eighth
of a float32 checkpoint). Those count as unknown. Each code is the sum, modulo 2, of the bits of several weights from
different tensors.

Knows parameters and PEFT's wrappers; knows nothing of selectors.

Legend: N sampled weights, C codes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel


# signs (all that older versions wrote), version, what is never quantized, matrices
_FORMAT = re.compile(r"(?:[0-9a-f]{16})?\.2\.([\w-]{86})\.([\w-]{342})?", re.ASCII)

_MATRIX_CODES = 1024
_WEIGHTS_PER_CODE = 8
_MOST_PER_MATRIX = 64
_VECTOR_CODES = 104
_PER_VECTOR, _PER_TABLE = 8, 32
_ROW_BLOCKS = 19  # blocks of vocabulary rows: row 0, row 1, rows 2 to 3, 4 to 7, ... up to 2**18
_CODES_PER_BLOCK = 4
_PER_BLOCK = 16

_LEAST, _MOST = 2.0**-14, 2.0**15  # where float16 is finer than bfloat16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CODED = (torch.uint8, torch.int8, torch.int16, torch.int32)


def model_hash(model: PreTrainedModel | PeftModel) -> str:
    """Fingerprint of a model's weights, to be compared by [`same_weights`].

    It has three fields: 16 hex digits as older versions wrote them; a few hundred weights of what is never quantized
    (embeddings, head, norms); up to 64 weights of each matrix, or tensor of more dimensions, with its bias. The last
    field is empty for a quantized model. Weights that are not in memory count as unknown.

    A float16 copy of a float32 checkpoint does not match that checkpoint loaded in bfloat16: the copy is rounded
    twice, and six weights in a hundred differ. Adapters do not count; merged ones do.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    vectors, matrices = _Codes(_VECTOR_CODES), _Codes(_MATRIX_CODES)
    rows = [_own_parameters(layer) for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
    known = {id(parameter) for parameters in rows for parameter in parameters.values()}  # a head's bias has rows too
    found: dict[str, nn.Parameter] = {}
    quantized = False
    for name, module in _own_modules(base):
        own = dict(module.named_parameters(recurse=False))
        if _is_quantized(module, own):
            quantized = True
            continue
        is_matrix = any(p.ndim > 1 for p in own.values()) and not isinstance(module, nn.Embedding)
        for part, parameter in own.items():
            if id(parameter) in known:
                continue
            known.add(id(parameter))
            if is_matrix:
                found[f"{name}.{part}"] = parameter
            else:
                vectors.add(f"{name}.{part}", parameter, _PER_VECTOR if parameter.ndim < 2 else _PER_TABLE)
    num_matrices = sum(parameter.ndim > 1 for parameter in found.values())
    each = min(max(_MATRIX_CODES * _WEIGHTS_PER_CODE // max(num_matrices, 1), 1), _MOST_PER_MATRIX)
    for name, parameter in found.items():
        matrices.add(name, parameter, each if parameter.ndim > 1 else max(each // 4, 1))
    blocks = [_Codes(_ROW_BLOCKS * _CODES_PER_BLOCK) for _ in rows]
    for codes, parameters in zip(blocks, rows):
        codes.add_rows(parameters.get("weight"))
    return f"{_signs_hash(base)}.2.{_encode(*blocks, vectors)}.{'' if quantized else _encode(matrices)}"


def same_weights(stored: str, found: str) -> bool:
    """Whether two fingerprints may be those of one checkpoint.

    Only what both contain is compared: an empty one matches any, one of an older version is compared by its rule
    (signs of some embeddings and of all norms), and for a quantized model only what is never quantized counts.
    """
    ours, theirs = _FORMAT.fullmatch(stored), _FORMAT.fullmatch(found)
    if ours is None or theirs is None:
        old, new = (fingerprint.partition(".")[0] for fingerprint in (stored, found))
        return not old or not new or old == new
    for one, other in zip(ours.groups(), theirs.groups()):
        if one and other:
            one_C, other_C = _decode(one), _decode(other)
            if np.any((one_C != other_C) & (one_C != _UNKNOWN) & (other_C != _UNKNOWN)):
                return False
    return True


def weights_name(fingerprint: str) -> str:
    """Short name of a fingerprint for messages: the 16 hex digits of older versions, then 8 for the rest, if any."""
    signs, _, rest = fingerprint.partition(".")
    return f"{signs}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}" if rest else signs


# ---------------------------------------------------------------------------------------------------------------------
# Codes

_UNKNOWN = 2


class _Codes:
    """C codes: the sum modulo 2 of the bits of sampled weights, or unknown where one of these is."""

    def __init__(self, num_codes: int):
        self.num_codes = num_codes
        self.values: list[torch.Tensor] = []
        self.places: list[np.ndarray] = []

    def add(self, name: str, parameter: torch.Tensor, num_weights: int) -> None:
        """Samples a tensor evenly; its weights go to codes next to each other."""
        first, row, column = _numbers(name)
        shape = parameter.shape or (1,)
        rows_N = _spread(row, _ROW_STRIDE, num_weights, int(np.prod(shape[:-1])))
        columns_N = _spread(column, _COLUMN_STRIDE, num_weights, shape[-1])
        index = (*np.unravel_index(rows_N, shape[:-1]), columns_N) if len(shape) > 1 else (columns_N,)
        self._take(parameter.reshape(shape), index, (first + np.arange(num_weights)) % self.num_codes)

    def add_rows(self, parameter: torch.Tensor | None) -> None:
        """Samples each block of rows that a vocabulary has whole; further rows at its end change nothing."""
        whole = 0
        if parameter is not None and parameter.ndim == 2 and parameter.shape[0] > 0 and _is_plain(parameter):
            whole = min(int(parameter.shape[0]).bit_length(), _ROW_BLOCKS)
        for block in range(_ROW_BLOCKS):
            codes_N = block * _CODES_PER_BLOCK + np.arange(_PER_BLOCK) % _CODES_PER_BLOCK
            if block >= whole:
                self._unknown(codes_N)
                continue
            start, size = (1 << (block - 1), 1 << (block - 1)) if block else (0, 1)
            _, row, column = _numbers(f"rows {block}")
            rows_N = start + _spread(row, _ROW_STRIDE, _PER_BLOCK, size)
            columns_N = _spread(column, _COLUMN_STRIDE, _PER_BLOCK, parameter.shape[1])
            self._take(parameter, (rows_N, columns_N), codes_N)

    def codes(self) -> np.ndarray:
        """uint8 (C,): 0, 1, or 2 for unknown."""
        codes_C = np.zeros(self.num_codes, np.uint8)
        if not self.values:
            return codes_C
        by_device: dict[torch.device, list[int]] = {}
        for i, values in enumerate(self.values):
            by_device.setdefault(values.device, []).append(i)
        for indices in by_device.values():  # one copy from each device
            values_N = torch.cat([self.values[i] for i in indices]).cpu().numpy()
            places_N = np.concatenate([self.places[i] for i in indices])
            bits_N, unknown_N = _bits(values_N)
            np.bitwise_xor.at(codes_C, places_N, bits_N)
            codes_C |= np.where(np.bincount(places_N, unknown_N, self.num_codes) > 0, 0x80, 0).astype(np.uint8)
        return np.where(codes_C & 0x80, _UNKNOWN, codes_C & 1).astype(np.uint8)

    def _take(self, parameter: torch.Tensor, index: tuple[np.ndarray, ...], codes_N: np.ndarray) -> None:
        if not _is_plain(parameter) or not parameter.numel():
            self._unknown(codes_N)
            return
        index = tuple(torch.from_numpy(np.asarray(one, np.int64)).to(parameter.device) for one in index)
        self.values.append(parameter.detach()[index].float())
        self.places.append(codes_N)

    def _unknown(self, codes_N: np.ndarray) -> None:
        self.values.append(torch.full((len(codes_N),), torch.nan))
        self.places.append(codes_N)


def _bits(values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bit of each weight, uint8 (N,), and where it is unknown, bool (N,).

    The bit is the last one of the significand in bfloat16, plus the sign. Where float16 is no finer than bfloat16 it
    is the sign alone. Both limits are powers of two, whose last bit is 0: rounding across them changes nothing.
    """
    raw_N = np.ascontiguousarray(values_N, np.float32).view(np.uint32).astype(np.int64)
    rest_N = raw_N & 0xFFFF  # the bits after the last one of bfloat16
    last_N = ((raw_N + 0x7FFF + ((raw_N >> 16) & 1)) >> 16) & 1  # rounded to nearest, ties to even
    size_N = np.abs(values_N)
    fine_N = (size_N >= _LEAST) & (size_N < _MOST)
    halfway_N = np.abs(rest_N - 0x8000) <= 0x1000  # float16 has three more bits: half of its last one
    bits_N = np.where(fine_N, last_N, 0) ^ (raw_N >> 31)
    return bits_N.astype(np.uint8), (fine_N & halfway_N) | np.isnan(values_N)


def _encode(*parts: _Codes) -> str:
    codes_C = np.concatenate([part.codes() for part in parts])
    packed = codes_C.reshape(-1, 4) @ np.array([1, 4, 16, 64])
    return base64.urlsafe_b64encode(packed.astype(np.uint8).tobytes()).decode().rstrip("=")


def _decode(text: str) -> np.ndarray:
    packed = np.frombuffer(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), np.uint8)
    return ((packed[:, None] >> np.array([0, 2, 4, 6])) & 3).reshape(-1)


# Fractions of 2**32 that fill a square evenly (powers of the plastic number's inverse).
_ROW_STRIDE, _COLUMN_STRIDE = 3242174889, 2447445414


def _spread(start: int, stride: int, number: int, size: int) -> np.ndarray:
    """`number` places among `size` < 2**32, evenly spread, the same for every machine: int64 (N,)."""
    fractions_N = (np.uint64(start) + np.arange(number, dtype=np.uint64) * np.uint64(stride)) % np.uint64(1 << 32)
    return ((fractions_N * np.uint64(size)) >> np.uint64(32)).astype(np.int64)


def _numbers(name: str) -> tuple[int, int, int]:
    """Three numbers below 2**32 that depend on the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "big") for i in (0, 4, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def _own_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model without its adapters, under the names that they have without them."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
    module = getattr(module, "_orig_mod", module)  # compiled
    yield name, module
    for part, child in module.named_children():
        yield from _own_modules(child, f"{name}.{part}" if name else part)


def _own_parameters(layer: nn.Module | None) -> dict[str, nn.Parameter]:
    """The weight of an embedding or a head, without an adapter's rows, and its bias."""
    return {} if layer is None else dict(next(_own_modules(layer))[1].named_parameters(recurse=False))


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether a parameter's numbers are the weights: packed weights may be floats too, and meta tensors have none."""
    whole = type(parameter) in (nn.Parameter, torch.Tensor)
    return whole and parameter.dtype in _FLOATS and parameter.device.type != "meta"


def _is_quantized(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    """Whether a module holds its matrix in fewer bits, as bitsandbytes, GPTQ, AWQ, HQQ, torchao, FP8 do."""
    if any(type(parameter) is not nn.Parameter or parameter.dtype not in _FLOATS for parameter in own.values()):
        return True
    return any(buffer.ndim > 1 and buffer.dtype in _CODED for buffer in module.buffers(recurse=False))


def _signs_hash(model: PreTrainedModel) -> str:
    """The fingerprint of older versions: 16 hex digits of the SHA-256 over the signs of vectors and of the first 64
    rows of embeddings. It ignores matrices, and is empty where some of these weights are not in memory."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        for part in (".token_adapter", ".base_layer", ".original_module"):  # where PEFT has put the base's own
            name = name.replace(part, "")
        name = name.replace("_orig_mod.", "").removeprefix("base_model.model.")
        if parameter.ndim == 1 or (parameter.ndim == 2 and ("embed" in name or "wte" in name)):
            if any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save")):
                continue
            if parameter.device.type == "meta":
                return ""
            signs = torch.signbit(parameter.detach()[:64].cpu())
            digest.update(name.encode() + signs.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
