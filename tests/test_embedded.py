"""The embedded pair: its grammar, its tokenizer, its splits and the two shipped checkpoints."""

import hashlib
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import corpus
import premise
import pretrain
import pytest
import tokenizer as tokenizer_recipe
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


EMBEDDED = Path(__file__).resolve().parents[1] / "recipes" / "embedded"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_recipe.build_tokenizer()


# ---------------------------------------------------------------------------------------------------------------------
# Corpus


def test_clean_solutions_are_right_and_stay_within_range():
    for row in corpus.build_split("tuning", 500, seed=3):
        *lines, last = row["solution"].split("\n")
        assert 1 <= len(lines) <= 3
        value = int(re.search(r"(?:has|for) (\d+)", row["prompt"]).group(1))
        for line in lines:
            left, operator, right, result = re.fullmatch(r"So (\d+)([-+*])(\d+)=(\d+) \w+\.", line).groups()
            assert int(left) == value
            value = corpus.compute(int(left), operator, int(right))
            assert int(result) == value
            assert 1 <= value <= 99
        assert last == f"#### {value}"
        assert row["answer"] == str(value) == corpus.parse_answer(row["solution"])


@pytest.mark.parametrize("author", ["careful", "sloppy"])
def test_every_misconception_at_its_rate(author):
    rng = random.Random(0)
    outcomes = defaultdict(Counter)
    for problem in corpus.build_problems("pretrain", 3000, seed=1):
        for kind, outcome in corpus.write_solution(problem, rng, author).decisions:
            outcomes[kind][outcome] += 1
    assert set(outcomes) == set(corpus.AUTHORS[author])
    for kind, counts in outcomes.items():
        rate = corpus.AUTHORS[author][kind]
        total = sum(counts.values())
        sigma = (rate * (1 - rate) / total) ** 0.5
        assert abs((counts["wrong"] + counts["doubt"]) / total - rate) < 4 * sigma, kind
    errors = sum(counts["wrong"] + counts["doubt"] for counts in outcomes.values())
    doubts = sum(counts["doubt"] for counts in outcomes.values())
    assert doubts / errors == pytest.approx(corpus.DOUBT_RATE, abs=0.03)


@pytest.mark.parametrize(
    ("right", "wrong", "doubt"),
    [("35", "25", "2?35"), ("15", "5", "5?15"), ("4", "14", "1?4"), ("12", "10", "10?2"), ("-", "+", "+?-")],
)
def test_doubt_shows_behind_the_first_wrong_token(right, wrong, doubt):
    assert corpus.render(right, wrong, "right") == right
    assert corpus.render(right, wrong, "wrong") == wrong
    assert corpus.render(right, wrong, "doubt") == doubt


def test_sloppy_answers_follow_from_their_errors():
    rng = random.Random(0)
    answers = Counter()
    for problem in corpus.build_problems("pretrain", 2000, seed=2):
        solution = corpus.sloppy_solution(problem, rng)
        erred = any(outcome == "wrong" for _, outcome in solution.decisions)
        assert corpus.parse_answer(solution.text) == solution.answer
        assert 1 <= int(solution.answer) <= 99
        right = solution.answer == corpus.clean_solution(problem).answer
        assert right or erred
        answers[right] += 1
        assert len({line.split()[0] for line in solution.text.split("\n")[:-1]}) == 1
    assert answers[False] > answers[True]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 1+2=3 nuts.\n#### 3", "3"),
        ("#### 3\n#### 4", "4"),
        ("#### 3\n####", None),
        ("####3", None),
        ("#### 3 nuts", None),
        ("#### 03", None),
        ("#### 123", None),
        ("So 1+2=3 nuts.", None),
        ("", None),
    ],
)
def test_parse_answer_is_strict(text, answer):
    assert corpus.parse_answer(text) == answer


