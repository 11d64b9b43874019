"""The problems that an adapter has seen: written by the stages, refused by the recipes before a model is loaded."""

import json
import warnings
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from test_s2t_trainer import make_trainer
from tiny import RESERVED, tiny_model
from tiny_labels import make_labels, tiny_tokenizer

from s2t_recipes.evaluation import agreement
from s2t_recipes.evaluation import run as evaluation
from s2t_recipes.training import calibrate
from transformers_s2t import SelectorConfig
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import (
    SEEN_PROBLEMS_NAME,
    STAGES,
    check_unseen,
    read_seen_problems,
    write_seen_problems,
)
from transformers_s2t.reserved_tokens import vocab_hash


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PROMPTS = [f"w{i} w{i + 1}" for i in range(3, 9)]


def ids_of(labels):
    return set(labels["problem_id"])


# ---- the file ----


def test_stages_are_written_one_by_one_and_read_back(tmp_path):
    assert read_seen_problems(tmp_path) == {}  # an adapter from before there was such a file
    write_seen_problems(tmp_path, "calibration", ["c"])
    write_seen_problems(tmp_path, "training", ["b", "a", "b"])
    write_seen_problems(tmp_path, "calibration", ["e", "d"])
    text = (tmp_path / SEEN_PROBLEMS_NAME).read_text(encoding="utf-8")
    assert json.loads(text) == {"training": ["a", "b"], "calibration": ["d", "e"]}
    assert read_seen_problems(tmp_path) == {"training": {"a", "b"}, "calibration": {"d", "e"}}
    assert [file.name for file in tmp_path.iterdir()] == [SEEN_PROBLEMS_NAME]


def test_unknown_stages_and_spoilt_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`stage` must be one of 'training', 'tuning', 'router', 'calibration', got"):
        write_seen_problems(tmp_path, "test", ["a"])
    with pytest.raises(ValueError, match="`stages` must be one of 'training'"):
        check_unseen(tmp_path, ["a"], ["test"], "labels")
    for text in ("[1]", '{"training": 1}', '{"training": "abc"}', '{"testing": ["a"]}'):
        (tmp_path / SEEN_PROBLEMS_NAME).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{SEEN_PROBLEMS_NAME} must hold lists of ids of training"):
            read_seen_problems(tmp_path)


def test_seen_problems_are_named_with_their_stages(tmp_path):
    write_seen_problems(tmp_path, "training", "abcde")
    write_seen_problems(tmp_path, "router", "ex")
    check_unseen(tmp_path, ["f", "g"], STAGES, "labels")
    check_unseen(tmp_path, ["a", "x"], ("tuning",), "labels")
    message = r"`labels` shares 5 of its 6 problems .* \(ids a, b, c, ...\), in training \(4\), router \(2\): take"
    with pytest.raises(ValueError, match=message):
        check_unseen(tmp_path, ["x", "e", "c", "b", "a", "new", "a"], STAGES, "labels")


def test_an_adapter_on_the_hub_brings_its_file(tmp_path, monkeypatch):
    def no_such_file(*args, **kwargs):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_such_file)
    assert read_seen_problems("you/older-adapter") == {}
    asked = []
    file = write_seen_problems(tmp_path, "training", ["a"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kw: asked.append((args, kw)) or str(file))
    assert read_seen_problems("you/adapter", revision="v1") == {"training": {"a"}}
    assert asked == [(("you/adapter", SEEN_PROBLEMS_NAME), {"revision": "v1"})]
    with pytest.raises(ValueError, match="'you/adapter' has seen"):
        check_unseen("you/adapter", ["a"], STAGES, "dataset")


def test_a_file_that_cannot_be_asked_for_is_not_taken_for_missing(tmp_path):
    with pytest.warns(UserWarning, match="'you/adapter' is not in the local cache .* is not checked"):
        assert read_seen_problems("you/adapter", cache_dir=tmp_path) == {}  # the tests are offline


# ---- training ----


def test_training_notes_what_it_saw_also_in_checkpoints(tmp_path):
    held_out = {"a": make_labels(seed=1), "b": make_labels(4, seed=2)}
    config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, eval_dataset=held_out, **config)
    trainer.train()
    trainer.save_model()
    seen = {"training": ids_of(make_labels()), "tuning": ids_of(held_out["a"]) | ids_of(held_out["b"])}
    assert read_seen_problems(tmp_path / "out") == seen
    assert read_seen_problems(tmp_path / "out" / "checkpoint-1") == seen


def test_trajectories_without_a_decision_are_seen_too(tmp_path):
    """Blocks know no problem, and leave rows out; the ids are of the labels as they were given."""
    rows = make_labels().to_list()
    for name in ("positions", "candidate_ids", "student_logprobs", "teacher_logprobs", "teacher_top_id"):
        rows[0][name] = []
    trainer = make_trainer(tmp_path, labels=make_labels().from_list(rows))
    assert "problem_id" not in trainer.train_dataset.column_names
    trainer.save_model()
    assert read_seen_problems(tmp_path / "out")["training"] == ids_of(make_labels())


def test_new_weights_drop_what_the_old_ones_saw(tmp_path):
    make_trainer(tmp_path).save_model()
    for stage in ("router", "calibration"):
        write_seen_problems(tmp_path / "out", stage, ["old"])
    make_trainer(tmp_path, labels=make_labels(seed=3)).save_model()
    assert read_seen_problems(tmp_path / "out") == {
        "training": ids_of(make_labels(seed=3)),
        "tuning": ids_of(make_labels(seed=1)),
    }
    unnamed = make_labels().remove_columns(["problem_id"])
    make_trainer(tmp_path, labels=unnamed, eval_dataset=unnamed).save_model()
    assert not (tmp_path / "out" / SEEN_PROBLEMS_NAME).exists()


