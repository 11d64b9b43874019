"""Teachers: a model behind a server gives the rows of the same model here, whatever goes wrong on the way.

Legend: S positions, N named tokens, K candidates, V vocabulary.
"""

import json
import logging
import math
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from tiny import EOS, PAD, RESERVED, VOCAB_SIZE, disagreeing_pair, tiny_model
from tiny_labels import tiny_tokenizer
from tiny_server import TinyServer

from s2t_recipes.labeling import label as label_recipe
from transformers_s2t.labeling import http_teacher, points
from transformers_s2t.labeling import label_problems as labeling
from transformers_s2t.labeling.http_teacher import HTTPTeacher, TeacherError, coarse_divergence, host_free
from transformers_s2t.labeling.label_problems import label_problems
from transformers_s2t.labeling.points import score_trajectories
from transformers_s2t.labeling.teachers import LocalTeacher
from transformers_s2t.labels.folder import read_header, read_labels
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.triggers import kl_divergence


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SECRET = "sk-very-secret-4711"
FAULTS = ("error", "unavailable", "busy", "dropped", "half", "cut", "slow", "drip", "restart")
HEADER = TrajectoryHeader(
    model="student",
    teacher_model="teacher",
    vocab_hash="0123456789abcdef",
    num_candidates=5,
    max_new_tokens=9,
    eos_token_ids=(EOS,),
    excluded_ids=RESERVED,
    points="all",
    divergence_threshold=0.1,
    threshold_sample=0,
)


