"""The labelled row: what the writer refuses, what the reader refuses, what the collator makes of literal rows."""

import copy
import json
import warnings
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from transformers_s2t.labels.collator import TrajectoryCollator
from transformers_s2t.labels.folder import (
    CARD_NAME,
    done_problem_ids,
    next_shard_index,
    read_header,
    read_labels,
    remove_labels,
    shard_files,
    write_header,
    write_shard,
)
from transformers_s2t.labels.schema import FEATURES, HEADER_NAME, TrajectoryHeader, validate_row


HEADER = TrajectoryHeader(
    model="student",
    teacher_model="teacher",
    vocab_hash="0123456789abcdef",
    divergence_threshold=0.5,
    eos_token_ids=(2,),
    prompt_source={"dataset": "problems.jsonl", "split": None},
    complete=True,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_row(problem_id="one"):
    """Two points, two candidates each."""
    return {
        "problem_id": problem_id,
        "rollout": 0,
        "input_ids": [5, 6, 7, 8],
        "prompt_length": 2,
        "divergence": [0.5, 0.0],
        "entropy": [1.0, 0.25],
        "margin": [-0.5, -2.0],
        "positions": [2, 3],
        "candidate_ids": [[7, 9], [8, 4]],
        "student_logprobs": [[-0.5, -1.0], [-0.125, -3.0]],
        "teacher_logprobs": [[-2.0, -0.25], [-0.5, -4.0]],
        "teacher_top_id": [9, 8],
    }


def make_empty_row(problem_id="two"):
    """No point at all."""
    return {
        "problem_id": problem_id,
        "rollout": 0,
        "input_ids": [5, 6],
        "prompt_length": 1,
        "divergence": [0.25],
        "entropy": [0.5],
        "margin": [-1.0],
        "positions": [],
        "candidate_ids": [],
        "student_logprobs": [],
        "teacher_logprobs": [],
        "teacher_top_id": [],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_legal_rows_pass():
    validate_row(make_row())
    validate_row(make_empty_row())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("problem_id", ""),
        ("problem_id", 7),
        ("input_ids", [5, 6, 7, -8]),
        ("input_ids", [5, 6, 7, 8.0]),
        ("prompt_length", 0),
        ("prompt_length", 4),
        ("prompt_length", True),
        ("divergence", [0.5]),
        ("divergence", [0.5, -0.5]),
        ("divergence", [0.5, float("nan")]),
        ("entropy", [1.0, float("inf")]),
        ("margin", [-0.5, 2.0]),
        ("positions", [3, 2]),
        ("positions", [2, 2]),
        ("positions", [1, 3]),
        ("positions", [2, 4]),
        ("candidate_ids", [[7, 9]]),
        ("candidate_ids", [[7, 9], [8]]),
        ("candidate_ids", [[7, 7], [8, 4]]),
        ("candidate_ids", [[], []]),
        ("student_logprobs", [[-1.0, -0.5], [-0.125, -3.0]]),
        ("student_logprobs", [[-0.5, float("-inf")], [-0.125, -3.0]]),
        ("teacher_logprobs", [[-2.0, 0.25], [-0.5, -4.0]]),
        ("teacher_logprobs", [[-2.0], [-0.5, -4.0]]),
        ("teacher_top_id", [9]),
        ("teacher_top_id", [9, None]),
        ("teacher_top_id", [9, -2]),
    ],
)
def test_illegal_values_are_refused_by_column(column, value):
    with pytest.raises(ValueError, match=f"`{column}`"):
        validate_row(make_row() | {column: value})


def test_a_teacher_with_another_tokenizer_may_have_no_choice():
    validate_row(make_row() | {"teacher_top_id": [9, -1]})


def test_missing_and_unknown_columns_are_named():
    row = make_row()
    del row["margin"]
    with pytest.raises(ValueError, match="missing: margin, unknown: spread"):
        validate_row(row | {"spread": []})


