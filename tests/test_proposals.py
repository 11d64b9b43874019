"""The student's top-K and the candidate floor: by hand on four tokens, then batched."""

import math

import pytest
import torch

from transformers_s2t.proposals import exclude, floor_mask, propose, stable_topk


NEVER = float("-inf")


def test_candidates_come_best_first_with_their_full_vocabulary_logprobs():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    proposals = propose(probabilities.log(), 3)
    assert proposals.ids_BK.tolist() == [[1, 3, 2]]
    assert torch.allclose(proposals.logprobs_BK.exp(), torch.tensor([[0.4, 0.3, 0.2]]))
    assert proposals.mask_BK.tolist() == [[True, True, True]]


def test_logprobs_do_not_depend_on_a_shift_of_the_logits():
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0]])
    assert torch.allclose(propose(logits + 7, 4).logprobs_BK, propose(logits, 4).logprobs_BK, atol=1e-6)


def test_the_floor_keeps_candidates_from_the_given_share_of_the_best_on():
    logprobs = torch.tensor([[0.5, 0.26, 0.24]]).log()
    assert floor_mask(logprobs, 0.5).tolist() == [[True, True, False]]


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 4), (0.05, 3), (0.5, 2), (1.0, 1)])
def test_the_floor_is_a_share_of_the_best_probability(ratio, kept):
    logits = torch.tensor([[0.6, 0.31, 0.07, 0.02]]).log()
    assert int(propose(logits, 4, ratio).mask_BK.sum()) == kept


def test_a_floor_of_one_keeps_exact_ties_only():
    assert propose(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 4, 1.0).mask_BK.tolist() == [[True, True, False, False]]


def test_without_a_floor_forbidden_tokens_are_still_not_offered():
    proposals = propose(torch.tensor([[1.0, NEVER, 2.0, NEVER]]), 4, 0.0)
    assert proposals.ids_BK[0, :2].tolist() == [2, 0]
    assert proposals.mask_BK.tolist() == [[True, True, False, False]]


def test_the_first_candidate_survives_the_floor_even_where_it_is_forbidden():
    assert floor_mask(torch.tensor([[NEVER, NEVER]]), 0.05).tolist() == [[True, False]]


def test_excluded_ids_are_not_offered_and_take_no_probability():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    proposals = propose(exclude(logits, torch.tensor([0, 3])), 2)
    assert proposals.ids_BK.tolist() == [[1, 2]]
    assert torch.allclose(proposals.logprobs_BK.exp(), torch.tensor([[0.6, 0.4]]))
    assert torch.isfinite(logits).all(), "the caller's logits were changed"


def test_rows_of_a_batch_are_proposed_for_on_their_own():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    batched = propose(logits, 7, 0.3)
    for row in range(6):
        alone = propose(logits[row : row + 1], 7, 0.3)
        assert torch.equal(batched.ids_BK[row], alone.ids_BK[0])
        assert torch.equal(batched.mask_BK[row], alone.mask_BK[0])
        expected = sorted(range(50), key=lambda i: -logits[row, i])[:7]
        assert batched.ids_BK[row].tolist() == expected
    assert len(set(batched.mask_BK.sum(-1).tolist())) > 1, "every row kept as many: the floor was not tried"


@pytest.mark.parametrize("size", [4, 40, 4000])
def test_the_first_candidate_is_the_one_that_argmax_takes_in_ties(size):
    """`torch.topk` promises no order among equals; greedy decoding takes `argmax`, and K = 1 must be greedy."""
    torch.manual_seed(size)
    logits = torch.randint(0, 3, (64, size)).float()
    for k in (1, 2, 4):
        values, ids = stable_topk(logits, k)
        assert torch.equal(ids[:, 0], logits.argmax(-1))
        assert torch.equal(logits.gather(-1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist()), "a token is offered twice"


def test_half_precision_logits_are_read_in_float32():
    proposals = propose(torch.tensor([[0.5, 2.0, -1.0, 1.0]], dtype=torch.bfloat16), 4)
    assert proposals.logprobs_BK.dtype == torch.float32
    assert math.isclose(float(proposals.logprobs_BK.exp().sum()), 1.0, rel_tol=1e-6)
