"""`S2TTrainer`: distils the teacher's ranking of candidates into a LoRA adapter and the reserved rows of the head.

Knows labelled trajectories, losses and scoring; knows nothing of decoding (the two meet in `scoring`,
`fusion` and `config`).

Legend: B trajectories, T tokens, N decision points, K candidates, M packed candidates, D hidden size, R reserved.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import EvalPrediction, HubStrategy, get_last_checkpoint
from transformers.utils import PushInProgress, find_adapter_config_file

from transformers_s2t import losses
from transformers_s2t.config import (
    CALIBRATION_NAME,
    DEFAULT_NUM_CANDIDATES,
    ROUTER_WEIGHTS_NAME,
    SEEN_PROBLEMS_NAME,
    SelectorConfig,
)
from transformers_s2t.files import give_plain_mode
from transformers_s2t.fingerprints import model_hash
from transformers_s2t.fusion import cross_fitted_choice
from transformers_s2t.labels.collator import TrajectoryCollator
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import read_seen_problems, write_seen_problems
from transformers_s2t.model_checks import check_causal_lm, check_without_virtual_tokens
from transformers_s2t.models.forwards import text_logits
from transformers_s2t.models.shared_prefix import is_random, runs_alone
from transformers_s2t.models.text_cache import TextCache
from transformers_s2t.models.views import ModelViews, get_decoder, switch_adapter
from transformers_s2t.reserved_tokens import vocab_hash
from transformers_s2t.scoring.packing import PackedPoints, packed_hidden, supports_packing, warn_without_tree
from transformers_s2t.scoring.reserved_rows import ReservedRows, bin_logits, candidate_scores, valid_candidates
from transformers_s2t.selector_card import CARD_NAME, selector_card
from transformers_s2t.selector_files import (
    ADAPTER_FOLDER,
    adapter_folder,
    guard,
    push_selector,
    write_custom_generate,
)
from transformers_s2t.training.attach import attach_adapter, whole_weights
from transformers_s2t.training.blocks import cut_to_blocks, text_mask
from transformers_s2t.training.label_checks import (
    check_labels_fit,
    check_weights_fit,
    load_labels,
    problems_of,
    warn_of_overlap,
)
from transformers_s2t.training.s2t_config import S2TConfig


_STAGES = {"training", "tuning"}  # the stages of `seen_problems` that shape the weights
_HUB_KWARGS = ("revision", "token", "trust_remote_code", "cache_dir")


class S2TTrainer(Trainer):
    """Trains S2T-Local: the small model learns to select among its own proposals as the larger model would.

    Args:
        model: name or path, `PreTrainedModel`, or a `PeftModel` whose LoraConfig trains the reserved rows.
        args: [`S2TConfig`]; `None` for the defaults.
        train_dataset: labelled trajectories: a `Dataset`, a folder written by `s2t label`, or a Hub id.
        eval_dataset: held-out trajectories, or a dict of several sets. A folder or Hub id with a split "validation"
            gives that split, so that labels made with `--validation_share` can be passed as both.
        processing_class: the model's tokenizer; loaded from the model's name where not given.
        peft_config: LoRA settings; `None` for r=16, alpha=32, dropout 0.05 on all linear layers (the authors'
            script). The reserved rows are added to it.
        quantization_config: passed to `from_pretrained` where `model` is a name or path. The adapter stays in float32
            beside quantized weights: in bfloat16 a step of 5e-5 would leave two fifths of its weights unchanged.
        label_header: header of `train_dataset` where that is a `Dataset`; checked against the model.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.
        data_collator: makes a batch of rows; `None` for [`TrajectoryCollator`], whose names it must give.
        compute_metrics: called once for each evaluation with all N held-out points that have a choice: `predictions`
            are the scores (N, K), -inf below the floor, `label_ids` the teacher's best candidates (N,). What it
            returns is added to the figures.

    Raises:
        ValueError: before the first step, for labels made with another tokenizer, model or K, illegal rows, an empty
            data set, too few reserved tokens, a model that is no causal language model or takes no cache.

    Warns:
        UserWarning: for a model whose attention or layers make packed candidates inexact. It is trained point by
            point; the warning says what that costs.
    """

    _tag_names = ["transformers-s2t", "s2t"]
    loss_is_scaled_for_ga = True  # compute_loss divides by the points of the whole step, see _get_num_items_in_batch

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | PeftModel,
        args: S2TConfig | None = None,
        train_dataset: Dataset | str | os.PathLike | None = None,
        eval_dataset: Dataset | str | os.PathLike | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any | None = None,
        label_header: TrajectoryHeader | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        data_collator: Callable[[list[dict]], dict[str, torch.Tensor]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        if args is not None and not isinstance(args, S2TConfig):
            raise TypeError(f"`args` must be an S2TConfig, got {type(args)}.")
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = S2TConfig(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-s2t-local")
        if args.n_gpu > 1:
            raise ValueError(
                f"S2TTrainer runs one process per GPU, but this one sees {args.n_gpu}: start it with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if not isinstance(model, str) and (args.model_init_kwargs or quantization_config is not None):
            raise ValueError("`model_init_kwargs` and `quantization_config` need `model` as a name or path.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: a folder of labels (s2t label) or a Dataset.")
        headers: dict[str, TrajectoryHeader | None] = {}
        train_dataset, headers["train_dataset"] = load_labels(train_dataset, "train_dataset", label_header)
        if isinstance(eval_dataset, dict):
            eval_dataset = dict(eval_dataset)
            for key, value in eval_dataset.items():
                name = f"eval_dataset[{key!r}]"
                eval_dataset[key], headers[name] = load_labels(value, name)
        elif eval_dataset is not None:
            eval_dataset, headers["eval_dataset"] = load_labels(eval_dataset, "eval_dataset")
        held_out = eval_dataset.items() if isinstance(eval_dataset, dict) else [("eval_dataset", eval_dataset)]
        held_out = {name: labels for name, labels in held_out if labels is not None}
        warn_of_overlap(train_dataset, held_out)
        self._seen_problems = problems_of(train_dataset, held_out)  # now: blocks of points have no problem ids

        if isinstance(model, str):
            init_kwargs = dict(args.model_init_kwargs or {})
            if quantization_config is not None:
                if "quantization_config" in init_kwargs:
                    raise ValueError("`quantization_config` must not be in `args.model_init_kwargs` too.")
                init_kwargs["quantization_config"] = quantization_config
            name_or_path = model
            hub = {key: init_kwargs[key] for key in _HUB_KWARGS if key in init_kwargs}
            if find_adapter_config_file(name_or_path, **{k: hub[k] for k in hub if k != "trust_remote_code"}):
                raise ValueError(
                    f"`model` must be a base model, got the adapter {name_or_path!r}: pass the model that it was "
                    "trained on, or one that it was merged into (s2t merge); to train it further, load it with "
                    "`PeftModel.from_pretrained(..., is_trainable=True)`."
                )
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(name_or_path, **hub)
            check_labels_fit(headers, processing_class, name_or_path)
            with whole_weights():
                model = AutoModelForCausalLM.from_pretrained(name_or_path, **init_kwargs)
        else:
            name_or_path = model.config._name_or_path
            if any(parameter.numel() == 0 for parameter in model.parameters()):
                raise ValueError(
                    "`model` is spread over processes already (ZeRO-3): pass its name or path, or load it before the "
                    "S2TConfig is made."
                )
            if processing_class is None:
                if not name_or_path:
                    raise ValueError("`processing_class` is required where the model does not know its own name.")
                processing_class = AutoTokenizer.from_pretrained(name_or_path)
            check_labels_fit(headers, processing_class, name_or_path)

        # now, and whole: a relative path means nothing in another working directory
        self._base_name = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path
        check_causal_lm("model", model)
        check_without_virtual_tokens("model", model)
        self._model_hash = model_hash(model)  # now: later the weights may be spread over processes
        check_weights_fit(headers, self._model_hash, args)
        set_seed(args.seed)  # LoRA's random half is drawn here; Trainer sets the seed only later
        with whole_weights():
            model, self.reserved_token_ids = attach_adapter(model, args, processing_class, peft_config)
        self.base_model = model.get_base_model()
        self.adapter_name = model.active_adapter
        warn_without_tree(self.base_model)
        self.rows = ReservedRows(self.base_model, self.reserved_token_ids, self.adapter_name)
        # only the adapter has dropout: it learns to read the base model as that decodes (layers that can be
        # checkpointed and quantized matrices have no dropout, but need to know that this is training)
        self._frozen = [
            module
            for name, module in self.base_model.named_modules()
            if "lora_dropout" not in name and not isinstance(module, (GradientCheckpointingLayer, nn.Linear))
        ]
        switch_adapter(
            self.base_model, self.adapter_name, args.proposals == "adapted"
        )  # `trainer.model.generate` is what will be deployed
        self._compiled_views: ModelViews | None = None
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        base_is_frozen = all(self.adapter_name in name.split(".") for name in trained)
        keeps_texts = args.adapter_scope == "candidate" and args.text_cache_gb and base_is_frozen
        self._text_cache = TextCache(int(args.text_cache_gb * 1e9)) if keeps_texts else None
        self.label_header = headers["train_dataset"]

        pad_token_id = processing_class.pad_token_id
        if pad_token_id is None:
            pad_token_id = processing_class.eos_token_id or 0
        if pad_token_id >= self.base_model.get_input_embeddings().weight.shape[0]:
            pad_token_id = 0  # added to the tokenizer alone; padding is masked, so any token will do
        with args.main_process_first(desc="preparing labels"):
            train_dataset = self._prepare_dataset(train_dataset, args, "train_dataset")
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    key: self._prepare_dataset(value, args, f"eval_dataset[{key!r}]")
                    for key, value in eval_dataset.items()
                }
            elif eval_dataset is not None:
                eval_dataset = self._prepare_dataset(eval_dataset, args, "eval_dataset")

        metric = args.metric_for_best_model if args.load_best_model_at_end else None
        if isinstance(eval_dataset, dict) and metric is not None:
            legal = [f"{key}_{metric.removeprefix('eval_')}" for key in eval_dataset]
            if not any(metric.removeprefix("eval_").startswith(f"{key}_") for key in eval_dataset):
                raise ValueError(
                    f"`metric_for_best_model` must name one of the evaluation sets, {legal}, got {metric!r}."
                )

        self._holds_best = False  # the best checkpoint's weights, in place of the last step's
        self._row_metrics: dict[str, dict[str, list[float]]] = {
            "train": defaultdict(lambda: [0.0, 0.0]),
            "eval": defaultdict(lambda: [0.0, 0.0]),
        }
        self._held_out: list[_HeldOutPoints] | None = None  # points of the running evaluation
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or TrajectoryCollator(pad_token_id, args.num_candidates),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._compute_selection_metrics = compute_metrics  # `Trainer` would gather logits for it
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if sharded and not supports_packing(self.base_model):
            raise ValueError(
                f"{type(self.base_model).__name__} takes a forward for every decision point, and processes that share "
                "its weights (FSDP, ZeRO-3) would wait for each other: use DDP or ZeRO-2."
            )
        self.can_return_loss = True  # with no label names: evaluation then reports a loss
        self.label_names = []
        self.model_accepts_loss_kwargs = False
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _prepare_dataset(self, dataset: Dataset, args: S2TConfig, name: str) -> Dataset:
        """Blocks of points that fit `max_packed_tokens`; see [`cut_to_blocks`]."""
        vocab_size = self.base_model.get_input_embeddings().weight.shape[0]
        dataset = cut_to_blocks(dataset, args, name, vocab_size, self.reserved_token_ids)
        # held-out blocks of similar length share a batch, longest first: too little memory shows at once
        if name == "train_dataset":
            return dataset
        lengths = dataset["length"]
        return dataset.select(sorted(range(len(dataset)), key=lambda i: -lengths[i]))

    # ---- objective ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ):
        """Loss per decision point; with `return_outputs` also their scores (B, N, K).

        The mean is over the points of the whole optimizer step, all processes and accumulated batches together
        (`num_items_in_batch`), so that it does not depend on how a step is split; without that count, over the batch.
        """
        self.rows.keep_share()
        if model.training:
            for module in self._frozen:
                module.training = False
        loss, scores_BNK, row_metrics = _call_through(
            model, self.accelerator.unwrap_model(model), lambda: self._loss(inputs, num_items_in_batch)
        )
        self._count(row_metrics)
        if self._held_out is not None:
            self._held_out.append(self._gather_points(scores_BNK, inputs))
        return (loss, {"scores": scores_BNK}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Decision points and text tokens (2,) of an optimizer step, over all processes and accumulated batches."""
        if not batch_samples:
            return None
        counts = []
        for batch in batch_samples:
            _, point_BN = valid_candidates(batch["student_logprobs"], batch["position_mask"], self.args.min_prob_ratio)
            counts.append(torch.stack([point_BN.sum(), text_mask(batch).sum()]))
        items_2 = torch.stack(counts).sum(0).to(device)
        return self.accelerator.gather(items_2[None]).sum(0) if self.args.world_size > 1 else items_2

    def _loss(
        self, inputs: dict[str, torch.Tensor], items_2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        args = self.args
        valid_BNK, point_BN = valid_candidates(
            inputs["student_logprobs"], inputs["position_mask"], args.min_prob_ratio
        )
        points = PackedPoints(inputs["positions"], inputs["candidate_ids"], valid_BNK)
        mask_BT, text_BT = inputs["attention_mask"].bool(), text_mask(inputs)
        if items_2 is None:
            num_points, num_tokens = point_BN.sum(), text_BT.sum()
        else:  # gradients are averaged over processes: each brings its share of the whole
            num_points, num_tokens = items_2 / self.accelerator.num_processes
        with self.accelerator.autocast():  # Trainer puts it into `forward` only, which is not what runs here
            views = self.views()
            hidden_BMD, prefix_BTD = packed_hidden(
                views, inputs["input_ids"], mask_BT, points, args.adapter_scope, self._texts_of(views)
            )
        scores_BNK = points.unpack(candidate_scores(bin_logits(hidden_BMD, self.rows()), args.score_head))

        # flat over the points that have a choice
        scores_NK, valid_NK = scores_BNK[point_BN], valid_BNK[point_BN]
        teacher_NK, logprobs_NK = inputs["teacher_logprobs"][point_BN], inputs["student_logprobs"][point_BN]
        target_N = losses.best_candidate(teacher_NK, valid_NK)
        loss_N = scores_NK.new_zeros(len(scores_NK))
        if args.cross_entropy_weight:
            prior_NK = args.logprob_weight * args.temperature * logprobs_NK
            term_N = losses.selection_cross_entropy(scores_NK + prior_NK, valid_NK, target_N, args.temperature)
            loss_N = loss_N + args.cross_entropy_weight * term_N
        if args.distribution_kl_weight:
            term_N = losses.distribution_kl(scores_NK, teacher_NK, valid_NK, args.temperature)
            loss_N = loss_N + args.distribution_kl_weight * term_N
        if args.hinge_weight:
            term_N = losses.hard_negative_hinge(scores_NK, valid_NK, target_N, args.hinge_margin)
            loss_N = loss_N + args.hinge_weight * term_N
        # the second term keeps the graph where a batch has no point at all
        total = loss_N.sum() / num_points.clamp_min(1) + scores_BNK.sum() * 0.0
        metrics = self._agreement(scores_BNK.detach(), inputs, valid_BNK, point_BN)
        loss_BN = torch.zeros_like(scores_BNK[..., 0]).masked_scatter(point_BN, loss_N.detach())
        metrics["selection_loss"] = (loss_BN.sum(-1).float(), point_BN.sum(-1).float())
        if args.adapter_scope == "sequence" and args.prefix_kl_weight:
            kl_P = self._text_kl(views.base, inputs["input_ids"], mask_BT, text_BT, prefix_BTD)
            total = total + args.prefix_kl_weight * kl_P.sum() / num_tokens.clamp_min(1)
            kl_BT = torch.zeros_like(prefix_BTD[..., 0], dtype=kl_P.dtype).masked_scatter(text_BT, kl_P.detach())
            metrics["prefix_kl"] = (kl_BT.sum(-1), text_BT.sum(-1).float())
        return total, scores_BNK.detach(), metrics

    def _texts_of(self, views: ModelViews) -> TextCache | None:
        """The cache of texts that the base model has read; `None` where another epoch may read them differently."""
        if self._text_cache is None or not runs_alone() or is_random(views.base):
            return None
        return self._text_cache

    def views(self) -> ModelViews:
        """Views of the model without the adapter and with it; `trainer.model` itself stays as it will be deployed."""
        if not self.args.torch_compile:
            return ModelViews(self.base_model, self.adapter_name)
        if self._compiled_views is None:  # after the model was prepared: its modules are final
            views = ModelViews(self.base_model, self.adapter_name)
            backend, mode = self.args.torch_compile_backend or "inductor", self.args.torch_compile_mode
            for module in (*views.base.modules(), *views.adapted.modules()):
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=True, backend=backend, mode=mode)
            self._compiled_views = views
        self._compiled_views.follow_modes()
        return self._compiled_views

    def _text_kl(
        self,
        base_model: PreTrainedModel,
        input_ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        text_BT: torch.Tensor,
        tuned_BTD: torch.Tensor,
    ) -> torch.Tensor:
        """KL(base || tuned) at every token of the text, flat; `base_model` is the model with the adapter off."""
        with self.accelerator.autocast():
            with torch.no_grad():
                base_BTD = get_decoder(base_model)(
                    input_ids=input_ids_BT, attention_mask=mask_BT.long(), use_cache=False
                ).last_hidden_state
            return losses.chunked_text_kl(
                functools.partial(text_logits, base_model),
                base_BTD[text_BT],
                tuned_BTD[text_BT],
                torch.tensor(self.reserved_token_ids, device=mask_BT.device),
            )

    # ---- metrics ----

    def _agreement(
        self,
        scores_BNK: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        valid_BNK: torch.Tensor,
        point_BN: torch.Tensor,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Figures at the decision points of each trajectory: name -> (sum (B,), number of points (B,)).

        - `agree_at_1`, `fused_agree_at_1`, `student_first`, `second_candidate`: whether the teacher's best candidate
          above the floor is chosen by the selector, by the selector with the student's log-probability (at the fixed
          weights of the loss with `logprob_weight=1`), by the student, and by always taking the second candidate;
        - `spearman`: rank correlation of scores with the teacher's log-probabilities;
        - `hit_at_1`, `hit_at_2`, ...: whether the teacher's own token is among the student's first 1, 2, ...
        """
        low = torch.finfo(torch.float32).min
        target_BN = losses.best_candidate(inputs["teacher_logprobs"], valid_BNK)
        masked_BNK = scores_BNK.float().masked_fill(~valid_BNK, low)
        fused_BNK = (scores_BNK.float() / self.args.temperature + inputs["student_logprobs"]).masked_fill(
            ~valid_BNK, low
        )
        picks = {
            "agree_at_1": masked_BNK.argmax(-1),
            "fused_agree_at_1": fused_BNK.argmax(-1),
            "student_first": torch.zeros_like(target_BN),
            "second_candidate": torch.ones_like(target_BN),
        }
        values = {name: (pick_BN == target_BN).float() for name, pick_BN in picks.items()}
        values["spearman"] = losses.spearman(scores_BNK, inputs["teacher_logprobs"], valid_BNK)
        is_top_BNK = inputs["candidate_ids"] == inputs["teacher_top_id"][..., None]
        sizes = [size for size in (1, 2, 4, 8, 16) if size <= is_top_BNK.shape[-1]]
        values |= {f"hit_at_{size}": is_top_BNK[..., :size].any(-1).float() for size in sizes}
        count_B = point_BN.sum(-1).float()
        return {name: ((value_BN * point_BN).sum(-1), count_B) for name, value_BN in values.items()}

    def _count(self, row_metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        mode = "train" if self.model.training else "eval"
        stacked_BX2 = torch.stack([torch.stack(pair, dim=-1) for pair in row_metrics.values()], dim=1)
        # in training nothing is a duplicate: gather_for_metrics would cut batches that accumulation prefetched
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        sums_X2 = gather(stacked_BX2).sum(0).tolist()
        for name, (hits, count) in zip(row_metrics, sums_X2):
            self._row_metrics[mode][name][0] += hits
            self._row_metrics[mode][name][1] += count

    def _gather_points(self, scores_BNK: torch.Tensor, inputs: dict[str, torch.Tensor]) -> _HeldOutPoints:
        """The decision points of a batch, from all processes, without the duplicates that fill up the last batch."""
        valid_BNK, point_BN = valid_candidates(
            inputs["student_logprobs"], inputs["position_mask"], self.args.min_prob_ratio
        )
        target_BN = losses.best_candidate(inputs["teacher_logprobs"], valid_BNK)
        columns = [scores_BNK, inputs["student_logprobs"], valid_BNK, target_BN[..., None], point_BN[..., None]]
        values_BNX = torch.cat([column.float() for column in columns], dim=-1)
        # filled up with zeros, which are no points
        values_BNX = self.accelerator.pad_across_processes(values_BNX, dim=1)
        values_BNX, problem_B = self.accelerator.gather_for_metrics((values_BNX, _problem_numbers(inputs)))
        values_BNX, problem_B = values_BNX.cpu(), problem_B.cpu()
        keep_BN = values_BNX[..., -1] > 0
        K = scores_BNK.shape[-1]
        scores_NK, logprobs_NK, valid_NK, target_N1, _ = values_BNX[keep_BN].split([K, K, K, 1, 1], dim=-1)
        problem_N = problem_B[:, None].expand_as(keep_BN)[keep_BN]
        return _HeldOutPoints(scores_NK, logprobs_NK, valid_NK > 0, target_N1[:, 0].long(), problem_N)

    def _cross_fitted_agreement(self) -> float | None:
        """Agree@1 of the fused decision, each point decided by weights fitted on the other half of the problems.

        `None` where there are too few points, or problems, to fit weights on.
        """
        if not self._held_out:
            return None
        points = _HeldOutPoints(*(torch.cat(parts) for parts in zip(*self._held_out)))
        try:
            choice_N = cross_fitted_choice(*points)
        except ValueError:
            return None
        return float((choice_N == points.target_N).double().mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log line; evaluation brings its figures in its own metrics
            for name, (hits, count) in self._row_metrics["train"].items():
                if count:
                    logs[name] = round(hits / count, 5)
            self._row_metrics["train"].clear()
        super().log(logs, start_time)

    def _read_and_prepare(self, labels, name: str):
        """Labels given to `evaluate` or `predict`, in every form that `__init__` takes."""
        own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if labels is None or isinstance(labels, dict) or (isinstance(labels, str) and labels in own):
            return labels  # `Trainer` calls this again for each one of a dict
        labels, header = load_labels(labels, name)
        check_labels_fit({name: header}, self.processing_class, self.base_model.config._name_or_path)
        return self._prepare_dataset(labels, self.args, name)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As in `Trainer`; labels given here, or folders of labels, are checked and cut like those of `__init__`."""
        eval_dataset = self._read_and_prepare(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As in `Trainer`, with labels as for `evaluate`. Returns figures, but no predictions."""
        test_dataset = self._read_and_prepare(test_dataset, "test_dataset")
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As in `Trainer`, plus Agree@1 of the selector and of the controls on the held-out trajectories.

        The loss is the mean over all held-out points (the prefix KL: over tokens), whatever the batches are.
        `fused_agree_at_1` is for the decision that calibration would deploy: the fusion weights for one half of the
        problems are fitted on the other half. With too few points for that they are fixed, as in the training log.
        """
        self._row_metrics["eval"].clear()
        self._held_out = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            fused = self._cross_fitted_agreement()
            own = self._own_metrics()
        finally:
            self._held_out = None
        for name, (hits, count) in self._row_metrics["eval"].items():
            if count:
                output.metrics[f"{metric_key_prefix}_{name}"] = hits / count
        if fused is not None:
            output.metrics[f"{metric_key_prefix}_fused_agree_at_1"] = fused
        loss = output.metrics.get(f"{metric_key_prefix}_selection_loss")
        if loss is not None:
            kl = output.metrics.get(f"{metric_key_prefix}_prefix_kl")
            if kl is None:  # the loss has no other part
                del output.metrics[f"{metric_key_prefix}_selection_loss"]
            output.metrics[f"{metric_key_prefix}_loss"] = loss + self.args.prefix_kl_weight * (kl or 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in own.items()})
        return output

    def _own_metrics(self) -> dict[str, float]:
        """What the user's `compute_metrics` makes of the held-out points."""
        if self._compute_selection_metrics is None or not self._held_out:
            return {}
        points = _HeldOutPoints(*(torch.cat(parts) for parts in zip(*self._held_out)))
        scores_NK = points.scores_NK.masked_fill(~points.mask_NK, float("-inf"))
        return self._compute_selection_metrics(EvalPrediction(scores_NK.numpy(), points.target_N.numpy()))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`. Problems that the checkpoint has seen, in other labels too, count as seen."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint and os.path.isdir(checkpoint):
            before = read_seen_problems(checkpoint)
            for stage in _STAGES & before.keys():
                self._seen_problems[stage] = self._seen_problems.get(stage, set()) | before[stage]
        self._holds_best = False
        self._row_metrics["train"].clear()  # what an earlier training has counted in its last steps
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(self._weights_of(resume_from_checkpoint), model)

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        try:
            self.state.best_model_checkpoint = self._weights_of(checkpoint)
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = checkpoint
        self._holds_best = True

    def _weights_of(self, checkpoint: str) -> str:
        """Where `Trainer` is to look for a checkpoint's weights: FSDP has its own files at the top."""
        return checkpoint if self.is_fsdp_enabled else str(adapter_folder(checkpoint))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in `Trainer`, without the reserved rows: decay would pull them to zero, not to where they started."""
        return [name for name in super().get_decay_parameter_names(model) if "trainable_tokens_delta" not in name]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    # ---- saving ----

    def selector_config(self) -> SelectorConfig:
        """What is written beside the adapter as `s2t_config.json`."""
        header = self.label_header
        return SelectorConfig(
            reserved_token_ids=self.reserved_token_ids,
            adapter_scope=self.args.adapter_scope,
            proposals=self.args.proposals,
            score_head=self.args.score_head,
            num_candidates=min(self.args.num_candidates, DEFAULT_NUM_CANDIDATES),
            min_prob_ratio=self.args.min_prob_ratio,
            base_model=self._base_name,
            teacher_model=header.teacher_model if header else "",
            vocab_hash=vocab_hash(self.processing_class),
            model_hash=self._model_hash,
            metrics=self._eval_metrics(),
        )

    def _eval_metrics(self) -> dict[str, float]:
        """Held-out figures of the saved weights: the best step's where that was loaded, else the last evaluation's."""
        names = ("agree_at_1", "fused_agree_at_1", "spearman", "student_first", "second_candidate", "loss")
        entries = [entry for entry in self.state.log_history if any(key.endswith("agree_at_1") for key in entry)]
        entries = [entry for entry in entries if any(key.startswith("eval_") for key in entry)]
        if self._holds_best:
            entries = [entry for entry in entries if entry["step"] == self.state.best_global_step] or entries
        figures: dict[str, float] = {}
        step = entries[-1]["step"] if entries else None
        for entry in entries:  # a dict of evaluation sets logs one entry for each
            if entry["step"] == step:
                figures |= {
                    key.removeprefix("eval_"): value
                    for key, value in entry.items()
                    if key.startswith("eval_") and key.endswith(names)
                }
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves the LoRA weights, the reserved rows, `s2t_config.json`, the ids of the problems that they have seen
        (`seen_problems.json`), the tokenizer and the model card.

        The embedding matrices are never saved, even where reserved tokens were added: the adapter holds their rows.
        """
        if not self.args.should_save:
            return  # a sharded model's `state_dict` is whole in the main process alone
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        name = self.adapter_name
        inner = folder / ADAPTER_FOLDER
        model.save_pretrained(inner, state_dict=state_dict, save_embedding_layers=False, selected_adapters=[name])
        give_plain_mode(inner)
        (inner / CARD_NAME).unlink(missing_ok=True)  # PEFT's card says how to load an ordinary adapter
        if name != "default":  # PEFT gives it a folder of its own
            for file in (inner / name).glob("adapter_*"):
                file.replace(inner / file.name)
            shutil.rmtree(inner / name)
        guard(folder)
        self._save_beside_adapter(folder)
        self.processing_class.save_pretrained(folder)
        write_custom_generate(folder)
        torch.save(_without_secrets(self.args), folder / "training_args.bin")
        (folder / CARD_NAME).write_text(self._card(folder), encoding="utf-8")

    def _save_beside_adapter(self, folder: Path) -> None:
        """Writes `s2t_config.json` and `seen_problems.json`, and removes router and calibration of earlier weights."""
        for name in (SEEN_PROBLEMS_NAME, ROUTER_WEIGHTS_NAME, CALIBRATION_NAME):
            (folder / name).unlink(missing_ok=True)
        for stage, ids in self._seen_problems.items():
            write_seen_problems(folder, stage, ids)
        self.selector_config().save_pretrained(folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As in `Trainer`; of `output_dir` only what belongs to the selector is uploaded (`PUBLISHED`).

        Args:
            kwargs: for [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        where = {"token": token, "revision": revision, "private": private}
        return self._push(self.args.output_dir, commit_message, run_as_future=not blocking, **where)

    def _push(
        self,
        folder: str,
        commit_message: str | None,
        run_as_future: bool,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ):
        return push_selector(
            folder,
            self.hub_model_id,
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            run_as_future=run_as_future,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`. A checkpoint holds all of a selector's files, so every pushed state can be loaded."""
        strategy, running = self.args.hub_strategy, self.push_in_progress
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and running is not None and not running.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._push(checkpoint_folder, message, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            upload = HfApi(token=self.args.hub_token).upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo=name,
                commit_message=f"{message}, checkpoint",
                revision=self.args.hub_revision,
                ignore_patterns=["training_args.bin"],
                run_as_future=True,
            )
            jobs.append(upload)
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            running.jobs.extend(jobs)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        language: str | list[str] | None = None,
        license: str | None = None,
        **unused: Any,
    ) -> None:
        """Writes the model card with the held-out figures into `output_dir`.

        Args:
            model_name: title, by default the name of the repository or folder.
            dataset_name: Hub ids of the labels.
            tags: beside those that every selector has.
            language, license: metadata for the Hub.
            unused: what `Trainer` takes beside.
        """
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            card = {"language": language, "license": license, "tags": tags or (), "datasets": dataset_name or ()}
            (folder / CARD_NAME).write_text(self._card(folder, model_name=model_name, **card), encoding="utf-8")

    def _card(self, folder: Path, **card: Any) -> str:
        repository = self.hub_model_id or self.args.hub_model_id or folder.resolve().name
        return selector_card(self.selector_config(), repository, **card)


