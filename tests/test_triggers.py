"""Trigger values by hand on four tokens, then batched; thresholds that reach their rate."""

import math

import pytest
import torch

from transformers_s2t.triggers import calibrate_threshold, entropy, kl_divergence, margin


NEVER = float("-inf")


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size():
    assert torch.allclose(entropy(torch.zeros(2, 4)), torch.full((2,), math.log(4)))


def test_entropy_of_two_equal_tokens_is_log_two():
    assert math.isclose(float(entropy(torch.tensor([[5.0, NEVER, 5.0, NEVER]]))), math.log(2), rel_tol=1e-6)


def test_entropy_by_hand():
    p = [0.5, 0.25, 0.125, 0.125]
    assert math.isclose(float(entropy(torch.tensor([p]).log())), 1.75 * math.log(2), rel_tol=1e-6)


def test_entropy_is_taken_over_the_renormalised_top_k_only():
    logits = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log()
    assert math.isclose(float(entropy(logits, top_k=2)), math.log(2), rel_tol=1e-6)
    assert float(entropy(logits, top_k=3)) > math.log(2)


def test_a_certain_student_has_no_entropy():
    assert float(entropy(torch.tensor([[NEVER, 0.0, NEVER, NEVER]]))) == 0.0


def test_margin_is_minus_the_logprob_difference_of_the_two_best():
    logits = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.4, 0.4, 0.1, 0.1]]).log()
    assert torch.allclose(margin(logits), torch.tensor([-math.log(3), 0.0]), atol=1e-6)


def test_margin_grows_with_doubt():
    assert float(margin(torch.tensor([[1.0, 0.9, 0.0]]))) > float(margin(torch.tensor([[1.0, 0.0, 0.0]])))


def test_margin_of_one_token_that_alone_is_allowed_is_minus_infinity():
    assert float(margin(torch.tensor([[NEVER, 2.0, NEVER]]))) == NEVER


def test_kl_by_hand_is_from_teacher_to_student():
    teacher = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    student = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    expected = sum(t * math.log(t / 0.25) for t in teacher[0].tolist())
    assert math.isclose(float(kl_divergence(teacher.log(), student.log())), expected, rel_tol=1e-5)
    assert not math.isclose(float(kl_divergence(student.log(), teacher.log())), expected, rel_tol=1e-3)


def test_kl_of_equal_distributions_is_zero_and_never_negative():
    torch.manual_seed(0)
    logits = torch.randn(5, 300)
    values = kl_divergence(logits + 3, logits)
    assert torch.allclose(values, torch.zeros(5), atol=1e-6)
    assert bool((values >= 0).all())


@pytest.mark.parametrize("bigger", ["teacher", "student"])
def test_kl_renormalises_the_rows_that_both_heads_have(bigger):
    """Qwen2.5 1.5B has 151936 rows and 32B has 152064: what lies above belongs to nobody."""
    torch.manual_seed(1)
    teacher, student = torch.randn(3, 6), torch.randn(3, 6)
    expected = kl_divergence(teacher, student)
    padding = torch.full((3, 2), 9.0)
    if bigger == "teacher":
        teacher = torch.cat([teacher, padding], dim=-1)
    else:
        student = torch.cat([student, padding], dim=-1)
    assert torch.allclose(kl_divergence(teacher, student), expected, atol=1e-6)


def test_kl_is_that_of_the_tokens_that_the_users_processors_leave():
    teacher = torch.tensor([[0.4, 0.3, 0.1, 0.2]]).log()
    student = torch.tensor([[NEVER, 1.0, 1.0, NEVER]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert math.isclose(float(kl_divergence(teacher, student)), expected, rel_tol=1e-5)


@pytest.mark.parametrize("value", [entropy, margin])
def test_rows_of_a_batch_have_their_own_values(value):
    torch.manual_seed(2)
    logits = torch.randn(5, 90)
    assert torch.allclose(value(logits), torch.cat([value(row[None]) for row in logits]))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.5, 0.99, 1.0])
def test_the_calibrated_threshold_reaches_the_rate(rate):
    torch.manual_seed(3)
    values = torch.randn(1000)
    achieved = float((values >= calibrate_threshold(values, rate)).float().mean())
    assert math.isclose(achieved, rate, abs_tol=5e-4)


def test_the_calibrated_threshold_lies_between_two_values():
    assert calibrate_threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5) == 2.5


@pytest.mark.parametrize(("rate", "achieved"), [(0.25, 0.2), (0.6, 0.8), (0.4, 0.2)])
def test_ties_take_the_side_that_comes_closer(rate, achieved):
    values = torch.tensor([5.0] + [3.0] * 3 + [1.0])
    threshold = calibrate_threshold(values, rate)
    assert math.isclose(float((values >= threshold).float().mean()), achieved, rel_tol=1e-6)


def test_ties_at_the_top_take_the_side_that_comes_closer():
    """60 % of the values are the greatest: for a target of 10 % a rate of 0 is closer than one of 60 %."""
    values = torch.tensor([5.0] * 6 + [1.0] * 4)
    assert not bool((values >= calibrate_threshold(values, 0.1)).any())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_calibration_names_a_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r"`target_rate` must be in \(0, 1\], got"):
        calibrate_threshold(torch.rand(10), rate)


def test_calibration_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibrate_threshold(torch.tensor([NEVER, NEVER]), 0.1)


def test_calibration_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        calibrate_threshold(torch.tensor([1.0, float("nan")]), 0.1)


def test_positions_that_can_never_trigger_count_in_the_rate():
    """Warm-up positions are marked -inf: 2 of 8 tokens are a quarter, although they are a third of the finite ones."""
    values = torch.tensor([NEVER, NEVER, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert calibrate_threshold(values, 0.25) == 4.5
