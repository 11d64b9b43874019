"""Labels from a teacher with another tokenizer, end to end, against what enumeration says.

Legend: S positions, K candidates, P partition (K + 1), V vocabulary.
"""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import datasets
import pytest
import torch
from test_cross_tokenizer import STUDENT_MERGES, TEACHER_MERGES, tokenizer_of
from test_labeling import assert_same_rows
from tiny import BOS, EOS, PAD, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2t_recipes.labeling import label as label_recipe
from transformers_s2t import S2TConfig, S2TTrainer
from transformers_s2t.labeling import points
from transformers_s2t.labeling.cross_teacher import score_with_teacher
from transformers_s2t.labeling.cross_tokenizer import CrossTokenizer, partition_divergence
from transformers_s2t.labeling.label_problems import label_problems, label_stats
from transformers_s2t.labeling.teachers import CrossTokenizerTeacher
from transformers_s2t.labels.folder import read_header, read_labels, write_header
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.reserved_tokens import resize_for_reserved_tokens, vocab_hash


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
    """(row, n, exact log-probabilities (P,), the student's) of every stored point."""
    for row in rows:
        sequence = teacher.cross.encode(row["input_ids"])
        for n, position in enumerate(row["positions"]):
            anchor, start = teacher.cross.anchor(sequence, position)
            rest, ids = sequence.data[start : sequence.offsets[position]], row["candidate_ids"][n]
            events_P = torch.tensor(exact_events(teacher, sequence.ids[:anchor], rest, ids)).double()
            with torch.no_grad():
                logits_V = student(torch.tensor([row["input_ids"][:position]])).logits[:, -1]
            student_P = teacher.cross.student_partition(logits_V, torch.tensor([ids]))[0]
            yield row, n, events_P.log(), student_P


@pytest.mark.parametrize("name", PAIRS)
def test_rows_hold_the_exact_marginals_of_disjoint_texts(tmp_path, name):
    student, teacher = make_pair(name, healed_tokens=1, min_mass=0.0)
    label(student, teacher, tmp_path, replace(HEADER, num_candidates=4, max_new_tokens=4))
    below, points = 0, 0
    for row, n, events_P, student_P in checked_points(teacher, student, rows_of(tmp_path)):
        assert row["teacher_logprobs"][n] == pytest.approx(events_P[:-1].clamp_min(-1e4).tolist(), abs=1e-4)
        points += 1
        if name == "bpe-characters":  # all texts have one spelling, so that the divergence is a bound
            exact = float(partition_divergence(events_P[None], student_P[None]))
            assert row["divergence"][n] <= exact + 1e-4
            if all(len(teacher.cross.token_bytes(id)) < 2 for id in row["candidate_ids"][n]):
                assert row["divergence"][n] == pytest.approx(exact, abs=1e-4)
            below += row["divergence"][n] < exact - 1e-4
    assert points > 10 and (below > 0) == (name == "bpe-characters")


def test_the_same_characters_under_other_ids_get_the_ordinary_log_probabilities(tmp_path):
    student, plain, renamed = (tiny_model(seed=seed, vocab_size=6) for seed in (3, 4, 4))
    order = torch.tensor([0, 1, 2, 5, 3, 4])  # "abc" there, "cab" here
    for module in (renamed.get_input_embeddings(), renamed.get_output_embeddings()):
        module.weight.data = module.weight.data[order]
    cross = CrossTokenizer(tokenizer_of(CHARACTERS), tokenizer_of(CHARACTERS, characters="cab"))
    header = replace(HEADER, num_candidates=4)
    label(student, plain, tmp_path / "plain", header)
    label(student, CrossTokenizerTeacher(renamed, cross), tmp_path / "cross", header)
    plain, renamed = rows_of(tmp_path / "plain"), rows_of(tmp_path / "cross")
    for row, other in zip(plain, renamed):
        assert (torch.tensor(other.pop("divergence")) <= torch.tensor(row.pop("divergence")) + 1e-5).all()
    assert_same_rows(renamed, plain)


def test_batches_shards_and_a_stop_change_nothing(tmp_path, monkeypatch):
    """Branches are followed by their mass, so that what is read beside a trajectory must not move it."""
    student, teacher = make_pair("bpe-bpe")
    header = replace(HEADER, points="floor+kl", divergence_threshold=None, threshold_sample=3, rollout="sample")
    label(student, teacher, tmp_path / "whole", header)
    monkeypatch.setattr(points, "_MAX_FLOAT_LOGITS", 3 * 12)  # three positions at a time
    label(student, teacher, tmp_path / "alone", header, batch_size=1)
    assert_same_rows(rows_of(tmp_path / "alone"), rows_of(tmp_path / "whole"))
    monkeypatch.undo()
    label(student, teacher, tmp_path / "cut", header)
    stored = read_header(tmp_path / "cut")
    (tmp_path / "cut" / "train-00001.parquet").unlink()
    (tmp_path / "cut" / "train-00002.parquet").unlink()
    write_header(tmp_path / "cut", replace(stored, complete=False))
    label(student, teacher, tmp_path / "cut", header)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert read_header(tmp_path / "cut") == read_header(tmp_path / "whole")


