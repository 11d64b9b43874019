"""What selecting costs: S2T-Local against greedy decoding and against the published procedure, in one run.

    python benchmarks/decode.py --shape small --rates 0.01 0.1 --output runs/benchmarks/decode.json

A random model of a given shape decodes the same prompts under every way in turn, A B C A B C ..., and each ratio is
taken inside one turn, so that it holds when the machine's speed drifts. Steps are triggered at random at the given
rate with K candidates each, so that every way asks equally often. Absolute times mean little; ratios are printed.

    greedy       model.generate
    fast         custom_generate=s2t_generate, adapter on the candidates only (the default)
    sequence     custom_generate=s2t_generate, adapter on prefix and candidates, base proposals (a second cache)
    processor    logits_processor=S2T(selector): a cache of its own
    published    K full prefixes through the adapted model at every trigger, no cache (arXiv 2604.26940, public code)
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

from transformers_s2t import S2T, LocalSelector, S2TDecodingConfig, S2TTrace, SelectorConfig, s2t_generate
from transformers_s2t.config import write_json
from transformers_s2t.scoring import get_decoder


SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 1000},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 32000},
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
}


class Published(LogitsProcessor):
    """The public procedure at the same random steps: every candidate's whole text, without a cache, at batch 1."""

    def __init__(self, selector: LocalSelector, config: S2TDecodingConfig, prompt_length: int):
        self.selector, self.config, self.prompt_length = selector, config, prompt_length
        self.random = torch.Generator().manual_seed(config.seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        fires = torch.rand(len(scores), generator=self.random) >= self.config.resolve_threshold(None)
        if input_ids.shape[1] - self.prompt_length < self.config.warmup_tokens:
            return scores
        for row in fires.nonzero()[:, 0].tolist():
            candidates = scores[row].topk(self.config.num_candidates).indices
            texts = torch.cat([input_ids[row].expand(len(candidates), -1), candidates[:, None]], dim=-1)
            with self.selector.switch(True):
                hidden = get_decoder(self.selector.model)(input_ids=texts, use_cache=False).last_hidden_state[:, -1]
            chosen = candidates[self.selector.read_scores(hidden[None])[0].argmax()]
            scores[row] = float("-inf")
            scores[row, chosen] = 0.0
        return scores


def make_selector(shape: str, scope: str, dtype: torch.dtype) -> LocalSelector:
    torch.manual_seed(0)
    heads = max(SHAPES[shape]["hidden_size"] // 64, 2)
    config = Qwen2Config(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    reserved = list(range(config.vocab_size - 16, config.vocab_size))
    lora = LoraConfig(r=16, target_modules="all-linear", trainable_token_indices={"lm_head": reserved})
    return LocalSelector(get_peft_model(model, lora), SelectorConfig(reserved, adapter_scope=scope), "default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="small", help="shape of the random model")
    add("--rates", type=float, nargs="+", default=[0.01, 0.1], help="shares of steps that trigger")
    add("--batch_sizes", type=int, nargs="+", default=[1], help="rows decoded together")
    add("--prompt_tokens", type=int, default=256, help="length of the prompt")
    add("--new_tokens", type=int, default=200, help="tokens to decode")
    add("--num_candidates", type=int, default=8, help="K")
    add("--repeats", type=int, default=3, help="turns")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights' type")
    add("--output", help="JSON file to write")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    candidate, sequence = (make_selector(args.shape, scope, dtype) for scope in ("candidate", "sequence"))

    rows = []
    for batch_size in args.batch_sizes:
        prompt = torch.randint(3, 900, (batch_size, args.prompt_tokens), generator=torch.Generator().manual_seed(1))
        common = {"input_ids": prompt, "max_new_tokens": args.new_tokens, "do_sample": False}
        common["attention_mask"] = torch.ones_like(prompt)
        for rate in args.rates:
            config = S2TDecodingConfig(
                trigger="random", target_rate=rate, min_prob_ratio=0.0, num_candidates=args.num_candidates
            )

            def fast(selector, config=config, common=common, trace=None):
                selector.model.generate(
                    **common, custom_generate=s2t_generate, selector=selector, decoding_config=config, trace=trace
                )

            def published(config=config, common=common, prompt=prompt):
                processor = LogitsProcessorList([Published(candidate, config, prompt.shape[1])])
                candidate.model.generate(**common, logits_processor=processor)

            ways = {
                "greedy": lambda common=common: candidate.model.generate(**common),
                "fast": lambda: fast(candidate),
                "sequence": lambda: fast(sequence),
                "processor": lambda common=common, config=config: candidate.model.generate(
                    **common, logits_processor=S2T(candidate, config=config)
                ),
                "published": published,
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in tqdm(range(args.repeats + 1), desc=f"batch {batch_size}, {rate:.0%} triggers", unit="turn"):
                for name, way in ways.items():
                    began = time.perf_counter()
                    way()
                    if turn:  # the first turn warms up
                        seconds[name].append(time.perf_counter() - began)
            trace = S2TTrace()
            fast(candidate, trace=trace)
            asked = sum(int(step["asked_B"].sum()) for step in trace.steps) / (len(trace.steps) * batch_size)
            for name, values in seconds.items():
                ratios = [value / base for value, base in zip(values, seconds["greedy"])]
                row = {"way": name, "batch_size": batch_size, "rate": rate, "asked_rate": round(asked, 4)}
                row |= {"ratio_to_greedy": round(statistics.median(ratios), 3)}
                row |= {"ratio_range": [round(min(ratios), 3), round(max(ratios), 3)]}
                rows.append(row)

    meta = {name: value for name, value in vars(args).items() if name != "output"} | {"torch": torch.__version__}
    print(f"\nTime relative to greedy, {args.shape} shape, {args.dtype}, {torch.get_num_threads()} thread(s), K = "
          f"{args.num_candidates}, prompt {args.prompt_tokens}, {args.new_tokens} new tokens")  # fmt: skip
    print(f"{'way':<11} {'batch':>5} {'rate':>6} {'asked':>6} {'ratio':>7}   range of {args.repeats} turns")
    for row in rows:
        low, high = row["ratio_range"]
        print(f"{row['way']:<11} {row['batch_size']:>5} {row['rate']:>6.1%} {row['asked_rate']:>6.1%} "
              f"{row['ratio_to_greedy']:>6.2f}x   {low:.2f} - {high:.2f}")  # fmt: skip
    if args.output:
        print(f"\nwritten to {write_json(Path(args.output), {'meta': meta, 'rows': rows})}")


if __name__ == "__main__":
    main()
