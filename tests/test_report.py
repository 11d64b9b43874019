"""recipes/report.py: what is in the page, that it is safe and the same every time, and what is said of bad input."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from test_evaluate import RECIPES
from transformers import AutoTokenizer

from s2t_recipes import texts as texts_module
from s2t_recipes.commands import run
from s2t_recipes.evaluation.bench import asked_points
from s2t_recipes.problems import load_problems
from s2t_recipes.records import read_records, write_records
from s2t_recipes.report import canvas, charts, html_report, report
from transformers_s2t.labels.folder import write_header, write_shard
from transformers_s2t.labels.schema import TrajectoryHeader


EVIL = "</script><script>alert(1)</script><!-- <script> &amp; https://example.com"
IDS = ["a1", "b2", "c3", "d4"]
#: Words, an attack, two halves of one character, the end.
TOKENS = {"3": "So", "4": " 2", "5": "\n", "6": EVIL, "7": "\ufffd", "8": "\ufffd", "9": "7", "1": "<end>"}
TEXTS = {
    "problems": [[id, f"How many? {EVIL}\n", "7"] for id in IDS],
    "tokens": TOKENS,
    "special": [1],
    "joined": {"7 8": "é"},
}


def make_row(label, correct_PN, **more):
    policy, trigger, rate = (*label.split(":"), None, None)[:3]
    by_seed = [100 * sum(correct) / len(correct) for correct in correct_PN]
    accuracy = sum(by_seed) / len(by_seed)
    row = {"policy": policy, "label": label, "trigger": trigger, "target_rate": rate and float(rate)}
    row |= {"accuracy": accuracy, "accuracy_ci": [max(accuracy - 9, 0), min(accuracy + 9, 100)]}
    row |= {"accuracy_by_seed": by_seed, "num_seeds": len(by_seed), "uses_teacher": trigger == "kl"}
    row |= {"achieved_rate": rate and float(rate), "flip_rate": 0.01 if trigger else None, "helped": 1, "hurt": 0}
    return row | {"mcnemar_p": 0.5, "seconds_vs_greedy": 1.5, "extra_forwards": {"scorer": 4.0}} | more


def traced(id, correct, asked=True):
    """A record of a policy with a trigger."""
    tokens = [3, 4, 5, 6, 7, 8, 9, 1]
    record = {"id": id, "num_tokens": len(tokens), "text": "So 2\n" + EVIL + "é7", "answer": "7", "correct": correct}
    record |= {"tokens": tokens, "kinds": ".ftk..k.", "student_tokens": {"1": 9}}
    if asked:
        record["asked"] = {
            "1": [0.31, [[9, 0.1, -0.6, 0.2], [4, 0.9, -0.9, 1.4]]],
            "3": [None, [[6, 1.0, -0.2, 1.0], [5, 0.0, -1.7, -2.0]]],
            "6": [0.5, []],
        }
    return record


@pytest.fixture
def folder(tmp_path):
    """A run of three policies, one with two seeds, and its labels."""
    rights = {"greedy": [[0, 1, 0, 1]], "maj@2": [[0, 0, 1, 1]], "s2t-local:kl:0.1": [[1, 1, 0, 1], [1, 0, 0, 1]]}
    rights["s2t-local:kl:0.2"] = [[1, 1, 1, 1]]
    (tmp_path / "records").mkdir()
    for label, correct_PN in rights.items():
        for seed, correct_N in enumerate(correct_PN):
            records = []
            for id, right in zip(IDS, map(bool, correct_N)):
                if label == "greedy":
                    record = {"id": id, "num_tokens": 3, "text": f"no {EVIL}", "answer": None, "correct": right}
                elif label == "maj@2":
                    record = {"id": id, "votes": ["7", None], "answer": "7", "correct": right}
                else:
                    record = traced(id, right)
                records.append(record)
            name = label.replace(":", "_") + (f"_adapter{seed}" if "local" in label else "")
            header = {"settings": {"policy": label, "threshold": 0.3}, "totals": {}}
            write_records(tmp_path / "records" / f"{name}.jsonl", header, records)
    rows = [make_row(label, correct_PN) for label, correct_PN in rights.items()]
    meta = {"model": "m", "teacher_model": None, "dataset": "nowhere.jsonl", "num_problems": 4, "num_seeds": 2}
    meta |= {"settings": {"num_candidates": 2}, "eval_labels": "somewhere/else/labels"}
    write(tmp_path / "report.json", {"meta": meta, "rows": rows, "hit_at_k": {"1": 0.5, "2": 1.0}, "examples": []})
    write(tmp_path / "texts.json", TEXTS)
    return tmp_path


def write(file, data):
    file.write_text(json.dumps(data), encoding="utf-8")


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def run_report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    run(report.main)


def page_of(folder, **arguments):
    content = read(folder / "report.json")
    return html_report.build(content, folder, html_report.charts_of(content, folder), **arguments)


class Page(HTMLParser):
    """Elements, texts of scripts by their id, and whether every element is closed in its turn."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts, self.texts = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "script":
            self.script = attributes.get("id", "code")
            assert self.scripts.setdefault(self.script, "") == ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.script] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)


