"""A fixed share of tests/differential.py, and that it finds what is planted: a harness that cannot fail is no test."""

from collections import Counter
from dataclasses import replace
from functools import partial

import differential
import pytest
import torch
from differential import ARCHITECTURES, SETUPS, TRIGGERS, Case, draw, run_case
from tiny import EOS, PAD, WAYS
from transformers.utils import logging

from transformers_s2t import LocalSelector, S2TDecodingConfig, TeacherSelector, triggers
from transformers_s2t.decoding.selectors import Scores
from transformers_s2t.decoding.session import S2TSession


SHARE = range(42)
#: field -> every value that a night has to see
VALUES = {
    "architecture": set(ARCHITECTURES),
    "setup": set(SETUPS),
    "trigger": set(TRIGGERS),
    "attn": {"sdpa", "eager"},
    "tied": {True, False},
    "padding": {"none", "left", "right"},
    "mask": {"given", "ones", "absent"},
    "positions": {"absent", "right", "one-row", "shifted", "gap", "columns"},
    "inputs": {"ids", "embeds", "both"},
    "filler": {"pad", "any"},
    "in_call": {True, False},
    "pad_to_s2t": {True, False},
    "teacher_pad": {"same", "none", "other"},
    "suppressed_by": {"setting", "user"},
    "do_sample": {True, False},
    "num_return_sequences": {1, 2, 3},
    "again": {True, False},
    "num_candidates": set(range(1, 9)),
}
SEEN_IN_THE_SHARE = ("architecture", "setup", "trigger", "attn", "padding", "mask", "inputs", "do_sample")
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (12, 13, 14))
PADDED = Case(-1, prompts=PROMPTS, padding="left", new_tokens=4)
EVEN = replace(PADDED, prompts=((5, 6, 7, 8), (12, 13, 14, 15)), padding="none")


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize("number", SHARE)
def test_a_random_call_is_exact_on_both_ways_or_refused(number):
    result = run_case(draw(number))
    assert not result.failed, str(result)


def test_a_case_is_what_its_number_says():
    assert draw(5) == draw(5) != draw(6)


def test_a_night_sees_everything_and_the_share_most_of_it():
    for numbers, names in ((range(1000), VALUES), (SHARE, SEEN_IN_THE_SHARE)):
        cases = [draw(number) for number in numbers]
        for name in names:
            assert {getattr(case, name) for case in cases} == VALUES[name], name
    cases = [draw(number) for number in range(1000)]
    pads = Counter(
        "eos" if case.pad in case.eos else {PAD: "own", 1: "bos", None: "none"}.get(case.pad, "word") for case in cases
    )
    assert min(pads[kind] for kind in ("own", "eos", "bos", "none", "word")) >= 20
    assert min(sum(map(bool, (getattr(case, name) for case in cases))) for name in ("holes", "cached", "noise")) >= 20
    assert sum(case.extra > 0 and case.padding == "left" for case in cases) >= 20
    assert {case.teacher_rows for case in cases} == {-7, 0, 23}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", [PADDED, EVEN], ids=["padded", "even"])
def test_where_nothing_is_planted_the_reference_is_met_by_choices(case, setup):
    result = run_case(replace(case, setup=setup))
    assert result.kind == "exact", str(result)
    assert result.num_flipped > 0
    assert result.largest_error < differential.TOLERANCE / 2
    assert (result.largest_error > 0) == (setup != "takeover")  # which has no numbers to compare


def shift_scores_of_padded_rows(monkeypatch, by=0.001):
    """The second candidate's, in both ways."""

    def shifted(score):
        def score_and_shift(selector, session, rows_A, proposals):
            scores = score(selector, session, rows_A, proposals)
            scores = scores if isinstance(scores, Scores) else Scores(scores)
            padded_A = ~session.mask_BT[rows_A].all(-1)
            scores.scores_AK[:, 1] += by * padded_A
            return scores

        return score_and_shift

    for selector in (LocalSelector, TeacherSelector):
        monkeypatch.setattr(selector, "score", shifted(selector.score))


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup != "takeover"])
def test_scores_that_are_shifted_for_padded_rows_are_found(setup, monkeypatch):
    shift_scores_of_padded_rows(monkeypatch)
    result = run_case(replace(PADDED, setup=setup))
    assert result.kind == "wrong"
    assert all("row 1 step 0: score of" in why for _, why in result.ways.values()), str(result)
    assert run_case(replace(EVEN, setup=setup)).kind == "exact"


def test_a_takeover_by_another_token_is_found(monkeypatch):
    monkeypatch.setattr(S2TSession, "_takeover", lambda session, rows_A, logits_BV: logits_BV[rows_A].argmin(-1))
    result = run_case(replace(PADDED, setup="takeover"))
    assert [kind for kind, _ in result.ways.values()] == ["wrong", "wrong"]


@pytest.mark.parametrize("trigger", ["entropy", "margin", "kl_divergence"])
def test_a_trigger_that_is_a_thousandth_off_is_found(trigger, monkeypatch):
    case = replace(PADDED, trigger="kl" if trigger == "kl_divergence" else trigger)
    assert run_case(case).kind == "exact"
    value = getattr(triggers, trigger)
    monkeypatch.setattr(triggers, trigger, lambda *logits: value(*logits) + 1e-3)
    result = run_case(case)
    assert result.kind == "wrong"
    assert "trigger value" in result.ways["loop"][1]


