"""A teacher with another tokenizer: every number against the enumeration of all token sequences of tiny vocabularies.

Legend: N decision points, K candidates, P partition (K + 1), V vocabulary.
"""

import functools
import hashlib
import math

import pytest
import torch
from tiny import BOS, EOS, tiny_model
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from transformers_s2t.labeling.cross_teacher import _Trajectory, score_with_teacher
from transformers_s2t.labeling.cross_tokenizer import CrossTokenizer, least_divergence, partition_divergence


SPECIAL = ["<pad>", "<s>", "</s>"]
STUDENT_MERGES = ["a b", "ab a", "b c", "c a", "bc a"]
TEACHER_MERGES = ["b a", "a ba", "c c", "a b", "ab c", "b b"]


def tokenizer_of(merges, characters="abc", **kwargs):
    """Byte-level BPE with the given merges; ids 0-2 are special."""
    tokens = [*SPECIAL, *characters, *(merge.replace(" ", "") for merge in merges)]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def trained_tokenizer(texts, vocab_size, normalizer=None):
    """Byte-level BPE with all 256 bytes."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class RandomModel:
    """Next-token logits that are random, but a function of the context: any language model there could be."""

    def __init__(self, vocab_size, seed=0, spread=1.5):
        self.vocab_size, self.seed, self.spread = vocab_size, seed, spread
        self.asked = 0
        self.logits = functools.cache(self._logits)

    def _logits(self, context):
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {context}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        return self.spread * torch.randn(self.vocab_size, generator=generator, dtype=torch.float64)

    def next_logits(self, contexts):
        self.asked += len(contexts)
        return torch.stack([self.logits(tuple(ids)) for ids in contexts])

    def along(self, ids):
        return torch.stack([self.logits(tuple(ids[: i + 1])) for i in range(len(ids))])


def enumerate_texts(model, cross, context, length):
    """All token sequences behind `context`, until they have `length` bytes or a token without text: (ids, text, P)."""
    done, open_ = [], [((), b"", 1.0)]
    while open_:
        ids, text, mass = open_.pop()
        for id, p in enumerate(torch.softmax(model.logits((*context, *ids)), -1).tolist()):
            data = cross.teacher_token_bytes(id)
            one = ((*ids, id), text + data, mass * p)
            (done if not data or len(one[1]) >= length else open_).append(one)
    assert sum(mass for *_, mass in done) == pytest.approx(1.0)
    return done


def log(value):
    return math.log(value) if value > 0 else float("-inf")


def marginals(model, cross, context, rest, candidate_ids):
    """log P(text goes on with each candidate | context, text goes on with `rest`), by enumeration."""
    texts = [cross.token_bytes(id) for id in candidate_ids]
    done = enumerate_texts(model, cross, context, len(rest) + max(map(len, texts)) + 1)
    whole = sum(mass for _, text, mass in done if text.startswith(rest))
    values = []
    for id, text in zip(candidate_ids, texts):
        if id == EOS:
            mass = sum(mass for ids, data, mass in done if data == rest and ids[-1] == EOS)
        else:
            mass = sum(mass for _, data, mass in done if data.startswith(rest + text))
        values.append(log(mass / whole))
    return values


def anchor_of(cross, sequence, position):
    """The context and r that `healed_tokens=1` means, from the text alone."""
    offset = sequence.offsets[position]
    count = sum(end < offset for end in sequence.ends)
    start = sequence.ends[count - 1]
    return sequence.ids[:count], sequence.data[start:offset]


STUDENT_IDS = [BOS, 5, 7, 4, 3, 6, 8, 3, 5]  # bytes: c aba b a ab bc a c


@pytest.fixture(scope="module")
def pair():
    return tokenizer_of(STUDENT_MERGES), tokenizer_of(TEACHER_MERGES)


@pytest.mark.parametrize("seed", range(3))
def test_following_every_tokenization_gives_the_exact_marginal(pair, seed):
    cross, model = CrossTokenizer(*pair, healed_tokens=1, min_mass=0.0), RandomModel(12, seed)
    sequence = cross.encode(STUDENT_IDS)
    positions = [2, 3, 4, 6, 7]
    candidate_ids_NK = torch.tensor([[3, 4, 5, 6, 7, 9, 10, EOS]] * len(positions))
    scores = cross.score_candidates(
        sequence, model.along(sequence.ids), positions, candidate_ids_NK, model.next_logits
    )
    for n, position in enumerate(positions):
        context, rest = anchor_of(cross, sequence, position)
        expected = marginals(model, cross, context, rest, candidate_ids_NK[n].tolist())
        assert scores.teacher_logprobs_NK[n].tolist() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(scores.lower_NK, scores.upper_NK, rtol=0, atol=1e-9)


def test_healing_back_to_the_start_is_the_marginal_of_the_whole_text(pair):
    cross, model = CrossTokenizer(*pair, healed_tokens=9, min_mass=0.0), RandomModel(12, 7)
    sequence = cross.encode(STUDENT_IDS[:5])
    candidate_ids = [3, 5, 7, 10, EOS]
    scores = cross.score_candidates(
        sequence, model.along(sequence.ids), [3], torch.tensor([candidate_ids]), model.next_logits
    )
    expected = marginals(model, cross, [BOS], sequence.data[1 : sequence.offsets[3]], candidate_ids)
    assert scores.teacher_logprobs_NK[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_estimate_and_truth_lie_between_the_bounds_and_close_in_as_more_is_followed(pair):
    """Random models write any tokenization; those that were trained keep to the canonical ones."""
    sequence = CrossTokenizer(*pair).encode(STUDENT_IDS)
    positions = list(range(2, len(STUDENT_IDS)))
    candidate_ids_NK = torch.tensor([[3, 4, 5, 6, 7, 9, 10, EOS]] * len(positions))
    errors, gaps = [], []
    for min_mass in (None, 0.1, 0.02, 0.002):
        cross = CrossTokenizer(*pair, min_mass=min_mass)
        for seed in range(3):
            model = RandomModel(12, seed)
            args = (sequence, model.along(sequence.ids), positions, candidate_ids_NK, model.next_logits)
            scores = cross.score_candidates(*args)
            exact_NK = CrossTokenizer(*pair, min_mass=0.0).score_candidates(*args).teacher_logprobs_NK
            for value_NK in (scores.teacher_logprobs_NK, exact_NK):
                assert (scores.lower_NK <= value_NK + 1e-9).all() and (value_NK <= scores.upper_NK + 1e-9).all()
            errors.append(float((scores.teacher_logprobs_NK - exact_NK).abs().mean()))
            gaps.append(float((scores.upper_NK.exp() - scores.lower_NK.exp()).mean()))
    for values in (errors, gaps):
        means = [sum(values[i : i + 3]) / 3 for i in range(0, 12, 3)]
        assert means == sorted(means, reverse=True) and 0 < means[3] < 0.05


@pytest.mark.parametrize(("ids", "known"), [([3, 4, 5, EOS], True), ([3, 4, 5, 6, 7, 9, 10, EOS], False)])
def test_bounds_along_the_trajectory_hold_what_the_canonical_spellings_give(pair, ids, known):
    """Without healing, where a teacher's token ends with the prefix: that has one spelling then."""
    cross = CrossTokenizer(*pair, healed_tokens=0, min_mass=None)
    sequence = cross.encode(STUDENT_IDS)
    positions = [i for i in range(1, len(STUDENT_IDS)) if sequence.offsets[i] in sequence.ends]
    candidate_ids_NK = torch.tensor([ids] * len(positions))
    for seed in range(10):
        model = RandomModel(12, seed)
        logits_TV, student_NV = model.along(sequence.ids), RandomModel(11, seed + 50).along([0] * len(positions))
        scores = cross.score_candidates(sequence, logits_TV, positions, candidate_ids_NK, model.next_logits)
        bounds = cross.bound_candidates(sequence, logits_TV, positions, candidate_ids_NK)
        events_NP = scores.partition_NP.exp()
        assert (bounds.lower_NP <= events_NP + 1e-9).all() and (events_NP <= bounds.upper_NP + 1e-9).all()
        student_NP = cross.student_partition(student_NV, candidate_ids_NK)
        least_N = least_divergence(bounds.lower_NP, bounds.upper_NP, student_NP)
        wanted_N = partition_divergence(scores.partition_NP, student_NP)
        assert (least_N <= wanted_N + 1e-9).all()
        assert torch.allclose(least_N, wanted_N, rtol=0, atol=1e-6) == known
        assert torch.equal(bounds.teacher_top_id_N, scores.teacher_top_id_N)