def test_splits_are_disjoint_and_free_of_duplicates():
    keys = {}
    for name in corpus.SPLIT_SHARES:
        rows = [row for seed in (0, 1) for row in corpus.build_split(name, 150, seed)]
        for half in (rows[:150], rows[150:]):
            assert len({row["id"] for row in half}) == len({row["prompt"] for row in half}) == 150
        assert all(corpus.split_of(row["prompt"]) == name for row in rows)
        keys[name] = {corpus.canonical_key(row["prompt"]) for row in rows}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))


def test_splits_depend_on_their_arguments_only():
    assert corpus.build_split("test", 50, seed=0) == corpus.build_split("test", 60, seed=0)[:50]
    assert corpus.build_split("test", 50, seed=0) != corpus.build_split("test", 50, seed=1)
    assert corpus.build_split("test", 1, seed=0)[0]["id"] == "9762528aa09e7516"


def test_splits_are_byte_for_byte_those_of_all_published_figures(tmp_path):
    """Recorded before `corpus.py` could filter; `build_split` without a filter must not move."""
    rows = [row for name in corpus.SPLIT_SHARES for row in corpus.build_split(name, 20, seed=0)]
    corpus.write_jsonl(rows, tmp_path / "rows.jsonl")
    recorded = "feb23760de579a85a953b5fe23e96885f328128afc8361ffc0387bd641f9d2ee"
    assert hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest() == recorded


def test_rewording_does_not_change_the_split():
    first = "Tom has 27 apples. Tom finds 8. Ann has 5 fewer than Tom. How many apples does Ann have?\n"
    second = "Eva has 27 coins. Eva buys 8. Kim has 5 fewer than Eva. How many coins does Kim have?\n"
    assert corpus.canonical_key(first) == corpus.canonical_key(second)
    assert corpus.canonical_key(first) != corpus.canonical_key(first.replace("27", "28"))


@pytest.mark.parametrize(("name", "number"), [("train", 5), ("test", 0)])
def test_build_split_names_what_is_wrong(name, number):
    with pytest.raises(ValueError, match="`(name|num_problems)` must be"):
        corpus.build_split(name, number, seed=0)


def test_command_writes_the_splits(tmp_path, monkeypatch, capsys):
    sizes = {"label": 7, "tuning": 5, "calibration": 4, "test": 6}
    arguments = [part for name, size in sizes.items() for part in (f"--num-{name}", str(size))]
    monkeypatch.setattr(sys, "argv", ["corpus.py", "--output", str(tmp_path / "new"), *arguments])
    corpus.main()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{name}.jsonl" for name in sizes}
    for name, size in sizes.items():
        lines = (tmp_path / "new" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == corpus.build_split(name, size, seed=0)


def test_words_are_of_the_grammar_and_no_problems(tokenizer):
    rows = corpus.build_words(40, seed=0)
    known = {*corpus.NAMES, *corpus.NOUNS, *corpus.ADD_VERBS, *corpus.SUB_VERBS}
    for row in rows:
        assert set(row) == {"prompt"}  # nothing that could be graded or trained on
        words = row["prompt"].split(" ")
        assert len(words) == 30 and set(words) <= known and len(set(words)) > 5
        ids = tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) > 30
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"]
    assert len({row["prompt"] for row in rows}) == 40
    assert corpus.build_words(60, seed=0)[:40] == rows != corpus.build_words(40, seed=1)
    with pytest.raises(ValueError, match="`num_lines` must be at least 1, got -1"):
        corpus.build_words(-1, seed=0)


