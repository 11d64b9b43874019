"""Labeling: rows against a naive re-forward per position, batches, interruptions, and what is refused unwritten.

Legend: S generated positions, K candidates, V vocabulary.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import EOS, PAD, RESERVED, VOCAB_SIZE, disagreeing_pair, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from s2t_recipes import problems
from s2t_recipes.labeling import label as label_recipe
from transformers_s2t import TeacherSelector, s2t_generate
from transformers_s2t.labeling import label_problems as labeling
from transformers_s2t.labeling import points
from transformers_s2t.labeling import rollout as rollout_module
from transformers_s2t.labeling.label_problems import label_problems, label_stats
from transformers_s2t.labeling.points import choose_positions, score_positions, score_trajectories
from transformers_s2t.labeling.rollout import rollout
from transformers_s2t.labels.folder import read_header, read_held_out_labels, read_labels, shard_files, split_of
from transformers_s2t.labels.schema import TrajectoryHeader


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHARED = RECIPES.parents[1] / "shared" / "data"
HEADER = TrajectoryHeader(
    model="student",
    teacher_model="teacher",
    vocab_hash="0123456789abcdef",
    num_candidates=5,
    target_rate=0.2,
    max_new_tokens=9,
    eos_token_ids=(EOS,),
    excluded_ids=RESERVED,
    threshold_sample=6,
)


@pytest.fixture(scope="module")
def pair():
    return disagreeing_pair()


@pytest.fixture(scope="module")
def prompts():
    """Problem id -> token ids, of different lengths, in an order that is not theirs."""
    generator = torch.Generator().manual_seed(4)
    lengths = [5, 2, 9, 3, 7, 1, 6, 4, 8, 5]
    return {f"p{i}": torch.randint(3, 80, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def many(prompts):
    """Enough problems for both splits."""
    return {f"q{i}": [*list(prompts.values())[i % len(prompts)], 3 + i] for i in range(24)}


def label(pair, prompts, folder, header=HEADER, **kwargs):
    kwargs = {"pad_token_id": PAD, "batch_size": 4, "shard_size": 3, "show_progress": False} | kwargs
    return label_problems(*pair, prompts, folder, header, **kwargs)


def rows_of(folder):
    return list(read_labels(folder)[0])


def assert_same_rows(rows, expected):
    """Equal ids, and numbers that are equal up to float32 rounding."""
    assert [row["problem_id"] for row in rows] == [row["problem_id"] for row in expected]
    for row, other in zip(rows, expected):
        assert set(row) == set(other)
        for name, value in row.items():
            if name in ("divergence", "entropy", "margin", "student_logprobs", "teacher_logprobs"):
                torch.testing.assert_close(torch.tensor(value), torch.tensor(other[name]), rtol=1e-5, atol=1e-5)
            else:
                assert value == other[name], (row["problem_id"], name)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


@torch.no_grad()
def naive_greedy(model, ids, max_new_tokens, suppressed=()):
    ids = list(ids)
    start = len(ids)
    while len(ids) < start + max_new_tokens and (len(ids) == start or ids[-1] != EOS):
        logits_V = model(torch.tensor([ids])).logits[0, -1]
        logits_V[list(suppressed)] = float("-inf")
        ids.append(int(logits_V.argmax()))
    return ids[start:]


def test_greedy_is_the_argmax_whatever_the_checkpoint_says(pair, prompts):
    """The authors' greedy baseline inherited the checkpoint's repetition penalty, their method did not."""
    model, ids = pair[0], list(prompts.values())
    expected = [naive_greedy(model, one, 12, RESERVED) for one in ids]
    own = model.generation_config
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "bad_words_ids": [[expected[0][0]]]}
    model.generation_config = type(own)(no_repeat_ngram_size=1, min_new_tokens=11, **settings)
    told = model.generation_config
    try:
        rows = rollout(model, ids, 12, PAD, [EOS], suppressed_ids=RESERVED)
        assert model.generation_config is told
    finally:
        model.generation_config = own
    assert rows == expected


@torch.no_grad()
def naive_corrected(model, teacher, ids, max_new_tokens):
    """Teacher selects among the student's candidates above the floor, from the fourth new token on."""
    ids = list(ids)
    start = len(ids)
    while len(ids) < start + max_new_tokens and (len(ids) == start or ids[-1] != EOS):
        logits_V = model(torch.tensor([ids])).logits[0, -1]
        logits_V[list(RESERVED)] = float("-inf")
        best = logits_V.softmax(-1).topk(8)
        candidates = best.indices[best.values >= 0.05 * best.values[0]]
        choice = candidates[0]
        if len(ids) - start >= 3:
            choice = candidates[teacher(torch.tensor([ids])).logits[0, -1, candidates].argmax()]
        ids.append(int(choice))
    return ids[start:]


CORRECTED = replace(HEADER, rollout="s2t", decoding={"trigger": "always"}, max_new_tokens=14)


def corrected_by(teacher):
    return {"custom_generate": s2t_generate, "selector": TeacherSelector(teacher)}


def test_the_teacher_corrects_the_student_as_it_writes(pair, prompts, tmp_path):
    """On-policy for what will be deployed: what is written once the selector selects."""
    label(pair, prompts, tmp_path / "labels", CORRECTED, decode_with=corrected_by(pair[1]))
    expected = {id: naive_corrected(*pair, ids, 14) for id, ids in prompts.items()}
    greedy = {id: naive_greedy(pair[0], ids, 14, RESERVED) for id, ids in prompts.items()}
    rows = rows_of(tmp_path / "labels")
    assert {row["problem_id"]: row["input_ids"][row["prompt_length"] :] for row in rows} == expected != greedy


