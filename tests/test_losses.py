"""The losses, by hand on two or three candidates."""

import math

import pytest
import torch

from transformers_s2t import losses


MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_best_candidate_ignores_what_is_masked():
    teacher = torch.tensor([[-1.0, -0.5, -3.0], [-1.0, -2.0, -0.1]])
    assert losses.best_candidate(teacher, MASK).tolist() == [1, 0]


def test_cross_entropy_is_the_log_softmax_over_the_mask():
    scores = torch.tensor([[0.2, 0.5, 0.1], [0.3, 0.3, 9.0]])
    loss = losses.selection_cross_entropy(scores, MASK, torch.tensor([1, 0]), temperature=0.1)
    expected = math.log(math.exp(2) + math.exp(5) + math.exp(1)) - 5
    assert loss[0].item() == pytest.approx(expected, abs=1e-5)
    assert loss[1].item() == pytest.approx(math.log(2), abs=1e-6)


def test_distribution_kl_is_zero_where_the_scores_are_the_teacher():
    teacher = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 1e-9]]))
    assert losses.distribution_kl(teacher * 0.1, teacher, MASK, 0.1).abs().max() < 1e-6
    away = losses.distribution_kl(torch.zeros(2, 3), teacher, MASK, 0.1)
    expected = sum(p * math.log(p * 3) for p in (0.5, 0.3, 0.2))
    assert away[0].item() == pytest.approx(expected, abs=1e-6)


def test_hinge_counts_the_best_other_candidate_only():
    scores = torch.tensor([[0.2, 0.9, 0.5], [0.9, 0.1, 5.0]])
    loss = losses.hard_negative_hinge(scores, MASK, torch.tensor([1, 1]), margin=1.0)
    assert loss.tolist() == pytest.approx([1 - 0.4, 1 + 0.8])
    alone = losses.hard_negative_hinge(scores[:1], torch.tensor([[True, False, False]]), torch.tensor([0]), margin=1.0)
    assert alone.item() == 0.0


def test_text_kl_leaves_excluded_tokens_out():
    base = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    tuned = torch.tensor([[1.0, 2.0, 9.0, -9.0]])
    assert losses.text_kl(base, base).item() == pytest.approx(0.0)
    assert losses.text_kl(base, tuned).item() > 1.0
    assert losses.text_kl(base, tuned, torch.tensor([2, 3])).item() == pytest.approx(0.0, abs=1e-6)


def test_gradients_do_not_reach_masked_candidates():
    scores = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]))
    target = losses.best_candidate(teacher, MASK)
    total = (
        losses.selection_cross_entropy(scores, MASK, target, 0.1)
        + losses.distribution_kl(scores, teacher, MASK, 0.1)
        + losses.hard_negative_hinge(scores, MASK, target, 1.0)
    ).sum()
    total.backward()
    assert scores.grad[1, 2] == 0.0
    assert torch.isfinite(scores.grad).all() and scores.grad.abs().sum() > 0


def test_rank_correlation_by_hand():
    """Ranks 2 1 3 5 4 against 2 1 3 4 5: the squared differences sum to 2, so 1 - 6 * 2 / (5 * 24)."""
    scores = torch.tensor([[0.2, 0.1, 0.3, 0.5, 0.4], [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    teacher = torch.tensor([[-4.0, -5.0, -3.0, -2.0, -1.0], [-1.0, -2.0, -3.0, -9.0, -9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False  # what is below the floor has no rank
    expected = [1 - 6 * 2 / 120, -1.0, 0.0]
    assert torch.allclose(losses.spearman(scores, teacher, mask), torch.tensor(expected))
    ties = losses.spearman(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]]), mask[:1, :3])
    assert torch.allclose(ties, torch.tensor([0.8660254]))  # ranks 1.5, 1.5, 3 against 1, 2, 3


@pytest.mark.parametrize("max_logits", [1, 60, 1 << 20])
def test_the_chunked_kl_has_the_values_and_the_gradient_of_the_whole(max_logits):
    """Whatever the chunks; hidden states of a masked position get nothing from the others."""
    torch.manual_seed(0)
    head, base_ND = torch.nn.Linear(5, 12), torch.randn(7, 5)
    tuned_ND, excluded, weight_N = torch.randn(7, 5, requires_grad=True), torch.tensor([3, 11]), torch.rand(7)
    whole_N = losses.text_kl(head(base_ND), head(tuned_ND), excluded)
    (expected_ND,) = torch.autograd.grad((weight_N * whole_N).sum(), tuned_ND)
    rows = []

    def logits_of(hidden_ND):
        rows.append(len(hidden_ND))
        return head(hidden_ND)

    chunked_N = losses.chunked_text_kl(logits_of, base_ND, tuned_ND, excluded, max_logits)
    (weight_N * chunked_N).sum().backward()
    assert torch.allclose(chunked_N, whole_N, atol=1e-6) and torch.allclose(tuned_ND.grad, expected_ND, atol=1e-6)
    assert max(rows) <= max(1, max_logits // 12) and sum(rows) == 14  # each position once for either model


def test_the_chunked_kl_needs_no_gradient_and_no_position():
    head = torch.nn.Linear(5, 12)
    with torch.no_grad():
        kl_N = losses.chunked_text_kl(head, torch.zeros(3, 5), torch.ones(3, 5))
        assert (kl_N > 0).all() and not kl_N.requires_grad
        assert losses.chunked_text_kl(head, torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
    nothing = torch.zeros(0, 5, requires_grad=True)
    losses.chunked_text_kl(head, torch.zeros(0, 5), nothing).sum().backward()
    assert nothing.grad.shape == (0, 5)