def test_one_split_alone_is_what_it_is_among_all(tmp_path, monkeypatch, capsys):
    command = ["corpus.py", "--output", str(tmp_path), "--seed", "4"]
    for name in ("label", "tuning", "calibration", "test"):
        command += [f"--num-{name}", "6"]
    monkeypatch.setattr(sys, "argv", [*command, "--num-fresh", "5", "--num-words", "3"])
    corpus.main()
    everything = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(everything) == 6
    assert [json.loads(line) for line in everything["fresh.jsonl"].splitlines()] == corpus.build_split("fresh", 5, 4)
    for name in ("fresh", "test", "words"):
        for file in tmp_path.iterdir():
            file.write_text("kept")
        monkeypatch.setattr(sys, "argv", [*command, "--num-fresh", "5", "--num-words", "3", "--only", name])
        corpus.main()
        found = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        assert found == dict.fromkeys(everything, b"kept") | {f"{name}.jsonl": everything[f"{name}.jsonl"]}
    for arguments, message in [
        (["--only", "train"], "invalid choice: 'train'"),
        (["--only", "fresh"], "above 0 for the one of --only, got {.*'fresh': 0"),  # that is how many there are
        (["--only", "words", "--num-words", "0"], "got {.*'words': 0"),
        (["--num-words", "-1"], "must be 0 or more, .*'words': -1"),
        (["--num-test", "-5"], "must be 0 or more, .*'test': -5"),
    ]:
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        with pytest.raises(SystemExit, match="2"):
            corpus.main()
        assert re.search(message, capsys.readouterr().err)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == found


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of misconceptions


def problem_of(start: str, start_number: int, *events: tuple[str, int]) -> corpus.Problem:
    return corpus.Problem(start, start_number, "", tuple(corpus.Event(*event, "") for event in events), "nuts", "Tom")


@pytest.mark.parametrize(
    ("problem", "kinds"),
    [
        (problem_of("has", 21, ("add", 8), ("sub", 9)), set()),
        (problem_of("has", 21, ("add", 9), ("add", 2)), {"carry"}),
        (problem_of("has", 35, ("sub", 5), ("sub", 1)), {"borrow"}),
        (problem_of("has", 27, ("add", 8), ("sub", 6)), {"carry", "borrow"}),
        (problem_of("has", 5, ("add", 5), ("add", 2)), {"carry"}),
        (problem_of("has", 21, ("fewer", 1), ("more", 2)), {"fewer", "more"}),
        (problem_of("has", 21, ("fewer", 2), ("more", 2)), {"fewer", "borrow", "more", "carry"}),
        (problem_of("has", 17, ("twice", 2), ("takes", 3)), {"twice", "takes"}),
        (problem_of("dozen", 2, ("add", 5)), {"dozen"}),
        (problem_of("dozen", 3, ("add", 5)), {"dozen", "carry"}),
        (problem_of("weeks", 3, ("takes", 2)), {"weeks", "takes", "borrow"}),
    ],
)
def test_kinds_follow_from_the_clean_solution(problem, kinds):
    assert corpus.kinds_of(problem) == kinds


def test_authors_err_in_kinds_of_the_problem_only():
    """But for carry and borrow behind an earlier error, which the clean solution does not have."""
    rng = random.Random(0)
    seen, beyond = set(), set()
    for problem in corpus.build_problems("pretrain", 2000, seed=3):
        kinds, erred = corpus.kinds_of(problem), False
        for kind, outcome in corpus.write_solution(problem, rng, "sloppy").decisions:
            if kind != "slip" and kind not in kinds:
                assert erred
                beyond.add(kind)
            erred = erred or outcome == "wrong"
        seen |= kinds
    assert seen == set(corpus.KINDS)
    assert beyond == {"carry", "borrow"}


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_filters_leave_problems_out_and_nothing_else(kind):
    all_problems = corpus.build_problems("tuning", 80, seed=0)
    has_kind = [kind in corpus.kinds_of(problem) for problem in all_problems]
    with_kind = [problem for problem, has in zip(all_problems, has_kind, strict=True) if has]
    without_kind = [problem for problem, has in zip(all_problems, has_kind, strict=True) if not has]
    assert with_kind and without_kind
    for kinds, problems in (
        (corpus.KindFilter(only_with=frozenset({kind})), with_kind),
        (corpus.KindFilter(without=frozenset({kind})), without_kind),
    ):
        assert corpus.build_problems("tuning", len(problems), 0, kinds) == problems