def test_the_header_says_how_texts_were_compared(tmp_path):
    student, teacher = make_pair("bpe-bpe")
    header = label(student, teacher, tmp_path)
    assert header.cross_tokenizer == {
        "teacher_vocab_hash": vocab_hash(tokenizer_of(TEACHER_MERGES)),
        "healed_tokens": 2,
        "min_mass": 0.01,
    }
    assert read_header(tmp_path) == header
    _, other = make_pair("bpe-bpe", healed_tokens=1)
    with pytest.raises(ValueError, match="cross_tokenizer: {.*'healed_tokens': 2.* there, {.*'healed_tokens': 1"):
        label(student, other, tmp_path)
    assert label(student, teacher.model, tmp_path / "plain").cross_tokenizer == {}


def test_illegal_arguments_are_named(tmp_path):
    student, teacher = make_pair("bpe-bpe")
    tokenizer = tokenizer_of(STUDENT_MERGES)
    with pytest.raises(ValueError, match="`cross` must be of two different tokenizers"):
        CrossTokenizerTeacher(teacher.model, CrossTokenizer(tokenizer, tokenizer))
    teacher = CrossTokenizerTeacher(teacher.model, teacher.cross, {(BOS, 3, 4): [BOS]})
    with pytest.raises(ValueError, match=r"`teacher_prompts` must hold every prompt, and lacks .* \(1, 5\)"):
        label(student, teacher, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_what_the_teacher_cannot_read_is_not_written(tmp_path):
    """A special token without a counterpart, characters that the teacher lacks, rows without a token."""
    tokenizer = tokenizer_of(STUDENT_MERGES, extra_special_tokens=["<|user|>"])
    student = tiny_model(seed=3, vocab_size=len(tokenizer) + 4)
    cross = CrossTokenizer(tokenizer, tokenizer_of(["a b"], characters="ab"))
    c = [id for id in range(3, 11) if b"c" in cross.token_bytes(id)]
    assert len(c) == 4 and cross.unreadable_ids() == [*c, tokenizer.convert_tokens_to_ids("<|user|>")]
    prompts = {id: [3 if token == 5 else token for token in ids] for id, ids in PROMPTS.items()}
    teacher = CrossTokenizerTeacher(tiny_model(seed=4, vocab_size=8), cross)
    label(student, teacher, tmp_path, prompts=prompts)
    rows = rows_of(tmp_path)
    readable = set(range(11)) - set(c)
    assert {id for row in rows for id in row["input_ids"]} <= readable
    for row in rows:  # but proposed
        for ids, values in zip(row["candidate_ids"], row["teacher_logprobs"]):
            assert all((id in readable) == (value > -1e4) for id, value in zip(ids, values))
    assert any(not set(ids) <= readable for row in rows for ids in row["candidate_ids"])
    with pytest.raises(ValueError, match="no token for b'c'"):
        label(student, teacher, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_teachers_choice_may_be_none_of_the_students_tokens(tmp_path):
    student, teacher = tiny_model(seed=3, vocab_size=9), tiny_model(seed=4, vocab_size=8)
    teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(8))
    teacher.lm_head.bias.data[5] = 99.0  # "c"
    cross = CrossTokenizer(tokenizer_of(["a b"], characters="ab"), tokenizer_of(CHARACTERS))
    prompts = {"p": [BOS, 3, 4]}
    label(student, CrossTokenizerTeacher(teacher, cross), tmp_path, prompts=prompts)
    (row,) = rows_of(tmp_path)
    assert set(row["teacher_top_id"]) == {-1}
    assert label_stats(read_labels(tmp_path)[0], 0.0)["hit_at_k"] == {"1": 0.0, "2": 0.0, "4": 0.0}


def test_a_rollout_ends_where_the_teachers_context_does(tmp_path):
    tokenizers = tokenizer_of(STUDENT_MERGES), tokenizer_of(CHARACTERS)
    student = tiny_model(seed=3, vocab_size=12)
    header = replace(HEADER, eos_token_ids=(), max_new_tokens=12)
    lengths = {}
    for limit in (128, 18):
        teacher = CrossTokenizerTeacher(
            tiny_model(seed=4, vocab_size=8, max_position_embeddings=limit), CrossTokenizer(*tokenizers)
        )
        label(student, teacher, tmp_path / str(limit), header)
        rows = rows_of(tmp_path / str(limit))
        lengths[limit] = [teacher.count_tokens(row["input_ids"], row["prompt_length"]) for row in rows]
        assert all(row["divergence"] for row in rows)
    assert max(lengths[128]) > 18 >= max(lengths[18]) and 18 - min(lengths[18]) < 3
    with pytest.raises(ValueError, match="at most 12: `teacher_model` takes 18 tokens and the longest prompt has 6"):
        label(student, teacher, tmp_path / "more", replace(header, max_new_tokens=13))


def test_a_selector_learns_from_such_labels(tmp_path):
    student, teacher = make_pair("bpe-bpe")
    label(student, teacher, tmp_path / "labels")
    resize_for_reserved_tokens(student, 40)
    config = S2TConfig(
        output_dir=str(tmp_path), max_steps=1, num_candidates=5, use_cpu=True, bf16=False, save_strategy="no"
    )
    trainer = S2TTrainer(
        model=student,
        args=config,
        train_dataset=read_labels(tmp_path / "labels")[0],
        processing_class=tokenizer_of(STUDENT_MERGES),
    )
    assert trainer.train().training_loss > 0


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


@pytest.fixture
def recipe(monkeypatch):
    return label_recipe


TEMPLATE = "{% for m in messages %}c{{ m.content }}{% endfor %}{% if add_generation_prompt %}MARK{% endif %}"


TEXTS = ("abc", "c", "bbca", "ca", "abab")


@pytest.fixture
def bench(tmp_path):
    """A student and a teacher of other tokens and another chat template on disk, and five problems."""
    for name, seed, merges, mark in (("student", 3, STUDENT_MERGES, "a"), ("teacher", 4, TEACHER_MERGES, "b")):
        tokenizer = tokenizer_of(merges)
        tokenizer.chat_template = TEMPLATE.replace("MARK", mark)
        tokenizer.save_pretrained(tmp_path / name)
        tiny_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS))
    return tmp_path