def test_corrected_labels_do_not_depend_on_the_batch_nor_on_a_stop(pair, prompts, tmp_path):
    decode_with = corrected_by(pair[1])
    label(pair, prompts, tmp_path / "a", CORRECTED, decode_with=decode_with)
    first = dict(list(prompts.items())[:7])
    label(pair, first, tmp_path / "b", CORRECTED, decode_with=decode_with, batch_size=1)
    label(pair, prompts, tmp_path / "b", CORRECTED, decode_with=decode_with, batch_size=3)
    assert_same_rows(rows_of(tmp_path / "b"), rows_of(tmp_path / "a"))


@pytest.mark.parametrize("header, given", [(HEADER, True), (CORRECTED, False)], ids=["greedy", "s2t"])
def test_who_corrects_is_given_where_somebody_does(pair, prompts, tmp_path, header, given):
    decode_with = corrected_by(pair[1]) if given else None
    with pytest.raises(ValueError, match="`decode_with` must be given for the rollouts 's2t', 's2t-local'"):
        label(pair, prompts, tmp_path / "labels", header, decode_with=decode_with)
    assert not (tmp_path / "labels").exists()


def test_a_rollout_ends_with_its_first_end_token(pair, prompts):
    free = rollout(pair[0], list(prompts.values()), 8, PAD)
    end = free[0][2]
    for row, whole in zip(rollout(pair[0], list(prompts.values()), 8, PAD, [EOS, end]), free):
        stops = [i for i, id in enumerate(whole) if id in (EOS, end)]
        assert row == (whole[: stops[0] + 1] if stops else whole)


def test_samples_depend_on_the_seed_and_the_prompt_alone(pair, prompts):
    ids = list(prompts.values())
    settings = {"do_sample": True, "temperature": 1.0, "suppressed_ids": RESERVED}
    together = rollout(pair[0], ids, 8, PAD, [EOS], seed=1, **settings)
    alone = [rollout(pair[0], [one], 8, PAD, [EOS], seed=1, **settings)[0] for one in reversed(ids)][::-1]
    assert together == alone
    assert together != rollout(pair[0], ids, 8, PAD, [EOS], seed=2, **settings)
    assert not {id for row in together for id in row} & set(RESERVED)


def test_samples_follow_the_softmax(pair):
    prompt, temperature = [5, 9, 11], 2.0
    # one prompt, many seeds: the first token's frequencies
    with torch.no_grad():
        expected_V = torch.softmax(pair[0](torch.tensor([prompt])).logits[0, -1] / temperature, dim=-1)
    logits_BV = pair[0](torch.tensor([prompt])).logits[0, -1].detach().expand(2000, -1)
    noise = rollout_module._GumbelNoise([[i] for i in range(2000)], [0] * 2000, temperature, 0, torch.device("cpu"))
    noisy_BV = noise(None, logits_BV)
    counts = Counter(noisy_BV.argmax(-1).tolist())
    for id in expected_V.topk(5).indices.tolist():
        assert counts[id] / 2000 == pytest.approx(float(expected_V[id]), abs=0.04)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def naive_scores(model, teacher, prefix, num_candidates):
    """One position, spelled out in plain log-softmax arithmetic, from the bare prefix; reserved tokens are no text."""
    logits_V = model(torch.tensor([prefix])).logits[0, -1]
    teacher_V = torch.log_softmax(teacher(torch.tensor([prefix])).logits[0, -1], -1)
    allowed_V = logits_V.clone()
    allowed_V[list(RESERVED)] = float("-inf")
    allowed_V = torch.log_softmax(allowed_V, -1)
    said = sum(float(teacher_V[id].exp()) for id in range(VOCAB_SIZE) if id not in RESERVED)
    ids = sorted(range(VOCAB_SIZE), key=lambda id: -float(allowed_V[id]))[:num_candidates]
    best = sorted(value for value in allowed_V.tolist() if value > float("-inf"))
    top64_V = torch.log_softmax(torch.tensor(best[-64:]), -1)
    return {
        "divergence": max(
            sum(
                float(teacher_V[id].exp() / said * (teacher_V[id] - math.log(said) - allowed_V[id]))
                for id in range(VOCAB_SIZE)
                if id not in RESERVED
            ),
            0.0,
        ),
        "entropy": float(-(top64_V.exp() * top64_V).sum()),
        "margin": best[-2] - best[-1],
        "candidate_ids": ids,
        "student_logprobs": allowed_V[ids].tolist(),
        "teacher_logprobs": teacher_V[ids].tolist(),
        "teacher_top_id": int(teacher_V.argmax()),
    }


def test_rows_equal_a_naive_forward_of_every_prefix(pair, prompts, tmp_path):
    label(pair, prompts, tmp_path, replace(HEADER, points="all"))
    rows = rows_of(tmp_path)
    assert [row["problem_id"] for row in rows] == list(prompts)
    for row in rows:
        ids, prompt_length = row["input_ids"], row["prompt_length"]
        assert ids[:prompt_length] == prompts[row["problem_id"]]
        assert ids[prompt_length:] == naive_greedy(pair[0], ids[:prompt_length], 9, RESERVED)
        assert row["positions"] == list(range(prompt_length, len(ids)))
        for n, position in enumerate(row["positions"]):
            expected = naive_scores(*pair, ids[:position], 5)
            for name, value in expected.items():
                assert row[name][n] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_batches_split_for_memory_give_the_same(pair, prompts, monkeypatch):
    sequences = [[*ids, 5, 6, 7] for ids in prompts.values()]
    lengths = [len(ids) for ids in prompts.values()]
    whole = score_trajectories(*pair, sequences, lengths, 5, RESERVED)
    monkeypatch.setattr(points, "_MAX_NUMBERS", 2000)
    monkeypatch.setattr(points, "_MAX_TOKENS", 20)
    monkeypatch.setattr(points, "_MAX_FLOAT_LOGITS", 2 * VOCAB_SIZE)
    for one, other in zip(whole, score_trajectories(*pair, sequences, lengths, 5, RESERVED)):
        assert one.candidate_ids_SK.shape == (3, 5)
        for column, expected in zip(one, other):
            torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-5)


