"""Labelled trajectories and a tokenizer for the tiny models of tests/tiny.py, made in memory."""

from functools import cache

import torch
from datasets import Dataset
from tiny import BOS, EOS, PAD, RESERVED, VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


NUM_CANDIDATES = 4


def tiny_tokenizer():
    """Words `w3` to `w80`, the three special tokens and 16 reserved ones: 97 ids."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    reserved = {f"<|reserved_special_token_{i}|>": id for i, id in enumerate(RESERVED)}
    words = {f"w{id}": id for id in range(3, RESERVED[0])}
    backend = Tokenizer(models.WordLevel(special | words | reserved, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(reserved),
        padding_side="left",
    )
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


@cache
def make_labels(num_rows=12, seed=0):
    """Trajectories with random text; the teacher's favourite is the candidate with the largest token id."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num_rows):
        length = int(torch.randint(9, 15, (1,), generator=generator))
        ids = torch.randint(3, RESERVED[0], (length,), generator=generator).tolist()
        prompt_length = 4
        positions = sorted((torch.randperm(length - prompt_length, generator=generator)[:3] + prompt_length).tolist())
        candidates, student, teacher = [], [], []
        for _ in positions:
            ids_K = (
                torch.randperm(20, generator=generator)[:NUM_CANDIDATES] + 3
            ).tolist()  # few, so that it can be learned
            candidates.append(ids_K)
            student.append(torch.log_softmax(torch.linspace(1.5, 0.0, NUM_CANDIDATES), -1).tolist())
            teacher.append(torch.log_softmax(torch.tensor(ids_K) / 8.0, -1).tolist())
        num_generated = length - prompt_length
        rows.append(
            {
                "problem_id": f"p{seed}-{i}",
                "rollout": 0,
                "input_ids": ids,
                "prompt_length": prompt_length,
                "divergence": [0.1] * num_generated,
                "entropy": [0.1 * j for j in range(num_generated)],
                "margin": [-0.1 * j for j in range(num_generated)],
                "positions": positions,
                "candidate_ids": candidates,
                "student_logprobs": student,
                "teacher_logprobs": teacher,
                "teacher_top_id": [max(c) for c in candidates],
            }
        )
    return Dataset.from_list(rows)


@cache
def make_uneven_labels(num_rows=12, seed=0):
    """[`make_labels`] with one point left in every second row: means of means differ from the mean."""
    columns = ("positions", "candidate_ids", "student_logprobs", "teacher_logprobs", "teacher_top_id")
    rows = list(make_labels(num_rows, seed))
    return Dataset.from_list(
        [row | ({} if i % 2 else {name: row[name][:1] for name in columns}) for i, row in enumerate(rows)]
    )
