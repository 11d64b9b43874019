"""Runs one policy on all problems: texts are written a batch at a time, read, and kept as one record a problem.

All policies go through `model.generate` with one clean generation config: nothing is inherited from the checkpoints
but their end-of-sequence tokens. Does not know how a selector scores, how an answer is read, or what else is compared.

Legend: B rows, T tokens of the whole text, S steps, N problems.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from s2t_recipes.answers import stand_ins
from s2t_recipes.evaluation.policies import Policy
from s2t_recipes.metrics import load_metric
from s2t_recipes.problems import Problem
from transformers_s2t import S2TDecodingConfig, S2TTrace, Selector, s2t_generate
from transformers_s2t.labeling.rollout import generate_rows
from transformers_s2t.models.shared_prefix import pad_prompts, read_prompts, read_shared


KINDS = ".tkf"  # plain, triggered with one candidate only, asked and kept, flipped
COUNTS = ("student_tokens", "teacher_tokens", "steps", "generated", "triggered", "asked", "flipped")


@dataclass
class Bench:
    """The problems, encoded, and the one way in which every policy is run on them.

    Args:
        problems, prompt_ids: problems with answers, and token ids of each prompt.
        tokenizer, pad_token_id: the small model's tokenizer, and the token that fills up short rows.
        device: device of the models.
        batch_size: sequences per `generate` call.
        drops_rows: whether finished rows leave their batch, where no selector runs.
        max_new_tokens: largest number of new tokens, for every policy.
        temperature, seed: temperature and seed of samples that vote.
        answer_style: how answers are read, see answers.py.
    """

    problems: list[Problem]
    prompt_ids: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    device: torch.device
    batch_size: int
    drops_rows: bool
    max_new_tokens: int
    temperature: float
    seed: int
    answer_style: str

    def check_length(self, max_positions: int | None) -> None:
        """Raises a ValueError for prompts that leave no room for `max_new_tokens`."""
        longest = max(map(len, self.prompt_ids))
        if max_positions is not None and longest + self.max_new_tokens > max_positions:
            raise ValueError(
                f"`max_new_tokens` must be at most {max(max_positions - longest, 0)} (context of {max_positions} "
                f"tokens, longest prompt {longest}), got {self.max_new_tokens}."
            )

    def warm_up(self, model: PreTrainedModel) -> None:
        """Writes a few tokens that nobody times: the first call pays for what the process sets up once."""
        longest = next(self._batches(2))
        inputs = self._encode(longest)
        model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=self.pad_token_id)

    def run(
        self,
        policy: Policy,
        model: PreTrainedModel,
        config: S2TDecodingConfig | None = None,
        selector: Selector | None = None,
        teacher: PreTrainedModel | None = None,
        lengths: Sequence[int] | None = None,
        progress: tqdm | None = None,
    ) -> tuple[dict, list[dict]]:
        """Runs one policy on all problems.

        Args:
            policy, model: what is run, and the model that writes the text.
            config, selector: how one `generate` call selects, and who decides; `None` for plain decoding.
            teacher: model that the "kl" trigger reads.
            lengths: expected number of tokens of each problem, so that texts of like length share a batch; votes stay
                with their prompts. `None`: prompts of like length share one.
            progress: bar that is advanced by problems.

        Returns:
            Totals over all batches, and one record per problem, in the problems' order.
        """
        settings, trace = self._settings(policy, model), None
        if config is not None:
            trace = S2TTrace()
            settings |= {"custom_generate": s2t_generate, "selector": selector, "decoding_config": config}
            settings |= {"trace": trace} | ({"teacher_model": teacher} if policy.trigger == "kl" else {})
        totals = {"seconds": 0.0, "cpu_seconds": 0.0, **dict.fromkeys(COUNTS, 0), "forwards": {}}
        records: list[dict | None] = [None] * len(self.problems)
        per_batch = max(1, self.batch_size // max(1, policy.num_votes))
        for number, rows in enumerate(self._batches(per_batch, None if policy.num_votes else lengths)):
            inputs = self._encode(rows, [one for one in (model, teacher) if one is not None])
            torch.manual_seed(self.seed * 1_000_003 + number)
            began, cpu_began = self._clock(), time.process_time()
            new_ids_BS = self._write(policy, model, inputs, settings)
            totals["seconds"] += self._clock() - began
            totals["cpu_seconds"] += time.process_time() - cpu_began
            new_ids_BS = new_ids_BS.cpu()
            num_tokens_B = count_tokens(new_ids_BS, settings["eos_token_id"])
            num_generated = int(num_tokens_B.sum())
            num_prompt = int(inputs["attention_mask"].sum()) * max(1, policy.num_votes)
            totals["steps"] += new_ids_BS.shape[1]
            totals["generated"] += num_generated
            totals["teacher_tokens" if policy.name == "teacher" else "student_tokens"] += num_prompt + num_generated
            batch_records = self._grade(policy, rows, new_ids_BS, num_tokens_B)
            if trace is not None:
                read_trace(trace, new_ids_BS, num_tokens_B, totals, batch_records)
            for i, record in zip(rows, batch_records):
                records[i] = record
            if progress is not None:
                progress.update(len(rows))
        return totals, records

    def _batches(self, size: int, lengths: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Numbers of the problems that share a batch, the long ones first."""
        # a batch that does not fit into memory fails at once
        order = sorted(range(len(self.problems)), key=lambda i: -len(self.prompt_ids[i]))
        if lengths is not None:
            order.sort(key=lambda i: -lengths[i])
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _encode(self, rows: list[int], models: Sequence[PreTrainedModel] = ()) -> dict[str, torch.Tensor]:
        inputs = pad_prompts([self.prompt_ids[i] for i in rows], self.pad_token_id, models)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _settings(self, policy: Policy, model: PreTrainedModel) -> dict[str, Any]:
        """Arguments of `generate`: greedy, or samples for a vote."""
        eos = model.generation_config.eos_token_id
        settings = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.pad_token_id, "do_sample": False}
        settings["eos_token_id"] = self.tokenizer.eos_token_id if eos is None else eos
        if policy.num_votes:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return settings

    def _write(
        self, policy: Policy, model: PreTrainedModel, inputs: dict[str, torch.Tensor], settings: dict[str, Any]
    ) -> torch.Tensor:
        """New tokens (B, S); as many rows for each prompt as there are votes."""
        if policy.trigger is not None:  # s2t_generate reads what prompts share once by itself
            return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        cache = None
        if policy.num_votes:
            cache = read_prompts(model, **inputs, num_copies=policy.num_votes)
            inputs = {name: rows_BT.repeat_interleave(policy.num_votes, 0) for name, rows_BT in inputs.items()}
        if not self.drops_rows:
            cache = read_shared(model, **inputs) if cache is None else cache
            output_BT = model.generate(**inputs, **settings, past_key_values=cache)
            return output_BT[:, inputs["input_ids"].shape[1] :]
        settings = {name: value for name, value in settings.items() if name != "max_new_tokens"}
        rows = generate_rows(model, inputs, GenerationConfig(**settings), self.max_new_tokens, cache=cache)
        width = max(map(len, rows))
        return torch.tensor([ids + [self.pad_token_id] * (width - len(ids)) for ids in rows])

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _grade(
        self, policy: Policy, rows: list[int], new_ids_BS: torch.Tensor, num_tokens_B: torch.Tensor
    ) -> list[dict]:
        """One record per problem: its id, the answer, whether that is right, and the text or the votes."""
        texts = self.tokenizer.batch_decode(new_ids_BS, skip_special_tokens=True)
        num_each = max(1, policy.num_votes)
        golds = [self.problems[i].answer for i in rows for _ in range(num_each)]
        graded = load_metric("math_answer").compute(predictions=texts, references=golds, style=self.answer_style)
        answers, correct = graded["answers"], graded["correct"]
        records = []
        for place, i in enumerate(rows):
            record, chosen = {"id": self.problems[i].id}, place
            if policy.num_votes:
                mine = range(place * num_each, (place + 1) * num_each)
                stands = stand_ins([texts[n] for n in mine], self.answer_style)
                winner = majority_vote(stands)
                record["votes"] = [None if stand is None else answers[mine[stand]] for stand in stands]
                record["any_correct"] = any(correct[n] for n in mine)
                chosen = None if winner is None else mine[stands[winner]]
            else:
                record["num_tokens"] = int(num_tokens_B[place])
                record["text"] = texts[place]
            record["answer"] = None if chosen is None else answers[chosen]
            record["correct"] = chosen is not None and correct[chosen]
            records.append(record)
        return records