@pytest.fixture(scope="module")
def pair():
    return disagreeing_pair()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(4)
    lengths = [5, 2, 9, 3, 7, 1]
    return {f"p{i}": torch.randint(3, 80, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server(pair):
    with TinyServer(pair[1]) as server:
        yield server


def connect(server, **changes):
    settings = {"top_logprobs": 8, "max_concurrency": 4, "timeout": 5.0, "backoff": 0.02, "max_retries": 8}
    return HTTPTeacher(server.url, **(settings | changes))


def ask(teacher, prefixes, ids):
    """Log-probabilities of some next tokens after each prefix."""
    lengths = [len(prefix) for prefix in prefixes]
    return [one for (one,) in teacher.logprobs_of(prefixes, lengths, [[n] for n in lengths], [[one] for one in ids])]


def label(student, teacher, prompts, folder, header=HEADER, **kwargs):
    settings = {"pad_token_id": PAD, "batch_size": 4, "shard_size": 3, "show_progress": False} | kwargs
    return label_problems(student, teacher, prompts, folder, header, **settings)


def rows_of(folder):
    return list(read_labels(folder)[0])


def assert_rows_agree(rows, expected):
    """Equal but for the divergence, which may only be lower."""
    assert [row["problem_id"] for row in rows] == [row["problem_id"] for row in expected]
    for row, other in zip(rows, expected):
        for name in ("input_ids", "positions", "candidate_ids", "teacher_top_id"):
            assert row[name] == other[name], name
        for name in ("entropy", "margin", "student_logprobs"):
            torch.testing.assert_close(torch.tensor(row[name]), torch.tensor(other[name]), rtol=1e-5, atol=1e-5)
        found, wanted = torch.tensor(row["teacher_logprobs"]), torch.tensor(other["teacher_logprobs"])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert (torch.tensor(row["divergence"]) <= torch.tensor(other["divergence"]) + 1e-5).all()


# ---------------------------------------------------------------------------------------------------------------------
# The divergence of what is named


def random_logits(seed, forbidden=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student_SV = spread * torch.randn(64, 50, generator=generator)
    teacher_SV = spread * torch.randn(64, 50, generator=generator)
    student_SV[:, 50 - forbidden :] = -math.inf
    return student_SV, teacher_SV


def named(teacher_SV, k):
    values_SN, ids_SN = torch.log_softmax(teacher_SV, -1).topk(k, dim=-1)
    return ids_SN, values_SN


@pytest.mark.parametrize("forbidden", [0, 9])
def test_the_coarse_divergence_is_a_lower_bound_that_rises_to_the_exact_one(forbidden):
    for seed in range(20):
        student_SV, teacher_SV = random_logits(seed, forbidden, spread=0.3 * (seed + 1))
        exact_S = kl_divergence(teacher_SV, student_SV)
        last_S = torch.zeros(64)
        for k in (1, 2, 5, 20, 49, 50):
            bound_S = coarse_divergence(student_SV, *named(teacher_SV, k), k)
            assert (bound_S <= exact_S + 1e-5).all(), (seed, k)
            assert (bound_S >= last_S - 1e-5).all(), (seed, k)
            last_S = bound_S
        torch.testing.assert_close(last_S, exact_S, rtol=1e-4, atol=1e-5)


def test_the_coarse_divergence_spelled_out():
    student_SV = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    bound_S = coarse_divergence(student_SV, torch.tensor([[2, 0]]), torch.tensor([[0.6, 0.3]]).log(), 2)
    expected = 0.6 * math.log(0.6 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    assert bound_S.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("rows", [(50, 40), (40, 50)])
def test_the_coarse_divergence_with_heads_of_different_padding(rows):
    student_SV, teacher_SV = random_logits(1)
    student_SV, teacher_SV = student_SV[:, : rows[0]], teacher_SV[:, : rows[1]]
    bound_S = coarse_divergence(student_SV, *named(teacher_SV, rows[1]), rows[1], rows[1])
    torch.testing.assert_close(bound_S, kl_divergence(teacher_SV, student_SV), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_a_local_teacher_is_what_a_bare_model_is(pair, prompts, tmp_path):
    label(*pair, prompts, tmp_path / "model")
    header = label(pair[0], LocalTeacher(pair[1]), prompts, tmp_path / "teacher")
    assert rows_of(tmp_path / "model") == rows_of(tmp_path / "teacher")
    assert (header.teacher_source, header.top_logprobs) == ("local", None)


def test_rows_of_a_server_are_those_of_its_model(pair, prompts, tmp_path, server):
    label(*pair, prompts, tmp_path / "local")
    header = label(pair[0], connect(server), prompts, tmp_path / "http")
    assert_rows_agree(rows_of(tmp_path / "http"), rows_of(tmp_path / "local"))
    assert (header.teacher_source, header.top_logprobs) == ("tiny-teacher", 8)
    assert read_header(tmp_path / "http") == header
    with pytest.raises(ValueError, match="top_logprobs: 8 there, 9 now"):
        label(pair[0], connect(server, top_logprobs=9), prompts, tmp_path / "http")


def test_all_logprobs_named_give_the_exact_divergence(pair, prompts, tmp_path, server):
    label(*pair, prompts, tmp_path / "local")
    label(pair[0], connect(server, top_logprobs=VOCAB_SIZE), prompts, tmp_path / "http")
    for row, other in zip(rows_of(tmp_path / "http"), rows_of(tmp_path / "local")):
        found, wanted = torch.tensor(row["divergence"]), torch.tensor(other["divergence"])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_request_reads_a_trajectory_and_one_each_point_that_lacks_a_candidate(pair, prompts, tmp_path, server):
    teacher = connect(server)
    server.bodies.clear()
    label(pair[0], teacher, prompts, tmp_path, replace(HEADER, points="kl", divergence_threshold=0.5))
    points = sum(len(row["positions"]) for row in rows_of(tmp_path))
    positions = sum(len(row["divergence"]) for row in rows_of(tmp_path))
    readings = [body for body in server.bodies if "prompt_logprobs" in body]
    asked = [body for body in server.bodies if "logprob_token_ids" in body]
    assert len(readings) == len(prompts)
    assert 0 < len(asked) <= points < positions
    assert all(body["max_tokens"] == 1 and body["logprobs"] == len(body["logprob_token_ids"]) for body in asked)
    assert len(readings) + len(asked) == len(server.bodies)


def test_candidates_that_the_server_did_not_name_are_nan_until_asked_for(pair, server):
    scores = score_trajectories(pair[0], connect(server, top_logprobs=1), [[5, 6, 7, 8]], [1], 5, RESERVED)[0]
    local = score_trajectories(*pair, [[5, 6, 7, 8]], [1], 5, RESERVED)[0]
    known_SK = ~scores.teacher_logprobs_SK.isnan()
    assert not known_SK.all()
    torch.testing.assert_close(
        scores.teacher_logprobs_SK[known_SK], local.teacher_logprobs_SK[known_SK], rtol=0, atol=1e-4
    )


def test_both_teachers_score_named_tokens_alike(pair, server):
    prefixes, ids = [[5, 6], [7, 8, 9]], [[3, 90], [4]]
    for found, wanted in zip(ask(connect(server), prefixes, ids), ask(LocalTeacher(pair[1]), prefixes, ids)):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_candidates_beyond_the_teachers_rows_are_not_asked_for(pair, prompts, tmp_path):
    teacher = tiny_model(seed=1, vocab_size=60)
    few = {id: [min(token, 50) for token in ids] for id, ids in prompts.items()}
    with TinyServer(teacher, max_logprobs=60) as server:
        label(pair[0], connect(server, num_embeddings=60), few, tmp_path / "http")
    label(pair[0], teacher, few, tmp_path / "local")
    assert_rows_agree(rows_of(tmp_path / "http"), rows_of(tmp_path / "local"))


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_after_a_fault_are_those_without(pair, prompts, tmp_path, server, fault):
    teacher = connect(server, timeout=0.4 if fault in ("slow", "drip") else 5.0)
    before = len(server.bodies)
    server.faults += [None, fault, fault if fault != "restart" else None, None, None, None, None, None, None, fault]
    label(pair[0], teacher, prompts, tmp_path / "http")
    assert not server.faults
    label(*pair, prompts, tmp_path / "local")
    assert_rows_agree(rows_of(tmp_path / "http"), rows_of(tmp_path / "local"))
    asked = [json.dumps(body) for body in server.bodies[before:]]
    assert len(asked) > len(set(asked))  # something was asked twice


def test_an_answer_that_comes_byte_by_byte_is_given_up(server):
    """Each byte comes in time, so that only a limit for the whole can end it."""
    teacher = connect(server, max_retries=0)
    teacher.timeout = 0.3  # not for the start, which a busy machine may make slow
    server.faults += ["drip"]
    with pytest.raises(TeacherError, match="no answer within 0.3 seconds"):
        ask(teacher, [[5, 6]], [[3]])
    assert server.hung_up.wait(30)


def test_a_connection_is_used_again(server):
    teacher = connect(server)
    before = len(server.open)
    for _ in range(5):
        ask(teacher, [[5, 6]], [[3]])
    assert len(server.open) == before == 1


def test_a_server_that_is_down_for_a_moment_is_waited_for(pair, server):
    teacher = connect(server)
    wanted = ask(teacher, [[5, 6]], [[3]])
    server.restart(0.3)
    assert ask(teacher, [[5, 6]] * 8, [[3]] * 8) == wanted * 8


def test_after_the_last_attempt_one_line_says_where_and_what(server):
    teacher = connect(server, max_retries=2)
    server.faults += ["error"] * 3
    before = len(server.bodies)
    with pytest.raises(TeacherError, match=r"/v1/completions: status 500: Internal Server Error \(attempt 3 of 3\)"):
        ask(teacher, [[5, 6]], [[3]])
    assert len(server.bodies) == before + 3


def test_what_the_client_did_wrong_is_not_repeated(server):
    teacher = connect(server)
    before = len(server.bodies)
    with pytest.raises(TeacherError, match="status 400: This model's maximum context length.*attempt 1 of 9"):
        ask(teacher, [[5] * 128], [[3]])
    assert len(server.bodies) == before + 1


def test_one_failure_ends_the_waiting_of_all(server):
    teacher = connect(server, backoff=20.0)
    server.faults += ["error"] * 99
    began = time.monotonic()
    with pytest.raises(TeacherError, match="maximum context length"):
        ask(teacher, [[5], [5], [5], [5] * 128, [5], [5]], [[3]] * 6)
    wait_for_threads()
    assert time.monotonic() - began < 5


def test_a_failed_run_goes_on_where_it_stopped(pair, prompts, tmp_path, server):
    teacher = connect(server, max_retries=0)
    server.faults += [None] * 25 + ["error"]
    with pytest.raises(TeacherError):
        label(pair[0], teacher, prompts, tmp_path / "http", shard_size=1)
    assert 0 < len(list((tmp_path / "http").glob("train-*"))) < len(prompts)
    label(pair[0], teacher, prompts, tmp_path / "http", shard_size=1)
    label(*pair, prompts, tmp_path / "local")
    assert_rows_agree(rows_of(tmp_path / "http"), rows_of(tmp_path / "local"))


def test_nobody_waits_for_what_was_cancelled(server):
    teacher = connect(server, max_concurrency=1)
    server.asked.clear()
    server.faults += ["held"]
    readings = [teacher.read([[5, 6, token]], [1]) for token in (7, 8)]
    assert server.asked.wait(30)
    teacher.cancel()
    with pytest.raises(TeacherError, match="not asked"):
        readings[1].compare(0, slice(0, 2), torch.zeros(2, VOCAB_SIZE), torch.zeros(2, 1, dtype=torch.long))
    server.gate.set()
    assert len(readings[0].rows) == 1


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_than_allowed_are_under_way(pair, server, most):
    teacher = connect(server, max_concurrency=most)
    server.delay, server.most = 0.03, 0
    ask(teacher, [[5, 6]] * 12, [[3]] * 12)
    assert server.most == most


# ---------------------------------------------------------------------------------------------------------------------
# Beside the student's work


def wait_for_threads():
    for thread in threading.enumerate():
        if thread.name == "s2t-teacher":
            thread.join(30)
            assert not thread.is_alive()


def test_the_server_reads_while_the_student_writes(pair, prompts, tmp_path, server, monkeypatch):
    """The second batch of rollouts waits for a request of the first: without one it would wait for ever."""
    teacher, write, batches = connect(server), labeling.rollout, []

    def rollout(model, prompt_ids, *args, **kwargs):
        if batches:
            assert server.asked.wait(30)
        server.asked.clear()
        batches.append(len(prompt_ids))
        return write(model, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(labeling, "rollout", rollout)
    server.asked.clear()
    server.bodies.clear()
    label(pair[0], teacher, prompts, tmp_path / "http", batch_size=2, shard_size=6)
    assert batches == [2, 2, 2]
    assert sum("prompt_logprobs" in body for body in server.bodies) == len(prompts)  # nothing is read twice
    assert not teacher._begun
    monkeypatch.undo()
    label(*pair, prompts, tmp_path / "local", batch_size=2, shard_size=6)
    assert_rows_agree(rows_of(tmp_path / "http"), rows_of(tmp_path / "local"))


def test_the_server_reads_during_the_students_forward(pair, server, monkeypatch):
    teacher, forward = connect(server), points.TextLogits

    def text_logits(*args):
        assert server.asked.wait(30)
        return forward(*args)

    monkeypatch.setattr(points, "TextLogits", text_logits)
    server.asked.clear()
    sequences = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8]]
    found = score_trajectories(pair[0], teacher, sequences, [1] * 3, 5, RESERVED)
    for row, other in zip(found, score_trajectories(*pair, sequences, [1] * 3, 5, RESERVED)):
        assert row.teacher_top_id_S.tolist() == other.teacher_top_id_S.tolist()


def test_a_failure_ahead_ends_the_shard_and_leaves_nothing_behind(pair, prompts, tmp_path, server, monkeypatch):
    """Told at the next batch, not after all rollouts of the shard."""
    teacher, write, batches = connect(server, max_retries=0, max_concurrency=1), labeling.rollout, []

    def rollout(*args, **kwargs):
        if batches:
            wait_for_threads()
        batches.append(args)
        return write(*args, **kwargs)

    monkeypatch.setattr(labeling, "rollout", rollout)
    server.faults += [None, "error"]
    with pytest.raises(TeacherError, match="status 500"):
        label(pair[0], teacher, prompts, tmp_path / "http", batch_size=2, shard_size=6)
    assert len(batches) == 2
    assert not list((tmp_path / "http").glob("part-*"))
    wait_for_threads()
    assert not teacher._begun
    label(pair[0], teacher, prompts, tmp_path / "http", batch_size=2, shard_size=6)
    label(*pair, prompts, tmp_path / "local", batch_size=2, shard_size=6)
    assert_rows_agree(rows_of(tmp_path / "http"), rows_of(tmp_path / "local"))


def test_ctrl_c_waits_for_no_answer(pair, prompts, tmp_path, server, monkeypatch):
    """One request is under way and hangs, others wait for their turn: they are not sent."""
    teacher, write, batches = connect(server, max_concurrency=1), labeling.rollout, []

    def rollout(*args, **kwargs):
        if batches:
            assert server.asked.wait(30)
            raise KeyboardInterrupt
        batches.append(args)
        return write(*args, **kwargs)

    monkeypatch.setattr(labeling, "rollout", rollout)
    server.asked.clear()
    server.faults += ["held"]
    before = len(server.bodies)
    with pytest.raises(KeyboardInterrupt):
        label(pair[0], teacher, prompts, tmp_path, batch_size=2, shard_size=6)
    assert not server.gate.is_set() and not teacher._begun
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "s2t-teacher")
    server.gate.set()
    wait_for_threads()
    assert len(server.bodies) == before + 1


# ---------------------------------------------------------------------------------------------------------------------
# The start, and the key


def test_the_start_refuses_what_would_fail_later(pair, server):
    with pytest.raises(ValueError, match=r"`model` must be one of \['tiny-teacher'\]"):
        connect(server, model="other")
    server.max_logprobs = 7
    with pytest.raises(TeacherError, match="greater than max allowed: 7"):
        connect(server)
    server.max_logprobs, server.old = 97, True
    with pytest.raises(TeacherError, match="must know `logprob_token_ids`"):
        connect(server)
    server.stop()
    with pytest.raises(TeacherError, match="the connection failed"):
        connect(server)


def test_of_several_models_the_named_one_is_taken_or_the_default(server):
    assert connect(server, default_model="absent").model == "tiny-teacher"  # the only one
    server.other_names = ["another", "third"]
    assert connect(server, model="tiny-teacher", default_model="another").model == "tiny-teacher"
    assert connect(server, default_model="tiny-teacher").model == "tiny-teacher"
    for default in (None, "absent"):
        with pytest.raises(ValueError, match=r"`model` is required: .* offers \['another', 'third', 'tiny-teacher'\]"):
            connect(server, default_model=default)
    with pytest.raises(ValueError, match=r"`model` must be one of \['another', 'third', 'tiny-teacher'\]"):
        connect(server, model="absent", default_model="tiny-teacher")


def test_trajectories_must_fit_into_the_servers_context(pair, prompts, tmp_path, server):
    server.max_model_len = 16
    with pytest.raises(ValueError, match="`max_new_tokens` must be at most 6: `teacher_model` takes 15 tokens"):
        label(pair[0], connect(server), prompts, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("url", "changes", "message"),
    [
        ("localhost:8000", {}, "`url` must be like"),
        ("ftp://host", {}, "`url` must be like"),
        (f"http://me:{SECRET}@host", {}, "`url` must hold neither"),
        (f"http://host/?key={SECRET}", {}, "`url` must hold neither"),
        ("http://host", {"max_concurrency": 0}, "`max_concurrency`"),
        ("http://host", {"max_retries": -1}, "`max_retries`"),
        ("http://host", {"top_logprobs": True}, "`top_logprobs`"),
        ("http://host", {"timeout": 0}, "`timeout`"),
    ],
)
def test_illegal_arguments_are_named_without_a_secret(url, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        HTTPTeacher(url, **changes)
    assert SECRET not in str(caught.value)


def everything_of(error):
    """An exception and all that it drags along, as text and as objects' attributes."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {vars(error)} "
        for name in ("request", "response"):
            text += str(getattr(getattr(error, name, None), "headers", ""))
        error = error.__cause__ or error.__context__
    return text


def test_the_key_is_sent_and_told_to_nobody_else(pair, prompts, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    with TinyServer(pair[1], key=SECRET) as server:
        teacher = connect(server, api_key_env="MY_KEY", max_retries=1)
        label(pair[0], teacher, prompts, tmp_path / "labels", show_progress=True)
        assert set(server.keys) == {f"Bearer {SECRET}"}
        said = repr(teacher) + str(vars(teacher)) + str(vars(teacher._session)) + str(vars(teacher._auth))
        for fault in ("error", "dropped", "half", "cut"):
            server.faults += [fault, fault]
            with pytest.raises(TeacherError) as caught:
                ask(teacher, [[5, 6]], [[3]])
            said += everything_of(caught.value)
        server.key = "another"  # and this server repeats the key in its message
        with pytest.raises(TeacherError, match="status 401.*is MY_KEY set") as caught:
            ask(teacher, [[5, 6]], [[3]])
        said += everything_of(caught.value)
    monkeypatch.setenv("MY_KEY", f"{SECRET}\nX: y")
    with pytest.raises(ValueError, match="MY_KEY must hold a key") as caught:
        connect(server, api_key_env="MY_KEY")
    said += everything_of(caught.value) + caplog.text + "".join(capfd.readouterr())
    for file in (tmp_path / "labels").iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content and b"127.0.0.1" not in content
    assert SECRET not in said


def test_a_key_is_hidden_before_a_long_message_is_cut(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    auth = http_teacher._KeyFromEnvironment("MY_KEY")
    for start in range(280, 300):
        assert "sk-" not in http_teacher._message_of(("x" * start + SECRET).encode(), auth)


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-1", None])
def test_a_strange_retry_after_does_not_count(value):
    assert http_teacher._seconds(value) == 0.0


def test_no_key_is_sent_where_none_is_set(server):
    connect(server)
    assert set(server.keys) == {None}


def test_a_path_on_the_servers_disk_is_not_published():
    assert host_free("/home/someone/models/Qwen2.5-32B/") == "Qwen2.5-32B"
    assert host_free("Qwen/Qwen2.5-32B-Instruct") == "Qwen/Qwen2.5-32B-Instruct"


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


@pytest.fixture
def recipe(monkeypatch):
    return label_recipe


@pytest.fixture
def bench(pair, tmp_path):
    for name, model in zip(("student", "teacher"), pair):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    lines = [json.dumps({"prompt": " ".join(f"w{3 + (7 * i + j) % 78}" for j in range(3 + i % 4))}) for i in range(6)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    return tmp_path


def command(bench, output, **changes):
    settings = {
        "model": bench / "student",
        "dataset": bench / "problems.jsonl",
        "output_dir": bench / output,
        "max_new_tokens": 8,
        "num_candidates": 4,
        "divergence_threshold": 0.1,
        "points": "floor",
    } | changes
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_the_recipe_labels_with_a_server_and_loads_no_teacher(bench, server, recipe):
    recipe.main(command(bench, "local", teacher_model=bench / "teacher"))
    for file in (bench / "teacher").glob("*.safetensors"):
        file.unlink()
    recipe.main(command(bench, "http", teacher_model=bench / "teacher", teacher_url=server.url))
    assert_rows_agree(rows_of(bench / "http"), rows_of(bench / "local"))
    header = read_header(bench / "http")
    assert (header.teacher_source, header.top_logprobs) == ("tiny-teacher", 20)
    assert header.teacher_model == str(bench / "teacher")
    recipe.main(command(bench, "nameless", teacher_url=server.url))
    assert_rows_agree(rows_of(bench / "nameless"), rows_of(bench / "local"))
    assert read_header(bench / "nameless").teacher_model == "tiny-teacher"


def lower_bounds(pair, row, k):
    """What the divergence of a row must be where the server names k tokens and that of the text."""
    ids, first = torch.tensor(row["input_ids"]), row["prompt_length"] - 1
    with torch.no_grad():
        student_SV, teacher_SV = (model(ids[None]).logits[0, first:-1] for model in pair)
    student_SV[:, list(RESERVED)] = -math.inf
    ids_SN, logprobs_SN = named(teacher_SV, k)
    text_S1 = ids[first + 1 :, None]
    text_logprobs_S1 = torch.log_softmax(teacher_SV, -1).gather(-1, text_S1)
    twice_S1 = (ids_SN == text_S1).any(-1, keepdim=True)
    ids_SN = torch.cat([ids_SN, text_S1.masked_fill(twice_S1, -1)], -1)
    logprobs_SN = torch.cat([logprobs_SN, text_logprobs_S1.masked_fill(twice_S1, -math.inf)], -1)
    return coarse_divergence(student_SV, ids_SN, logprobs_SN, k)


@pytest.mark.parametrize("k", [3, VOCAB_SIZE])
def test_every_fault_in_one_run_changes_no_row_and_tells_no_key(pair, bench, recipe, k, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(recipe, "HTTPTeacher", partial(HTTPTeacher, timeout=0.6, backoff=0.02, max_retries=40))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    settings = {"teacher_model": bench / "teacher", "points": "all", "batch_size": 2}
    recipe.main(command(bench, "local", **settings))
    settings |= {"top_logprobs": k, "max_concurrency": 4}
    with TinyServer(pair[1], key=SECRET) as server:
        server.faults += [None, *FAULTS]  # the first is for the start
        server.point_faults += [None, *(FAULTS if k < VOCAB_SIZE else ())]  # all are named: no point is asked for
        recipe.main(command(bench, "http", teacher_url=server.url, **settings))
        assert not server.faults and not server.point_faults
        assert set(server.keys) == {f"Bearer {SECRET}"}
        server.key = "another"  # and this server repeats the key in its message
        with pytest.raises(SystemExit) as stopped:
            recipe.main(command(bench, "refused", teacher_url=server.url, **settings))
        assert stopped.value.code == 2
    rows, expected = rows_of(bench / "http"), rows_of(bench / "local")
    assert len(rows) == 6
    assert_rows_agree(rows, expected)
    for row, other in zip(rows, expected):
        found, wanted = torch.tensor(row["divergence"]), torch.tensor(other["divergence"])
        if k == VOCAB_SIZE:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(found, lower_bounds(pair, row, k), rtol=1e-4, atol=1e-4)
            assert (found < wanted - 1e-3).any()
    said = "".join(capfd.readouterr())
    assert "Unauthorized: Bearer ***" in said and "is OPENAI_API_KEY set?" in said
    assert "/v1/completions" in caplog.text  # what urllib3 logs is in it
    assert SECRET not in said + caplog.text
    for file in (bench / "http").iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content and b"127.0.0.1" not in content


def test_the_recipe_says_in_one_line_that_the_server_is_gone_and_goes_on_later(
    bench, server, recipe, capsys, monkeypatch
):
    monkeypatch.setattr(recipe, "HTTPTeacher", partial(HTTPTeacher, max_retries=0))
    arguments = command(bench, "http", teacher_model=bench / "teacher", teacher_url=server.url, shard_size=2)
    server.faults += [None] * 6 + ["error"]
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments)
    assert stopped.value.code == 1
    assert "status 500: Internal Server Error" in capsys.readouterr().err
    recipe.main(arguments)
    recipe.main(command(bench, "local", teacher_model=bench / "teacher"))
    assert_rows_agree(rows_of(bench / "http"), rows_of(bench / "local"))


def test_the_recipe_finds_the_teacher_among_several_models(pair, bench, recipe):
    with TinyServer(pair[1], name=str(bench / "teacher")) as server:
        server.other_names = ["another"]
        teacher = {"teacher_model": bench / "teacher", "teacher_url": server.url}
        recipe.main(command(bench, "default", **teacher))
        recipe.main(command(bench, "named", teacher_url=server.url, teacher_served_name=server.name))
    assert_rows_agree(rows_of(bench / "default"), rows_of(bench / "named"))


def test_the_recipe_refuses_in_one_line(bench, server, recipe, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "label", lambda *args: pytest.fail("weights were loaded"))
    server.max_logprobs, server.other_names = 5, ["another"]
    served = {"teacher_served_name": "tiny-teacher"}
    for changes, message in (
        ({}, "`teacher_model` is required, or `teacher_url`"),
        ({"teacher_model": "t", "teacher_served_name": "x"}, "`teacher_served_name` must be given with `teacher_url`"),
        ({"teacher_url": "nowhere"}, "`teacher_url` must be like"),
        ({"teacher_url": server.url, "teacher_served_name": "x"}, "`teacher_served_name` must be one of"),
        ({"teacher_url": server.url, "teacher_model": bench / "teacher"}, "`teacher_served_name` is required: "),
        ({"teacher_url": server.url, **served}, "greater than max allowed: 5"),
        (
            {"teacher_url": server.url, **served, "top_logprobs": 5, "max_new_tokens": 125},
            "`max_new_tokens` must be at most",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(command(bench, "labels", **changes))
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in error and len(error.strip().splitlines()) == 1
    assert not (bench / "labels").exists()