def unpack(packed: dict, problem_ids: list[str], texts: dict, ids: list[int]) -> list[dict]:
    """The records that html_report.pack has packed; `ids` is the vocabulary."""
    records = []
    for n, correct in enumerate(packed["correct"]):
        record = {"id": problem_ids[n], "correct": correct == "1"}
        record |= {name: packed[name][n] for name in html_report.RECORD_FIELDS if name in packed}
        record = html_report.renumber(record, ids)
        if "tokens" in record and record["text"] is None:
            record["text"] = html_report.spell(record["tokens"], texts)
        records.append(record)
    return records


def unpacked(page):
    """(label, seed) -> records, as the page holds them."""
    data = json.loads(page.scripts["data"])
    ids = [problem[0] for problem in data["problems"]]
    out = {}
    for number in range(len(data["runs"])):
        packed = json.loads(page.scripts[f"run-{number}"])
        out[packed["label"], packed["seed"]] = unpack(packed, ids, TEXTS, data["ids"])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_panels_of_a_picture_of_few_policies_stand_clear_of_one_another(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(report, "save_png", lambda figure, path: figures.append(figure) or path)
    meta = {"model": "m", "dataset": "d", "num_problems": 4}
    meta["selector_metrics"] = {"student_first": 0.5, "second_candidate": 0.25, "agree_at_1": 0.75}
    content = {"meta": meta, "rows": [make_row("greedy", [[0, 1]])], "hit_at_k": {"1": 0.5, "8": 0.975}}
    assert report.draw(content, tmp_path / "x.png") == tmp_path / "x.png"
    (figure,) = figures
    bars, hits, agreement = figure.axes
    assert ["50.0", "97.5"] == [text.get_text() for text in hits.texts if "." in text.get_text()]
    assert ["50.0", "25.0", "75.0"] == [text.get_text() for text in agreement.texts]
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for place, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:place])
    canvas.plt.close(figure)


def test_the_page_holds_the_records_and_needs_nothing_else(folder):
    text = page_of(folder)
    page = Page(text)
    held = unpacked(page)
    assert list(held) == [
        ("greedy", None),
        ("maj@2", None),
        *((f"s2t-local:kl:{r}", s) for r, s in (("0.1", 0), ("0.1", 1), ("0.2", 0))),
    ]
    for (label, seed), records in held.items():
        name = label.replace(":", "_") + ("" if seed is None else f"_adapter{seed}")
        assert records == read_records(folder / "records" / f"{name}.jsonl")[1]
    data = json.loads(page.scripts["data"])
    assert data["problems"] == TEXTS["problems"]
    assert {str(id): data["tokens"][n] for n, id in enumerate(data["ids"])} == TOKENS
    (joined,) = data["joined"].items()
    assert ([data["ids"][int(n)] for n in joined[0].split()], joined[1]) == ([7, 8], "é")

    assert set(page.scripts) == {"data", "code", *(f"run-{n}" for n in range(5))}
    loads = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert {name: value for name, value in attributes.items() if name in loads} in ({}, {"href": "#problems"})
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in page.elements)


