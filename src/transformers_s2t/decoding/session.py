"""One decoding step, on one screen ([`S2TSession.step`]), and what a call keeps between steps.

Knows prefixes and caches; does not know whether a logits processor or `s2t_generate` drives it.

Legend: B rows, A asked rows, K candidates, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from transformers_s2t import triggers
from transformers_s2t.config import (
    FusionWeights,
    S2TDecodingConfig,
)
from transformers_s2t.decoding.selectors import NextStep, Scores, Selector, check_teacher, name_of
from transformers_s2t.fusion import fused_scores
from transformers_s2t.model_checks import (
    Reader,
    check_context,
    check_models,
    check_reads_in_parts,
    check_room,
)
from transformers_s2t.proposals import Proposals, propose
from transformers_s2t.reserved_tokens import check_same_ids
from transformers_s2t.router import LastHidden
from transformers_s2t.scoring.candidates import (
    PrefixCache,
)


class StepResult(NamedTuple):
    """What a step decided.

    Attributes:
        token_B: the selected token where `asked_B`, the student's first elsewhere.
        asked_B: rows whose selector was asked; the others decode by the user's own settings.
        advance: where scoring has already run the next forward: returns its [`NextStep`] and moves the driving call's
            cache there. Not to be called after the last token. `None` where the next forward is still to run.
    """

    token_B: torch.Tensor
    asked_B: torch.Tensor
    advance: Callable[[], NextStep] | None = None


@dataclass
class S2TTrace:
    """What happened in one `generate` call. Pass an empty one to `S2T(..., trace=)` or `s2t_generate(trace=)`.

    A new call clears it. Tensors are on the CPU, one entry per generated token, in order.

    Attributes:
        prompt_length: columns of the prompt.
        steps: per step a dict with `value_B` (trigger value), `triggered_B`, `asked_B`, `first_B` (the student's first
            token), `token_B` (the selected one; for rows that were asked), `forwards` (how many, by kind), and, where
            any row was asked, `rows_A`, `candidate_ids_AK`, `scores_AK` (the selector's), `mask_AK` (above the floor),
            `logprobs_AK` (the student's, nats) and `fused_AK` (what decided; -inf below the floor). A takeover has no
            candidates.
        forwards: number of forwards of the whole call, by kind. "teacher", "scorer" and "router" forwards are run in
            addition to plain decoding's own ("router" only where the call's own forwards do not give its hidden
            states). A "tree" forward replaces one of plain decoding's, because it both scores and decodes; at the
            last token there is none to replace.
        tokens: number of tokens in these forwards, by kind, over all rows.
    """

    prompt_length: int = 0
    steps: list[dict] = field(default_factory=list)
    forwards: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def clear(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.steps, self.forwards, self.tokens = [], {}, {}

    def rows(self) -> list[list[dict]]:
        """The steps of each row: dicts with `value`, `triggered`, `asked`, `flipped`, `first`, `token`, `forwards`
        (the step's, which all rows share), and, where the row was asked, `candidate_ids`, `scores` and `logprobs` of
        the candidates above the floor."""
        if not self.steps:
            return []
        out: list[list[dict]] = [[] for _ in range(len(self.steps[0]["asked_B"]))]
        for step in self.steps:
            where = {int(row): a for a, row in enumerate(step.get("rows_A", []))}
            for row, items in enumerate(out):
                asked = bool(step["asked_B"][row])
                item = {
                    "value": float(step["value_B"][row]),
                    "triggered": bool(step["triggered_B"][row]),
                    "asked": asked,
                    "first": int(step["first_B"][row]),
                    "token": int(step["token_B"][row]),
                    "flipped": asked and int(step["first_B"][row]) != int(step["token_B"][row]),
                    "forwards": step["forwards"],
                }
                if row in where and "scores_AK" in step:
                    mask_K = step["mask_AK"][where[row]]
                    item["candidate_ids"] = step["candidate_ids_AK"][where[row]][mask_K].tolist()
                    item["scores"] = step["scores_AK"][where[row]][mask_K].tolist()
                    item["logprobs"] = step["logprobs_AK"][where[row]][mask_K].tolist()
                items.append(item)
        return out


class S2TSession:
    """The state of one `generate` call: caches, trigger threshold, prompt length. Made anew for every call.

    Args:
        selector: who chooses.
        config: `None` for the selector's own defaults.
        prompt_length: columns of the prompt; warm-up counts from there.
        teacher_model: for the "kl" trigger where the selector is local.
        student_cache: the cache of the `generate` call that drives this session, so that nothing is computed twice;
            `None` makes the session keep caches of its own.
        trace: filled during the call.
        model: the small model, `None` where it is not known.
        prompt_embeds_BTD: embeddings of a prompt that was given as such.

    Attributes:
        excluded_ids: token ids that this call never writes, `None` for none.
    """

    def __init__(
        self,
        selector: Selector,
        config: S2TDecodingConfig | None,
        prompt_length: int,
        teacher_model: PreTrainedModel | None = None,
        student_cache: Cache | None = None,
        trace: S2TTrace | None = None,
        model: PreTrainedModel | None = None,
        prompt_embeds_BTD: torch.Tensor | None = None,
    ):
        self.selector = selector
        self.config = selector.resolve_config(config)
        self.threshold = self.config.resolve_threshold(selector.thresholds)
        self.fusion = self.config.fusion or selector.fusion or FusionWeights()
        self.router = selector.needed_router(self.config)
        self.prompt_length = prompt_length
        self.teacher_model = check_teacher(self.config, selector, teacher_model)
        self.student_cache = student_cache
        self.trace = trace
        self._random = torch.Generator().manual_seed(self.config.seed)
        self._teacher_prefix: PrefixCache | None = None
        self._teacher_rows: int | None = None
        self.excluded_ids = selector.excluded_ids
        self.prompt_embeds_BTD = prompt_embeds_BTD
        self._teacher_logits_BV: torch.Tensor | None = None
        self._scorer_prefix: PrefixCache | None = None
        self._writer_prefix: PrefixCache | None = None
        self.hidden = LastHidden()
        watches = {} if self.router is None else {id(self.router.read): self.hidden.see}
        if self.router is not None:
            model = self.router.model
        self.views = selector.views(model, watches)
        self._hidden_BD: torch.Tensor | None = None
        self._router_logits_B: torch.Tensor | None = None
        self.input_ids_BT: torch.Tensor | None = None
        self.mask_BT: torch.Tensor | None = None
        self.default_B: torch.Tensor | None = None
        self.head_is_plain: bool | None = None  # known after the first tree
        self._step_forwards: dict[str, int] = {}
        self._room: dict[str, int | None] = {}  # name of a model -> most tokens that it can read
        if trace is not None:
            trace.clear(prompt_length)

    def check(
        self,
        mask_BT: torch.Tensor | None,
        num_head_rows: int,
        model: PreTrainedModel | None = None,
        input_ids: torch.Tensor | None = None,
        eos_token_ids: Collection[int] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        """All checks that can be made before the first token.

        Args:
            mask_BT: mask of the prompt, bool; `None` where nothing is padding.
            num_head_rows: V of the small model.
            model: the small model, `None` where it is not known.
            input_ids: the prompt.
            eos_token_ids: ids that end a text.
            max_new_tokens: most new tokens, `None` where that is not known.

        Raises:
            ValueError: more candidates than tokens; a model that is no causal language model, or cannot be read on a
                cache ([`check_reads_in_parts`]); a text that does not fit into a model's context ([`check_context`]);
                a teacher whose token ids mean something else.
        """
        num_tokens = num_head_rows - (0 if self.selector.excluded_ids is None else len(self.selector.excluded_ids))
        if self.config.num_candidates > num_tokens:
            raise ValueError(
                f"`num_candidates` must be in [1, {num_tokens}], the model's vocabulary without reserved tokens, got "
                f"{self.config.num_candidates}."
            )
        lengths_B = torch.tensor([self.prompt_length]) if mask_BT is None else mask_BT.sum(-1)
        shortest, length = lengths_B.min().item(), lengths_B.max().item()
        own = getattr(self.selector, "model", None)
        model = own if model is None else model
        scorers = {
            "model": getattr(self.router, "model", None) if own is None else own,
            "teacher_model": self.teacher_model if self.runs_teacher else None,
        }
        scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        check_models(model, scorers)
        readers = [Reader("model", model, is_scorer="model" in scorers, reads_candidates=own is not None)]
        readers.append(Reader("teacher_model", scorers.get("teacher_model")))
        readers = [reader for reader in readers if reader.model is not None]
        check_context(readers, length, max_new_tokens, shortest)
        self._room = {reader.name: reader.room(shortest) for reader in readers}
        if "teacher_model" in scorers:
            if model is not None:
                check_same_ids(name_of(model), name_of(self.teacher_model))
            num_known = self.teacher_model.get_input_embeddings().weight.shape[0]
            if num_known < num_head_rows:
                self._leave_out_what_the_teacher_lacks(num_known, num_head_rows, mask_BT, input_ids, eos_token_ids)
        is_padded = mask_BT is not None and not bool(mask_BT.all())
        for name, scorer in scorers.items():  # last, because it runs the models
            check_reads_in_parts(name, scorer, is_padded)

    def _leave_out_what_the_teacher_lacks(
        self,
        num_known: int,
        num_head_rows: int,
        mask_BT: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        eos_token_ids: Collection[int],
    ) -> None:
        """Excludes token ids that the teacher's embedding lacks: it could not read a text that holds them. An id that
        ends a text may be one of them, because nothing is read after it.

        Raises:
            ValueError: where the prompt holds one.
        """
        self._teacher_rows = num_known
        if input_ids is not None and input_ids.numel():
            last = int((input_ids if mask_BT is None else input_ids.masked_fill(~mask_BT.bool(), 0)).max())
            if last >= num_known:
                raise ValueError(
                    f"The prompt holds token id {last}, but `teacher_model` knows {num_known} tokens: choose a "
                    "teacher with the tokenizer of `model`."
                )
        lacking = torch.tensor([id for id in range(num_known, num_head_rows) if id not in eos_token_ids])
        own = self.selector.excluded_ids
        self.excluded_ids = lacking if own is None else torch.cat([own, lacking.to(own)]).unique()

    def step(
        self,
        input_ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        logits_BV: torch.Tensor,
        active_B: torch.Tensor | None = None,
        default_B: torch.Tensor | None = None,
        hidden_BD: torch.Tensor | None = None,
    ) -> StepResult:
        """One decoding step: trigger, candidates, selection.

        Args:
            input_ids_BT: everything so far, prompt included.
            mask_BT: bool, False at padding.
            logits_BV: the student's next-token logits, after the user's processors, before any sampling warper, and
                with this session's `excluded_ids` at -inf: triggers and proposals must not see reserved tokens.
            active_B: rows that have not finished; `None` for all.
            default_B: the tokens of rows that are not asked, where they are known already (see `StepResult.advance`).
            hidden_BD: the last token's hidden states at the router's layer, from the forward that gave the logits.
                With `None`, a router that is needed reads the prefix again, on a cache of its own.
        """
        past_warmup = input_ids_BT.shape[1] - self.prompt_length >= self.config.warmup_tokens
        if mask_BT.shape[1] > input_ids_BT.shape[1]:  # a prompt of embeddings has no ids: fill in any
            input_ids_BT = nn.functional.pad(input_ids_BT, (mask_BT.shape[1] - input_ids_BT.shape[1], 0))
        self.input_ids_BT, self.mask_BT, self._teacher_logits_BV = input_ids_BT, mask_BT, None
        self._hidden_BD, self._router_logits_B = hidden_BD, None
        self.default_B, self._step_forwards = default_B, {}
        config, device = self.config, logits_BV.device
        if active_B is None:
            active_B = torch.ones(len(logits_BV), dtype=torch.bool, device=device)

        # 1. trigger
        value_B = self._trigger_value(logits_BV)
        triggered_B = active_B & past_warmup
        if config.trigger == "never":
            triggered_B = torch.zeros_like(triggered_B)
        elif self.threshold is not None:
            triggered_B = triggered_B & (value_B >= self.threshold)
        unsound_B = active_B & (~(logits_BV.amax(-1) > float("-inf")) | value_B.isnan())
        any_triggered, any_unsound = torch.stack([triggered_B.any(), unsound_B.any()]).tolist()
        if any_unsound:
            check_choosable(logits_BV[active_B])
            check_not_nan(value_B, "trigger's values")
        if not any_triggered:  # an ordinary step costs no more than its trigger
            first_B = logits_BV.argmax(-1)
            self._record(value_B, triggered_B, triggered_B, first_B, first_B)
            return StepResult(first_B, triggered_B)

        # 2. candidates
        proposals = propose(logits_BV, config.num_candidates, config.min_prob_ratio)
        token_B = proposals.ids_BK[:, 0].clone()
        asked_B = triggered_B if self.selector.takeover else triggered_B & (proposals.mask_BK.sum(-1) > 1)

        # 3. selection
        scored, advance = {}, None
        if bool(asked_B.any()):
            rows_A = asked_B.nonzero()[:, 0]
            if self.selector.takeover:
                token_B[rows_A] = self._takeover(rows_A, logits_BV)
            else:
                # the floor keeps the first candidates of each row: no more are run than the widest row keeps
                width = int(proposals.mask_BK[rows_A].sum(-1).max())
                asked = Proposals(*(tensor[rows_A, :width] for tensor in proposals))
                if self.selector.appends_candidates:
                    check_room("model", self._room.get("model"), mask_BT, num_more=1)
                scores = self.selector.score(self, rows_A, asked)
                scores_AK, advance_from = scores if isinstance(scores, Scores) else Scores(scores)
                check_not_nan(scores_AK, "selector's scores")
                router_A = self._router_logits(logits_BV)[rows_A] if self.fusion.router else None
                fused_AK = fused_scores(scores_AK, asked.logprobs_BK, asked.mask_BK, self.fusion, router_A)
                choice_A = fused_AK.argmax(-1)  # a tie goes to the candidate that the student ranks higher
                token_B[rows_A] = asked.ids_BK.gather(-1, choice_A[:, None])[:, 0]
                advance = None if advance_from is None else functools.partial(advance_from, choice_A)
                scored = {"rows_A": rows_A, "candidate_ids_AK": asked.ids_BK, "scores_AK": scores_AK}
                scored |= {"mask_AK": asked.mask_BK, "logprobs_AK": asked.logprobs_BK, "fused_AK": fused_AK}
        self._record(value_B, triggered_B, asked_B, proposals.ids_BK[:, 0], token_B, **scored)
        return StepResult(token_B, asked_B, advance)

    def _record(
        self,
        value_B: torch.Tensor,
        triggered_B: torch.Tensor,
        asked_B: torch.Tensor,
        first_B: torch.Tensor,
        token_B: torch.Tensor,
        **scored: torch.Tensor,
    ) -> None:
        """Adds a step to the trace, where one was asked for."""
        if self.trace is not None:
            entry = {"value_B": value_B, "triggered_B": triggered_B, "asked_B": asked_B, "first_B": first_B}
            entry |= {"token_B": token_B} | scored
            entry = {name: tensor.detach().cpu() for name, tensor in entry.items()}
            self.trace.steps.append(entry | {"forwards": self._step_forwards})

    def _takeover(self, rows_A: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """The teacher's favourite (A,) among the tokens that the student's head has and the user allows."""
        shared = min(self.teacher_logits().shape[-1], logits_BV.shape[-1])
        check_not_nan(self.teacher_logits()[rows_A], "teacher's logits")
        allowed_AV = torch.isfinite(logits_BV[rows_A, :shared])
        return self.teacher_logits()[rows_A, :shared].masked_fill(~allowed_AV, float("-inf")).argmax(-1)

    def _trigger_value(self, logits_BV: torch.Tensor) -> torch.Tensor:
        kind = self.config.trigger
        if kind == "entropy":
            return triggers.entropy(logits_BV, self.config.trigger_top_k)
        if kind == "margin":
            return triggers.margin(logits_BV)
        if kind == "router":
            return self._router_logits(logits_BV)
        if kind == "kl":
            return triggers.kl_divergence(self.teacher_logits(), logits_BV)
        if kind == "random":
            return torch.rand(len(logits_BV), generator=self._random).to(logits_BV.device)
        return torch.zeros(len(logits_BV), device=logits_BV.device)

    @property
    def runs_teacher(self) -> bool:
        """Whether a teacher reads the text of this call."""
        return getattr(self.selector, "teacher_model", None) is not None or self.config.trigger == "kl"

    @property
    def is_bare_text(self) -> bool:
        """Whether the text so far is token ids without padding."""
        return self.prompt_embeds_BTD is None and bool(self.mask_BT.all())

    def take_hidden(self) -> torch.Tensor | None:
        """The last token's hidden states (B, D) in the last forward, `None` where no router is read."""
        return None if self.router is None else self.hidden.take()[:, -1]

    def _router_logits(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The router's logits (B,) of this step, read at most once."""
        if self._router_logits_B is None:
            hidden_BD = self._read_hidden() if self._hidden_BD is None else self._hidden_BD
            self._router_logits_B = self.router.logits(hidden_BD, logits_BV)
        return self._router_logits_B

    def _read_hidden(self) -> torch.Tensor:
        """Hidden states (B, D) at the router's layer, by reading the tokens since the last time."""
        if self._writer_prefix is None:
            self._writer_prefix = self._new_prefix(self.selector.writer(self.views))
        num_new = self.input_ids_BT.shape[1] - self._writer_prefix.num_cached
        self.count_forward("router", num_new * len(self.input_ids_BT))
        self._writer_prefix.feed(self.input_ids_BT, self.mask_BT)
        return self.hidden.take()[:, -1]

    def teacher_logits(self) -> torch.Tensor:
        """The teacher's next-token logits (B, V) for the current prefix, float32, run at most once a step.

        Only the tokens since the last time go through the teacher.
        """
        if self._teacher_logits_BV is None:
            if self._teacher_prefix is None:
                self._teacher_prefix = PrefixCache(self.teacher_model)
            check_room("teacher_model", self._room.get("teacher_model"), self.mask_BT)
            num_cached = self._teacher_prefix.num_cached
            ids_BT = self.input_ids_BT
            if self._teacher_rows is not None:  # ids that it lacks are padding, or at or after the end of a text
                ids_BT = ids_BT.masked_fill(ids_BT >= self._teacher_rows, 0)
            self.count_forward("teacher", (ids_BT.shape[1] - num_cached) * len(ids_BT))
            logits_BV = self._teacher_prefix.feed(ids_BT, self.mask_BT, with_logits=True)
            self._teacher_logits_BV = logits_BV.to(self.input_ids_BT.device)
        return self._teacher_logits_BV

    def _new_prefix(self, model: PreTrainedModel) -> PrefixCache:
        """A cache of the small model over this call's text."""
        return PrefixCache(model, prompt_embeds_BTD=self.prompt_embeds_BTD)

    def student_prefix(self, selector: Selector) -> tuple[PrefixCache, int]:
        """A cache of the small model over the prefix, as the selector reads it, and how many tokens it lacks.

        The driving call's own cache is used where it is computed the same way; otherwise the session keeps one, and
        feeds it lazily.
        """
        if self.student_cache is not None and selector.shares_the_cache:
            return PrefixCache(selector.reader(self.views), self.student_cache), 0
        if self._scorer_prefix is None:
            self._scorer_prefix = self._new_prefix(selector.reader(self.views))
        return self._scorer_prefix, self.input_ids_BT.shape[1] - self._scorer_prefix.num_cached

    def count_forward(self, kind: str, num_tokens: int) -> None:
        """Adds a forward to the trace, where one was asked for."""
        if self.trace is not None:
            for counts in (self.trace.forwards, self._step_forwards):
                counts[kind] = counts.get(kind, 0) + 1
            self.trace.tokens[kind] = self.trace.tokens.get(kind, 0) + num_tokens


def check_not_nan(values: torch.Tensor, what: str = "model's logits") -> None:
    """Raises a ValueError where values are NaN."""
    if bool(values.isnan().any()):
        raise ValueError(f"The {what} are NaN: there is nothing to select from (check its dtype and weights).")


def check_choosable(logits_BV: torch.Tensor) -> None:
    """Raises a ValueError where a row has no token to choose: NaN, or all of them forbidden."""
    check_not_nan(logits_BV)
    barred_B = logits_BV.amax(-1) == float("-inf")
    if bool(barred_B.any()):
        raise ValueError(
            f"Row {int(barred_B.nonzero()[0, 0])} has no token left to choose: its logits are all -inf after the "
            "logits processors (`suppress_tokens`, `bad_words_ids`, constraints ...) and without reserved tokens."
        )
