"""What benchmarks/objective.py divides, measures, keeps and writes, on a tiny random model."""

import importlib.util
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import NaiveModel, make_selector, tiny_model
from tiny_labels import make_labels, tiny_tokenizer

from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader


FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "objective.py"
SPEC = importlib.util.spec_from_file_location("benchmark_objective", FILE)
objective = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(objective)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A model, 40 labelled trajectories and a recipe, and the flags that name them."""
    folder = tmp_path_factory.mktemp("objective")
    tiny_model().save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    (folder / "labels").mkdir()
    write_shard(folder / "labels", 0, make_labels(40).to_list())
    header = TrajectoryHeader(
        model="student",
        teacher_model="teacher",
        vocab_hash=_vocab_hash(),
        num_candidates=4,
        num_problems=40,
        complete=True,
    )
    write_header(folder / "labels", header)
    recipe = {"model": str(folder / "student"), "learning_rate": 5e-3, "num_candidates": 4, "lora_dropout": 0.0}
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--recipe", str(folder / "train.yaml"), "--labels", str(folder / "labels"), "--seeds", "2"]
    return [*flags, "--num_train", "16", "--num_fusion", "12", "--num_held_out", "12"]


def _vocab_hash():
    from transformers_s2t.reserved_tokens import vocab_hash

    return vocab_hash(tiny_tokenizer())


def test_every_variant_is_measured_at_the_same_points_and_kept(arguments, tmp_path, capsys, monkeypatch):
    file, picture = tmp_path / "new" / "objective.json", tmp_path / "objective.png"
    chosen = ["--variants", "temperature 1", "paper's objective", "--json", str(file), "--picture", str(picture)]
    monkeypatch.setitem(objective.VARIANTS["paper's objective"], "num_candidates", 4)
    objective.main([*arguments, *chosen])
    stored = json.loads(file.read_text())
    names = ["recipe", "temperature 1", "paper's objective"]
    assert [(row["variant"], row["seed"]) for row in stored["rows"]] == [(n, s) for s in (0, 1) for n in names]
    for key in ("points", "student_first", "second_candidate"):
        assert len({row[key] for row in stored["rows"]}) == 1, key
    assert len({row["agree_at_1"] for row in stored["rows"]}) > 1  # variants and seeds differ
    assert str(tmp_path.parent) not in json.dumps(stored["meta"])
    table = capsys.readouterr().out
    for line in objective.summarise(stored["rows"]):
        own = [100 * row["agree_at_1"] for row in stored["rows"] if row["variant"] == line["variant"]]
        assert f"| {line['variant']} | {sum(own) / 2:.1f} [{min(own):.1f}, {max(own):.1f}] |" in table
    assert picture.stat().st_size > 5000

    monkeypatch.setattr(objective, "train_one", lambda *args: pytest.fail("trained again"))
    objective.main([*arguments, *chosen])
    with pytest.raises(ValueError, match=re.escape("holds figures of other settings")):
        objective.main([*arguments, *chosen, "--num_train", "10"])


def test_the_parts_share_no_problem_and_too_few_problems_are_an_error(arguments, tmp_path):
    """Labels with several texts of each problem had been divided by text: a problem could train and be measured."""
    args = objective.make_parser().parse_args([*arguments, "--json", str(tmp_path / "x.json")])
    rows = [row | {"rollout": number} for number in range(3) for row in make_labels(41)]  # in no order by problem
    for labels, texts in ((make_labels(41), 1), (Dataset.from_list(rows), 3)):
        parts = objective.divide(labels, args)
        assert [len(part) for part in parts] == [16 * texts, 12 * texts, 12 * texts]
        problems = [set(part["problem_id"]) for part in parts]
        assert [len(part) for part in problems] == [16, 12, 12] and len(set.union(*problems)) == 40
    with pytest.raises(ValueError, match="must be at most 40, the problems in .*, got 324"):
        objective.main([*arguments, "--num_train", "300", "--json", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


def test_every_variant_is_a_legal_setting(tmp_path):
    for name, changes in objective.VARIANTS.items():
        read = {key: value for key, value in changes.items() if key in objective.READ_OUT}
        fields = {key: value for key, value in changes.items() if key != "lora_r" and key not in read}
        assert objective.S2TConfig(output_dir=str(tmp_path), use_cpu=True, **fields), name
        with objective.read_out(**read) as prepare:
            prepare(tiny_model(num_hidden_layers=3))
        assert not read or not fields, name  # one change at a time, and in the scope for which it is made


# ---------------------------------------------------------------------------------------------------------------------
# Other read-outs


NUM_LAYERS = 3


def forward_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("layers_below", [0, 1, 2])
def test_the_hidden_state_is_that_of_a_lower_layer_behind_the_norm(layers_below, batch):
    model = tiny_model(num_hidden_layers=NUM_LAYERS)

    def last_hidden():
        with torch.no_grad():
            return model.get_decoder()(**batch).last_hidden_state

    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states  # embeddings, layers, the last one normed
    plain, hooks = last_hidden(), forward_hooks(model)
    expected = plain if layers_below == 0 else model.model.norm(states[NUM_LAYERS - layers_below])
    with objective.read_out(layers_below=layers_below) as prepare:
        prepare(model)
        assert torch.equal(last_hidden(), expected) and torch.equal(last_hidden(), expected)
        with torch.no_grad():  # with a cache, as the scorer reads the prefix
            output = model.get_decoder()(**batch, use_cache=True)
        torch.testing.assert_close(output.last_hidden_state, expected)
        assert forward_hooks(model) == hooks + 2 * (layers_below > 0)
    assert forward_hooks(model) == hooks and torch.equal(last_hidden(), plain)
    assert (layers_below == 0) == torch.equal(expected, plain)


@pytest.mark.parametrize("layers_below", [3, 5, -1])
def test_a_layer_that_the_model_does_not_have_is_refused(layers_below):
    """Counted from the other end it would be another layer, and the figure that of another variant."""
    model = tiny_model(num_hidden_layers=NUM_LAYERS)
    hooks = forward_hooks(model)
    with pytest.raises(ValueError, match=f"`layers_below` must be below the model's 3 layers, got {layers_below}"):
        with objective.read_out(layers_below=layers_below) as prepare:
            prepare(model)
    assert forward_hooks(model) == hooks


def scores_one_by_one(selector, labels, layers_below, num_heads):
    """Scores of every candidate of every point, from a whole text each, in the order of `score_labels`."""
    naive = NaiveModel(tiny_model(num_hidden_layers=NUM_LAYERS), selector)
    kept = {}
    layer = naive.base.model.layers[NUM_LAYERS - 1 - layers_below]
    layer.register_forward_hook(lambda module, args, output: kept.update(hidden=output))
    scores = []
    for row in sorted(labels, key=lambda row: len(row["input_ids"])):
        for position, candidates in zip(row["positions"], row["candidate_ids"]):
            for id in candidates:
                naive([*row["input_ids"][:position], id], tokens_adapted="last")
                with torch.no_grad():
                    logits_R = naive.rows_RD @ naive.base.model.norm(kept["hidden"])[0, -1]
                size = len(logits_R) // num_heads
                parts = [logits_R[head * size : (head + 1) * size].softmax(-1) for head in range(num_heads)]
                values = [sum(p * i / (size - 1) for i, p in enumerate(part.tolist())) for part in parts]
                scores.append(sum(values) / num_heads)
    return torch.tensor(scores)


@pytest.mark.parametrize(("layers_below", "num_heads"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 4)])
def test_scores_are_those_of_a_naive_forward(layers_below, num_heads):
    labels = make_labels(4)
    with objective.read_out(num_heads=num_heads, layers_below=layers_below) as prepare:
        model = tiny_model(num_hidden_layers=NUM_LAYERS)
        prepare(model)
        selector = make_selector(model, num_candidates=4)
        scores_NK = objective.score_labels(selector, labels).scores_NK
    naive = scores_one_by_one(selector, labels, layers_below, num_heads)
    torch.testing.assert_close(scores_NK.flatten(), naive, atol=1e-5, rtol=1e-4)
    again = objective.score_labels(selector, labels).scores_NK  # everything is as it was
    assert (layers_below, num_heads) == (0, 1) or not torch.allclose(again, scores_NK, atol=1e-3)
    torch.testing.assert_close(again.flatten(), scores_one_by_one(selector, labels, 0, 1), atol=1e-5, rtol=1e-4)


def test_two_heads_are_the_mean_of_both_halves():
    logits_R = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for score_head in ("bins", "linear"):
        halves = [
            objective.reserved_rows.candidate_scores(part, score_head) for part in (logits_R[:, :8], logits_R[:, 8:])
        ]
        torch.testing.assert_close(objective.scores_of_heads(2)(logits_R, score_head), (halves[0] + halves[1]) / 2)
        assert torch.equal(
            objective.scores_of_heads(1)(logits_R, score_head),
            objective.reserved_rows.candidate_scores(logits_R, score_head),
        )


def test_a_failed_training_leaves_nothing_behind():
    model = tiny_model()
    hooks, readers = forward_hooks(model), (objective.s2t_trainer, objective.local_selector)
    original = [module.candidate_scores for module in readers]
    with pytest.raises(KeyError), objective.read_out(num_heads=2, layers_below=1) as prepare:
        prepare(model)
        assert forward_hooks(model) > hooks
        assert all(module.candidate_scores is not objective.reserved_rows.candidate_scores for module in readers)
        raise KeyError
    assert forward_hooks(model) == hooks and [module.candidate_scores for module in readers] == original


def test_a_trained_read_out_is_measured_as_it_was_trained(arguments, tmp_path, monkeypatch):
    """Both models of a training, the one that learns and the one that is measured, are read in the same way."""
    trained = {}
    prepared = []
    read_out = objective.read_out

    @contextmanager
    def watched(**settings):
        with read_out(**settings) as prepare:
            yield lambda model: (prepared.append((settings, model)), prepare(model))

    monkeypatch.setattr(objective, "read_out", watched)
    args = objective.make_parser().parse_args([*arguments, "--json", str(tmp_path / "x.json")])
    recipe = yaml.safe_load(args.recipe.read_text())
    for variant in ("recipe", "two heads of 8 tokens", "read-out one layer below"):
        trained[variant] = objective.train_one(args, recipe, variant, 0)
    assert len({row["agree_at_1"] for row in trained.values()}) == 3
    settings = [{}, {}, {"num_heads": 2}, {"num_heads": 2}, {"layers_below": 1}, {"layers_below": 1}]
    assert [found for found, _ in prepared] == settings
    assert len({id(model) for _, model in prepared}) == 6
    assert {row["points"] for row in trained.values()} == {trained["recipe"]["points"]}