def command(bench, output="labels", **changes):
    settings = {
        "model": bench / "student",
        "teacher_model": bench / "teacher",
        "cross_tokenizer": True,
        "dataset": bench / "problems.jsonl",
        "output_dir": bench / output,
        "max_new_tokens": 8,
        "num_candidates": 4,
        "shard_size": 2,
        "chat_template": True,
    } | changes
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def test_the_recipe_labels_with_each_models_own_template(bench, recipe, capsys):
    recipe.main(command(bench, dry_run=True))
    printed = capsys.readouterr().out
    recipe.main(command(bench))
    labels, header = read_labels(bench / "labels")
    student, teacher = (AutoTokenizer.from_pretrained(bench / name) for name in ("student", "teacher"))
    cross = CrossTokenizer(student, teacher)
    assert header.vocab_hash == vocab_hash(student) and header.cross_tokenizer == cross.settings
    assert "estimates" in (bench / "labels" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(bench / "teacher")
    prompts, read = 0, 0
    texts = {sha256(text.encode()).hexdigest()[:16]: text for text in TEXTS}
    for row in labels:
        length, text = row["prompt_length"], texts[row["problem_id"]]
        assert student.decode(row["input_ids"][:length]) == f"c{text}a"
        own = teacher(f"c{text}b")["input_ids"]
        prompts += len(own)
        read += len(cross.encode(row["input_ids"], length, own).ids)
        (scores,) = score_with_teacher(
            cross, model, [row["input_ids"]], [length], [row["positions"]], [torch.tensor(row["candidate_ids"])], [own]
        )
        wanted_NK = scores.partition_NP[:, :-1].clamp_min(-1e4).float()
        torch.testing.assert_close(torch.tensor(row["teacher_logprobs"]), wanted_NK, rtol=0, atol=1e-4)
    assert f"teacher tokens  {read} ({prompts} of prompts, {read - prompts} generated)" in printed
    positions = sum(len(row["divergence"]) for row in labels)
    assert f"positions       {positions} scored" in printed
    files = {file.name: file.read_bytes() for file in (bench / "labels").iterdir()}
    recipe.main(command(bench))  # nothing is left to do
    assert {file.name: file.read_bytes() for file in (bench / "labels").iterdir()} == files


def test_each_template_gets_the_variables_that_it_has(bench, recipe, capsys):
    student, teacher = (AutoTokenizer.from_pretrained(bench / name) for name in ("student", "teacher"))
    teacher.chat_template += "{% if enable_thinking is defined and not enable_thinking %}ba{% endif %}"
    teacher.save_pretrained(bench / "teacher")
    plans = [
        recipe.prepare(*recipe.Parser(recipe.LabelArguments).parse_args_into_dataclasses(command(bench, **changes)))
        for changes in ({}, {"chat_template_kwargs": '{"enable_thinking": false}'})
    ]
    assert plans[0].prompts == plans[1].prompts  # the student's template knows of no thinking
    for plan, end in zip(plans, ("b", "bba")):
        assert [teacher.decode(ids) for ids in plan.teacher_prompts.values()] == [f"c{text}{end}" for text in TEXTS]
    with pytest.raises(SystemExit):
        recipe.main(command(bench, chat_template_kwargs='{"enable_thinkin": false}'))
    assert "chat template (enable_thinking), got 'enable_thinkin'" in capsys.readouterr().err


def test_the_recipe_gives_the_teacher_the_text_that_was_left_of_a_prompt(bench, recipe):
    recipe.main(command(bench, chat_template=False, max_prompt_tokens=1))
    labels, _ = read_labels(bench / "labels")
    assert set(labels["prompt_length"]) == {1}
    assert labels[0]["input_ids"][0] == 6  # "ab"
    with pytest.raises(SystemExit):
        recipe.main(command(bench, max_prompt_tokens=1))


def test_one_tokenizer_is_labelled_as_ever(bench, recipe, capsys):
    tokenizer_of(STUDENT_MERGES).save_pretrained(bench / "teacher")
    tiny_model(seed=4, vocab_size=11).save_pretrained(bench / "teacher")
    for output, flag in (("with", True), ("without", False)):
        recipe.main(command(bench, output, cross_tokenizer=flag, chat_template=False))
        assert ("`cross_tokenizer` is not needed" in capsys.readouterr().err) == flag
    assert rows_of(bench / "with") == rows_of(bench / "without")
    assert read_header(bench / "with") == read_header(bench / "without")


def test_the_recipe_refuses_in_one_line_before_weights(bench, recipe, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "label", lambda *args: pytest.fail("weights were loaded"))
    (bench / "special.jsonl").write_text(json.dumps({"prompt": "ab<|user|>"}))
    (bench / "begin.jsonl").write_text(json.dumps({"prompt": "<s>"}))
    for name, merges, kwargs in (
        ("other", STUDENT_MERGES, {"extra_special_tokens": ["<|user|>"]}),
        ("untold", TEACHER_MERGES, {}),
        ("endless", TEACHER_MERGES, {"eos_token": None}),
        ("beginless", TEACHER_MERGES, {"bos_token": None}),
    ):
        tokenizer_of(merges, **kwargs).save_pretrained(bench / name)
        ends = {"eos_token_id": None} if name == "endless" else {}
        tiny_model(vocab_size=12, **ends).config.save_pretrained(bench / name)
    plain = {"chat_template": False}
    for changes, message in (
        ({"cross_tokenizer": False}, "must share one tokenizer, but"),
        ({"cross_tokenizer": False}, "Or pass --cross_tokenizer true"),
        ({"teacher_url": "http://host:1"}, "`cross_tokenizer` must be false with `teacher_url`, got true with 'http"),
        ({"rollout_policy": "s2t"}, "`rollout_policy` must be 'greedy', 'sample' or 's2t-local' with cross_tokenizer"),
        (
            {"max_prompt_tokens": 3},
            "`max_prompt_tokens` must not be given with cross_tokenizer=true and chat_template",
        ),
        ({"teacher_model": bench / "untold"}, "untold': `chat_template` needs a tokenizer that has one"),
        ({"max_new_tokens": 125}, "`max_new_tokens` must be at most 124: `model` takes 128"),
        (
            plain | {"model": bench / "other", "dataset": bench / "special.jsonl"},
            "the prompt 'ab<|user|>' cannot be read by `teacher_model`: The teacher's tokenizer has no counterpart",
        ),
        (plain | {"teacher_model": bench / "endless"}, "`teacher_model` must have an end-of-text token"),
        (
            plain | {"teacher_model": bench / "beginless", "dataset": bench / "begin.jsonl"},
            "the prompt '<s>' cannot be read by `teacher_model`: No teacher token ends before position 1",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(command(bench, **changes))
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (bench / "labels").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize(
    ("own", "other"), [("gpt2", "qwen2.5"), pytest.param("qwen2.5", "gpt2", marks=pytest.mark.slow)]
)
def test_real_tokenizers(tmp_path, recipe, own, other):
    for name, tokenizer, seed in (("student", own, 1), ("teacher", other, 2)):
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / tokenizer)
        tokenizer.save_pretrained(tmp_path / name)
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
        tiny_model("qwen2", seed, vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path / name)
    texts = ["Natalia sold 48/2 = 24 clips in May. Therefore", "日本語 naïve 😀"]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = command(tmp_path, chat_template=False, batch_size=2, num_candidates=8)
    recipe.main(arguments)
    labels, header = read_labels(tmp_path / "labels")
    assert len(labels) == 2 and header.complete
    values = torch.tensor([values for row in labels for values in row["teacher_logprobs"]])
    assert (values > -1e4).any(-1).all() and (values.exp().sum(-1) < 1 + 1e-6).all()