def test_the_least_divergence_is_that_of_the_best_teacher_between_the_bounds():
    generator = torch.Generator().manual_seed(0)
    student_NP = torch.log_softmax(torch.randn(6, 3, generator=generator).double(), -1)
    center_NP = torch.softmax(2 * torch.randn(6, 3, generator=generator).double(), -1)
    lower_NP, upper_NP = (center_NP - 0.15).clamp_min(0.0), (center_NP + 0.15).clamp_max(1.0)
    grid = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)
    teacher_GP = torch.cartesian_prod(grid, grid)
    teacher_GP = torch.cat([teacher_GP, 1 - teacher_GP.sum(-1, keepdim=True)], -1)
    for lower_P, upper_P, student_P in zip(lower_NP, upper_NP, student_NP):
        inside_GP = teacher_GP[((teacher_GP >= lower_P) & (teacher_GP <= upper_P)).all(-1)]
        wanted = float(partition_divergence(inside_GP.log(), student_P.expand_as(inside_GP)).min())
        assert float(least_divergence(lower_P[None], upper_P[None], student_P[None])) == pytest.approx(
            wanted, abs=0.01
        )


def test_one_token_of_one_character_needs_no_other_forward(pair):
    cross, model = CrossTokenizer(*pair, healed_tokens=0), RandomModel(12)
    sequence = cross.encode(STUDENT_IDS)
    scores = cross.score_candidates(
        sequence, model.along(sequence.ids), [1], torch.tensor([[3, 4, 5]]), model.next_logits
    )
    p_V = torch.softmax(model.logits((BOS,)), -1)
    starts = [[i for i in range(3, 12) if cross.teacher_token_bytes(i).startswith(c)] for c in (b"a", b"b", b"c")]
    assert scores.teacher_logprobs_NK[0].tolist() == pytest.approx([float(p_V[ids].sum().log()) for ids in starts])
    assert model.asked == scores.num_forwards == 0