def majority_vote(answers: Sequence[Hashable | None]) -> int | None:
    """Index of the first sample with the winning answer; answers that are to vote together must be equal.

    What could not be read does not vote; a tie goes to the answer seen first; `None` where nothing could be read.
    """
    counts = Counter(answer for answer in answers if answer is not None)  # most_common keeps the order of first sight
    return answers.index(counts.most_common(1)[0][0]) if counts else None


def count_tokens(new_ids_BS: torch.Tensor, eos_token_id: int | list[int]) -> torch.Tensor:
    """Generated tokens of each row (B,), up to and including its first end-of-sequence token."""
    eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
    before_end_BS = (~torch.isin(new_ids_BS, eos)).long().cumprod(-1)
    return (before_end_BS.sum(-1) + 1).clamp_max(new_ids_BS.shape[1])


def read_trace(
    trace: S2TTrace, new_ids_BS: torch.Tensor, num_tokens_B: torch.Tensor, totals: dict, records: list[dict]
) -> None:
    """Adds the trace of one call to the totals, and to each record its tokens and what happened at each."""
    triggered_BS, asked_BS, first_BS = (
        torch.stack([step[name] for step in trace.steps], dim=1) for name in ("triggered_B", "asked_B", "first_B")
    )
    flipped_BS = asked_BS & (first_BS != new_ids_BS)
    for name, flags_BS in (("triggered", triggered_BS), ("asked", asked_BS), ("flipped", flipped_BS)):
        totals[name] += int(flags_BS.sum())
    teacher_tokens = trace.tokens.get("teacher", 0)
    totals["teacher_tokens"] += teacher_tokens
    totals["student_tokens"] += sum(trace.tokens.values()) - teacher_tokens
    for kind, count in trace.forwards.items():
        totals["forwards"][kind] = totals["forwards"].get(kind, 0) + count
    codes = (triggered_BS.to(torch.uint8) + asked_BS + flipped_BS).tolist()
    ids, firsts, lengths = new_ids_BS.tolist(), first_BS.tolist(), num_tokens_B.tolist()
    for row, record in enumerate(records):
        end = lengths[row]
        record["tokens"] = ids[row][:end]
        record["kinds"] = "".join(KINDS[code] for code in codes[row][:end])
        record["student_tokens"] = {step: firsts[row][step] for step in range(end) if codes[row][step] == 3}
        record["asked"] = {}
    for number, step in enumerate(trace.steps):
        for row, asked in asked_points(step).items():
            records[row]["asked"][number] = asked


def asked_points(step: dict) -> dict[int, list]:
    """Row -> `[trigger value, [[id, selector's score, student's log-probability], ...]]` where a step was asked.

    Candidates above the floor alone, best first by the student; none for a takeover. Where fusion decided, its score
    is the fourth number. Four decimals; what is not finite is `None`.
    """
    values = step["value_B"].tolist()
    points = {row: [_short(values[row]), []] for row in step["asked_B"].nonzero()[:, 0].tolist()}
    if "rows_A" not in step:
        return points
    columns = [step[name] for name in ("candidate_ids_AK", "scores_AK", "logprobs_AK", "fused_AK")]
    mask_AK = step["mask_AK"]
    if torch.equal(columns[1][mask_AK].float(), columns[3][mask_AK]):
        del columns[3]
    for row, mask_K, *columns_K in zip(*(tensor.tolist() for tensor in (step["rows_A"], mask_AK, *columns))):
        candidates = [candidate for candidate, offered in zip(zip(*columns_K), mask_K) if offered]
        points[row][1] = [[id, *map(_short, numbers)] for id, *numbers in candidates]
    return points


def _short(number: float) -> float | None:
    return round(number, 4) if math.isfinite(number) else None
