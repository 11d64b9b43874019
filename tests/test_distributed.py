"""Two processes on one machine (gloo) train what one trains. At night `accelerate launch` itself starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_training
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_processes import launch, run_alone


TESTS = Path(__file__).resolve().parent
CONFIGS = TESTS.parent / "recipes" / "accelerate_configs"


def start_anew(options, work, *args):
    """As `tiny_processes.launch`, by the command itself."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, work.__code__.co_filename, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


BY_DAY_AND_NIGHT = pytest.mark.parametrize("start", [launch, pytest.param(start_anew, marks=pytest.mark.slow)])


def run(folder, scope, config=None, options=(), start=launch):
    """Figures and adapter of a run by one process, or by two that `config` starts, with the same steps."""
    folder = folder / (config or "alone")
    folder.mkdir()
    # tied, as small models are: sharding must keep the two together
    tiny_model(tie_word_embeddings=True).save_pretrained(folder / "model")
    num_processes = 2 if config else 1
    arguments = scope, str(4 // num_processes), str(folder)
    if config:
        options = ["--config_file", str(CONFIGS / config), "--num_processes", "2", *options]
        start(options, run_training.main, *arguments)
    else:
        run_alone(run_training.main, *arguments)
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["world_size"] == num_processes
    return figures, load_file(folder / "out" / "s2t" / "adapter_model.safetensors")


@pytest.fixture(scope="module", params=["candidate", pytest.param("sequence", marks=pytest.mark.slow)])
def alone(request, tmp_path_factory):
    """(scope, what one process gives)."""
    return request.param, run(tmp_path_factory.mktemp(request.param), request.param)


def assert_same(found, expected):
    """Loss curve, evaluation and adapter of two runs; a step moves a weight by up to the learning rate, 5e-3."""
    (found, weights), (expected, expected_weights) = found, expected
    assert len(expected["loss"]) == 6 and expected["loss"][0] != expected["loss"][-1]
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    for name in ("eval_loss", "eval_agree_at_1", "eval_fused_agree_at_1", "eval_spearman", "eval_hit_at_2"):
        assert found["eval"][name] == pytest.approx(expected["eval"][name], rel=1e-4), name
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert (weight - expected_weights[name]).abs().max() < 5e-5, name


@BY_DAY_AND_NIGHT
def test_two_processes_give_the_loss_curve_and_the_adapter_of_one(tmp_path, alone, start):
    """Steps hold the same trajectories, with different numbers of points in each half."""
    scope, expected = alone
    found = run(tmp_path, scope, "cpu.yaml", start=start)
    assert found[0]["kind"] == "MULTI_CPU"
    assert_same(found, expected)


@BY_DAY_AND_NIGHT
def test_a_model_sharded_by_fsdp_gives_the_loss_curve_and_the_adapter_of_one_process(tmp_path, alone, start):
    """Scores read weights that no forward has gathered, and whose gradients no hook averages."""
    scope, expected = alone
    found = run(tmp_path, scope, "fsdp2.yaml", ["--mixed_precision", "no"], start)
    assert found[0]["kind"] == "FSDP"
    assert_same(found, expected)


@pytest.mark.parametrize("config", ["zero2.yaml", "zero3.yaml"])
def test_deepspeed_gives_the_loss_curve_and_the_adapter_of_one_process(tmp_path, alone, config):
    """Where it is installed; its first run on a machine compiles for minutes."""
    pytest.importorskip("deepspeed")
    scope, expected = alone
    found = run(tmp_path, scope, config, ["--mixed_precision", "no"], start_anew)
    assert found[0]["kind"] == "DEEPSPEED"
    assert_same(found, expected)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_accelerate_config_loads(file):
    """By accelerate's own loader, which refuses keys that it does not know."""
    config = load_config_from_file(str(file))
    assert config.num_processes > 1 and config.main_process_port == 0
    assert f"accelerate launch --config_file recipes/accelerate_configs/{file.name} recipes/train.py" in (
        file.read_text(encoding="utf-8")
    )
