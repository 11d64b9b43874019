"""Trains what S2T-Local has to be compared with, on the same problems: a LoRA of the small model that imitates.

    s2t imitate --method sft --model M --teacher_model T --labels runs/demo/labels/label \
        --output_dir runs/demo/sft-seed0 --learning_rate 1e-3
    s2t imitate --method kd  --model M --teacher_model T --labels runs/demo/labels/label \
        --output_dir runs/demo/kd-seed0 --learning_rate 1e-3

"sft": supervised fine-tuning on the large model's own greedy solutions of the labelled problems (TRL's SFTTrainer), or
on several that it samples of each (`--num_samples`).
"kd": distillation of its whole next-token distribution, KL(teacher || student), along the small model's own labelled
trajectories. Both see the problems of the labels and no others, train the prompt's tokens not at all, and take every
option of trl.SFTConfig. With `--teacher_texts FOLDER` the teacher writes its solutions once for all learning rates and
seeds. `s2t eval` measures what was trained (`--tuned sft=FOLDER kd=FOLDER`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer, get_peft_config

from s2t_recipes.adapters import BASELINE_NAME, check_model
from s2t_recipes.models import default_device, load_model, padding_token_id
from s2t_recipes.options import Parser, check_least
from s2t_recipes.records import fingerprint, hash_of, read_records, write_records
from s2t_recipes.training.lora_arguments import LoraArguments, quantization_of, without_pinned_memory
from transformers_s2t.config import check_choice
from transformers_s2t.files import give_plain_mode, write_json
from transformers_s2t.labeling.rollout import rollout
from transformers_s2t.labels.folder import read_labels
from transformers_s2t.labels.schema import TrajectoryHeader
from transformers_s2t.labels.seen_problems import write_seen_problems
from transformers_s2t.models.forwards import TextLogits, text_logits
from transformers_s2t.models.shared_prefix import can_share, share_in_forward
from transformers_s2t.reserved_tokens import check_same_vocabulary


METHODS = ("sft", "kd")
#: Bytes of the teacher's hidden states that are kept in memory, at most.
MAX_STATES = 4 << 30


@dataclass(kw_only=True)
class BaselineArguments(LoraArguments):
    """What is trained, and on what.

    Raises:
        ValueError: naming the argument, its legal values and the value given.
    """

    method: str = HfArg(help="'sft' (the teacher's texts) or 'kd' (its distributions).")
    model: str = HfArg(help="Small model: a Hub id or a local folder.")
    teacher_model: str = HfArg(help="Large model, with the same tokenizer: a Hub id or a local folder.")
    labels: str = HfArg(help="Folder written by `s2t label`: its problems, and its trajectories.")
    max_problems: int | None = HfArg(default=None, help="Number of problems, the first ones (default: all).")
    num_samples: int | None = HfArg(
        default=None,
        help="Number of texts that the teacher samples of each problem, for 'sft' (default: its greedy one).",
    )
    attn_implementation: str | None = HfArg(
        default=None,
        help="Attention of the trained model, as from_pretrained takes it. On a CPU a tiny model takes half the time "
        "with 'eager': the backward pass of 'sdpa' is slow there.",
    )
    teacher_batch_size: int = HfArg(default=64, help="Texts of the teacher written at a time.")
    teacher_texts: str | None = HfArg(
        default=None,
        help="Folder that keeps the teacher's texts for other trainings that want the same, for 'sft' (default: they "
        "are written anew each time).",
    )
    overwrite: bool = HfArg(default=False, help="Train again although `output_dir` holds an adapter.")

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        check_least(self, teacher_batch_size=1)
        if self.num_samples is not None and (self.num_samples < 1 or self.method != "sft"):
            raise ValueError(
                f"`num_samples` must be at least 1, and is for method='sft', got {self.num_samples!r} with "
                f"{self.method!r} (labels hold the texts of 'kd', see `num_rollouts` of s2t label)."
            )
        if self.teacher_texts is not None and self.method != "sft":
            raise ValueError(f"`teacher_texts` is for method='sft', got {self.teacher_texts!r} with {self.method!r}.")
        super().__post_init__()


def trained_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
    """Applies the head to the positions before trained tokens and to no others: over a large vocabulary it costs as
    much as many layers. Takes the labels out of `inputs`.

    Returns:
        The model's outputs, with logits at the C positions before a token that some row trains; the logits before the
        N trained tokens (N, V), float32, row by row; these tokens (N,); and where they are (B, T - 1).
    """
    labels_BT = inputs.pop("labels")[:, 1:]
    trained_BT = labels_BT != -100
    columns_C = trained_BT.any(0).nonzero()[:, 0]
    outputs = model(**inputs, logits_to_keep=columns_C, use_cache=False)
    return outputs, outputs.logits[trained_BT[:, columns_C]].float(), labels_BT[trained_BT], trained_BT


class TextTrainer(SFTTrainer):
    """TRL's own loss, the mean cross-entropy of the trained tokens.

    Without Triton, TRL applies the head to every position, prompts included; this takes its place where it can.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        is_plain = args.loss_type == "nll" and not args.label_smoothing_factor and args.world_size == 1
        if not is_plain or inputs["input_ids"].device.type == "cuda":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, logits_NV, ids_N, _ = trained_logits(model, inputs)
        total = torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="sum")
        loss = total / (len(ids_N) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class DistillationTrainer(SFTTrainer):
    """KL(teacher || student) over the tokens that both have, mean over the trained tokens of the global batch.

    Args:
        teacher_model: teacher with the student's tokenizer; on its own device, without gradient.
        texts: token ids, and where the trained ones begin. The teacher's last hidden states of them are kept where
            they fit, so that it reads each text once and not in every epoch.
    """

    def __init__(
        self,
        *args,
        teacher_model: PreTrainedModel,
        texts: Sequence[tuple[list[int], int]] = (),
        batch_size=8,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval()
        self.states = keep_states(self.teacher_model, texts, batch_size)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, student_NV, ids_N, trained_BT = trained_logits(model, inputs)
        with torch.no_grad():
            teacher_NV = self._teacher_logits(inputs, trained_BT).to(student_NV.device)
        shared = min(student_NV.shape[-1], teacher_NV.shape[-1])
        student_NV = student_NV[:, :shared].log_softmax(-1)
        teacher_NV = teacher_NV[:, :shared].float().log_softmax(-1)
        total = (teacher_NV.exp() * (teacher_NV - student_NV)).sum()
        loss = total / (len(ids_N) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # gradients are averaged, tokens were counted over all processes
        return (loss, outputs) if return_outputs else loss

    def _teacher_logits(self, inputs: dict[str, torch.Tensor], trained_BT: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (N, V) at the trained tokens, row by row."""
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        rows = [tuple(ids_T[mask_T.bool()].tolist()) for ids_T, mask_T in zip(ids_BT, mask_BT)]
        if all(row in self.states for row in rows):
            states_ND = torch.cat([self.states[row] for row in rows])
            return text_logits(self.teacher_model, states_ND.to(self.teacher_model.device))
        return self.teacher_model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1][trained_BT]


@torch.no_grad()
def keep_states(
    teacher: PreTrainedModel, texts: Sequence[tuple[list[int], int]], batch_size: int
) -> dict[tuple[int, ...], torch.Tensor]:
    """Text -> the teacher's last hidden states (trained tokens, D) that decide its trained tokens, on the CPU; empty
    where they would take more than `MAX_STATES` bytes."""
    width = teacher.get_output_embeddings().weight
    if sum(len(ids) - start for ids, start in texts) * width.shape[1] * width.element_size() > MAX_STATES:
        return {}
    states, order = {}, sorted(texts, key=lambda text: len(text[0]))
    for begin in tqdm(range(0, len(order), batch_size), desc="The teacher's hidden states", unit="batch"):
        batch = order[begin : begin + batch_size]
        first = min(start for _, start in batch) - 1
        hidden_BTD = TextLogits(teacher, [ids for ids, _ in batch], first).kept_BTX
        for hidden_TD, (ids, start) in zip(hidden_BTD, batch):
            states[tuple(ids)] = hidden_TD[start - 1 - first : len(ids) - 1 - first].cpu().clone()
    return states


def make_texts(args: BaselineArguments, labels: Dataset, header: TrajectoryHeader, pad: int):
    """Token ids and where the trained tokens begin, problem by problem."""
    if args.method == "kd":
        return list(zip(labels["input_ids"], labels["prompt_length"]))
    prompts = {row["problem_id"]: row["input_ids"][: row["prompt_length"]] for row in labels}
    if args.teacher_texts is None:
        texts = write_texts(args, prompts, header, pad)
    else:
        settings = {name: getattr(header, name) for name in ("max_new_tokens", "eos_token_ids", "excluded_ids")}
        settings |= {name: getattr(args, name) for name in ("dtype", "num_samples")}
        settings |= {"teacher_model": fingerprint(args.teacher_model), "prompts": prompts}
        key = hash_of(settings)
        file = Path(args.teacher_texts) / f"{key}.jsonl"
        kept = read_records(file, key)
        if kept is None:
            texts = write_texts(args, prompts, header, pad)
            write_records(file, settings | {"settings_hash": key}, [{"input_ids": ids} for ids in texts])
        else:
            texts = [record["input_ids"] for record in kept[1]]
            print(f"The teacher's texts are read from {file}")
    starts = [len(ids) for ids in prompts.values() for _ in range(args.num_samples or 1)]
    return list(zip(texts, starts))


def write_texts(
    args: BaselineArguments, prompts: dict[str, list[int]], header: TrajectoryHeader, pad: int
) -> list[list[int]]:
    """Token ids of the teacher's texts, prompts included, `num_samples` for each problem in turn."""
    teacher = load_model(args.teacher_model, args.dtype, default_device())
    wanted = [(id, number) for id in prompts for number in range(args.num_samples or 1)]
    order = sorted(wanted, key=lambda text: len(prompts[text[0]]))
    texts = {}
    for start in tqdm(range(0, len(order), args.teacher_batch_size), desc="The teacher's texts", unit="batch"):
        batch = order[start : start + args.teacher_batch_size]
        settings = {"do_sample": args.num_samples is not None, "rollouts": [number for _, number in batch]}
        settings["suppressed_ids"] = header.excluded_ids
        given = [prompts[id] for id, _ in batch]
        new = rollout(teacher, given, header.max_new_tokens, pad, header.eos_token_ids, **settings)
        texts |= {text: [*prompts[text[0]], *tokens] for text, tokens in zip(batch, new)}
    return [texts[text] for text in wanted]


def ignore_old_names() -> None:
    """Silences the FutureWarnings for two names of transformers that TRL and PEFT still use, which no user can change;
    what a user says with `--gradient_checkpointing` is done all the same."""
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated", category=FutureWarning)


def main(argv: list[str] | None = None) -> None:
    ignore_old_names()
    args, config = Parser(BaselineArguments, SFTConfig).parse_args_and_config(argv)
    without_pinned_memory(config)
    if (Path(config.output_dir) / BASELINE_NAME).is_file() and not args.overwrite:
        print(f"{config.output_dir} already holds a trained adapter; pass --overwrite true to train it again.")
        return
    labels, header = read_labels(args.labels)
    if header is None:
        raise ValueError(f"`labels` {args.labels!r} have no header: make them with s2t label.")
    if args.max_problems is not None:
        kept = set(list(dict.fromkeys(labels["problem_id"]))[: args.max_problems])
        labels = labels.select([i for i, id in enumerate(labels["problem_id"]) if id in kept])
    check_model("model", args.model)
    check_model("teacher_model", args.teacher_model, may_be_tuned=True)
    quantization = quantization_of(args, config)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    check_same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(args.teacher_model))
    pad = padding_token_id(tokenizer, args.model)
    texts = make_texts(args, labels, header, pad)
    trained_ids = [[-100] * start + ids[start:] for ids, start in texts]
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in texts], "labels": trained_ids})
    dtype = "float32" if args.dtype == "auto" and default_device().type == "cpu" else args.dtype
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation=args.attn_implementation, quantization_config=quantization
    )
    config.max_length = None  # texts are as long as they were labelled
    settings = {"args": config, "train_dataset": dataset, "processing_class": tokenizer}
    settings["peft_config"] = get_peft_config(args)
    if can_share(model) and config.n_gpu <= 1 and config.world_size == 1:  # replicas and shards run their own forwards
        share_in_forward(model)  # a system prompt is the longest part of a short text
    if args.method == "sft":
        trainer = TextTrainer(model, **settings)
    else:
        teacher = load_model(args.teacher_model, args.dtype, default_device())
        trainer = DistillationTrainer(
            model, teacher_model=teacher, texts=texts, batch_size=args.teacher_batch_size, **settings
        )
    trainer.train()
    trainer.save_model(config.output_dir)
    if trainer.args.should_save:
        give_plain_mode(Path(config.output_dir))
    write_seen_problems(config.output_dir, "training", labels["problem_id"])
    trained = sum(len(ids) - start for ids, start in texts)
    found = {name: getattr(args, name) for name in ("method", "model", "teacher_model")}
    found |= {"problems": len(set(labels["problem_id"])), "texts": len(texts), "trained_tokens": trained}
    found |= {name: getattr(config, name) for name in ("learning_rate", "num_train_epochs", "seed")}
    write_json(Path(config.output_dir) / BASELINE_NAME, found)
    print(f"\n{args.method}: {len(texts)} texts, {trained} trained tokens, written to {config.output_dir}")