# ---------------------------------------------------------------------------------------------------------------------
# Header


def test_header_survives_json(tmp_path):
    write_header(tmp_path, HEADER)
    assert read_header(tmp_path) == HEADER
    assert TrajectoryHeader.from_dict(json.loads((tmp_path / HEADER_NAME).read_text())) == HEADER
    assert read_header(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_candidates", 0),
        ("num_candidates", 65),
        ("num_candidates", 8.5),
        ("target_rate", 0),
        ("target_rate", 1.5),
        ("min_prob_ratio", -0.1),
        ("points", "some"),
        ("rollout", "beam"),
        ("temperature", 0),
        ("max_new_tokens", 0),
        ("threshold_sample", -1),
        ("excluded_ids", (-1,)),
    ],
)
def test_illegal_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        replace(HEADER, **{name: value})


def test_headers_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown fields.*colour"):
        TrajectoryHeader.from_dict(HEADER.to_dict() | {"colour": "red"})
    with pytest.raises(ValueError, match="lacks the fields"):
        TrajectoryHeader.from_dict({"model": "student"})
    (tmp_path / HEADER_NAME).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_header(tmp_path)


def test_differences_name_settings_and_leave_out_progress():
    asked = replace(HEADER, divergence_threshold=None, versions={"torch": "9"}, num_problems=7, complete=False)
    assert asked.differences(HEADER) == {}
    assert replace(asked, num_candidates=4).differences(HEADER) == {"num_candidates": (16, 4)}
    assert replace(asked, divergence_threshold=0.25).differences(HEADER) == {"divergence_threshold": (0.5, 0.25)}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_what_is_written_is_read(tmp_path):
    write_header(tmp_path, HEADER)
    write_shard(tmp_path, 0, [make_row(), make_empty_row()])
    write_shard(tmp_path, 1, [make_row("three")])
    labels, header = read_labels(tmp_path)
    assert header == HEADER
    assert labels.features == FEATURES
    assert list(labels) == [make_row(), make_empty_row(), make_row("three")]
    assert done_problem_ids(tmp_path) == {"one", "two", "three"}
    assert next_shard_index(tmp_path) == 2
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_load_dataset_reads_the_folder_beside_two_json_files(tmp_path):
    """One shard beside s2t_labels.json and label_stats.json was read as JSON: the commonest extension wins."""
    write_header(tmp_path, HEADER)
    write_shard(tmp_path, 0, [make_row(), make_empty_row()])
    (tmp_path / "label_stats.json").write_text("{}")
    loaded = datasets.load_dataset(str(tmp_path))
    assert list(loaded) == ["train"]
    assert loaded["train"].features == FEATURES
    assert list(loaded["train"]) == [make_row(), make_empty_row()]


def test_a_shard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    bad = make_row("bad") | {"divergence": [0.5]}
    with pytest.raises(ValueError, match="'bad'"):
        write_shard(tmp_path, 0, [make_row(), bad])
    with pytest.raises(ValueError, match="occurs twice"):
        write_shard(tmp_path, 0, [make_row(), make_row()])
    with pytest.raises(ValueError, match="got none"):
        write_shard(tmp_path, 0, [])

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers_s2t.files.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shard(tmp_path, 0, [make_row()])
    assert list(tmp_path.iterdir()) == []
    write_shard(tmp_path, 0, [make_row()])
    with pytest.raises(FileExistsError):
        write_shard(tmp_path, 0, [make_row("three")])


def test_folders_that_are_no_labels_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of labels"):
        read_labels(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no train-"):
        read_labels(tmp_path)
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'all', got 'test'"):
        write_shard(tmp_path / "train only", 0, [make_row()])
        read_labels(tmp_path / "train only", split="test")

    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), other / "train-00000.parquet")
    with pytest.raises(ValueError, match="missing: problem_id.*unknown: prompt"):
        read_labels(other)

    empty = tmp_path / "empty"
    empty.mkdir()
    pq.write_table(FEATURES.arrow_schema.empty_table(), empty / "train-00000.parquet")
    with pytest.raises(ValueError, match="no labelled trajectory"):
        read_labels(empty)

    broken = tmp_path / "broken"
    write_shard(broken, 0, [make_row()])
    file = broken / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train-00000.parquet is not a readable"):
        read_labels(broken)


