"""The labelled row and the header of a folder of rows: what the labeler writes and the trainer reads.

One row is one trajectory: a prompt and what the student wrote. It holds the trigger values of every generated
position, and the student's candidates with the teacher's log-probabilities at the chosen points. A folder of labels
holds `train-00000.parquet` and so on, `validation-00003.parquet` where problems were held out, a header
`s2t_labels.json`, and a `README.md` that tells `datasets.load_dataset(folder)` which of the files are data. This file
knows nothing of models.

Legend: B rows, T tokens, S = T - prompt_length generated positions, N decision points, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import lt
from typing import Any

from datasets import Features, List, Value

from transformers_s2t.config import MAX_CANDIDATES, check_choice, check_range
from transformers_s2t.fingerprints import same_weights, weights_name


HEADER_NAME = "s2t_labels.json"
#: Which generated positions become decision points.
POINTS = ("floor+kl", "kl", "floor", "all")
ROLLOUTS = ("greedy", "sample", "s2t", "s2t-local")
#: Rollouts in which a selector corrects the student.
CORRECTED_ROLLOUTS = ("s2t", "s2t-local")
#: Stands for "no such candidate" in log-probabilities: finite, so that sums and means stay so.
MISSING_LOGPROB = -1e4
FEATURES = Features(
    {
        "problem_id": Value("string"),
        "rollout": Value("int32"),  # which of the problem's rollouts, from 0
        "input_ids": List(Value("int32")),  # (T)
        "prompt_length": Value("int32"),
        "divergence": List(Value("float32")),  # (S) KL(teacher || student), nats
        "entropy": List(Value("float32")),  # (S) of the student over its renormalised top 64, nats
        "margin": List(Value("float32")),  # (S) minus the difference of its two best log-probabilities, nats
        "positions": List(Value("int32")),  # (N) index of the token under decision, its prefix is input_ids[:position]
        "candidate_ids": List(List(Value("int32"))),  # (N, K) the student's best first
        "student_logprobs": List(List(Value("float32"))),  # (N, K) full vocabulary, nats
        "teacher_logprobs": List(List(Value("float32"))),  # (N, K) full vocabulary, nats; see `cross_tokenizer`
        "teacher_top_id": List(Value("int32")),  # (N) the teacher's argmax, inside the candidates or not; -1: none
    }
)
_PER_TOKEN = ("divergence", "entropy", "margin")
_PER_POINT = ("candidate_ids", "student_logprobs", "teacher_logprobs", "teacher_top_id")
_TOLERANCE = 1e-3  # rounding of float32 sums over a large vocabulary


@dataclass(frozen=True)
class TrajectoryHeader:
    """How a folder of labels was made. A run may resume another one whose settings are the same.

    Args:
        model (`str`): name or path of the student.
        teacher_model (`str`): name or path of the teacher.
        teacher_source (`str`): "local", or the name under which a server offered the teacher. Never its address.
        teacher_quantization (`str`): "nf4" or "int8" where the teacher was quantized as it was loaded.
        top_logprobs (`int`, *optional*): how many tokens the teacher named at each position; `None` for all. Where it
            is given, `divergence` is a lower bound (`labeling.http_teacher.coarse_divergence`).
        cross_tokenizer (`dict`): empty where the teacher has the student's tokenizer. Otherwise the fingerprint of the
            teacher's ("teacher_vocab_hash") and how texts were compared ("healed_tokens", "min_mass", see
            `labeling.cross_tokenizer.CrossTokenizer`). Then `teacher_logprobs` belong to the disjoint events of
            `CrossTokenizer.partition`, `divergence` is the least that the logits along a trajectory allow over them,
            and a `teacher_top_id` of -1 says that no token of the student has the teacher's text.
        vocab_hash (`str`): fingerprint of the student's tokenizer.
        model_hash (`str`): fingerprint of the student's weights; empty until they have been loaded.
        num_candidates (`int`): K. 16 in the paper for labels (arXiv 2604.26940).
        target_rate (`float`): tau, the share of generated positions whose divergence reaches the threshold. 0.1 in
            the paper for labels.
        divergence_threshold (`float`, *optional*): in nats; `None` until it has been estimated.
        threshold_sample (`int`): number of first problems that it is estimated from; 0 where it was given.
        min_prob_ratio (`float`): the candidate floor of the rules with "floor".
        points (`str`): which positions became points: "floor+kl", "kl", "floor" or "all".
        max_points (`int`, *optional*): most points of one trajectory; `None` for all.
        rollout (`str`): who chose the tokens: "greedy" (student), "sample" (student at `temperature`), "s2t" (student,
            corrected by the teacher at decision points) or "s2t-local" (corrected by a trained selector).
        decoding (`dict`): for the last two, the settings of [`S2TDecodingConfig`] and the selector's adapter.
        temperature (`float`): temperature of the sampling.
        num_rollouts (`int`): rows of each problem; more than one with "sample" alone.
        validation_share (`float`): share of the problems that is held out of the split "train" (`split_of`).
        max_new_tokens (`int`): most new tokens of a rollout.
        seed (`int`): seed of the sampling.
        eos_token_ids (`tuple[int, ...]`): tokens that end a rollout.
        excluded_ids (`tuple[int, ...]`): reserved tokens, never generated and never proposed.
        dtype (`str`): type of the weights.
        prompt_source (`dict`): where the prompts came from and how they were formatted.
        versions (`dict`): versions of the libraries. A run may resume with others.
        num_problems (`int`): how many problems the folder is to hold. May grow.
        complete (`bool`): whether it holds all of them.
    """

    model: str
    teacher_model: str
    vocab_hash: str
    model_hash: str = ""
    num_candidates: int = 16
    target_rate: float = 0.1
    divergence_threshold: float | None = None
    threshold_sample: int = 200
    min_prob_ratio: float = 0.05
    points: str = "floor+kl"
    max_points: int | None = None
    rollout: str = "greedy"
    decoding: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    num_rollouts: int = 1
    validation_share: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    excluded_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    prompt_source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    teacher_source: str = "local"
    teacher_quantization: str = ""
    top_logprobs: int | None = None
    cross_tokenizer: dict[str, Any] = field(default_factory=dict)
    num_problems: int = 0
    complete: bool = False

    def __post_init__(self):
        check_range("num_candidates", self.num_candidates, 1, MAX_CANDIDATES, integer=True)
        check_range("target_rate", self.target_rate, 0.0, 1.0)
        if self.target_rate == 0:
            raise ValueError("`target_rate` must be in (0, 1], got 0.")
        if self.divergence_threshold is not None:
            check_range("divergence_threshold", self.divergence_threshold, -1.0, float("inf"))
        check_range("threshold_sample", self.threshold_sample, 0, 1 << 30, integer=True)
        if self.threshold_sample == 0 and self.divergence_threshold is None:
            raise ValueError("`threshold_sample` must be at least 1 where no `divergence_threshold` is given, got 0.")
        check_range("min_prob_ratio", self.min_prob_ratio, 0.0, 1.0)
        check_choice("points", self.points, POINTS)
        if self.max_points is not None:
            check_range("max_points", self.max_points, 1, 1 << 30, integer=True)
        check_choice("rollout", self.rollout, ROLLOUTS)
        if self.top_logprobs is not None:
            check_range("top_logprobs", self.top_logprobs, 1, 1 << 30, integer=True)
        check_range("temperature", self.temperature, 0.0, 100.0)
        if self.temperature == 0:
            raise ValueError("`temperature` must be above 0, got 0; rollouts without sampling are rollout='greedy'.")
        check_range("num_rollouts", self.num_rollouts, 1, 1 << 20, integer=True)
        if self.num_rollouts > 1 and self.rollout != "sample":
            raise ValueError(
                f"`num_rollouts` must be 1 for rollout={self.rollout!r}, which writes the same text every time, got "
                f"{self.num_rollouts}; rollout='sample' writes several."
            )
        check_range("validation_share", self.validation_share, 0.0, 1.0)
        if self.validation_share == 1:
            raise ValueError("`validation_share` must be in [0, 1), got 1: no problem is left for training.")
        check_range("max_new_tokens", self.max_new_tokens, 1, 1 << 20, integer=True)
        check_range("seed", self.seed, 0, (1 << 63) - 1, integer=True)
        for name in ("eos_token_ids", "excluded_ids"):
            ids = tuple(sorted({int(id) for id in getattr(self, name)}))
            if ids and ids[0] < 0:
                raise ValueError(f"`{name}` must hold token ids of 0 or more, got {ids}.")
            object.__setattr__(self, name, ids)

    def differences(self, stored: TrajectoryHeader) -> dict[str, tuple[Any, Any]]:
        """Settings in which a stored header differs from this one: field -> (stored, this one).

        Versions and progress do not count, nor does the threshold where this header has none. Fingerprints of weights
        are compared by `fingerprints.same_weights`, and returned as short names.
        """
        progress = {"versions", "num_problems", "complete"}
        if self.divergence_threshold is None:
            progress.add("divergence_threshold")
        differ = {
            f.name: (getattr(stored, f.name), getattr(self, f.name))
            for f in fields(self)
            if f.name not in progress and getattr(stored, f.name) != getattr(self, f.name)
        }
        if "model_hash" in differ:
            weights = differ.pop("model_hash")
            if not same_weights(*weights):
                differ["model_hash"] = tuple(map(weights_name, weights))
        return differ

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = HEADER_NAME) -> TrajectoryHeader:
        """Raises a ValueError for unknown, missing or illegal fields, naming `where` they are."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{where} has unknown fields {unknown}; it was written by a newer version.")
        missing = sorted({"model", "teacher_model", "vocab_hash"} - set(data))
        if missing:
            raise ValueError(f"{where} lacks the fields {missing}: it is not a header of labels.")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