def test_texts_cannot_become_markup(folder):
    content = read(folder / "report.json")
    content["meta"] |= {"model": EVIL, "dataset": EVIL, "leaks": [EVIL], "command": EVIL, "settings": {"a": EVIL}}
    content["rows"][3]["policy"] = "s2t-local" + EVIL
    write(folder / "report.json", content)
    text = page_of(folder)
    page = Page(text)
    assert "alert(1)</script>" not in text and text.count("<script") == len(page.scripts)
    code = (html_report.PAGE / "script.js").read_text(encoding="utf-8")
    assert page.scripts["code"].strip() == code.strip()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", code)


def test_a_leak_is_said_on_top(folder):
    assert 'class="banner"' not in page_of(folder)
    content = read(folder / "report.json")
    content["meta"]["leaks"] = ["adapter-seed0 has seen 2 of the problems"]
    write(folder / "report.json", content)
    text = page_of(folder)
    assert text.index('role="alert"') < text.index("adapter-seed0 has seen 2 of the problems") < text.index("<main>")


def test_every_row_and_group_is_in_the_table(folder):
    page = Page(page_of(folder))
    for name in ("greedy", "majority of 2 samples", "S2T-Local · KL 10\N{NO-BREAK SPACE}%", "The small model alone"):
        assert name in page.texts
    sorted_by = [attributes["data-v"] for tag, attributes in page.elements if tag == "td" and "data-v" in attributes]
    assert len(sorted_by) == 4 * (len(html_report.COLUMNS) - 1)
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert len(labels) == 6 and all(labels)  # three charts at two widths


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    names = ["report.html", "report-cost.png", "report-hits.png", "report-rates.png"]
    run_report(monkeypatch, folder)
    first = [(folder / name).read_bytes() for name in names]
    run_report(monkeypatch, folder / "report.json")
    assert [(folder / name).read_bytes() for name in names] == first
    assert {path.name for path in folder.iterdir()} == {*names, "report.png", "report.json", "texts.json", "records"}
    assert all(picture.startswith(b"\x89PNG") for picture in first[1:])


def test_a_page_that_would_be_too_large_leaves_out_seeds_then_candidates_then_problems(folder):
    runs, _ = html_report.read_runs(folder, read(folder / "report.json")["rows"])

    def size(elements):
        return sum(len(element.encode()) for element in elements)

    found, limit = [], 1e9
    for _ in range(4):
        elements, notes = html_report.data_elements(runs, TEXTS, limit)
        assert size(elements) <= limit
        problems = json.loads(elements[0].split(">", 1)[1].removesuffix("</script>"))["problems"]
        found.append((len(elements) - 1, any('"asked"' in element for element in elements), len(problems), len(notes)))
        limit = size(elements) - 1
    assert found[:3] == [(5, True, 4, 0), (4, True, 4, 1), (4, False, 4, 2)]
    assert found[3][:2] == (4, False) and found[3][2] < 4 and found[3][3] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Older runs, and parts that are missing


def test_records_without_what_was_asked_and_a_run_without_texts(folder):
    """As recipes/eval.py wrote them: prompts come from the data set, tokens from the tokenizer."""
    student = RECIPES / "embedded" / "student"
    ids = AutoTokenizer.from_pretrained(student)("So 2", add_special_tokens=False)["input_ids"]
    problems = [{"prompt": f"How many is {n}?\n", "answer": f"so #### {n}"} for n in range(4)]
    (folder / "data").mkdir()
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (folder / "data" / "test.jsonl").write_text(lines, encoding="utf-8")
    names = [problem.id for problem in load_problems(str(folder / "data" / "test.jsonl"))]
    for file in (folder / "records").iterdir():
        header, records = read_records(file)
        for record, name in zip(records, names):
            record["id"] = name
            if "tokens" in record:
                record |= {"tokens": ids, "kinds": "." * len(ids), "student_tokens": {}, "text": "So 2"}
                del record["asked"]
        write_records(file, header, records)
    (folder / "texts.json").unlink()
    content = read(folder / "report.json")
    content["meta"] |= {"model": str(student), "dataset": "moved/since/data/test.jsonl"}
    write(folder / "report.json", content)

    page = Page(page_of(folder))
    data = json.loads(page.scripts["data"])
    assert data["problems"][2] == [names[2], "How many is 2?\n", "2"]
    packed = json.loads(page.scripts["run-2"])
    assert "".join(data["tokens"][n] for n in packed["tokens"][0]) == "So 2"
    assert packed["text"] == [None] * 4 and "asked" not in packed

    content["meta"] |= {"model": str(folder / "gone"), "dataset": "gone.jsonl"}
    write(folder / "report.json", content)
    page = Page(page_of(folder))
    assert json.loads(page.scripts["run-2"])["text"] == ["So 2"] * 4
    assert json.loads(page.scripts["data"])["tokens"] == []
    said = " ".join(page.texts)
    assert "The prompts are not shown: the data set gone.jsonl is not at hand." in said
    assert "Texts are not shown token by token" in said