def test_a_hub_id_that_cannot_be_had_is_one_clear_error():
    with pytest.raises(FileNotFoundError, match="neither a local folder"):
        read_labels("nobody/no-such-labels")


def test_incomplete_labels_are_read_with_a_warning(tmp_path):
    write_shard(tmp_path, 0, [make_row()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_labels(tmp_path)[1] is None
    write_header(tmp_path, replace(HEADER, complete=False, num_problems=3))
    with pytest.warns(UserWarning, match="1 of 3 problems"):
        read_labels(tmp_path)


def test_removing_labels_leaves_other_files(tmp_path):
    write_header(tmp_path, HEADER)
    write_shard(tmp_path, 0, [make_row()])
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / ".train-00001.parquet.x1").write_text("half")
    assert {CARD_NAME, HEADER_NAME} < {file.name for file in tmp_path.iterdir()}
    remove_labels(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert shard_files(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Collator


def check_batch(batch, expected):
    assert set(batch) == set(expected)
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype, name
        assert torch.equal(batch[name], tensor), name


def test_collator_on_literal_rows():
    rows = [make_row(), make_empty_row()]
    given = copy.deepcopy(rows)
    none = [[-1e4, -1e4], [-1e4, -1e4]]
    check_batch(
        TrajectoryCollator(pad_token_id=0)(rows),
        {
            "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
            "prompt_length": torch.tensor([2, 1]),
            "text_start": torch.tensor([0, 0]),
            "positions": torch.tensor([[2, 3], [1, 1]]),
            "position_mask": torch.tensor([[True, True], [False, False]]),
            "candidate_ids": torch.tensor([[[7, 9], [8, 4]], [[0, 0], [0, 0]]]),
            "student_logprobs": torch.tensor([[[-0.5, -1.0], [-0.125, -3.0]], none]),
            "teacher_logprobs": torch.tensor([[[-2.0, -0.25], [-0.5, -4.0]], none]),
            "teacher_top_id": torch.tensor([[9, 8], [0, 0]]),
        },
    )
    assert rows == given


def test_collator_cuts_candidates_and_keeps_shapes_without_points():
    batch = TrajectoryCollator(pad_token_id=3, num_candidates=1)([make_row(), make_empty_row()])
    assert batch["candidate_ids"].tolist() == [[[7], [8]], [[0], [0]]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 3, 3]]
    batch = TrajectoryCollator(pad_token_id=3)([make_empty_row()])
    assert batch["positions"].tolist() == [[1]]
    assert batch["position_mask"].tolist() == [[False]]
    assert batch["candidate_ids"].shape == batch["teacher_logprobs"].shape == (1, 1, 1)


def test_collator_pads_rows_with_fewer_candidates():
    narrow = make_row() | {
        "candidate_ids": [[7], [8]],
        "student_logprobs": [[-0.5], [-0.125]],
        "teacher_logprobs": [[-2.0], [-0.5]],
    }
    batch = TrajectoryCollator(pad_token_id=0, num_candidates=8)([make_row(), narrow])
    assert batch["candidate_ids"].tolist() == [[[7, 9], [8, 4]], [[7, 0], [8, 0]]]
    assert batch["student_logprobs"][1].tolist() == [[-0.5, -1e4], [-0.125, -1e4]]


@pytest.mark.parametrize(("name", "value"), [("pad_token_id", None), ("pad_token_id", -1), ("num_candidates", 0)])
def test_collator_refuses(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        TrajectoryCollator(**{"pad_token_id": 0, name: value})