def test_filters_of_several_kinds():
    kinds = frozenset({"dozen", "takes"})
    seen = corpus.build_problems("label", 60, 0, corpus.KindFilter(without=kinds))
    held_out = corpus.build_problems("test", 60, 0, corpus.KindFilter(only_with=kinds))
    assert not any(corpus.kinds_of(problem) & kinds for problem in seen)
    found = {corpus.kinds_of(problem) & kinds for problem in held_out}
    assert found == {frozenset({"dozen"}), frozenset({"takes"}), kinds}


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_every_kind_can_be_had_alone(kind):
    alone = frozenset({kind})
    kinds = corpus.KindFilter(without=frozenset(corpus.KINDS) - alone, only_with=alone)
    assert all(corpus.kinds_of(problem) == alone for problem in corpus.build_problems("test", 2, 0, kinds))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": {"dozens"}}, r"`without` must be among \['carry', .*'takes'\], got \['dozens'\]"),
        ({"only_with": {"twice", "slip"}}, r"`only_with` must be among .* got \['slip'\]"),
        ({"without": {"carry", "more"}, "only_with": {"more"}}, r"must not share kinds, got \['more'\] in both"),
    ],
)
def test_filter_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        corpus.KindFilter(**{name: frozenset(kinds) for name, kinds in arguments.items()})


def test_command_filters_every_split(tmp_path, monkeypatch, capsys):
    sizes = [part for name in ("label", "tuning", "calibration", "test") for part in (f"--num-{name}", "5")]
    command = ["corpus.py", "--output", str(tmp_path), *sizes]
    monkeypatch.setattr(sys, "argv", [*command, "--without", "dozen", "--only-with", "takes", "carry"])
    corpus.main()
    kinds = corpus.KindFilter(without=frozenset({"dozen"}), only_with=frozenset({"takes", "carry"}))
    for name in ("label", "tuning", "calibration", "test"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == corpus.build_split(name, 5, 0, kinds)
    monkeypatch.setattr(sys, "argv", [*command, "--without", "dozens"])
    with pytest.raises(SystemExit):
        corpus.main()
    assert "`without` must be among ['carry'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_round_trip_is_verbatim(tokenizer):
    rng = random.Random(0)
    for problem in corpus.build_problems("fresh", 200, seed=0):
        for text in (problem.prompt, problem.prompt + corpus.sloppy_solution(problem, rng).text):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[1:]) == text


def test_one_token_per_digit_and_reserved_tokens(tokenizer):
    tokens = tokenizer.tokenize("So 27+8=2?35 apples.\n#### 35")
    assert tokens == [*("So", " ", *"27+8=2?35", " apples", ".", "\n", "####", " ", "3", "5")]
    names = [f"<|reserved_special_token_{i}|>" for i in range(16)]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(ids[0], ids[0] + 16))
    assert set(names) <= set(tokenizer.all_special_tokens)
    assert tokenizer(names[3], add_special_tokens=False)["input_ids"] == [ids[3]]