def test_records_of_another_evaluation_are_left_out(folder):
    content = read(folder / "report.json")
    content["rows"][1]["accuracy_by_seed"] = [75.0]
    (folder / "records" / "s2t-local_kl_0.2_adapter0.jsonl").unlink()
    write(folder / "report.json", content)
    page = Page(page_of(folder))
    assert len(json.loads(page.scripts["data"])["runs"]) == 3
    said = " ".join(page.texts)
    assert "records/maj@2.jsonl is of another evaluation than report.json." in said
    assert "records/s2t-local_kl_0.2_adapter0.jsonl is not there." in said


def test_a_report_alone_gives_tables_and_charts(folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "report.json").rename(alone / "report.json")
    page = Page(page_of(alone))
    assert set(page.scripts) == {"code"}
    assert not any(attributes.get("id") == "problems" for _, attributes in page.elements)
    assert "The problems: there are no records beside report.json." in page.texts


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "report.json").unlink(), r"`report`: \S+report.json does not exist"),
        (lambda folder: (folder / "report.json").write_text("{'rows'"), r"`report`: \S+report.json is not JSON"),
        (lambda folder: write(folder / "report.json", [1]), r"`report`: \S+ has no rows: it is not a report"),
        (lambda folder: write(folder / "report.json", {"meta": {}, "rows": []}), r"`report`: \S+ has no rows"),
        (lambda folder: write(folder / "texts.json", {}), r"`report`: \S+texts.json does not hold"),
        (lambda folder: (folder / "texts.json").write_text("{"), r"`report`: \S+texts.json is not JSON"),
        (
            lambda folder: (folder / "records" / "greedy.jsonl").write_text('{}\n{"id": 1\n'),
            r"`report`: line 2 of \S+greedy.jsonl is not JSON",
        ),
        (
            lambda folder: (folder / "records" / "greedy.jsonl").write_text('{}\n{"id": 1}\n'),
            r"`report`: \S+greedy.jsonl does not hold records",
        ),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, break_it, message):
    break_it(folder)
    with pytest.raises(SystemExit) as stopped:
        run_report(monkeypatch, folder)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match("report.py: " + message, error)


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def test_points_of_the_labels(folder):
    """Rank of the teacher's token, and the teacher's best of the candidates above the floor."""
    row = {"problem_id": "p", "rollout": 0, "input_ids": [5, 6, 7, 8, 9], "prompt_length": 1}
    row |= {"divergence": [0.1, 0.2, 3.0, 4.0], "entropy": [0.0] * 4, "margin": [0.0] * 4, "positions": [2, 3, 4]}
    row["candidate_ids"] = [[6, 7, 8], [7, 6, 8], [8, 9, 6]]
    row["student_logprobs"] = [[-0.5, -1.0, -9.0], [-0.1, -8.0, -9.0], [-0.7, -0.8, -2.0]]
    row["teacher_logprobs"] = [[-2.0, -1.5, -0.5], [-3.0, -0.1, -4.0], [-0.3, -2.0, -4.0]]
    row["teacher_top_id"] = [8, 6, 33]
    (folder / "labels").mkdir()
    write_shard(folder / "labels", 0, [row])
    header = TrajectoryHeader(model="m", teacher_model="t", vocab_hash="v", divergence_threshold=2.0, complete=True)
    write_header(folder / "labels", header)
    points, top, depth = html_report.read_points(folder, read(folder / "report.json")["meta"])
    found = [(round(p.divergence, 3), p.rank, p.best, p.num_above) for p in points]
    assert found == [(0.2, 3, 2, 2), (3.0, 2, 1, 1), (4.0, None, 1, 2)]
    assert (top, depth) == (points[1:], 3)
    chart = charts.radial_chart(top, depth, 2)
    assert [(line[0], line[1]) for line in chart.rows] == [("1", "0"), ("2", "1"), ("3", "0"), ("beyond", "1")]
    assert charts.buckets_chart(points, 2) is None  # too few
    many = charts.buckets_chart(points * 16, 2)
    assert [line[1] for line in many.rows] == ["6"] * 8
    assert many.rows[0][2:] == ("0.0 %", "0.0 %", "100.0 %") and many.rows[-1][2:] == ("0.0 %", "100.0 %", "0.0 %")