def test_heads_of_different_padding():
    """Qwen2.5 has 151936 rows at 1.5B and 152064 at 32B; either may be the larger."""
    student_SV = torch.tensor([[1.0, 3.0, 0.0, 2.0]])
    teacher_SV = torch.tensor([[0.0, 1.0, 2.0]])
    scores = score_positions(student_SV, teacher_SV, num_candidates=3)
    teacher_logp = torch.log_softmax(teacher_SV[0], -1).tolist()
    assert scores.candidate_ids_SK.tolist() == [[1, 3, 0]]
    assert scores.teacher_logprobs_SK[0].tolist() == pytest.approx([teacher_logp[1], -1e4, teacher_logp[0]])
    assert scores.teacher_top_id_S.tolist() == [2]

    scores = score_positions(teacher_SV, student_SV + torch.tensor([0.0, 0.0, 0.0, 9.0]), num_candidates=2)
    teacher_logp = torch.log_softmax(student_SV[0] + torch.tensor([0.0, 0.0, 0.0, 9.0]), -1).tolist()
    assert scores.candidate_ids_SK.tolist() == [[2, 1]]
    assert scores.teacher_logprobs_SK[0].tolist() == pytest.approx([teacher_logp[2], teacher_logp[1]])
    assert scores.teacher_top_id_S.tolist() == [1]  # token 3 is the teacher's first, but the student has no such row


def test_labels_with_a_teacher_of_fewer_rows(pair, prompts, tmp_path):
    teacher = tiny_model(seed=1, vocab_size=60)
    few = {id: [min(token, 50) for token in ids] for id, ids in prompts.items()}
    label((pair[0], teacher), few, tmp_path)
    rows = rows_of(tmp_path)
    assert max(max(row["input_ids"]) for row in rows) < 60
    assert any(id >= 60 for row in rows for ids in row["candidate_ids"] for id in ids)
    with pytest.raises(ValueError, match="`teacher_model` has no embedding for"):
        score_trajectories(pair[0], teacher, [[5, 70, 6]], [1], 4)


def test_choose_positions():
    divergence_S = torch.tensor([0.1, 0.9, 0.5, 0.2])
    floor_count_S = torch.tensor([1, 1, 3, 2])
    expected = {"kl": [1, 2], "floor": [2, 3], "floor+kl": [1, 2, 3], "all": [0, 1, 2, 3]}
    for kind, indices in expected.items():
        assert choose_positions(divergence_S, floor_count_S, 0.5, kind).tolist() == indices
    with pytest.raises(ValueError, match="`points` must be one of"):
        choose_positions(divergence_S, floor_count_S, 0.5, "none")


def test_a_cap_keeps_points_that_are_evenly_spread():
    divergence_S, floor_count_S = torch.arange(12) / 10.0, torch.ones(12)
    for max_points, kept in {
        None: range(2, 12),
        99: range(2, 12),
        10: range(2, 12),
        5: [3, 5, 7, 9, 11],
        1: [7],
    }.items():
        assert choose_positions(divergence_S, floor_count_S, 0.15, "kl", max_points).tolist() == list(kept)
    with pytest.raises(ValueError, match=r"`max_points` must be an integer in \[1, .*got 0"):
        replace(HEADER, max_points=0)


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


@pytest.mark.parametrize("rollout_policy", ["greedy", "sample"])
def test_batch_and_shard_size_do_not_matter(pair, prompts, tmp_path, rollout_policy):
    header = replace(HEADER, rollout=rollout_policy)
    one = label(pair, prompts, tmp_path / "a", header, batch_size=1, shard_size=100)
    two = label(pair, prompts, tmp_path / "b", header, batch_size=7, shard_size=4)
    assert one.divergence_threshold == pytest.approx(two.divergence_threshold, rel=1e-5)
    assert_same_rows(rows_of(tmp_path / "b"), rows_of(tmp_path / "a"))
    assert [len(shard_files(tmp_path / name)) for name in "ab"] == [1, 3]


def test_threshold_is_the_quantile_of_the_first_problems(pair, prompts, tmp_path):
    header = label(pair, prompts, tmp_path)
    assert header == read_header(tmp_path)
    assert header.complete and header.num_problems == len(prompts)
    values = torch.tensor([value for row in rows_of(tmp_path)[:6] for value in row["divergence"]])
    assert float((values >= header.divergence_threshold).float().mean()) == pytest.approx(0.2, abs=0.5 / len(values))


def test_points_follow_the_rule_in_the_header(pair, prompts, tmp_path):
    header = label(pair, prompts, tmp_path, replace(HEADER, points="kl"))
    for row in rows_of(tmp_path):
        above = [i + row["prompt_length"] for i, v in enumerate(row["divergence"]) if v >= header.divergence_threshold]
        assert row["positions"] == above


def test_a_trajectory_has_as_many_points_as_the_header_allows(pair, prompts, tmp_path):
    label(pair, prompts, tmp_path / "all", replace(HEADER, points="all"))
    label(pair, prompts, tmp_path / "few", replace(HEADER, points="all", max_points=3))
    for row, whole in zip(rows_of(tmp_path / "few"), rows_of(tmp_path / "all"), strict=True):
        assert len(row["positions"]) == min(3, len(whole["positions"]))
        at = [whole["positions"].index(position) for position in row["positions"]]
        assert row["candidate_ids"] == [whole["candidate_ids"][n] for n in at]


