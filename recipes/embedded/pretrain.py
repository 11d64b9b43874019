"""Train the models of the embedded pair from scratch: the pair of student and teacher, and a small student.

    python recipes/embedded/pretrain.py --output recipes/embedded --seed 0 --role both
    python recipes/embedded/pretrain.py --output recipes/embedded --seed 0 --role small

The student reads sloppy solutions, the teacher and the small student clean ones, all of problems of the split
`pretrain` only. Each model goes to OUTPUT/ROLE: fp16 weights, config, generation config and tokenizer. Needs
torch >= 2.9, for `torch.optim.Muon`.

Shapes: B rows, T tokens, V vocabulary.
"""

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
from tokenizer import MAX_LENGTH, build_tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)


@dataclass(frozen=True)
class Role:
    """What tells the models apart."""

    num_layers: int
    num_steps: int
    sloppy: bool
    hidden_size: int = 64
    intermediate_size: int = 192
    num_heads: int = 4


ROLES = {
    "student": Role(num_layers=4, num_steps=1200, sloppy=True),
    "teacher": Role(num_layers=3, num_steps=1500, sloppy=False),
    "small": Role(num_layers=1, num_steps=2400, sloppy=False, hidden_size=48, intermediate_size=144, num_heads=2),
}
PAIR = ("student", "teacher")
BATCH_SIZE = 32
MUON_LR, ADAMW_LR = 0.02, 3e-3
WARMUP_STEPS = 20
PROMPT_WEIGHT = 0.1
IGNORE = -100


def tokenized_problems(tokenizer: PreTrainedTokenizerFast, num_problems: int, seed: int, sloppy: bool) -> list[dict]:
    """Problems with their solutions: `input_ids` and `prompt_length`."""
    rng = random.Random(f"solutions {seed}")
    problems = corpus.build_problems("pretrain", num_problems, seed)
    write = (lambda p: corpus.sloppy_solution(p, rng)) if sloppy else corpus.clean_solution
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    solutions = tokenizer([write(problem).text for problem in problems], add_special_tokens=False)["input_ids"]
    return [
        {"input_ids": prompt + solution + [tokenizer.eos_token_id], "prompt_length": len(prompt)}
        for prompt, solution in zip(prompts, solutions, strict=True)
    ]


@dataclass
class WeightingCollator:
    """Pads on the right. Rows [7, 8, 9] (prompt 2) and [7, 8] (prompt 1), pad 0, become

    input_ids_BT [[7, 8, 9], [7, 8, 0]], attention_mask_BT [[1, 1, 1], [1, 1, 0]],
    labels_BT [[7, 8, 9], [7, 8, -100]], weights_BT [[.1, .1, 1], [.1, 1, 0]].
    """

    pad_token_id: int
    prompt_weight: float = PROMPT_WEIGHT

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rows_T = [torch.tensor(row["input_ids"]) for row in rows]
        weights_T = [torch.ones(len(ids_T)) for ids_T in rows_T]
        for row, weight_T in zip(rows, weights_T, strict=True):
            weight_T[: row["prompt_length"]] = self.prompt_weight
        labels_BT = pad_sequence(rows_T, batch_first=True, padding_value=IGNORE)
        return {
            "input_ids": pad_sequence(rows_T, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": (labels_BT != IGNORE).long(),
            "labels": labels_BT,
            "weights": pad_sequence(weights_T, batch_first=True),
        }


def weighted_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the next-token cross-entropy."""
    losses_BT = nn.functional.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2).float(), labels_BT[:, 1:], ignore_index=IGNORE, reduction="none"
    )
    return (losses_BT * weights_BT[:, 1:]).sum() / weights_BT[:, 1:].sum()


class PretrainTrainer(Trainer):
    """`Trainer` with the weights of `WeightingCollator` in its loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = weighted_loss(outputs.logits, inputs["labels"], inputs["weights"])
        return (loss, outputs) if return_outputs else loss


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the hidden layers, AdamW for embeddings, head and norms, behind one interface."""

    def __init__(self, model: nn.Module, muon_lr: float = MUON_LR, adamw_lr: float = ADAMW_LR):
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        hidden = [parameter for name, parameter in named if parameter.ndim == 2 and ".layers." in name]
        others = [parameter for name, parameter in named if parameter.ndim != 2 or ".layers." not in name]
        muon = torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.0)
        adamw = torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
        super().__init__([{"params": hidden, "lr": muon_lr}, {"params": others, "lr": adamw_lr}], {})
        self.parts = (muon, adamw)
        # The scheduler writes the learning rates here; both parts read the very same dictionaries.
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, part_state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(part_state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_model(tokenizer: PreTrainedTokenizerFast, role: Role) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=role.hidden_size,
        intermediate_size=role.intermediate_size,
        num_hidden_layers=role.num_layers,
        num_attention_heads=role.num_heads,
        num_key_value_heads=role.num_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(role: Role, seed: int, num_steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model in fp32, trained on `num_steps` batches of fresh problems."""
    set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, role)
    dataset = tokenized_problems(tokenizer, num_steps * BATCH_SIZE, seed, role.sloppy)
    optimizer = MuonAndAdamW(model)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            seed=seed,
            max_grad_norm=1.0,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = PretrainTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=WeightingCollator(tokenizer.pad_token_id),
            optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, num_steps)),
        )
        trainer.train()
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """fp16 weights, for size; load them with `dtype=torch.float32` on a CPU."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.float16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded models from scratch on one CPU core.")
    parser.add_argument("--output", type=Path, required=True, help="parent of the models' directories")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the problems (default: 0)")
    parser.add_argument("--role", choices=[*ROLES, "both"], default="both", help="default: both of the pair")
    steps = ", ".join(f"{role.num_steps} {name}" for name, role in ROLES.items())
    parser.add_argument("--num-steps", type=int, help=f"for a quick try; default: {steps}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in PAIR if args.role == "both" else [args.role]:
        role = ROLES[name]
        start = time.perf_counter()
        model, tokenizer = pretrain(role, args.seed, args.num_steps or role.num_steps)
        save(model, tokenizer, args.output / name)
        print(f"{args.output / name}: {model.num_parameters()} parameters, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
