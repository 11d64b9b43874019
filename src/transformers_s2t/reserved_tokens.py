"""Which token ids carry the selector's score: reserved tokens that ordinary text never contains.

Knows tokenizers and the size of an output head; knows nothing of scores.
"""

from __future__ import annotations

import functools
import hashlib
import re

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


#: R = 16 reserved tokens, as in arXiv 2604.26940.
NUM_RESERVED_TOKENS = 16

# Added or special tokens only, and the whole token: a substring search would hit ordinary words (" reserved").
# Llama 3: <|reserved_special_token_0|>; Gemma: <unused0>; Phi-3: <|placeholder1|> (six of them); BERT-like: [unused0].
_RESERVED = re.compile(
    r"<\|?(?:reserved(?:_special)?(?:_token)?|unused|placeholder|extra_id|dummy)_?(\d+)\|?>|\[unused(\d+)\]",
    re.IGNORECASE,
)


def find_reserved_token_ids(
    processing_class: PreTrainedTokenizerBase, num_head_rows: int, num_tokens: int = NUM_RESERVED_TOKENS
) -> list[int]:
    """Ids of `num_tokens` reserved tokens of a model.

    Tokens that the tokenizer names as reserved come first (Llama 3, Gemma); otherwise the last rows of the output
    head above the tokenizer are taken (Qwen2.5: 151936 rows for 151665 tokens).

    Args:
        processing_class: the model's tokenizer.
        num_head_rows: rows of the output head, `model.get_output_embeddings().weight.shape[0]`.
        num_tokens: R.

    Raises:
        ValueError: where there are too few, with what can be done about it.
    """
    tokens = {token.content: id for id, token in processing_class.added_tokens_decoder.items()}
    named = []
    for content, id in tokens.items():
        match = _RESERVED.fullmatch(content)
        if match and id < num_head_rows:
            named.append((int(match.group(1) or match.group(2)), id))
    if len(named) >= num_tokens:
        return [id for _, id in sorted(named)[:num_tokens]]
    num_used = max(processing_class.get_vocab().values(), default=-1) + 1  # ids may have holes
    free = num_head_rows - num_used
    if free >= num_tokens:
        return list(range(num_head_rows - num_tokens, num_head_rows))
    raise ValueError(
        f"The selector needs {num_tokens} reserved tokens, but the tokenizer names {len(named)} and the output head "
        f"has {max(free, 0)} rows above its {num_used} tokens. Pass `add_reserved_tokens=True` "
        f"(S2TConfig, or --add_reserved_tokens true) to resize the embeddings by {num_tokens} rows, or name free ids "
        "with `reserved_token_ids`."
    )


def resize_for_reserved_tokens(model: PreTrainedModel, num_head_rows: int) -> None:
    """Grows the embeddings and the head to `num_head_rows` rows (no-op where they have as many).

    The new rows of the head are the ones that the adapter stores; the new rows of the input embedding are never read.
    They are suppressed in the model's generation config, so that its text stays what it was.
    """
    num_rows = model.get_output_embeddings().weight.shape[0]
    if num_rows < num_head_rows:
        model.resize_token_embeddings(num_head_rows, mean_resizing=False)
        suppressed = set(model.generation_config.suppress_tokens or []) | set(range(num_rows, num_head_rows))
        model.generation_config.suppress_tokens = sorted(suppressed)


def vocab_hash(processing_class: PreTrainedTokenizerBase) -> str:
    """Fingerprint of a vocabulary: 16 hex digits of the SHA-256 over every (token, id), in id order.

    Two models with equal fingerprints can exchange token ids, whatever rows their heads are padded to.
    """
    digest = hashlib.sha256()
    for token, id in sorted(processing_class.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{id}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def check_same_vocabulary(
    processing_class: PreTrainedTokenizerBase, teacher_processing_class: PreTrainedTokenizerBase
) -> str:
    """Returns the common fingerprint of two tokenizers.

    Raises:
        ValueError: where they differ, naming the first token that does.
    """
    ours, theirs = vocab_hash(processing_class), vocab_hash(teacher_processing_class)
    if ours == theirs:
        return ours
    student, teacher = processing_class.get_vocab(), teacher_processing_class.get_vocab()
    different = next(
        (token for token, id in sorted(student.items(), key=lambda item: item[1]) if teacher.get(token) != id), None
    )
    what = (
        f"token {different!r} is {student[different]} for `model` and {teacher.get(different, 'missing')} for "
        "`teacher_model`"
        if different is not None
        else f"`teacher_model` has {len(teacher) - len(student)} more tokens"
    )
    raise ValueError(
        f"`model` and `teacher_model` must share one tokenizer, but their vocabularies differ ({len(student)} and "
        f"{len(teacher)} tokens): {what}. Choose two models of one family."
    )


@functools.lru_cache(maxsize=8)
def _local_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model by its name or folder, from this machine alone; `None` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False) if name else None
    except (OSError, ValueError, KeyError):  # not in the cache, no tokenizer, or code of its own
        return None


@functools.lru_cache(maxsize=8)
def check_same_ids(
    processing_class: PreTrainedTokenizerBase | str, teacher_processing_class: PreTrainedTokenizerBase | str
) -> None:
    """Checks that a token id means the same token to two models. One of them may have more ids than the other.

    Args:
        processing_class: the small model's tokenizer, or its name or folder, looked up on this machine alone.
        teacher_processing_class: the teacher's, likewise.

    Nothing is checked where a name has no tokenizer on this machine.

    Raises:
        ValueError: where some id means two different tokens, naming the first.
    """
    ours, theirs = (
        _local_tokenizer(given) if isinstance(given, str) else given
        for given in (processing_class, teacher_processing_class)
    )
    if ours is None or theirs is None:
        return
    tokens = {id: token for token, id in theirs.get_vocab().items()}
    different = [(id, token) for token, id in ours.get_vocab().items() if tokens.get(id, token) != token]
    if different:
        id, token = min(different)
        raise ValueError(
            f"`model` and `teacher_model` must share token ids, but their tokenizers differ: id {id} is {token!r} for "
            f"`model` and {tokens[id]!r} for `teacher_model`. Choose two models of one family."
        )