def validate_row(row: Mapping[str, Any]) -> None:
    """Checks one row, every column and how they fit together.

    Raises:
        ValueError: naming the column and what is wrong.
    """
    check_columns(row, "a row")
    problem_id, prompt_length = row["problem_id"], row["prompt_length"]
    if not isinstance(problem_id, str) or not problem_id:
        raise ValueError(f"`problem_id` must be a non-empty string, got {problem_id!r}.")
    where = f"(problem_id {problem_id!r})"
    if not is_int(row["rollout"]) or row["rollout"] < 0:
        raise ValueError(f"`rollout` must be an integer of 0 or more, got {row['rollout']!r} {where}.")
    ids = _ids("input_ids", row["input_ids"], where)
    if not is_int(prompt_length) or not 1 <= prompt_length < len(ids):
        raise ValueError(
            f"`prompt_length` must be an integer in [1, {len(ids) - 1}], one token of the {len(ids)} at least being "
            f"generated, got {prompt_length!r} {where}."
        )
    for name, low, high in (("divergence", 0.0, math.inf), ("entropy", 0.0, math.inf), ("margin", -math.inf, 0.0)):
        values = _numbers(name, row[name], low, high, where)
        _check_length(name, values, len(ids) - prompt_length, "one for each generated position", where)

    positions = _ids("positions", row["positions"], where)
    if any(left >= right for left, right in zip(positions, positions[1:])):
        raise ValueError(f"`positions` must ascend {where}.")
    if positions and not (prompt_length <= positions[0] and positions[-1] < len(ids)):
        raise ValueError(
            f"`positions` must be in [{prompt_length}, {len(ids) - 1}], the generated tokens, got "
            f"{positions[0]} to {positions[-1]} {where}."
        )
    for name in _PER_POINT:
        if not isinstance(row[name], (list, tuple)):
            raise ValueError(f"`{name}` must be a list, got {type(row[name]).__name__} {where}.")
        _check_length(name, row[name], len(positions), "one for each of `positions`", where)
    _ids("teacher_top_id", row["teacher_top_id"], where, lowest=-1)
    width = None
    for n in range(len(positions)):
        at = f"at position {positions[n]} {where}"
        candidates = _ids("candidate_ids", row["candidate_ids"][n], at)
        width = len(candidates) if width is None else width
        if not candidates or len(set(candidates)) != len(candidates):
            raise ValueError(f"`candidate_ids` must hold one or more different ids, got {candidates} {at}.")
        _check_length("candidate_ids", candidates, width, "as many at every point of a row", at)
        for name in ("student_logprobs", "teacher_logprobs"):
            values = _numbers(name, row[name][n], MISSING_LOGPROB, 0.0, at)
            _check_length(name, values, width, "one for each candidate", at)
        values = row["student_logprobs"][n]
        if any(map(lt, values, values[1:])):
            raise ValueError(f"`student_logprobs` must descend, best candidate first {at}.")


