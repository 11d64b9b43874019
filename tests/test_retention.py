"""recipes/retention.py: how far a model has moved from the base model, against one document at a time."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import RESERVED, lora_model, tiny_model
from tiny_labels import make_uneven_labels, tiny_tokenizer

from s2t_recipes.evaluation import retention
from transformers_s2t import LocalSelector, SelectorConfig
from transformers_s2t.fingerprints import model_hash
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import write_seen_problems
from transformers_s2t.reserved_tokens import vocab_hash


MAX_LENGTH = 8


def write_labels(folder, rows, **changes):
    header = {"num_problems": len(rows), "complete": True, "num_candidates": 4, "divergence_threshold": 0.1}
    header |= {"vocab_hash": vocab_hash(tiny_tokenizer()), "model_hash": model_hash(tiny_model()), "rollout": "sample"}
    header |= {"num_rollouts": 2, "excluded_ids": RESERVED}
    write_shard(folder, 0, rows)
    write_header(folder, TrajectoryHeader("student", "teacher", **(header | changes)))


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A base model, labels in which a problem has two rollouts, other text, two tuned adapters, two selectors."""
    folder = tmp_path_factory.mktemp("retention")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = list(make_uneven_labels(6))
    prompt_length = rows[0]["prompt_length"]
    again = rows[1] | {"problem_id": rows[0]["problem_id"], "rollout": 1}
    again["input_ids"] = rows[0]["input_ids"][:prompt_length] + rows[1]["input_ids"][prompt_length:]
    write_labels(folder / "labels", [rows[0], again, *rows[2:]])
    generator = torch.Generator().manual_seed(1)
    lines = []
    for length in (3, 12, 5, 1, 9, 7):  # one longer than is read, one without a token to predict
        words = torch.randint(3, RESERVED[0], (length,), generator=generator).tolist()
        lines.append(" ".join(f"w{id}" for id in words))
    lines[2] += f" <|reserved_special_token_3|> w{words[0]} w{words[1]}"  # no text, not counted
    (folder / "text.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    (folder / "text.txt").write_text("\n\n".join([*lines, lines[0]]) + "\n")
    for number in range(2):
        torch.manual_seed(number)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(tiny_model(), config).save_pretrained(folder / f"tuned{number}")
    for name, settings in {"base": {}, "adapted": {"adapter_scope": "sequence", "proposals": "adapted"}}.items():
        lora_model(tiny_model(), name="default").save_pretrained(folder / name)
        SelectorConfig(RESERVED, vocab_hash=vocab_hash(tiny_tokenizer()), **settings).save_pretrained(folder / name)
    return folder


def arguments(folder, **changes):
    settings = {"model": "model", "labels": "labels", "text": "text.jsonl"}
    settings = {name: str(folder / path) for name, path in settings.items()}
    settings |= {"text_column": "body", "max_length": MAX_LENGTH, "batch_size": 3}
    settings["tuned"] = [f"sft={folder / 'tuned0'}", f"sft={folder / 'tuned1'}", f"kd={folder / 'tuned1'}"]
    settings["adapters"] = [str(folder / "base"), str(folder / "adapted")]
    return retention.RetentionArguments(**(settings | changes))


@pytest.fixture(scope="module")
def report(bed):
    return retention.measure(arguments(bed))


def rows_of(report):
    return {row["name"]: row for row in report["rows"]}


@torch.no_grad()
def one_by_one(folder, model):
    """kind -> [(problem, KL, loss)] of each token that counts, every text by itself in float64."""
    base = tiny_model().double()
    model = model.double()
    kept = list(range(RESERVED[0]))
    tokenizer, found, known = tiny_tokenizer(), {kind: [] for kind in retention.KINDS}, set()

    def read(ids, first, end, kind, problem):
        base_TV = base(torch.tensor([ids])).logits[0, :, kept].log_softmax(-1)
        model_TV = model(torch.tensor([ids])).logits[0, :, kept].log_softmax(-1)
        for t in range(first, end):
            if ids[t] in kept:
                p_V, q_V = base_TV[t - 1], model_TV[t - 1]
                found[kind].append((problem, float((p_V.exp() * (p_V - q_V)).sum()), -float(q_V[ids[t]])))

    rows, _ = retention.read_held_out_labels(str(folder / "labels"))
    for row in rows:
        ids, start = row["input_ids"], row["prompt_length"]
        read(ids, start, len(ids), "generated", row["problem_id"])
        if row["problem_id"] not in known:
            read(ids[:start], 1, start, "prompts", row["problem_id"])
        known.add(row["problem_id"])
    for line in (folder / "text.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["body"])["input_ids"][:MAX_LENGTH]
        read(ids, 1, len(ids), "text", line)
    return found


def mean(found, place):
    return np.mean([token[place] for token in found])


def test_nothing_moves_where_the_base_model_writes(report):
    rows = rows_of(report)
    assert list(rows) == ["base", "sft", "kd", "s2t-local", "s2t-local-adapted"]
    for kind in retention.KINDS:
        for name in ("base", "s2t-local"):
            assert rows[name][kind]["kl"] == {"value": 0.0, "ci": [0.0, 0.0]}
            assert rows[name][kind]["loss"] == rows["base"][kind]["loss"]
        assert rows["s2t-local"][kind]["loss_change"] == {"value": 0.0, "ci": [0.0, 0.0]}
        for name in ("sft", "kd", "s2t-local-adapted"):
            assert 0 < rows[name][kind]["kl"]["ci"][0] <= rows[name][kind]["kl"]["value"]


def test_figures_are_those_of_one_document_at_a_time(bed, report):
    rows = rows_of(report)
    of_base = one_by_one(bed, tiny_model())
    tuned = [
        one_by_one(bed, PeftModel.from_pretrained(tiny_model(), str(bed / f"tuned{number}"))) for number in range(2)
    ]
    selector = LocalSelector.from_pretrained(bed / "adapted", tiny_model())
    expected = {"base": [of_base], "sft": tuned, "kd": tuned[1:]}
    expected["s2t-local-adapted"] = [one_by_one(bed, selector.model)]
    for kind, counts in report["meta"]["documents"].items():
        assert counts["tokens"] == len(of_base[kind])
        assert counts["documents"] == len({problem for problem, *_ in of_base[kind]})
        for name, runs in expected.items():
            row = rows[name][kind]
            for figure, place in (("kl", 1), ("loss", 2)):
                by_seed = [mean(found[kind], place) for found in runs]
                assert row[figure]["value"] == pytest.approx(np.mean(by_seed), abs=2e-5)
                assert row[figure].get("by_seed", by_seed) == pytest.approx(by_seed, abs=2e-5)
                assert row[figure]["ci"][0] <= row[figure]["value"] + 1e-9
                assert row[figure]["value"] <= row[figure]["ci"][1] + 1e-9
            if name != "base":
                change = np.mean([mean(found[kind], 2) - mean(of_base[kind], 2) for found in runs])
                assert row["loss_change"]["value"] == pytest.approx(change, abs=2e-5)
    assert [report["meta"]["documents"][kind]["documents"] for kind in retention.KINDS] == [5, 5, 5]


def test_neither_batches_nor_small_parts_change_anything(bed, report, monkeypatch):
    monkeypatch.setattr(retention, "MAX_FLOAT_LOGITS", 2 * 97)  # two positions
    again = retention.measure(arguments(bed, batch_size=1, adapters=[]))
    for row in again["rows"]:
        for kind in retention.KINDS:
            assert row[kind]["kl"]["value"] == pytest.approx(
                rows_of(report)[row["name"]][kind]["kl"]["value"], abs=2e-5
            )


def test_a_text_file_has_a_document_per_line(bed, capsys, tmp_path):
    args = arguments(bed, text=str(bed / "text.txt"), text_limit=4)
    assert [text.prompt for text in retention.read_text(args)] == [
        json.loads(line)["body"] for line in (bed / "text.jsonl").read_text().splitlines()[:4]
    ]
    output = tmp_path / "retention.json"
    retention.main(
        ["--model", str(bed / "model"), "--labels", str(bed / "labels"), "--text", str(bed / "text.txt")]
        + ["--adapters", str(bed / "base"), "--max_length", str(MAX_LENGTH), "--output", str(output)]
    )
    said = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert re.search(r"\ns2t-local  0\.0000 \[0\.0000, 0\.0000\]", said) and f"written to {output}" in said
    assert report["meta"]["versions"]["torch"] == torch.__version__ and report["meta"]["command"].startswith("python")
    assert {len(line) for line in said.split("\n\n")[0].strip("\n").splitlines()} == {len(said.splitlines()[1])}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_limit": 0}, "`text_limit` must be at least 1, got 0"),
        ({"max_length": 1}, "`max_length` must be at least 2, got 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"dtype": "int8"}, "`dtype` must be one of 'auto', .*, got 'int8'"),
        ({"tuned": ["sft"]}, "`tuned` must be name=folder"),
        ({"tuned": ["base=x"]}, "`tuned` must not be named 'base'"),
        ({"tuned": [], "adapters": []}, "`tuned` or `adapters` must name at least one adapter"),
        ({"output": "/tmp"}, "`output` must be a file, got the folder '/tmp'"),
    ],
)
def test_bad_arguments_are_named(bed, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(bed, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "`model`: './nowhere' does not exist"),
        ({"labels": "./nowhere"}, "`labels`: './nowhere' does not exist"),
        ({"text": "./nowhere.jsonl"}, "`text`: there is no file or folder './nowhere.jsonl'"),
        ({"text": "./nowhere.txt"}, "`text`: there is no file './nowhere.txt'"),
        ({"text_column": "prompt"}, r"`text_column`='prompt' is not in row 0 of .*; columns there: \['body'\]"),
        ({"tuned": ["sft=./nowhere"]}, "`tuned`: './nowhere' does not exist"),
        ({"adapters": ["./nowhere"]}, "`adapters`: './nowhere' does not exist"),
        (
            {"tuned": ["sft={bed}/base"]},
            "`tuned` must be an adapter that writes text, got '.*base'.*: name it in `adap",
        ),
        ({"model": "{bed}/base"}, "`model` must be a model, got '.*base', an S2T-Local selector"),
        ({"model": "{bed}/tuned0"}, "`model` must be a model, got the adapter '.*tuned0': merge it into"),
        ({"max_length": 200}, "`max_length` must be at most 128, the model's context, got 200"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(bed, monkeypatch, changes, message):
    monkeypatch.setattr(retention, "load_model", None)

    def fill_in(value):
        return value.replace("{bed}", str(bed)) if isinstance(value, str) else value

    changes = {
        name: [fill_in(part) for part in value] if isinstance(value, list) else fill_in(value)
        for name, value in changes.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        retention.measure(arguments(bed, **changes))


def test_what_does_not_fit_together_is_refused(bed, monkeypatch, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            retention.measure(arguments(bed, **changes))

    rows = list(make_uneven_labels(6))
    write_labels(tmp_path / "others", rows, model_hash="0123456789abcdef")
    refused(
        r"hold text of 'student' \(weights 0123456789abcdef\), but .*: they are not its own",
        labels=str(tmp_path / "others"),
    )
    monkeypatch.setattr(retention, "load_model", None)
    write_labels(tmp_path / "words", rows, vocab_hash="another")
    refused("made with another tokenizer", labels=str(tmp_path / "words"))
    refused("made with another tokenizer than that of", labels=str(tmp_path / "words"), adapters=[])
    write_shard(tmp_path / "corrected", 0, rows)
    header = TrajectoryHeader("student", "teacher", "v", rollout="s2t", num_problems=12, complete=True)
    write_header(tmp_path / "corrected", header)
    refused(r"hold text that a selector corrected \(rollout 's2t'\)", labels=str(tmp_path / "corrected"))
    (tmp_path / "empty.txt").write_text("\n \n")
    refused("`text`: .*empty.txt is empty", text=str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    refused("`text`: .*latin.txt is not UTF-8", text=str(tmp_path / "latin.txt"))
    (tmp_path / "short.txt").write_text("w3\nw4\n")
    refused("`text`: .*short.txt holds no document of two tokens or more", text=str(tmp_path / "short.txt"))
    refused("`tuned`: '.*model' holds no adapter", tuned=[f"kd={bed / 'model'}"])


def test_labels_of_the_base_are_not_those_of_a_model_that_was_merged(bed, tmp_path):
    merged = PeftModel.from_pretrained(tiny_model(), bed / "tuned0").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="has weights .*: they are not its own"):
        retention.measure(arguments(bed, model=str(tmp_path / "merged")))


def test_texts_that_an_adapter_has_seen_are_refused(bed, tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "load_model", None)
    for argument, id in (("labels", "p0-0"), ("text", retention.read_text(arguments(bed))[1].id)):
        write_seen_problems(tmp_path / argument, "training", [id])
        with pytest.raises(ValueError, match=rf"`{argument}` shares 1 of its \d+ problems .*in training \(1\)"):
            retention.measure(arguments(bed, tuned=[f"sft={tmp_path / argument}"]))
