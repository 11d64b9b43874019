"""What benchmarks/objective.py divides, measures, keeps and writes, on a tiny random model."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model
from tiny_labels import make_labels, tiny_tokenizer

from transformers_s2t.trajectories import TrajectoryHeader, write_header, write_shard


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


def test_the_parts_are_disjoint_and_too_few_trajectories_are_an_error(arguments, tmp_path):
    labels = make_labels(40)
    args = objective.make_parser().parse_args([*arguments, "--json", str(tmp_path / "x.json")])
    parts = [set(part["problem_id"]) for part in objective.divide(labels, args)]
    assert [len(part) for part in parts] == [16, 12, 12] and len(set.union(*parts)) == 40
    with pytest.raises(ValueError, match="must be at most 40, the trajectories in .*, got 324"):
        objective.main([*arguments, "--num_train", "300", "--json", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


def test_every_variant_is_a_legal_setting(tmp_path):
    for name, changes in objective.VARIANTS.items():
        fields = {key: value for key, value in changes.items() if key != "lora_r"}
        assert objective.S2TConfig(output_dir=str(tmp_path), use_cpu=True, **fields), name