def test_one_vocabulary_gives_the_ordinary_log_probabilities(pair):
    cross, model = CrossTokenizer(pair[0], pair[0]), RandomModel(11)
    assert cross.same_vocabulary
    candidate_ids_NK = torch.tensor([[3, 7, EOS], [4, 5, 6], [8, 9, 10]])
    for prompt in (None, [BOS, 3, 3, 3]):
        sequence = cross.encode(STUDENT_IDS, 2, prompt)
        assert sequence.ids == (STUDENT_IDS if prompt is None else prompt + STUDENT_IDS[2:])
        logits_TV = model.along(sequence.ids)
        scores = cross.score_candidates(sequence, logits_TV, [2, 4, 8], candidate_ids_NK, model.next_logits)
        shift = len(sequence.ids) - len(STUDENT_IDS)
        logp_NV = torch.log_softmax(logits_TV[torch.tensor([2, 4, 8]) + shift - 1].float(), -1)
        assert torch.equal(scores.teacher_logprobs_NK, logp_NV.gather(-1, candidate_ids_NK))
        assert torch.equal(scores.teacher_top_id_N, logp_NV.argmax(-1))
        torch.testing.assert_close(scores.partition_NP.exp().sum(-1), torch.ones(3, dtype=torch.float64))


def test_the_partition_adds_up_and_takes_the_longest_candidate(pair):
    cross, model = CrossTokenizer(*pair, healed_tokens=1, min_mass=0.0), RandomModel(12, 4)
    sequence = cross.encode(STUDENT_IDS)
    ids = [3, 6, 7, 4, EOS]  # a, ab, aba, b
    scores = cross.score_candidates(sequence, model.along(sequence.ids), [3], torch.tensor([ids]), model.next_logits)
    context, rest = anchor_of(cross, sequence, 3)
    texts = {id: cross.token_bytes(id) for id in ids if id != EOS}
    expected = dict.fromkeys([*ids, None], 0.0)
    for path, text, mass in enumerate_texts(model, cross, context, len(rest) + 4):
        if text.startswith(rest):
            found = [id for id, data in texts.items() if text[len(rest) :].startswith(data)]
            end = EOS if path[-1] == EOS and text == rest else None
            expected[max(found, key=lambda id: len(texts[id])) if found else end] += mass
    whole = sum(expected.values())
    assert scores.partition_NP[0].exp().tolist() == pytest.approx([m / whole for m in expected.values()], abs=1e-9)