def test_nothing_is_rolled_out_twice(pair, prompts, tmp_path, monkeypatch):
    seen = []

    def counted(model, prompt_ids, *args, **kwargs):
        seen.extend(map(tuple, prompt_ids))
        return rollout(model, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(labeling, "rollout", counted)
    label(pair, prompts, tmp_path)
    assert sorted(seen) == sorted(map(tuple, prompts.values()))
    label(pair, prompts, tmp_path)
    assert len(seen) == len(prompts)


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_rows(pair, prompts, tmp_path, monkeypatch, killed_at):
    label(pair, prompts, tmp_path / "whole")
    write_shard = labeling.write_shard

    def killed(folder, index, rows, split):
        if index == killed_at:
            (folder / f".train-{index:05d}.parquet.x").write_text("half")
            raise KeyboardInterrupt
        return write_shard(folder, index, rows, split)

    with monkeypatch.context() as patch:
        patch.setattr(labeling, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            label(pair, prompts, tmp_path / "cut")
    assert len(shard_files(tmp_path / "cut")) == killed_at
    assert not read_header(tmp_path / "cut").complete
    header = label(pair, prompts, tmp_path / "cut", batch_size=2)
    assert header == read_header(tmp_path / "whole")
    assert_same_rows(rows_of(tmp_path / "cut"), rows_of(tmp_path / "whole"))
    assert not list((tmp_path / "cut").glob(".train-*"))


def test_more_problems_extend_a_folder_with_its_own_threshold(pair, prompts, tmp_path):
    first = label(pair, dict(list(prompts.items())[:7]), tmp_path)
    second = label(pair, prompts, tmp_path)
    assert second.divergence_threshold == first.divergence_threshold
    assert (first.num_problems, second.num_problems) == (7, 10)
    assert [row["problem_id"] for row in rows_of(tmp_path)] == list(prompts)


def test_other_settings_are_refused_until_overwrite(pair, prompts, tmp_path):
    label(pair, prompts, tmp_path)
    before = rows_of(tmp_path)
    other = replace(HEADER, num_candidates=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="num_candidates: 5 there, 3 now; max_new_tokens: 9 there, 4 now.*overwrite"):
        label(pair, prompts, tmp_path, other)
    with pytest.raises(ValueError, match="divergence_threshold"):
        label(pair, prompts, tmp_path, replace(HEADER, divergence_threshold=0.5, threshold_sample=0))
    assert rows_of(tmp_path) == before
    header = label(pair, prompts, tmp_path, other, overwrite=True)
    assert header.num_candidates == 3
    assert {len(ids) for row in rows_of(tmp_path) for ids in row["candidate_ids"]} == {3}


def test_a_folder_of_other_files_is_left_alone(pair, prompts, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="`output_dir` must be a new or empty folder"):
            label(pair, prompts, tmp_path, overwrite=overwrite)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("README.md", "mine")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {}}, "`prompts` must hold one"),
        ({"prompts": {"a": []}}, "`prompts` must have one token"),
        ({"header": replace(HEADER, num_candidates=64, excluded_ids=tuple(range(50)))}, "`num_candidates`.*most 47"),
        ({"header": replace(HEADER, max_new_tokens=120)}, "`max_new_tokens` must be at most 119: `model` takes 128"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"shard_size": 0}, "`shard_size`"),
    ],
)
def test_illegal_arguments_leave_nothing_behind(pair, prompts, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        label(pair, **({"prompts": prompts, "folder": tmp_path / "labels"} | change))
    assert list(tmp_path.iterdir()) == []


def test_statistics(pair, prompts, tmp_path):
    header = label(pair, prompts, tmp_path, replace(HEADER, points="all"))
    labels, _ = read_labels(tmp_path)
    rows, threshold = list(labels), header.divergence_threshold
    ranks = [
        (ids.index(top) if top in ids else 99)
        for row in rows
        for value, ids, top in zip(row["divergence"], row["candidate_ids"], row["teacher_top_id"])
        if value >= threshold
    ]
    stats = label_stats(labels, threshold)
    assert stats["rows"] == len(prompts)
    assert stats["tokens"] == stats["points"] == sum(len(row["divergence"]) for row in rows)
    assert stats["kl_tokens"] == stats["kl_points"] == len(ranks)
    assert stats["hit_at_k"] == {str(k): sum(rank < k for rank in ranks) / len(ranks) for k in (1, 2, 4)}
    assert label_stats(labels, 1e9)["hit_at_k"] == {}


# ---------------------------------------------------------------------------------------------------------------------
# Several rollouts, two splits


SAMPLED = replace(HEADER, rollout="sample", num_rollouts=3, points="all", divergence_threshold=0.5)


def test_several_rollouts_of_a_problem_differ_and_do_not_depend_on_the_batch(pair, prompts, tmp_path):
    label(pair, prompts, tmp_path / "a", SAMPLED, batch_size=4, shard_size=4)
    label(pair, prompts, tmp_path / "b", SAMPLED, batch_size=7, shard_size=10)
    rows = rows_of(tmp_path / "a")
    assert_same_rows(rows, rows_of(tmp_path / "b"))
    assert [(row["problem_id"], row["rollout"]) for row in rows] == [(id, n) for id in prompts for n in range(3)]
    texts = Counter(tuple(row["input_ids"]) for row in rows)
    assert len(texts) > 0.8 * len(rows)
    label(pair, prompts, tmp_path / "one", replace(SAMPLED, num_rollouts=1))
    assert_same_rows([row for row in rows if row["rollout"] == 0], rows_of(tmp_path / "one"))


def test_a_killed_run_of_several_rollouts_goes_on_with_whole_problems(pair, prompts, tmp_path, monkeypatch):
    write_shard = labeling.write_shard

    def killed(folder, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        return write_shard(folder, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labeling, "write_shard", killed)
        label(pair, prompts, tmp_path, SAMPLED)
    assert label(pair, prompts, tmp_path, SAMPLED).num_problems == len(prompts)
    assert Counter(row["problem_id"] for row in rows_of(tmp_path)) == dict.fromkeys(prompts, 3)


def test_more_rollouts_of_a_greedy_student_are_refused():
    with pytest.raises(ValueError, match="`num_rollouts` must be 1 for rollout='greedy'.* got 2"):
        replace(HEADER, num_rollouts=2)


def test_held_out_problems_are_a_split_of_their_own(pair, many, tmp_path):
    header = replace(SAMPLED, num_rollouts=2, validation_share=0.3)
    label(pair, many, tmp_path / "a", header)
    parts = {split: set(read_labels(tmp_path / "a", split)[0]["problem_id"]) for split in ("train", "validation")}
    assert parts["train"].isdisjoint(parts["validation"]) and parts["train"] | parts["validation"] == set(many)
    assert 2 <= len(parts["validation"]) <= 14
    assert len(read_labels(tmp_path / "a", "all")[0]) == 48
    assert set(read_held_out_labels(tmp_path / "a")[0]["problem_id"]) == parts["validation"]
    loaded = datasets.load_dataset(str(tmp_path / "a"))
    assert {name: set(rows["problem_id"]) for name, rows in loaded.items()} == parts
    # other problems beside them, in another order, change nothing for those that were there
    label(pair, dict(reversed(list(many.items())[::2])), tmp_path / "b", header)
    assert set(read_labels(tmp_path / "b", "validation")[0]["problem_id"]) == parts["validation"] & set(
        list(many)[::2]
    )
    # a larger share takes more, and gives none back
    assert all(split_of(id, 0.6) == "validation" for id in parts["validation"])


def test_a_share_that_leaves_nothing_to_train_on_is_refused(pair, many, tmp_path):
    held_out = next(id for id in many if split_of(id, 0.5) == "validation")
    with pytest.raises(ValueError, match="`validation_share` must leave a problem for training: 0.5 holds out all 1"):
        label(pair, {held_out: many[held_out]}, tmp_path / "a", replace(HEADER, validation_share=0.5))
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"`validation_share` must be in \[0, 1\), got 1"):
        replace(HEADER, validation_share=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def test_problems_from_files_and_folders(tmp_path):
    rows = [
        {"id": "a", "prompt": "one", "answer": "1"},
        {"id": "a", "prompt": "two", "answer": 2},
        {"id": "b", "prompt": "one", "answer": None},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list([rows[0]]).to_parquet(tmp_path / "held.parquet")
    ids = [sha256(prompt).hexdigest()[:16] for prompt in (b"one", b"two")]  # not the file's: others may use them too
    expected = [problems.Problem(ids[0], "one", "1"), problems.Problem(ids[1], "two", "2")]
    assert problems.load_problems(str(tmp_path), "train") == expected
    assert problems.load_problems(str(tmp_path), "test") == expected
    assert problems.load_problems(str(tmp_path), "held") == expected[:1]
    assert problems.load_problems(str(tmp_path / "train.jsonl"), limit=1) == expected[:1]
    assert problems.load_problems(str(tmp_path / "train.jsonl"), answer_column=None)[0].answer is None
    with pytest.raises(ValueError, match="`split` is required.*held.parquet, test.json, train.jsonl"):
        problems.load_problems(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no dev"):
        problems.load_problems(str(tmp_path), "dev")
    with pytest.raises(ValueError, match="`prompt_column`='question'.*columns there: .*prompt"):
        problems.load_problems(str(tmp_path), "train", prompt_column="question")
    with pytest.raises(ValueError, match="`limit`"):
        problems.load_problems(str(tmp_path), "train", limit=0)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        problems.load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="neither a local"):
        problems.load_problems("nobody/nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        problems.load_problems(str(tmp_path), "empty")


def test_an_empty_cell_is_no_answer(tmp_path):
    """NaN, which is how pandas writes a missing number, became the text "nan" that every model had wrong."""

    def answers_in(name):
        return [problem.answer for problem in problems.load_problems(str(tmp_path / name))]

    prompts = [f"problem {i}" for i in range(3)]
    numbers = pa.table({"prompt": prompts, "answer": pa.array([42.0, float("nan"), None])})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    assert answers_in("numbers.parquet") == ["42.0", None, None]
    pq.write_table(pa.table({"prompt": prompts, "answer": ["", " \n", "nan"]}), tmp_path / "texts.parquet")
    assert answers_in("texts.parquet") == [None, None, "nan"]  # what somebody wrote
    for kind, column in {
        "text": pd.array(["a", pd.NA, None], dtype="string"),
        "number": pd.array([1, pd.NA, None], dtype="Int64"),
        "object": pd.Series(["a", float("nan"), pd.NaT], dtype=object),
        "float": pd.Series([1.5, None, float("nan")]),
    }.items():
        pd.DataFrame({"prompt": prompts, "answer": column}).to_parquet(tmp_path / f"{kind}.parquet")
        assert [answer is None for answer in answers_in(f"{kind}.parquet")] == [False, True, True]
    lines = [f'{{"prompt": "{prompt}", "answer": {cell}}}' for prompt, cell in zip(prompts, ("NaN", "1e16", "1e-7"))]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    assert answers_in("lines.jsonl") == [None, "10000000000000000", "0.0000001"]


def test_division_by_id_is_disjoint_and_stable():
    many = [problems.Problem(str(i), "text", None) for i in range(2000)]
    parts = problems.split_by_id(many, {"train": 0.6, "held": 0.2})
    assert not {p.id for p in parts["train"]} & {p.id for p in parts["held"]}
    assert len(parts["train"]) == pytest.approx(1200, abs=80) and len(parts["held"]) == pytest.approx(400, abs=60)
    assert problems.split_by_id(many[500:], {"train": 0.6, "held": 0.2})["held"] == [
        problem for problem in parts["held"] if int(problem.id) >= 500
    ]
    assert problems.split_by_id(many, {"train": 0.6}, seed=1)["train"] != parts["train"]
    assert sum(map(len, problems.split_by_id(many, {"a": 0.1, "b": 0.2, "c": 0.7}).values())) == 2000
    for fractions in ({}, {"a": 0.0}, {"a": 0.7, "b": 0.7}):
        with pytest.raises(ValueError, match="`fractions`"):
            problems.split_by_id(many, fractions)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def make_tokenizer(num_words=78, appends_eos=False):
    """Words w0, w1, ... behind <pad>, <s>, </s>; the head's last rows stay free for reserved tokens."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS} | {f"w{i}": 3 + i for i in range(num_words)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if appends_eos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)], pair=None
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def bench(pair, tmp_path):
    """Both models and eight problems on disk."""
    for name, model in zip(("student", "teacher"), pair):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": " ".join(f"w{(7 * i + j) % 78}" for j in range(3 + i % 4)), "answer": "1"} for i in range(8)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(bench, **changes):
    settings = {
        "model": bench / "student",
        "teacher_model": bench / "teacher",
        "dataset": bench / "problems.jsonl",
        "output_dir": bench / "labels",
        "max_new_tokens": 8,
        "num_candidates": 4,
        "shard_size": 3,
    } | changes
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def test_prompts_are_encoded_ready_to_go_on():
    tokenizer = make_tokenizer(appends_eos=True)
    assert tokenizer("w1 w2")["input_ids"] == [1, 4, 5, EOS]
    assert problems.encode_prompts(tokenizer, ["w1 w2", "w3 </s>"]) == [[1, 4, 5], [1, 6, EOS]]
    with pytest.raises(ValueError, match="`chat_template`"):
        problems.encode_prompts(tokenizer, ["w1"], chat_template=True)
    with pytest.raises(ValueError, match="`system_prompt`"):
        problems.encode_prompts(tokenizer, ["w1"], system_prompt="w2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} w9 {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
    )
    assert problems.encode_prompts(tokenizer, ["w1"], chat_template=True, system_prompt="w2") == [[5, 12, 4, 12, 8]]


CHAT = "{% for m in messages %}{{ m.content }} w9 {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
THINKS = CHAT + "{% if enable_thinking is not defined or enable_thinking %} w20{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT


def test_template_variables_are_passed_on_and_unknown_ones_refused():
    tokenizer = make_tokenizer(appends_eos=True)
    tokenizer.chat_template = THINKS

    def encode(*prompts, **settings):
        return problems.encode_prompts(tokenizer, prompts or ["w1"], **({"chat_template": True} | settings))

    assert encode() == encode(chat_template_kwargs={"enable_thinking": True}) == [[4, 12, 8, 23]]
    assert encode(chat_template_kwargs={"enable_thinking": False}) == [[4, 12, 8]]
    assert encode(chat_template_kwargs={}, chat_template=False) == [[1, 4]]
    assert encode("w1", "w2") == [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)["input_ids"]
        for prompt in ("w1", "w2")
    ]
    with pytest.raises(ValueError, match="`chat_template_kwargs` needs `chat_template`, got .'enable_thinking'"):
        encode(chat_template=False, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(
        ValueError, match=r"must name variables of .* template \(enable_thinking\), got 'enable_thinkin'"
    ):
        encode(chat_template_kwargs={"enable_thinkin": False})
    for taken in ("messages", "tokenize", "add_generation_prompt", "range"):
        with pytest.raises(ValueError, match=f"`chat_template_kwargs` must name variables .*got '{taken}'"):
            encode(chat_template_kwargs={taken: False})
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match=r"\(it has none to set\), got 'enable_thinking'"):
        encode(chat_template_kwargs={"enable_thinking": False})
    # transformers' own tags; what cannot be told is not refused
    tokenizer.chat_template = (
        "{%- generation %}{%- endgeneration -%}{% for m in messages %}{% continue %}{% endfor %}" + THINKS
    )
    assert problems.template_variables(tokenizer) == {"enable_thinking"}
    tokenizer.chat_template = (  # `date` may be given, `text` is the template's own
        "{% if not date is defined %}{% set date = 'w1' %}{% endif %}"
        "{% for m in messages %}{% if m.content %}{% set text = m.content %}{% endif %}{{ text }}{% endfor %}"
        "{{ date }}"
    )
    assert problems.template_variables(tokenizer) == {"date"}
    tokenizer.chat_template = "{% if"
    assert problems.template_variables(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            NO_SYSTEM,
            {"system_prompt": "w2"},
            "`system_prompt` must be left out, got 'w2': .*refuses it .System role not",
        ),
        ("{{ messages[-1].content }}", {"system_prompt": "w2"}, "`system_prompt` must be left out.* ignores it"),
        (
            "{{ raise_exception('bad\nday') }}",
            {},
            "`chat_template`: that of .*cannot be filled.* .bad day.; pass false",
        ),
        ("{{ raise_exception('bad') }}", {"system_prompt": "w2"}, "`chat_template`: that of .*cannot be filled"),
        ("{% if", {}, "`chat_template`: that of .*cannot be filled"),
        ("{{ messages[0].content + 3 }}", {}, "`chat_template`: that of .*cannot be filled"),
        (
            CHAT + "{{ ('' if effort is not defined else 'w' + effort) }}",
            {"chat_template_kwargs": {"effort": 3}},
            "`chat_template_kwargs` {'effort': 3} does not suit",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(template, settings, message):
    """jinja2's errors are no ValueErrors: they came as a traceback."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as caught:
        problems.encode_prompts(tokenizer, ["w1"], chat_template=True, **settings)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("given", ["[1]", "thinking=false", "3", '{"a": 1', '"text"', [1], 3])
def test_template_variables_are_a_mapping(given):
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be a JSON object, e.g. .* got "):
        problems.read_template_kwargs(given)


def test_template_variables_as_they_are_given():
    assert problems.read_template_kwargs('{"a": false, "b": [1]}') == {"a": False, "b": [1]}
    assert problems.read_template_kwargs({"a": False}) == {"a": False}
    assert problems.read_template_kwargs(None) is problems.read_template_kwargs("{}") is None


def test_recipe_end_to_end(bench, capsys):
    recipe = label_recipe
    (bench / "label.yaml").write_text("target_rate: 0.2\npoints: kl\nmin_prob_ratio: 0.1\n")
    recipe.main([*command(bench), "--config", str(bench / "label.yaml")])
    printed = capsys.readouterr().out
    assert "8 trajectories" in printed and "Hit@4" in printed
    labels, header = read_labels(bench / "labels")
    assert (header.points, header.target_rate, header.min_prob_ratio) == ("kl", 0.2, 0.1)
    assert header.excluded_ids == RESERVED and header.eos_token_ids == (EOS,) and header.dtype == "float32"
    assert header.prompt_source["dataset"] == str(bench / "problems.jsonl")
    loaded = datasets.load_dataset(str(bench / "labels"), split="train")
    assert list(loaded) == list(labels)
    stats = json.loads((bench / "labels" / "label_stats.json").read_text())
    assert stats["rows"] == 8 and list(stats["hit_at_k"]) == ["1", "2", "4"]
    # again: nothing to do, the same files
    before = {file.name: file.read_bytes() for file in (bench / "labels").iterdir()}
    recipe.main([*command(bench), "--config", str(bench / "label.yaml")])
    assert {file.name: file.read_bytes() for file in (bench / "labels").iterdir()} == before


def numbers_of(printed):
    return [float(number) for number in re.findall(r"[\d.]+", printed.split("left to do")[1])]


def test_a_dry_run_says_what_the_job_costs_and_writes_nothing(bench, capsys, monkeypatch):
    recipe = label_recipe
    before = {file: file.stat().st_mtime_ns for file in bench.rglob("*")}
    recipe.main(command(bench, dry_run=True))
    problems, done, teacher, prompts, generated, scored, points, _, kilobytes = numbers_of(capsys.readouterr().out)
    assert {file: file.stat().st_mtime_ns for file in bench.rglob("*")} == before
    recipe.main(command(bench))  # the sample was the whole job, so all of it is exact
    rows = rows_of(bench / "labels")
    assert (problems, done) == (8, 0) and teacher == sum(len(row["input_ids"]) for row in rows)
    assert prompts == sum(row["prompt_length"] for row in rows) and teacher == prompts + generated
    assert scored == generated == sum(len(row["divergence"]) for row in rows)
    assert points == sum(len(row["positions"]) for row in rows) and kilobytes > 0

    capsys.readouterr()
    recipe.main(command(bench, dry_run=True))
    assert "all 8 problems are labelled" in capsys.readouterr().out


def test_a_dry_run_scales_a_sample_to_what_is_left(bench, capsys, monkeypatch):
    recipe = label_recipe
    recipe.main(command(bench, limit=2))
    before = {file.name: file.read_bytes() for file in (bench / "labels").iterdir()}
    monkeypatch.setattr(recipe, "DRY_RUN_PROBLEMS", 3)
    seen, label_problems = [], recipe.label_problems

    def spy(model, teacher_model, prompts, *args, **kwargs):
        seen.append((list(prompts.values()), args[0]))
        return label_problems(model, teacher_model, prompts, *args, **kwargs)

    monkeypatch.setattr(recipe, "label_problems", spy)
    capsys.readouterr()
    recipe.main(command(bench, dry_run=True, batch_size=2, max_new_tokens=8, points="floor+kl"))
    printed = capsys.readouterr().out
    problems, done, teacher, prompts, generated, scored, *_ = numbers_of(printed)
    assert (problems, done) == (6, 2) and "3 problems took" in printed
    assert teacher == prompts + generated and 0 < generated <= 6 * 8 and generated % 2 == 0  # twice the sample's
    ((sample, folder),) = seen
    assert len(sample) == 3 and not Path(folder).exists()
    assert {file.name: file.read_bytes() for file in (bench / "labels").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./missing"}, "`model`: there is no folder './missing'"),
        ({"teacher_model": "nobody/nothing"}, "`teacher_model` must be a Hub id or a local folder"),
        ({"dataset": "./missing.jsonl"}, "no file or folder './missing.jsonl'"),
        ({"prompt_column": "question"}, "`prompt_column`='question' is not in row 0"),
        ({"answer_column": "solution"}, "`answer_column`='solution'"),
        ({"limit": 0}, "`limit` must be"),
        ({"num_candidates": 0}, "`num_candidates` must be an integer in [1, 64], got 0"),
        ({"num_candidates": 65}, "`num_candidates` must be an integer in [1, 64], got 65"),
        ({"target_rate": 1.5}, "`target_rate` must be in [0.0, 1.0], got 1.5"),
        ({"points": "some"}, "`points` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"max_new_tokens": 128}, "`max_new_tokens` must be at most 122"),
        ({"chat_template": True}, "`chat_template` needs a tokenizer"),
        ({"chat_template_kwargs": "[1]"}, "`chat_template_kwargs` must be a JSON object"),
        ({"chat_template_kwargs": '{"a": 1}'}, "`chat_template_kwargs` needs `chat_template`"),
        ({"config": "./missing.yaml"}, "missing.yaml"),
    ],
)
def test_recipe_refuses_in_one_line_before_weights(bench, capsys, monkeypatch, changes, message):
    recipe = label_recipe
    monkeypatch.setattr(recipe, "label", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        recipe.main(command(bench, **changes))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (bench / "labels").exists()


def give_template(bench, template):
    for name in ("student", "teacher"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(bench / name)


@pytest.mark.parametrize(
    ("template", "changes", "message"),
    [
        (NO_SYSTEM, {"system_prompt": "w2"}, "`system_prompt` must be left out, got 'w2'"),
        (THINKS, {"chat_template_kwargs": '{"thinking": false}'}, "chat template (enable_thinking), got 'thinking'"),
        (THINKS, {"max_prompt_tokens": 4}, "`max_prompt_tokens` must be at least 6, the shortest prompt"),
    ],
)
def test_recipe_refuses_what_a_template_does_not_take(bench, capsys, monkeypatch, template, changes, message):
    give_template(bench, template)
    test_recipe_refuses_in_one_line_before_weights(
        bench, capsys, monkeypatch, {"chat_template": True} | changes, message
    )


def test_prompts_in_a_template_are_never_cut(bench, capsys):
    """`--max_prompt_tokens` cut off the question's end and the assistant's header."""
    give_template(bench, THINKS)
    recipe = label_recipe
    recipe.main(command(bench, chat_template=True, max_prompt_tokens=7))  # prompts of 3 to 6 words, and 3 tokens
    assert "4 of 8 problems are left out" in capsys.readouterr().err
    labels, header = read_labels(bench / "labels")
    assert len(labels) == header.num_problems == 4
    for row in labels:
        assert row["input_ids"][row["prompt_length"] - 3 : row["prompt_length"]] == [12, 8, 23]
    assert json.loads((bench / "labels" / "label_stats.json").read_text())["too_long_problems"] == 4
    recipe.main(command(bench, chat_template=True, output_dir=bench / "whole", dry_run=True, max_prompt_tokens=7))
    assert "4 of 8 problems are left out" in capsys.readouterr().err
    recipe.main(command(bench, max_prompt_tokens=2, output_dir=bench / "plain"))  # without a template: cut, all there
    assert set(read_labels(bench / "plain")[0]["prompt_length"]) == {2}
    assert "left out" not in capsys.readouterr().err
    assert json.loads((bench / "plain" / "label_stats.json").read_text())["too_long_problems"] == 0


def test_template_variables_are_noted_and_compared(bench, capsys):
    give_template(bench, THINKS)
    recipe = label_recipe
    (bench / "label.yaml").write_text("chat_template: true\nchat_template_kwargs: {enable_thinking: false}\n")
    from_yaml = {"config": bench / "label.yaml"}
    recipe.main(command(bench, **from_yaml))
    labels, header = read_labels(bench / "labels")
    assert header.prompt_source["chat_template_kwargs"] == {"enable_thinking": False}
    assert all(row["input_ids"][row["prompt_length"] - 1] == 8 for row in labels)
    recipe.main(command(bench, chat_template=True, chat_template_kwargs='{"enable_thinking": false}'))  # goes on
    for other in (None, '{"enable_thinking": true}'):
        with pytest.raises(SystemExit):
            recipe.main(command(bench, chat_template=True, chat_template_kwargs=other))
        assert "made with other settings (prompt_source: " in capsys.readouterr().err
    recipe.main(command(bench, chat_template=True, output_dir=bench / "thinking"))
    thinking, header = read_labels(bench / "thinking")
    assert "chat_template_kwargs" not in header.prompt_source  # older labels can be resumed
    assert all(row["input_ids"][row["prompt_length"] - 1] == 23 for row in thinking)


def test_recipe_refuses_different_tokenizers_and_empty_data(bench, capsys):
    recipe = label_recipe
    (bench / "empty.jsonl").write_text("")
    make_tokenizer(num_words=70).save_pretrained(bench / "teacher")
    for changes, message in (({}, "must share one tokenizer"), ({"dataset": bench / "empty.jsonl"}, "is empty")):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(command(bench, **changes))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (bench / "labels").exists()


def test_recipe_refuses_other_settings_before_weights(bench, capsys, monkeypatch):
    recipe = label_recipe
    recipe.main(command(bench))
    monkeypatch.setattr(recipe, "label", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit):
        recipe.main(command(bench, num_candidates=3))
    assert "num_candidates: 4 there, 3 now" in capsys.readouterr().err


def test_recipe_help_names_every_argument(capsys):
    recipe = label_recipe
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name, spec in recipe.LabelArguments.__dataclass_fields__.items():
        assert f"--{name}" in text and spec.metadata["help"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
def test_recipe_on_real_models(tmp_path, capsys):
    recipe = label_recipe
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once upon a time, "}\n{"prompt": "The little dog "}\n')
    models = SHARED / "models"
    changes = {"model": models / "babyllama-weak", "teacher_model": models / "babyllama-strong"}
    recipe.main(command(tmp_path, **changes, dataset=tmp_path / "p.jsonl", max_new_tokens=40))
    labels, header = read_labels(tmp_path / "labels")
    tokenizer = AutoTokenizer.from_pretrained(models / "babyllama-weak")
    assert len(labels) == 2 and header.excluded_ids == ()
    assert "Once upon a time" in tokenizer.decode(labels[0]["input_ids"])