def test_a_run_that_goes_on_with_other_labels_has_seen_both(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    write_seen_problems(tmp_path / "out" / "checkpoint-1", "calibration", ["old"])  # it says nothing of the weights
    trainer = make_trainer(tmp_path, labels=make_labels(seed=3), max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    seen = read_seen_problems(tmp_path / "out")
    assert seen["training"] == ids_of(make_labels()) | ids_of(make_labels(seed=3))
    assert set(seen) == {"training", "tuning"}


# ---- the recipes ----


class ModelLoaded(Exception):
    """In place of a model: everything before it was fine."""


def no_model(*args, **kwargs):
    raise ModelLoaded


@pytest.fixture(scope="module")
def recipes():
    return {"agreement": agreement, "calibrate": calibrate, "evaluate": evaluation}


@pytest.fixture
def bed(tmp_path, recipes, monkeypatch):
    """An adapter's folder, a folder of labels, a file of problems: all that the recipes read before a model."""
    for module in recipes.values():
        monkeypatch.setattr(module, "load_model", no_model)
    tokenizer = tiny_tokenizer()
    tiny_model().config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("adapter", "other"):
        thresholds = {"margin": {0.1: -1.0}}
        SelectorConfig(RESERVED, thresholds=thresholds, base_model=str(tmp_path / "model")).save_pretrained(
            tmp_path / name
        )
    ids = [sha256(prompt.encode()).hexdigest()[:16] for prompt in PROMPTS]
    rows = [row | {"problem_id": id} for row, id in zip(make_labels(), ids)]
    write_shard(tmp_path / "labels", 0, rows)
    header = {"num_problems": len(ids), "complete": True, "num_candidates": 4, "divergence_threshold": 0.1}
    write_header(tmp_path / "labels", TrajectoryHeader("m", "t", vocab_hash(tokenizer), **header))
    lines = [json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in PROMPTS]
    (tmp_path / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path, ids


def start(recipes, name, folder, **changes):
    """Runs a recipe on the problems of `bed` until a model is loaded."""
    if name == "evaluate":
        settings = {"model": "model", "dataset": "test.jsonl", "output_dir": "out", "policies": ["s2t-local:always"]}
        settings = {key: str(folder / value) if isinstance(value, str) else value for key, value in settings.items()}
        settings |= {"adapters": [str(folder / "adapter")], "max_new_tokens": 4, "answer_style": "hash"}
        return recipes[name].evaluate(recipes[name].EvaluateArguments(**(settings | changes)))
    option = "--adapter" if name == "calibrate" else "--adapters"
    return recipes[name].main(["--labels", str(folder / "labels"), option, str(folder / "adapter")])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "refused", "what"),
    [("calibrate", ("training",), "labels"), ("agreement", STAGES, "labels"), ("evaluate", STAGES, "dataset")],
)
def test_recipes_refuse_what_the_adapter_has_seen(bed, recipes, name, refused, what, stage):
    folder, ids = bed
    write_seen_problems(folder / "adapter", stage, ["elsewhere"])
    with pytest.raises(ModelLoaded):  # without a shared problem
        start(recipes, name, folder)
    write_seen_problems(folder / "adapter", stage, ["elsewhere", ids[2]])
    if stage not in refused:
        with pytest.raises(ModelLoaded):
            start(recipes, name, folder)
        return
    with pytest.raises(ValueError, match=rf"`{what}` shares 1 of its 6 problems .*\(ids {ids[2]}\), in {stage} \(1\)"):
        start(recipes, name, folder)


def test_evaluation_refuses_what_its_thresholds_come_from(bed, recipes):
    folder, ids = bed
    changes = {"adapters": [], "policies": ["second:margin:0.1"], "thresholds_from": str(folder / "other")}
    with pytest.raises(ModelLoaded):
        start(recipes, "evaluate", folder, **changes)
    write_seen_problems(folder / "other", "calibration", ids)
    with pytest.raises(ValueError, match=r"`dataset` shares 6 of its 6 problems .*other.*in calibration \(6\)"):
        start(recipes, "evaluate", folder, **changes)
    start_both = changes | {"adapters": [str(folder / "adapter")], "policies": ["greedy"]}
    with pytest.raises(ValueError, match="other' has seen"):
        start(recipes, "evaluate", folder, **start_both)


def test_calibration_notes_its_problems_once_it_is_done(bed, recipes, monkeypatch):
    folder, ids = bed
    trainer = make_trainer(folder)
    trainer.save_model()
    (folder / "out").rename(folder / "trained")
    arguments = ["--adapter", str(folder / "trained"), "--labels", str(folder / "labels"), "--deployed", "false"]
    arguments += ["--model", str(folder / "model")]
    with pytest.raises(ModelLoaded):
        recipes["calibrate"].main(arguments)
    assert set(read_seen_problems(folder / "trained")) == {"training", "tuning"}
    monkeypatch.setattr(recipes["calibrate"], "load_model", lambda *args: tiny_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipes["calibrate"].main(arguments)
    assert read_seen_problems(folder / "trained")["calibration"] == set(ids)
    with pytest.raises(ValueError, match=r"in calibration \(6\)"):
        recipes["agreement"].main(["--adapters", str(folder / "trained"), *arguments[2:4], *arguments[6:]])