def test_a_text_that_two_candidates_share_counts_once(pair):
    cross = CrossTokenizer(*pair)
    both_NP = cross.partition(torch.tensor([[0.5, 0.5, 0.2]]).log(), torch.tensor([[3, 3, 6]]))
    assert both_NP.exp()[0].tolist() == pytest.approx([0.3, 0.0, 0.2, 0.5])


def test_divergence_of_partitions():
    teacher_NP = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]]).log()
    student_NP = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]]).log()
    assert partition_divergence(teacher_NP, student_NP).tolist() == pytest.approx([0.5 * math.log(2), 0.0], abs=1e-7)


def test_the_students_partition_is_of_the_same_events(pair):
    cross = CrossTokenizer(*pair)
    logits_NV = RandomModel(11, 9).logits((1,))[None]
    p_V = torch.softmax(logits_NV[0], -1).tolist()
    got = cross.student_partition(logits_NV, torch.tensor([[3, 6, EOS]])).exp()[0].tolist()
    # a: "a" alone; ab: "ab", "aba"; the rest: b, c, bc, ca, bca, <pad>, <s>
    expected = [p_V[3], p_V[6] + p_V[7], p_V[EOS]]
    assert got == pytest.approx([*expected, 1 - sum(expected)])


def test_the_teachers_first_choice_is_the_longest_token_of_the_student_that_it_starts_with(pair):
    cross, model = CrossTokenizer(*pair), RandomModel(12)
    sequence = cross.encode([BOS, 5, 3])
    logits_TV = model.along(sequence.ids)
    for teacher_id, student_id in ((7, 3), (10, 6), (8, 5), (11, 4), (EOS, EOS)):  # aba -> a? below
        logits_TV[0] = 0.0
        logits_TV[0, 5] = 8.0  # c, the prefix's own token
        logits_TV[1] = 0.0
        logits_TV[1, teacher_id] = 9.0
        scores = cross.score_candidates(sequence, logits_TV, [2], torch.tensor([[3]]), model.next_logits)
        text = cross.teacher_token_bytes(teacher_id)
        fits = [i for i in range(3, 11) if text.startswith(cross.token_bytes(i))]
        expected = max(fits, key=lambda i: len(cross.token_bytes(i))) if fits else EOS
        assert scores.teacher_top_id_N.tolist() == [expected], (teacher_id, student_id)