def test_labels_do_not_lie_on_one_another():
    generator = torch.Generator().manual_seed(0)
    anchors = [tuple(point) for point in (torch.rand(24, 2, generator=generator) * 120 + 200).tolist()]
    marks = [canvas.Box(x - 7, y - 7, x + 7, y + 7) for x, y in anchors]
    room = canvas.Box(0, 0, 600, 500)
    placed = [box for box, _ in canvas.place_labels(anchors, ["S2T-Local · x"] * 24, 13, room, marks, [])]
    assert not any(a.overlaps(b) for n, a in enumerate(placed) for b in placed[:n])
    assert sum(box.overlaps(mark) for box in placed for mark in marks) == 0
    assert all(box.left >= 0 and box.right <= 600 and box.top >= 0 and box.bottom <= 500 for box in placed)


def test_spread_keeps_the_order_and_the_gap():
    moved = canvas.spread([50.0, 10.0, 11.0, 12.0], 10, 0, 100)
    assert moved[1] < moved[2] < moved[3] < moved[0]
    ordered = sorted(moved)
    assert min(b - a for a, b in zip(ordered, ordered[1:])) >= 9.9 and 0 <= ordered[0] and ordered[-1] <= 100


# ---------------------------------------------------------------------------------------------------------------------
# What eval.py keeps


def test_asked_points_hold_the_candidates_above_the_floor():
    step = {
        "value_B": torch.tensor([0.123456, -math.inf, 1.0]),
        "asked_B": torch.tensor([True, True, False]),
        "rows_A": torch.tensor([0, 1]),
        "candidate_ids_AK": torch.tensor([[5, 6, 7], [8, 9, 5]]),
        "scores_AK": torch.tensor([[0.25, 0.5, 0.0], [1.0, 2.0, 3.0]]),
        "logprobs_AK": torch.tensor([[-0.5, -1.0, -9.0], [-0.25, -1.5, -2.0]]),
        "mask_AK": torch.tensor([[True, True, False], [True, True, True]]),
    }
    scores_AK = step["scores_AK"].masked_fill(~step["mask_AK"], -math.inf)
    plain = asked_points(step | {"fused_AK": scores_AK})
    assert plain[0] == [0.1235, [[5, 0.25, -0.5], [6, 0.5, -1.0]]]
    assert plain[1] == [None, [[8, 1.0, -0.25], [9, 2.0, -1.5], [5, 3.0, -2.0]]]
    fused = asked_points(step | {"fused_AK": 2 * scores_AK})
    assert fused[0][1] == [[5, 0.25, -0.5, 0.5], [6, 0.5, -1.0, 1.0]]
    takeover = {name: step[name] for name in ("value_B", "asked_B")}
    assert asked_points(takeover) == {0: [0.1235, []], 1: [None, []]}


def test_texts_of_tokens_that_share_a_character():
    class Bytes:
        """A tokenizer whose tokens are bytes."""

        all_special_ids = [256]

        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(text.encode())}

        def decode(self, ids):
            return bytes(id for id in ids if id < 256).decode(errors="replace")

    record = {"id": "x", "tokens": [*"aé, é".encode(), 256], "asked": {"0": [0.0, [[98, 0.0, -1.0]]]}}
    found = texts_module.collect_texts([], Bytes(), [[record]])
    first, second = "é".encode()
    assert found["joined"] == {f"{first} {second}": "é"}
    assert found["special"] == [256] and found["tokens"]["98"] == "b" and found["tokens"]["97"] == "a"
