"""S2T through programs of others: `transformers serve` and lm-evaluation-harness."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from tiny import EOS, RESERVED, make_selector, tiny_model
from tiny_labels import tiny_tokenizer
from transformers import AutoModelForCausalLM

from s2t_recipes.evaluation.arguments import EvaluateArguments
from s2t_recipes.evaluation.run import evaluate
from transformers_s2t import LocalSelector, s2t_generate


CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
PROMPTS = ["w5 w6 w7 w8", "w20 w21 w22", "w11 w9 w30 w31 w32", "w40 w41"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, a selector of it, and both in one checkpoint."""
    folder = tmp_path_factory.mktemp("ecosystem")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    selector = make_selector(model)
    selector.save_pretrained(folder / "selector", processing_class=tokenizer)
    selector.save_pretrained(folder / "whole", include_base=True, processing_class=tokenizer)
    return folder


def text_of(folder, prompt, with_selector=True, num_tokens=8):
    """What `generate` writes behind a prompt, as text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "base"), tiny_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    s2t = {"custom_generate": s2t_generate, "selector": LocalSelector.from_pretrained(folder / "selector", model)}
    ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, **(s2t if with_selector else {}))
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- transformers serve ----


class Server:
    """`transformers serve` of a checkpoint, on a port of its own."""

    def __init__(self, checkpoint, *options):
        pytest.importorskip("fastapi", reason="`transformers serve` needs transformers[serving]")
        pytest.importorskip("uvicorn", reason="`transformers serve` needs transformers[serving]")
        self.checkpoint = str(checkpoint)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        arguments = ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--device", "cpu", *options]
        code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", self.checkpoint, "--dtype", "float32", *arguments],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return self
            except OSError:
                time.sleep(0.2)
        self.process.kill()
        raise AssertionError(self.process.communicate()[0])

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def post(self, path, **body):
        body = json.dumps({"model": self.checkpoint, "max_tokens": 8, "temperature": 0} | body).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=120).read().decode()


def test_a_checkpoint_is_served_as_generate_decodes(folder):
    """Plain and streamed. What is served would be the base model's text without the checkpoint's own `generate`."""
    expected = [text_of(folder, prompt) for prompt in PROMPTS]
    assert expected != [text_of(folder, prompt, with_selector=False) for prompt in PROMPTS]
    with Server(folder / "whole", "--trust-remote-code") as server:
        for prompt, text in zip(PROMPTS, expected):
            assert json.loads(server.post("/v1/completions", prompt=prompt))["choices"][0]["text"].strip() == text
            chat = {"messages": [{"role": "user", "content": prompt}]}
            answer = json.loads(server.post("/v1/chat/completions", **chat))
            assert answer["choices"][0]["message"]["content"].strip() == text
            lines = server.post("/v1/chat/completions", stream=True, **chat).splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
            assert "".join(pieces).replace(" ", "") == text.replace(" ", "")


def test_continuous_batching_serves_an_error_and_no_other_text(folder):
    with Server(folder / "whole", "--trust-remote-code", "--continuous-batching") as server:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            server.post("/v1/completions", prompt=PROMPTS[0])


# ---- lm-evaluation-harness ----


@pytest.fixture(scope="module")
def task(folder):
    """Ten problems, as a task of the harness and as a file of ours."""
    generator = torch.Generator().manual_seed(0)
    problems = []
    for i in range(10):
        words = torch.randint(EOS + 1, RESERVED[0], (3 + i % 4,), generator=generator).tolist()
        problems.append({"id": f"p{i}", "question": " ".join(f"w{id}" for id in words), "answer": "#### 5"})
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)), encoding="utf-8")
    return {
        "task": "tiny_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "problems.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }


def harness(folder, task, model="s2t", chat=False, batch_size=4, **model_args):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import s2t_recipes.lm_eval  # noqa: F401

    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder / "base"), "dtype": "float32"} | model_args,
        tasks=[task],
        device="cpu",
        batch_size=batch_size,
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    samples = sorted(results["samples"]["tiny_words"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0].split() for sample in samples]


def recorded(folder, policy):
    """What `s2t eval` writes for the same problems."""
    settings = {"model": str(folder / "base"), "adapters": [str(folder / "selector")], "dtype": "float32"}
    settings |= {
        "dataset": str(folder / "problems.jsonl"),
        "prompt_column": "question",
        "max_new_tokens": 8,
        "policies": [policy],
    }
    evaluate(
        EvaluateArguments(
            **settings,
            num_candidates=5,
            min_prob_ratio=0.0,
            answer_style="hash",
            output_dir=str(folder / "evaluation"),
        )
    )
    (file,) = (folder / "evaluation" / "records").glob("*always*.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    return [record["text"].split() for record in records]


def test_the_harness_writes_what_our_evaluation_writes(folder, task):
    """Batches, thresholds and chat templates are the harness's own."""
    selected = harness(folder, task, s2t_adapter=str(folder / "selector"))
    assert selected == recorded(folder, "s2t-local:always")
    base = harness(folder, task, model="hf")
    assert base != selected
    assert harness(folder, task, s2t_adapter=str(folder / "selector"), batch_size=1) == selected
    assert harness(folder, task, pretrained=str(folder / "whole")) == selected
    assert harness(folder, task, chat=True, s2t_adapter=str(folder / "selector"))
    never = {"trigger": "entropy", "threshold": 99.0}
    without_reserved = task["generation_kwargs"] | {"suppress_tokens": list(RESERVED)}
    plain = harness(folder, task | {"generation_kwargs": without_reserved}, model="hf")
    assert harness(folder, task, s2t_adapter=str(folder / "selector"), **never) == plain


def test_the_harness_is_told_what_s2t_cannot_measure(folder, task):
    with pytest.raises(ValueError, match="`peft` writes other text"):
        harness(folder, task, s2t_adapter=str(folder / "selector"), peft="somewhere")
    with pytest.raises(ValueError, match="need `trigger`"):
        harness(folder, task, s2t_adapter=str(folder / "selector"), target_rate=0.1)
    with pytest.raises(NotImplementedError, match="--model hf"):
        harness(folder, task | {"output_type": "loglikelihood"}, s2t_adapter=str(folder / "selector"))