def check_columns(columns: Iterable[str], what: str) -> None:
    missing, unknown = [name for name in FEATURES if name not in columns], sorted(set(columns) - set(FEATURES))
    if missing or unknown:
        raise ValueError(
            f"{what} must have the columns {', '.join(FEATURES)}; missing: {', '.join(missing) or 'none'}, unknown: "
            f"{', '.join(unknown) or 'none'}."
        )


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(name: str, values: Any, where: str, lowest: int = 0) -> Sequence[int]:
    # `map` runs in C: this looks at every number of every shard
    fine = isinstance(values, (list, tuple)) and set(map(type, values)) <= {int}
    if not fine or min(values, default=lowest) < lowest:
        raise ValueError(f"`{name}` must be a list of integers of {lowest} or more, got {_short(values)} {where}.")
    return values


def _numbers(name: str, values: Any, low: float, high: float, where: str) -> Sequence[float]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"`{name}` must be a list of numbers, got {_short(values)} {where}.")
    if set(map(type, values)) <= {float, int} and math.isfinite(sum(values)):
        if low - _TOLERANCE <= min(values, default=low) and max(values, default=low) <= high + _TOLERANCE:
            return values
    for value in values:  # which one is it
        if not isinstance(value, (float, int)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"`{name}` must hold finite numbers, got {value!r} {where}.")
        if not low - _TOLERANCE <= value <= high + _TOLERANCE:
            raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r} {where}.")
    return values


def _check_length(name: str, values: Sequence, length: int, why: str, where: str) -> None:
    if len(values) != length:
        raise ValueError(f"`{name}` must have {length} entries, {why}, got {len(values)} {where}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