def test_special_tokens_of_other_names_are_each_others_by_role(pair):
    other = tokenizer_of(TEACHER_MERGES)
    backend = Tokenizer.from_str(other.backend_tokenizer.to_str().replace("</s>", "<|end|>").replace("<s>", "<|go|>"))
    teacher = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|go|>", eos_token="<|end|>", pad_token="<pad>"
    )
    cross, model = CrossTokenizer(pair[0], teacher, teacher_eos_token_ids=[EOS, 0]), RandomModel(12)
    sequence = cross.encode([BOS, 3, EOS, 4])
    assert sequence.ids == [BOS, 3, EOS, 4] and sequence.ends == [1, 2, 3, 4]
    logits_TV = model.along(sequence.ids)
    scores = cross.score_candidates(sequence, logits_TV, [1, 3], torch.tensor([[EOS, 3]] * 2), model.next_logits)
    for n, at in enumerate((0, 2)):  # nothing is healed across a special token
        assert scores.teacher_logprobs_NK[n, 0].exp() == pytest.approx(
            float(torch.softmax(logits_TV[at], -1)[[EOS, 0]].sum())
        )


def test_a_special_token_without_a_counterpart_needs_the_teachers_own_prompt(pair):
    student = tokenizer_of(STUDENT_MERGES, extra_special_tokens=["<|user|>"])
    cross = CrossTokenizer(student, pair[1])
    user = student.convert_tokens_to_ids("<|user|>")
    with pytest.raises(ValueError, match=r"no counterpart of the special token '<\|user\|>'"):
        cross.encode([BOS, user, 3, 4])
    sequence = cross.encode([BOS, user, 3, 4], 2, [BOS, 5, 5])
    assert sequence.ids == [BOS, 5, 5, *cross.teacher.encode(b"ab")]
    assert sequence.offsets[2:] == [1, 2, 3] and sequence.fences[2:] == [1, 1, 1]
    model = RandomModel(12)
    scores = cross.score_candidates(
        sequence, model.along(sequence.ids), [2], torch.tensor([[user, 3]]), model.next_logits
    )
    assert scores.teacher_logprobs_NK[0, 0] == float("-inf")


TEXTS = [
    "the cat sat on the mat, the cats are 12 and 123; naïve café 日本語 日本 語",
    "über 日本語 mat cat 😀 the end",
]


def test_fragments_of_characters_are_compared_as_bytes():
    student = trained_tokenizer(TEXTS[:1], 262)
    teacher = trained_tokenizer(TEXTS * 3, 330)
    cross, model = CrossTokenizer(student, teacher), RandomModel(len(teacher))
    ids = [BOS, *student("the 日本語 cat", add_special_tokens=False)["input_ids"]]
    fragments = [i for i in range(len(ids)) if any(byte >= 0x80 for byte in cross.token_bytes(ids[i]))]
    assert len(fragments) > 3
    sequence = cross.encode(ids)
    candidate_ids_NK = torch.tensor([[ids[i], ids[1]] for i in fragments])
    scores = cross.score_candidates(
        sequence, model.along(sequence.ids), fragments, candidate_ids_NK, model.next_logits
    )
    assert scores.teacher_logprobs_NK.isfinite().all()
    exact = CrossTokenizer(student, teacher, healed_tokens=1, min_mass=0.0).score_candidates(
        sequence, model.along(sequence.ids), fragments, candidate_ids_NK, model.next_logits
    )

    def mass(context, data):
        """The recursion over every first token, spelled out."""
        total = 0.0
        for i, p in enumerate(torch.softmax(model.logits(tuple(context)), -1).tolist()):
            token = cross.teacher_token_bytes(i)
            if token and token.startswith(data):
                total += p
            elif token and data.startswith(token):
                total += p * mass([*context, i], data[len(token) :])
        return total

    for n, position in enumerate(fragments):
        context, rest = anchor_of(cross, sequence, position)
        for k, id in enumerate(candidate_ids_NK[n].tolist()):
            expected = log(mass(context, rest + cross.token_bytes(id)) / mass(context, rest))
            assert float(exact.teacher_logprobs_NK[n, k]) == pytest.approx(expected, abs=1e-9)
    cut = cross.encode([BOS, *ids[1 : fragments[1]]])  # ends in the middle of a character
    assert b"".join(map(cross.teacher_token_bytes, cut.ids)) == cut.data[1:]