def tell(told, **settings):
    return S2TDecodingConfig(**(settings | told))


def test_a_floor_fusion_or_warm_up_that_is_not_the_documented_one_is_found(monkeypatch):
    case = replace(PADDED, min_prob_ratio=0.05, fusion=(1.0, 0.1, -0.2), warmup_tokens=2, new_tokens=8)
    assert run_case(case).kind == "exact"
    for told in ({"min_prob_ratio": 0.4}, {"warmup_tokens": 1}):
        with monkeypatch.context() as patch:
            patch.setattr(differential, "S2TDecodingConfig", partial(tell, told))
            assert run_case(case).kind == "wrong", told
    monkeypatch.setattr(
        "transformers_s2t.decoding.session.fused_scores",
        lambda scores_AK, logprobs_AK, mask_AK, fusion, router_A: scores_AK.masked_fill(~mask_AK, -torch.inf),
    )
    assert run_case(case).kind == "wrong"


def test_a_way_that_does_not_say_what_was_selected_is_found_alone(monkeypatch):
    monkeypatch.setattr(
        "transformers_s2t.decoding.logits_process.fix_tokens", lambda scores_BV, token_B, asked_B: scores_BV
    )
    result = run_case(PADDED)
    assert [kind for kind, _ in result.ways.values()] == ["wrong", "exact"]
    assert "token" in result.ways["processor"][1]


def test_a_draw_from_other_probabilities_is_found(monkeypatch):
    case = replace(PADDED, do_sample=True, temperature=1.5, trigger="random", quantile=0.7)
    assert run_case(case).kind == "exact"
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda probs_BV, num_samples: multinomial(probs_BV**2, num_samples))
    assert [kind for kind, _ in run_case(case).ways.values()] == ["wrong", "wrong"]


@pytest.mark.parametrize(
    ("error", "at", "kind"),
    [(ValueError, 0, "refused"), (ValueError, 2, "late"), (AssertionError, 0, "wrong"), (IndexError, 2, "wrong")],
)
def test_errors_are_told_from_each_other_by_what_and_when(error, at, kind, monkeypatch):
    step = S2TSession.step

    def fail(session, input_ids_BT, *args, **kwargs):
        if input_ids_BT.shape[1] == session.prompt_length + at:
            raise error("planted")
        return step(session, input_ids_BT, *args, **kwargs)

    monkeypatch.setattr(S2TSession, "step", fail)
    result = run_case(PADDED)
    assert result.kind == kind
    assert result.failed is (kind != "refused")
    assert all("planted" in why for _, why in result.ways.values())


def test_one_way_that_refuses_what_the_other_does_is_told(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("planted")

    monkeypatch.setattr("differential.S2T", refuse)
    result = run_case(EVEN)
    assert (result.kind, result.failed) == ("differs", False)
    assert [kind for kind, _ in result.ways.values()] == ["refused", "exact"]


def test_what_happens_at_a_tie_is_no_fault(monkeypatch):
    shift_scores_of_padded_rows(monkeypatch)
    monkeypatch.setattr(differential, "TIE", 1e9)
    assert run_case(PADDED).kind == "tie"


def test_the_references_draw_is_torchs():
    for seed in range(20):
        probs_BV = torch.softmax(3 * torch.randn(3, 97, generator=torch.Generator().manual_seed(seed)), -1)
        probs_BV[:, ::3] = 0
        torch.manual_seed(seed)
        drawn_B, then = torch.multinomial(probs_BV, 1)[:, 0], torch.rand(())
        torch.manual_seed(seed)
        assert (probs_BV / torch.empty_like(probs_BV).exponential_()).argmax(-1).tolist() == drawn_B.tolist()
        assert torch.rand(()) == then


def test_the_command_line_tells_failures_by_number_and_ends_with_a_table(monkeypatch, capsys):
    monkeypatch.setattr(differential, "draw", lambda number: replace(PADDED, number=number))
    assert differential.main(["--cases", "2", "--seed", "7"]) == 0
    told = capsys.readouterr().out
    assert "2 cases" in told and "--case" not in told
    shift_scores_of_padded_rows(monkeypatch)
    assert differential.main(["--cases", "2", "--seed", "7"]) == 1
    told = capsys.readouterr().out
    for number in (7, 8):
        assert f"python tests/differential.py --case {number} " in told
    assert differential.main(["--case", "7"]) == 1
    told = capsys.readouterr().out
    assert all(way in told for way in WAYS) and "generate without S2T equals a forward" in told


@pytest.mark.parametrize("trigger", ["kl", "router"])
def test_generate_without_s2t_is_told_from_the_fault_wherever_it_lies(trigger):
    assert differential.plain_is_exact(replace(PADDED, trigger=trigger))
    assert not differential.plain_is_exact(replace(PADDED, trigger=trigger, padding="right"))


def test_a_row_that_ends_early_is_compared_up_to_its_end():
    """The reference ends a row where it says so, and the rest has to be padding."""
    free = replace(PADDED, eos=(), new_tokens=6)
    built = differential.build(free)
    prompt = differential.write_prompt(free, built.model)
    tokens = differential.decode(free, built, prompt, None).tokens_BN
    end = next(int(token) for token in tokens[0, 2:] if token not in tokens[1] and token != EOS)
    result = run_case(replace(free, eos=(end,)))
    assert result.kind == "exact", str(result)
    assert result.num_asked < 12