def _without_secrets(args: S2TConfig) -> S2TConfig:
    """The arguments for `training_args.bin`, without tokens of the Hub."""
    clean = copy.copy(args)
    clean.hub_token = None
    secrets = {"token", "use_auth_token", "hub_token"}
    clean.model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in secrets} or None
    return clean


class _HeldOutPoints(NamedTuple):
    """Decision points of an evaluation, on the CPU, in the order of [`fusion.cross_fitted_choice`]."""

    scores_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    mask_NK: torch.Tensor
    target_N: torch.Tensor
    problem_N: torch.Tensor


def _problem_numbers(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number (B,) for each row's problem, made from its prompt: the same in every process, block and rollout."""
    prompts = [ids[:length] for ids, length in zip(inputs["input_ids"].tolist(), inputs["prompt_length"].tolist())]
    digests = [hashlib.sha256(repr(prompt).encode()).digest() for prompt in prompts]
    return torch.tensor([int.from_bytes(d[:7], "big") for d in digests], device=inputs["input_ids"].device)


def _call_through(wrapper: nn.Module, inner: nn.Module, method: Callable[[], Any]) -> Any:
    """Runs `method` inside the forward of a distributed wrapper, so that its hooks see the computation.

    FSDP2 has no wrapper, only hooks: `wrapper` is `inner` then. No tensor goes through as an argument, for mixed
    precision would round the labels.
    """
    own = inner.__dict__.get("forward")  # accelerate may have put one there

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    computed = []

    def redirected(*args, **kwargs) -> Any:
        restore()
        if args or kwargs:  # another caller, after an interrupt that left this function in place
            return inner(*args, **kwargs)
        computed.append(method())
        return computed[0]

    inner.forward = redirected
    try:
        output = wrapper()
    finally:
        restore()
    return computed[0] if wrapper is inner else output  # FSDP2 returns a copy rounded to the type it computes in