def test_a_normalizer_does_not_change_the_bytes():
    student, teacher = trained_tokenizer(TEXTS, 300), trained_tokenizer(TEXTS, 280, normalizers.NFC())
    cross = CrossTokenizer(student, teacher)
    sequence = cross.encode(student("cafe\u0301 </s> \u212b", add_special_tokens=False)["input_ids"])
    assert b"".join(map(cross.teacher_token_bytes, sequence.ids)) == sequence.data.replace(b"\0", b"")


def test_sentencepiece_tokens_are_known_as_bytes(pair):
    tokens = ["<unk>", "<s>", "</s>", "<0xE6>", "<0x0A>", "▁", "a", "b", "▁a", "ab"]
    backend = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, [("▁", "a"), ("a", "b")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    cross = CrossTokenizer(tokenizer_of(STUDENT_MERGES), teacher)
    assert [cross.teacher_token_bytes(i) for i in range(10)] == [
        b"", b"", b"", b"\xe6", b"\n", b" ", b"a", b"b", b" a", b"ab"
    ]  # fmt: skip
    assert cross.encode([BOS, 6]).ids == [1, 9]  # no space in front, so the text is what the student wrote
    with pytest.raises(ValueError, match="no token for b'c'"):
        cross.encode([BOS, 5])


def test_tokenizers_that_drop_spaces_are_refused(pair):
    backend = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    with pytest.raises(ValueError, match="`teacher_processing_class` must have tokens that join to text"):
        CrossTokenizer(pair[0], words)
    for kwargs, name in (({"healed_tokens": -1}, "healed_tokens"), ({"min_mass": 2.0}, "min_mass")):
        with pytest.raises(ValueError, match=name):
            CrossTokenizer(*pair, **kwargs)


def test_a_point_without_any_context_is_refused(pair):
    cross, model = CrossTokenizer(*pair), RandomModel(12)
    sequence = cross.encode([3, 4, 5])
    logits_TV = model.along(sequence.ids)
    with pytest.raises(ValueError, match="No teacher token ends before position 1"):
        cross.score_candidates(sequence, logits_TV, [1], torch.tensor([[3]]), model.next_logits)


def test_a_rollout_does_not_join_the_first_token_of_a_prompt(pair):
    """Without a beginning token, nothing would say how likely the teacher holds it."""
    cross, ids = CrossTokenizer(*pair), [3, 4, 3]
    assert cross.encode(ids).ids == [7]  # aba
    assert cross.encode(ids, 1).ids == [3, 6]  # a ba
    assert cross.encode([BOS, *ids], 2).ids == [BOS, 7]
    assert cross.count_tokens(ids, 1) == 2


@pytest.mark.parametrize(
    ("family", "settings", "branches"),
    [
        ("llama", {}, True),
        ("qwen2", {"attn": "eager"}, True),
        ("mistral", {"sliding_window": 4}, False),
    ],
)
def test_a_model_reads_a_trajectory_once_and_then_what_branches_off(pair, family, settings, branches):
    model = tiny_model(family, seed=3, vocab_size=14, **settings)  # two rows more than the teacher's tokenizer has
    assert (_Trajectory(model, [1, 2], 0).cache is not None) == branches
    cross = CrossTokenizer(*pair, min_mass=0.0)
    sequences = [STUDENT_IDS, STUDENT_IDS[:6]]
    positions, candidate_ids = [[2, 5], [4]], [torch.tensor([[3, 7, 10], [6, 9, EOS]]), torch.tensor([[4, 5, 8]])]
    scores = score_with_teacher(cross, model, sequences, [1, 2], positions, candidate_ids)

    @torch.no_grad()
    def naive(contexts):
        return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in contexts])

    for b, ids in enumerate(sequences):
        sequence = cross.encode(ids, [1, 2][b])
        logits_TV = naive([sequence.ids[: i + 1] for i in range(len(sequence.ids))])
        expected = cross.score_candidates(sequence, logits_TV, positions[b], candidate_ids[b], naive)
        assert scores[b].num_forwards == expected.num_forwards > 0
        for got, other in zip(scores[b][:-1], expected[:-1]):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)