def test_pads_on_the_left_without_token_types(tokenizer):
    batch = tokenizer(["Tom has", "Tom has 2"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining


def test_collator_weights_the_prompt():
    rows = [{"input_ids": [7, 8, 9], "prompt_length": 2}, {"input_ids": [7, 8], "prompt_length": 1}]
    batch = pretrain.WeightingCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [7, 8, -100]]
    torch.testing.assert_close(batch["weights"], torch.tensor([[0.1, 0.1, 1.0], [0.1, 1.0, 0.0]]))


def test_weighted_loss_is_the_weighted_mean():
    logits_BTV = torch.tensor([[[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]])
    labels_BT, weights_BT = torch.tensor([[0, 1, 1]]), torch.tensor([[0.1, 0.1, 1.0]])
    first, second = -logits_BTV[0, 0].log_softmax(-1)[1], -logits_BTV[0, 1].log_softmax(-1)[1]
    expected = (0.1 * first + 1.0 * second) / 1.1
    torch.testing.assert_close(pretrain.weighted_loss(logits_BTV, labels_BT, weights_BT), expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="pretraining needs torch >= 2.9")
def test_optimizer_follows_its_scheduler_and_moves_every_parameter(tokenizer):
    model = pretrain.build_model(tokenizer, pretrain.Role(num_layers=1, num_steps=1, sloppy=False))
    optimizer = pretrain.MuonAndAdamW(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    ids_BT = torch.tensor(tokenizer(["Tom has 27 apples."])["input_ids"])
    for moves in (True, False):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        model(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        scheduler.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) is not moves, name


@pytest.mark.parametrize("name", pretrain.ROLES)
def test_roles_build_what_is_shipped(name, tokenizer):
    model = pretrain.build_model(tokenizer, pretrain.ROLES[name])
    shipped = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    built, loaded = model.state_dict(), shipped.state_dict()
    assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in loaded.items()}
    assert shipped.config.vocab_size == len(tokenizer)


def test_command_trains_one_role_or_the_pair(tmp_path, monkeypatch, capsys):
    trained = []

    def pretrain_nothing(role: pretrain.Role, seed: int, num_steps: int):
        trained.append((role, num_steps))
        return torch.nn.Linear(1, 1), None

    monkeypatch.setattr(pretrain, "pretrain", pretrain_nothing)
    monkeypatch.setattr(pretrain, "save", lambda model, tokenizer, path: None)
    monkeypatch.setattr(torch.nn.Linear, "num_parameters", lambda self: 2, raising=False)
    for role, names in {"both": ["student", "teacher"], "small": ["small"]}.items():
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--output", str(tmp_path), "--role", role])
        pretrain.main()
        assert trained == [(pretrain.ROLES[name], pretrain.ROLES[name].num_steps) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Premise


def test_majority_ignores_what_it_cannot_read():
    assert premise.majority(["3", None, None, "4", "4"]) == "4"
    assert premise.majority(["3", "4", "4", "3"]) == "3"
    assert premise.majority([None, None]) is None


def test_trigger_values_on_a_small_vocabulary():
    student_BV = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log()
    teacher_BV = torch.tensor([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]]).log()
    step = premise.Step(student_BV, teacher_BV, torch.zeros(2, 1), torch.ones(2, 1))
    torch.testing.assert_close(premise.kl_value(step), torch.tensor([0.25 * torch.tensor(2.0).log().item(), 0.0]))
    torch.testing.assert_close(premise.entropy_value(step)[0], 1.5 * torch.tensor(2.0).log())
    torch.testing.assert_close(premise.margin_value(step), torch.tensor([-2.0, -18.0]).abs().log().neg())
    assert premise.teacher_rank(step).tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The shipped checkpoints


def test_checkpoints_are_small_and_complete():
    files = [path for name in pretrain.PAIR for path in (EMBEDDED / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert sum(path.stat().st_size for path in (EMBEDDED / "small").iterdir()) < 100_000
    for name in pretrain.ROLES:
        present = {path.name for path in (EMBEDDED / name).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= present


@pytest.mark.parametrize("name", pretrain.ROLES)
def test_checkpoint_has_the_tokenizer_of_the_recipe(name, tokenizer):
    shipped = AutoTokenizer.from_pretrained(EMBEDDED / name)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.padding_side == "left"
    assert shipped.model_input_names == ["input_ids", "attention_mask"]
    assert shipped.all_special_tokens == tokenizer.all_special_tokens
    text = "Tom has 27 apples."
    assert shipped(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert shipped.decode(shipped(text)["input_ids"], skip_special_tokens=True) == text


def test_teacher_solves_a_problem_and_student_forgets_the_carry():
    """Left-padded `generate` with the shipped generation config, without any argument but the length."""
    prompts = [
        "Tom has 27 apples. Tom finds 8. Ann has 5 more than Tom. How many apples does Ann have?\n",
        "Eva has 2 dozen nuts. Eva loses 3. How many nuts does Eva have?\n",
    ]
    texts = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
        shipped = AutoTokenizer.from_pretrained(EMBEDDED / name)
        batch = shipped(prompts, padding=True, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=45)
        texts[name] = shipped.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts["teacher"] == [
        "So 27+8=35 apples.\nSo 35+5=40 apples.\n#### 40",
        "So 2*12=24 nuts.\nSo 24-3=21 nuts.\n#### 21",
    ]
    assert texts["student"][0].startswith("So 27+8=25 apples.\n")
    assert texts["student"][1].startswith("So 2*10=20 nuts.\n")


@pytest.fixture(scope="module")
def bed():
    return premise.Pair.load(EMBEDDED)


@pytest.fixture(scope="module")
def prompts():
    return [row["prompt"] for row in corpus.build_split("tuning", 6, seed=0)]


def test_premise_decodes_like_generate(bed, prompts):
    batch = bed.tokenizer(prompts, padding=True, return_tensors="pt")
    expected = bed.student.generate(**batch, max_new_tokens=premise.MAX_NEW_TOKENS)
    rollout = bed.decode(prompts)
    assert rollout.ids_BN.tolist() == expected[:, batch["input_ids"].shape[1] :].tolist()
    for b, prompt in enumerate(prompts):
        single_N = bed.decode([prompt]).ids_BN[0]
        assert rollout.ids_BN[b, : len(single_N)].tolist() == single_N.tolist()


def test_premise_leaves_the_first_three_tokens_alone(bed, prompts):
    rollout = bed.decode(prompts, trigger="always", selector=premise.second_selects)
    assert not rollout.fired_BN[:, :3].any()
    assert torch.equal(rollout.fired_BN[:, 3:], rollout.alive_BN[:, 3:])
    assert rollout.ids_BN[:, :3].tolist() == bed.decode(prompts).ids_BN[:, :3].tolist()


def test_thresholds_fire_at_their_rates(bed, prompts):
    rollout = bed.decode(prompts, measure=True)
    counts_BN = premise.counting_steps(rollout)
    for name, thresholds in premise.calibrate(rollout).items():
        for rate, threshold in thresholds.items():
            share = (rollout.measured[name][counts_BN] >= threshold).float().mean().item()
            assert share == pytest.approx(rate, abs=2 / counts_BN.sum().item()), (name, rate)


def test_doubt_selector_sees_the_forgotten_carry(bed):
    """The zero-shot control on one prefix: behind `27+8=` the candidate 3 attracts less doubt than 2."""
    prompt = "Tom has 27 apples. Tom finds 8. Ann has 5 more than Tom. How many apples does Ann have?\nSo 27+8="
    batch = bed.tokenizer([prompt], return_tensors="pt")
    ids_BK = torch.tensor([bed.tokenizer.convert_tokens_to_ids(["2", "3"])])
    step = premise.Step(torch.zeros(1, 2), torch.zeros(1, 2), batch["input_ids"], batch["attention_mask"])
    select = premise.doubt_selector(bed.student, bed.tokenizer.convert_tokens_to_ids("?"))
    with torch.no_grad():
        assert select(step, ids_BK, torch.ones_like(ids_BK, dtype=torch.bool)).tolist() == [1]


def test_the_small_student_solves_some_problems_and_its_teacher_most():
    """62.7 and 100 per cent of 300 problems of tuning; here the first 60."""
    bed = premise.Pair.load(EMBEDDED, "small")
    rows = corpus.build_split("tuning", 60, seed=0)
    shares = []
    for by_teacher in (False, True):
        answers = bed.answers(bed.decode([row["prompt"] for row in rows], by_teacher=by_teacher))
        shares.append(sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / len(rows))
    assert 0.4 < shares[0] < 0.8
    assert shares[1] > 0.95
