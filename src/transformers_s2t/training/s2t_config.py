"""`S2TConfig`: the settings of [`S2TTrainer`], on top of `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from transformers_s2t.config import MAX_CANDIDATES, SelectorConfig, check_range


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_COMPILE_FIELDS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
#: Legal `max_packed_tokens`.
MAX_PACKED_TOKENS = 1 << 24


@dataclass
class S2TConfig(TrainingArguments):
    r"""Configuration of [`S2TTrainer`].

    Changed defaults of [`~transformers.TrainingArguments`]:

    - `per_device_train_batch_size=4` trajectories a step, with all their points.
    - `learning_rate=2e-4`, usual for LoRA (QLoRA, arXiv 2305.14314, table 9). The 5e-5 of arXiv 2604.26940 belong to
      its steps of four points, where one of ours holds hundreds (recipes/qwen2.5-1.5b/paper.yaml has both). Models far
      below 100 M parameters want about 2e-3 (docs/training.md).
    - `warmup_steps=10`, `logging_steps=10`.
    - `bf16` where the GPU has it, as in TRL; float32 on a CPU.
    - `remove_unused_columns=False`: the collator reads every column.
    - `metric_for_best_model="agree_at_1"` where `load_best_model_at_end`: the share of held-out points at which the
      selector picks the teacher's best candidate.
    - `activation_checkpointing_kwargs={"use_reentrant": False}`; checkpointing is for adapter_scope="sequence" alone.
    - `torch_compile` compiles the decoder's layers in place, for adapter_scope="sequence" alone. It pays in long runs:
      1.04 times as fast on two CPU cores after a minute of warm-up (docs/training.md).

    Parameters (the defaults come from the sweep in docs/training.md):
        adapter_scope: "candidate" or "sequence" (arXiv 2604.26940); see [`SelectorConfig`]. "candidate" is as good to
            within a point, the cheapest, and leaves ordinary generation untouched by construction.
        proposals: "base" or "adapted" (the paper's S2T-Local; only with "sequence").
        score_head: "bins" (paper, section 3) or "linear"; within a point of each other in the sweep.
        temperature: temperature of the cross-entropy over scores. 0.1 from the sweep: scores are in [0, 1], and at 1.0
            the gradient is weak.
        cross_entropy_weight: weight of the paper's loss (section 3.3).
        distribution_kl_weight, hinge_weight, hinge_margin: weight of KL(teacher over the candidates || scores), and
            weight and margin of a hinge against the best wrong candidate. The authors' script adds 0.1 of the first
            and a hinge with margin 1. Off by default: neither helped in the sweep.
        logprob_weight: adds this times the student's log-probability of the candidate to score / temperature in the
            cross-entropy, so that the selector learns what the student does not know already. Off by default: the
            fused decision is within a point of the one without it, and the score alone is worse.
        prefix_kl_weight: weight beta of KL(frozen base || tuned) on the trajectory's text, for
            adapter_scope="sequence". 1.0: in the sweep 0.1 was no better or worse, and lets the text drift further.
        num_candidates: K used in training; the labels may hold more. The selector is stored with as many, but 8 at
            most: the paper trains on 16 and decodes with 8, beyond which it finds no gain.
        min_prob_ratio: candidates below this share of the best one's probability are left out, as in decoding. 0.05
            from the sweep, where having none cost 0.7 and 4 points.
        max_packed_tokens: most tokens of trajectory plus candidates per row; longer ones are cut into blocks of
            decision points.
        max_points_per_block: most decision points per row; `None` for all that fit. 1 gives the paper's single points,
            where every point reads its prefix again.
        text_cache_gb: GB of CPU memory for the keys and values of texts, which the frozen base model then reads in the
            first epoch only (adapter_scope="candidate", one process).
        reserved_token_ids: tokens that carry the score; `None` for 16 (paper) found in the tokenizer.
        allow_labels_of_other_model: trains on trajectories that another model wrote.
        add_reserved_tokens: resizes the embeddings of a model that has too few reserved tokens.
        model_init_kwargs: arguments of `from_pretrained` where `model` is a name or path.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    per_device_train_batch_size: int = field(default=4, metadata={"help": "Trajectories per device and step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps of linear warm-up."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision; by default where the GPU has it."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: all columns are read."})

    adapter_scope: str = field(
        default="candidate",
        metadata={"help": "Which tokens see the adapter: 'candidate' (appended ones only) or 'sequence' (paper)."},
    )
    proposals: str = field(
        default="base", metadata={"help": "Who writes the text: 'base', or 'adapted' (paper; 'sequence' only)."}
    )
    score_head: str = field(default="bins", metadata={"help": "Read-out of the reserved logits: 'bins' or 'linear'."})
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the cross-entropy over scores."})
    cross_entropy_weight: float = field(default=1.0, metadata={"help": "Weight of the top-1 cross-entropy."})
    distribution_kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(teacher over the candidates || scores)."}
    )
    hinge_weight: float = field(default=0.0, metadata={"help": "Weight of the hard-negative hinge."})
    hinge_margin: float = field(default=1.0, metadata={"help": "Margin of the hinge, in units of the score."})
    logprob_weight: float = field(
        default=0.0, metadata={"help": "Weight of the student's log-probability beside score / temperature."}
    )
    prefix_kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of KL(base || tuned) on the text, for adapter_scope='sequence'."}
    )
    num_candidates: int = field(default=8, metadata={"help": "Candidates per decision point."})
    min_prob_ratio: float = field(default=0.05, metadata={"help": "Candidate floor, as in decoding; 0 keeps all."})
    max_packed_tokens: int = field(default=8192, metadata={"help": "Trajectory plus candidate tokens per row."})
    max_points_per_block: int | None = field(
        default=None, metadata={"help": "Decision points per row at most; by default all that fit."}
    )
    text_cache_gb: float = field(
        default=2.0,
        metadata={
            "help": "GB (1e9 bytes) of CPU memory for what the base model has read of the texts, so that later epochs "
            "need not read them again; for adapter_scope='candidate' in one process. 0 for none."
        },
    )
    reserved_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Token ids that carry the score; found in the tokenizer where not given."}
    )
    allow_labels_of_other_model: bool = field(
        default=False, metadata={"help": "Train on trajectories that another model wrote."}
    )
    add_reserved_tokens: bool = field(
        default=False, metadata={"help": "Resize the embeddings of a model that has too few reserved tokens."}
    )
    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained where `model` is a name or path."}
    )

    def __post_init__(self):
        if self.reserved_token_ids is not None and not isinstance(self.reserved_token_ids, (list, tuple)):
            raise ValueError(f"`reserved_token_ids` must be a list of token ids, got {self.reserved_token_ids!r}.")
        # what is stored with the adapter is checked where it is defined
        SelectorConfig(
            self.reserved_token_ids if self.reserved_token_ids is not None else (0, 1),
            adapter_scope=self.adapter_scope,
            proposals=self.proposals,
            score_head=self.score_head,
        )
        if not _is_number(self.temperature) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be above 0 and finite, got {self.temperature!r}.")
        weights = (
            "cross_entropy_weight",
            "distribution_kl_weight",
            "hinge_weight",
            "hinge_margin",
            "prefix_kl_weight",
        )
        for name in (*weights, "logprob_weight"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be 0 or more and finite, got {getattr(self, name)!r}.")
        if self.cross_entropy_weight + self.distribution_kl_weight + self.hinge_weight == 0:
            raise ValueError(
                "One of `cross_entropy_weight`, `distribution_kl_weight`, `hinge_weight` must be above 0."
            )
        check_range("num_candidates", self.num_candidates, 2, MAX_CANDIDATES, integer=True)
        check_range("min_prob_ratio", self.min_prob_ratio, 0.0, 1.0)
        if not _is_number(self.text_cache_gb) or not 0 <= self.text_cache_gb < float("inf"):
            raise ValueError(f"`text_cache_gb` must be 0 or more and finite, got {self.text_cache_gb!r}.")
        check_range("max_packed_tokens", self.max_packed_tokens, 16, MAX_PACKED_TOKENS, integer=True)
        if self.max_points_per_block is not None:
            check_range("max_points_per_block", self.max_points_per_block, 1, MAX_PACKED_TOKENS, integer=True)
        for name, off in (("neftune_noise_alpha", None), ("label_smoothing_factor", 0.0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"`{name}` must be {off}: it has no meaning for a selector, got {getattr(self, name)}."
                )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator reads every column of the labels.")
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "agree_at_1"  # transformers would take the loss
        self._check_compile()
        # not by accelerate: S2TTrainer runs the decoder itself, so that a compiled model would never be called
        compile_with = {name: getattr(self, name) for name in _COMPILE_FIELDS}
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        super().__post_init__()
        for name, value in compile_with.items():
            setattr(self, name, value)
        self.torch_compile = any(compile_with.values())
        # transformers is renaming these two, and warns of the old names
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if getattr(self, name, False) and self.adapter_scope == "candidate":
                raise ValueError(
                    f"`{name}` must be False with adapter_scope='candidate': it drops the key/value cache that "
                    "candidates share, and the prefix holds no activations anyway. Bound memory with "
                    "`max_packed_tokens`."
                )
            if getattr(self, f"{name}_kwargs", {}) is None:
                # reentrant checkpoints need an input with a gradient, which a frozen embedding does not give
                setattr(self, f"{name}_kwargs", {"use_reentrant": False})

    def _check_compile(self) -> None:
        if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
            raise ValueError(
                "`--dynamo_backend` of accelerate must be no: S2TTrainer runs the decoder itself, so that the "
                "compiled model is never called, and several processes would not average their gradients. "
                "`torch_compile=True` compiles the layers."
            )
        if self.adapter_scope == "candidate" and any(getattr(self, name) for name in _COMPILE_FIELDS):
            raise ValueError(
                "`torch_compile` must be False with adapter_scope='candidate': every layer would be compiled again "
                "for its place in the key/value cache that candidates share, beyond dynamo's limit."
            )
