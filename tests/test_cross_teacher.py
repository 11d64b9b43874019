"""Labels from a teacher with another tokenizer, end to end, against what enumeration says.

Legend: S positions, K candidates, P partition (K + 1), V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from test_cross_tokenizer import STUDENT_MERGES, TEACHER_MERGES, tokenizer_of
from tiny import BOS, EOS, PAD, tiny_model

from transformers_s2t.cross_tokenizer import (
    CrossTokenizer,
    partition_divergence,
)
from transformers_s2t.labeling import label_problems
from transformers_s2t.teachers import CrossTokenizerTeacher
from transformers_s2t.trajectories import TrajectoryHeader, read_labels


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHARED = RECIPES.parents[1] / "shared" / "data"
CHARACTERS = []  # no merges: a tokenizer of characters
HEADER = TrajectoryHeader(
    model="student",
    teacher_model="teacher",
    vocab_hash="0123456789abcdef",
    num_candidates=5,
    max_new_tokens=9,
    eos_token_ids=(EOS,),
    points="all",
    divergence_threshold=0.1,
    threshold_sample=0,
)
#: (student's merges, teacher's merges)
PAIRS = {
    "bpe-bpe": (STUDENT_MERGES, TEACHER_MERGES),
    "characters-bpe": (CHARACTERS, TEACHER_MERGES),
    "bpe-characters": (STUDENT_MERGES, CHARACTERS),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_pair(name, **settings):
    """Student, teacher of another tokenizer; one row of the student's head has no token."""
    tokenizers = [tokenizer_of(merges) for merges in PAIRS[name]]
    student = tiny_model(seed=3, vocab_size=len(tokenizers[0]) + 1)
    teacher = tiny_model(seed=4, vocab_size=len(tokenizers[1]) + 2)
    return student, CrossTokenizerTeacher(teacher, CrossTokenizer(*tokenizers, **settings))


PROMPTS = {"p0": [BOS, 3, 4], "p1": [BOS, 5], "p2": [BOS, 4, 4, 5, 3, 3], "p3": [BOS, 3, 5, 5], "p4": [BOS, 5, 3]}


def label(student, teacher, folder, header=HEADER, prompts=PROMPTS, **kwargs):
    settings = {"pad_token_id": PAD, "batch_size": 4, "shard_size": 2, "show_progress": False} | kwargs
    return label_problems(student, teacher, prompts, folder, header, **settings)


def rows_of(folder):
    return list(read_labels(folder)[0])


@torch.no_grad()
def next_probs(model, ids):
    return torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).tolist()


def exact_events(teacher, context, rest, ids):
    """P(each event | text goes on with `rest`): the longest candidate's text that it goes on with, or none of them.

    By the recursion over all of the teacher's next tokens, behind `context`. Special tokens have one id for both.
    """
    texts = [teacher.cross.token_bytes(id) for id in ids]
    events, longest = [0.0] * (len(ids) + 1), len(rest) + 1 + max(map(len, texts))

    def add(path, text, mass):
        for id, p in enumerate(next_probs(teacher.model, [*context, *path])):
            data = teacher.cross.teacher_token_bytes(id)
            whole = text + data
            if data and len(whole) < longest and (rest.startswith(whole) or whole.startswith(rest)):
                add([*path, id], whole, mass * p)
            elif whole.startswith(rest):
                found = [k for k, one in enumerate(texts) if one and whole[len(rest) :].startswith(one)]
                if id in (PAD, BOS, EOS) and whole == rest and id in ids:
                    found = [ids.index(id)]
                events[max(found, key=lambda k: len(texts[k])) if found else -1] += mass * p

    add([], b"", 1.0)
    return [mass / sum(events) for mass in events]


def checked_points(teacher, student, rows):
    """(row, n, r, exact log-probabilities (P,), the student's) of every stored point."""
    for row in rows:
        sequence = teacher.cross.encode(row["input_ids"])
        for n, position in enumerate(row["positions"]):
            anchor, start = teacher.cross.anchor(sequence, position)
            rest, ids = sequence.data[start : sequence.offsets[position]], row["candidate_ids"][n]
            events_P = torch.tensor(exact_events(teacher, sequence.ids[:anchor], rest, ids)).double()
            with torch.no_grad():
                logits_V = student(torch.tensor([row["input_ids"][:position]])).logits[:, -1]
            student_P = teacher.cross.student_partition(logits_V, torch.tensor([ids]))[0]
            yield row, n, rest, events_P.log(), student_P


@pytest.mark.parametrize("name", PAIRS)
def test_rows_hold_the_exact_marginals_of_disjoint_texts(tmp_path, name):
    student, teacher = make_pair(name, healed_tokens=1, min_mass=0.0)
    label(student, teacher, tmp_path, replace(HEADER, num_candidates=4, max_new_tokens=4))
    below, points = 0, 0
    for row, n, rest, events_P, student_P in checked_points(teacher, student, rows_of(tmp_path)):
        assert row["teacher_logprobs"][n] == pytest.approx(events_P[:-1].clamp_min(-1e4).tolist(), abs=1e-4)
        points += 1
        if name == "bpe-characters":  # all texts have one spelling, so that the divergence is a bound
            exact = float(partition_divergence(events_P[None], student_P[None]))
            assert row["divergence"][n] <= exact + 1e-4
            if all(len(teacher.cross.token_bytes(id)) < 2 for id in row["candidate_ids"][n]):
                assert row["divergence"][n] == pytest.approx(exact, abs=1e-4)
            below += row["divergence"][n] < exact - 1e-4
    assert points > 10 and (below > 0) == (name == "bpe-characters")
