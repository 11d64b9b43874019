"""The console command `s2t`: what it runs, in how many processes, and what a user reads first."""

import json
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny import EOS, PAD, RESERVED, disagreeing_pair, lora_model, make_selector, prompts, tiny_model
from tiny_labels import tiny_tokenizer
from tiny_processes import run_alone
from transformers import AutoModelForCausalLM
from trl import get_peft_config

import transformers_s2t
from s2t_recipes import cli, commands
from s2t_recipes.commands import COMMANDS, CommandFailed, run
from s2t_recipes.evaluation import rows
from s2t_recipes.evaluation.arguments import EvaluateArguments
from s2t_recipes.labeling import label
from s2t_recipes.options import Parser
from s2t_recipes.training import export, imitate, merge, train
from transformers_s2t import LocalSelector, S2TConfig, SelectorConfig
from transformers_s2t.fingerprints import model_hash
from transformers_s2t.labels.folder import read_labels


ROOT = Path(__file__).resolve().parents[1]
#: Scripts of recipes/ whose command has another name.
SCRIPTS = {"route": "train_router", "imitate": "train_baseline"}


@pytest.fixture
def s2t(monkeypatch, capsys):
    """Runs `s2t` in this process: its exit status, and what it wrote to stdout and stderr."""

    def call(*arguments, script=None):
        monkeypatch.setattr(sys, "argv", [str(script or "s2t"), *map(str, arguments)])
        try:
            cli.main() if script is None else runpy.run_path(str(script), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call


def python(code, *arguments):
    return subprocess.run([sys.executable, *code, *arguments], capture_output=True, text=True, timeout=240)


# ---------------------------------------------------------------------------------------------------------------------
# Help, version, environment


def test_the_overview_names_every_command_without_importing_torch():
    shown = python(["-X", "importtime", "-m", "s2t_recipes"], "--help")
    assert shown.returncode == 0
    for name, command in COMMANDS.items():
        assert f"\n  {name} " in shown.stdout and command.purpose in shown.stdout
    for heavy in ("torch", "transformers", "trl", "accelerate", "numpy"):
        assert not any(line.split("|")[-1].strip() == heavy for line in shown.stderr.splitlines()), heavy
    assert python(["-m", "s2t_recipes"]).stdout == shown.stdout


def test_no_text_of_the_package_names_a_script_that_has_a_command():
    """An installed wheel has no recipes/."""
    scripts = "|".join(SCRIPTS.get(name, name) for name in COMMANDS)
    for file in (ROOT / "src").rglob("*.py"):
        assert not re.search(rf"recipes/({scripts})\.py", file.read_text()), file


def test_the_version_is_that_of_the_distribution(s2t):
    assert s2t("--version") == (0, f"transformers-s2t {version('transformers-s2t')}\n", "")


def test_an_unknown_command_is_one_line(s2t):
    status, out, error = s2t("trian", "--model", "m")
    assert (status, out) == (2, "") and error.startswith("s2t: there is no command 'trian'; the commands are label, ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_opens_with_the_purpose_and_an_example_that_can_be_typed(s2t, name):
    command = COMMANDS[name]
    status, text, _ = s2t(name, "--help")
    purpose, example, rest = text.split("\n\n", 2)
    assert (status, purpose) == (0, command.purpose) and purpose.endswith(".") and "\n" not in purpose
    assert all(line.startswith("    ") for line in example.splitlines())
    assert shlex.split(example.replace("\\\n", "")) == shlex.split(command.example)
    assert command.example.startswith(f"s2t {name}") and rest.startswith(f"usage: s2t {name}")
    for word in shlex.split(command.example):
        assert not word.startswith("--") or f" {word} " in rest, word


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("export", "env")])
def test_help_of_a_script_is_that_of_its_command(s2t, name):
    script = ROOT / "recipes" / f"{SCRIPTS.get(name, name)}.py"
    (status, text, _), (_, expected, _) = s2t("--help", script=script), s2t(name, "--help")
    assert status == 0 and text.split() == expected.replace(f"s2t {name} [", f"{script.name} [").split()


@pytest.mark.parametrize("name", ["agreement", "demo", "paper", "retention", "splits"])
def test_help_of_the_other_scripts_opens_alike(s2t, name):
    status, text, _ = s2t("--help", script=ROOT / "recipes" / f"{name}.py")
    purpose, example = text.split("\n\n")[:2]
    assert status == 0 and purpose.endswith(".") and example.startswith(f"    python recipes/{name}.py")


@pytest.mark.parametrize(
    ("script", "title"),
    [
        ("label", "Which models label which problems, and how:"),
        ("eval", "What is compared, on which problems, and how:"),
        ("report", "What is drawn, and where it goes:"),
        ("merge", "What is merged, and where it goes:"),
        ("agreement", "What is compared with the teacher, and where:"),
        ("retention", "What is compared with the base model, and on what:"),
        ("demo", "What is run, and on what:"),
        ("paper", "Which tables are made, on which pairs, and where they go:"),
        ("results", "What is done instead of writing:"),
        ("splits", "What is divided, and into what:"),
    ],
)
def test_every_help_has_one_usage_line_and_a_titled_list_of_options(s2t, script, title):
    status, text, _ = s2t("--help", script=ROOT / "recipes" / f"{script}.py")
    usage, first, *_ = text.split("usage: ")[1].split("\n\n")
    assert status == 0 and usage.startswith(f"{script}.py [") and "\n" not in usage
    assert first.startswith(f"{title}\n") and "-h, --help" not in text
    assert "(default: None)" not in text and "(default: False)" not in text and "(default: []" not in text


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("train", ["model", "labels", "adapter_scope", "temperature"], "transformers.TrainingArguments:"),
        ("imitate", ["method", "model", "teacher_texts"], "trl.SFTConfig:"),
    ],
)
def test_our_own_options_stand_before_those_of_the_libraries(s2t, name, ours, theirs):
    _, text, _ = s2t(name, "--help")
    places = [text.index(f"\n  --{option} ") for option in ours]
    places += [text.index(part) for part in ("trl.ModelConfig:", "\n  --lora_r ", theirs, "\n  --learning_rate ")]
    assert places == sorted(places)
    assert len(text.split("usage:")[1].split("\n\n")[0].splitlines()) == 1  # not a heap of 200 options
    assert "(default: 16)" in text and "(required)" in text and "--learning-rate" not in text


def test_the_environment_holds_versions_and_no_secret(s2t, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    status, text, _ = s2t("env")
    found = dict(line.removeprefix("- ").split(": ", 1) for line in text.splitlines())
    packages = ("transformers-s2t", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate")
    assert status == 0 and {name: found[name] for name in packages} == {name: version(name) for name in packages}
    assert {"Python", "platform", "devices", "bitsandbytes", "vllm", "math-verify"} <= found.keys()
    assert "secret" not in text and str(Path.home()) not in text


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_name_what_was_typed(s2t, tmp_path):
    (tmp_path / "config.json").touch()
    arguments = ["--model", "m", "--adapter", "a", "--output_dir", tmp_path]
    message = f": `output_dir`: '{tmp_path}' holds a model already.\n"
    assert s2t("merge", *arguments) == (2, "", f"s2t merge{message}")
    assert s2t(*arguments, script=ROOT / "recipes" / "merge.py") == (2, "", f"merge.py{message}")
    for name, script in (("train", "train.py"), ("label", "label.py")):
        error = ": `--config` must be followed by a YAML file.\n"
        assert s2t(name, "--config") == (2, "", f"s2t {name}{error}")
        assert s2t("--config", script=ROOT / "recipes" / script) == (2, "", f"{script}{error}")


@pytest.mark.parametrize(
    ("program", "typed"), [("s2t eval", "s2t eval"), ("recipes/eval.py", "python recipes/eval.py")]
)
def test_a_report_holds_the_command_as_it_was_typed(monkeypatch, program, typed):
    plan = SimpleNamespace(args=EvaluateArguments("m", "d", "o"), leaks=[])
    plan.bench = SimpleNamespace(problems=[], device="cpu")
    plan.selectors = SimpleNamespace(configs=[], thresholds={})
    monkeypatch.setattr(sys, "argv", [program, "--model", "my model"])
    assert rows.describe_run(plan, {})["command"] == f"{typed} --model 'my model'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["label", "--model", "m", "--teacher_modell", "t"], "--teacher_modell; did you mean --teacher_model?"),
        (["imitate", "--methd=sft"], "--methd; did you mean --method?"),
        (["merge", "--modle", "m"], "--modle; did you mean --model?"),
        (["report", "--xyzzy"], "--xyzzy; --help lists all."),
        (["train", "--temperatur", "0.5"], "--temperatur; did you mean --temperature?"),
        (["calibrate", "--target-rate", "0.5"], "--target-rate; did you mean --target_rates?"),
        (["label", "--config", "{yaml}"], "--teacher_modell (in the YAML file); did you mean --teacher_model?"),
    ],
)
def test_an_unknown_option_is_named_first_and_no_option_can_be_abbreviated(s2t, tmp_path, words, message):
    (tmp_path / "x.yaml").write_text("teacher_modell: t\n")
    words = [word.format(yaml=tmp_path / "x.yaml") for word in words]
    assert s2t(*words) == (2, "", f"s2t {words[0]}: There is no option {message}\n")


def test_how_a_command_ends(s2t, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["s2t train"])
    for raised, status, message in (
        (ValueError("`x` must be 1."), 2, "s2t train: `x` must be 1."),
        (FileNotFoundError("no file"), 2, "s2t train: no file"),
        (ImportError("`x` needs y"), 2, "s2t train: `x` needs y"),
        (CommandFailed("it broke"), 1, "s2t train: it broke"),
        (KeyboardInterrupt(), 130, "Stopped."),
        (
            ModuleNotFoundError("No module named 'trl.x'", name="trl.x"),
            2,
            "s2t train: the package 'trl' is not installed: pip install 'transformers-s2t[recipes]'",
        ),
    ):

        def main(raised=raised):
            raise raised

        with pytest.raises(SystemExit) as stopped:
            run(main)
        assert stopped.value.code == status and capsys.readouterr().err.strip().startswith(message)

    def main():
        raise ModuleNotFoundError("a mistake of ours", name="s2t_recipes.nothing")

    with pytest.raises(ModuleNotFoundError):
        run(main)


@pytest.mark.parametrize(("name", "resumes"), [(name, name in ("label", "eval")) for name in COMMANDS])
def test_only_a_command_that_resumes_says_so_when_it_is_stopped(monkeypatch, capsys, name, resumes):
    def main():
        raise KeyboardInterrupt

    main.__module__ = COMMANDS[name].module
    with pytest.raises(SystemExit):
        run(main)
    ending = "The same command resumes from here." if resumes else "Nothing was kept: the same command begins again."
    assert capsys.readouterr().err == f"\nStopped. {ending}\n"


@pytest.mark.parametrize(
    ("checkpoint", "overwrite", "resumes"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_a_stopped_training_resumes_from_a_checkpoint_or_not_at_all(
    monkeypatch, capsys, tmp_path, checkpoint, overwrite, resumes
):
    class Stopped:
        def train(self, resume_from_checkpoint):
            if checkpoint:
                (tmp_path / "checkpoint-3").mkdir()
            raise KeyboardInterrupt

    asked = SimpleNamespace(overwrite=overwrite, eval_labels=None)
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    monkeypatch.setattr(train, "prepare", lambda argv: (asked, args, None, Stopped()))
    with pytest.raises(SystemExit):
        run(lambda: train.main([]))
    assert ("resumes from here" in capsys.readouterr().err) is resumes


def test_without_the_extra_s2t_names_the_installation(s2t, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "s2t_recipes.report.report", raising=False)
    message = "s2t report: the package 'matplotlib' is not installed: pip install 'transformers-s2t[recipes]'\n"
    assert s2t("report", "evaluation") == (2, "", message)


def test_without_the_extra_the_trainer_names_the_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "transformers_s2t.training.s2t_trainer", raising=False)
    with pytest.raises(ImportError, match=r"`S2TTrainer` needs .*'datasets'.*pip install 'transformers-s2t\[train\]'"):
        from transformers_s2t import S2TTrainer  # noqa: F401


def test_lazy_names_are_listed():
    assert set(transformers_s2t.__all__) <= set(dir(transformers_s2t))
    with pytest.raises(AttributeError, match="has no attribute 'S2TTrainr'"):
        transformers_s2t.S2TTrainr  # noqa: B018


@pytest.mark.parametrize("as_peft_model", [False, True])
def test_loading_a_selector_warns_of_nothing(tmp_path, as_peft_model):
    make_selector(tiny_model()).save_pretrained(tmp_path)
    model = tiny_model()
    if as_peft_model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lora_model(model, seed=2, name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalSelector.from_pretrained(tmp_path, model)


# ---------------------------------------------------------------------------------------------------------------------
# accelerate launch


def test_options_of_the_launcher_are_told_from_those_of_the_command():
    arguments = ["--config", "x.yaml", "--num_processes", "2", "--learning_rate", "1e-3", "--multi-gpu"]
    arguments += ["--mixed_precision=bf16", "--gradient_accumulation_steps", "4", "--use_cpu", "true"]
    flags, rest = cli.split_arguments(arguments)
    assert flags == ["--num_processes", "2", "--multi-gpu", "--mixed_precision=bf16"]
    assert rest == [word for word in arguments if word not in flags]


def test_what_both_know_goes_to_the_command():
    """So no option of a command ever disappears: a new one of either library fails here."""
    from accelerate.commands.launch import launch_command_parser

    launcher = {name for name in launch_command_parser()._option_string_actions if name.startswith("--")}
    ours = {
        name
        for parser in (Parser(train.ScriptArguments, S2TConfig), Parser(label.LabelArguments))
        for name in parser._option_string_actions
    }
    assert launcher & ours == set(cli.NOT_OF_THE_LAUNCHER)


@pytest.mark.parametrize(
    ("arguments", "devices", "environment", "expected"),
    [
        ("train --model m", 0, {}, ("here", "train", ["--model", "m"])),
        ("train --model m", 1, {}, ("here", "train", ["--model", "m"])),
        ("train --model m", 2, {}, ("launch", [], "train", ["--model", "m"])),
        ("train --model m --num_processes 1", 0, {}, ("launch", ["--num_processes", "1"], "train", ["--model", "m"])),
        ("train --model m", 2, {"LOCAL_RANK": "0"}, ("here", "train", ["--model", "m"])),
        ("label --model m", 2, {}, ("here", "label", ["--model", "m"])),
        ("label --model m --cpu", 0, {}, ("launch", ["--cpu"], "label", ["--model", "m"])),
        ("train --help --cpu", 2, {}, ("here", "train", ["--help", "--cpu"])),
        ("calibrate --cpu", 2, {}, ("here", "calibrate", ["--cpu"])),
    ],
)
def test_a_process_is_started_only_where_that_does_more(monkeypatch, arguments, devices, environment, expected):
    from accelerate.commands import config

    calls = []
    monkeypatch.setattr(config, "default_config_file", "nowhere.yaml")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    monkeypatch.setattr(cli, "run_here", lambda *args: calls.append(("here", *args)))
    monkeypatch.setattr(cli, "launch", lambda *args: calls.append(("launch", *args)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["s2t", *arguments.split()])
    cli.main()
    assert calls == [expected]


def test_exit_statuses_pass_through_the_launcher(monkeypatch, capsys):
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setattr(sys, "argv", ["s2t", "train"])
    first, later = (ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="nowhere") for code in (2, -15))
    later.timestamp = first.timestamp + 1
    for raised, status in (
        (subprocess.CalledProcessError(2, "x"), 2),
        (subprocess.CalledProcessError(-9, "x"), 137),
        (ChildFailedError("x", {1: first, 0: later}), 2),
        (SignalException("x", sigval=15), 143),
        (KeyboardInterrupt(), 130),
        (ValueError("`--multi_gpu` needs 2 processes"), 2),
    ):
        seen = []

        def fail(args, raised=raised, seen=seen):
            seen.append(args)
            raise raised

        monkeypatch.setattr(launch, "launch_command", fail)
        with pytest.raises(SystemExit) as stopped:
            cli.launch(["--num_processes", "2"], "train", ["--model", "m"])
        assert stopped.value.code == status
        args = seen[0]
        assert args.num_processes == 2 and args.module and args.training_script == "s2t_recipes.cli"
        assert args.training_script_args == ["train", "--model", "m"]
    assert capsys.readouterr().err == "s2t train: `--multi_gpu` needs 2 processes\n"


@pytest.mark.parametrize(
    ("number", "command", "arguments", "status", "said"),
    [
        (1, "report", ["nowhere"], 2, "s2t report: `report`: nowhere does not exist"),
        (2, "env", [], 0, "- transformers-s2t: "),
    ],
)
def test_launched_processes_run_the_command(number, command, arguments, status, said, capfd):
    flags = ["--num_processes", str(number), "--mixed_precision", "no", "--num_machines", "1"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0", *(["--multi_gpu"] if number > 1 else [])]
    run_alone(cli.launch, flags, command, arguments, status=status)
    out, error = capfd.readouterr()
    assert (out + error).count(said) == number and "Traceback" not in error


# ---------------------------------------------------------------------------------------------------------------------
# Options of the adapter, and the columns of a data set


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "all-linear"),
        ("--lora_target_modules all-linear", "all-linear"),
        ("--lora_target_modules q_proj", ["q_proj"]),
        ("--lora_target_modules q_proj,v_proj", ["q_proj", "v_proj"]),
        ("--lora_target_modules q_proj v_proj", ["q_proj", "v_proj"]),
        ("lora_target_modules: all-linear", "all-linear"),
        ("lora_target_modules: q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora_target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_target_modules_are_read_in_every_form(tmp_path, given, expected):
    arguments = ["--model", "m", "--labels", "l"]
    if given is not None and given.startswith("--"):
        arguments += given.split()
    elif given is not None:
        (tmp_path / "x.yaml").write_text(given)
        arguments += ["--config", str(tmp_path / "x.yaml")]
    (args,) = Parser(train.ScriptArguments).parse_args_and_config(arguments)
    assert args.lora_target_modules == expected
    config = get_peft_config(args)
    assert config.target_modules == (expected if isinstance(expected, str) else set(expected))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.05, "none")
    assert (args.dtype, args.attn_implementation) == ("auto", "sdpa")


def test_options_of_both_trainings_are_checked():
    for changes, message in (
        ({"lora_r": 0}, "`lora_r` must be at least 1, got 0"),
        ({"dtype": "int8"}, "`dtype` must be one of 'auto', 'bfloat16', 'float16', 'float32', got 'int8'"),
        ({"bnb_4bit_quant_type": "nf8"}, "`bnb_4bit_quant_type` must be one of 'fp4', 'nf4', got 'nf8'"),
    ):
        for make, required in (
            (train.ScriptArguments, {"model": "m", "labels": "l"}),
            (imitate.BaselineArguments, {"method": "sft", "model": "m", "teacher_model": "t", "labels": "l"}),
        ):
            with pytest.raises(ValueError, match=message):
                make(**required, **changes)


def write_pair(folder):
    for name, model in zip(("student", "teacher"), disagreeing_pair()):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return ["--model", folder / "student", "--teacher_model", folder / "teacher", "--dtype", "float32"]


def test_labels_are_made_of_questions_where_there_are_no_prompts(s2t, tmp_path):
    command = ["label", *write_pair(tmp_path), "--max_new_tokens", 4, "--num_candidates", 4]
    rows = {
        "question": [{"question": "w5 w6 w7", "answer": "w8"}],
        "prompt": [{"question": "w8 w9", "prompt": "w5 w6 w7"}],
        "column": [{"text": "w5 w6 w7"}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    note = "s2t label: prompts are read from the column 'question', for there is no 'prompt' (`prompt_column`).\n"
    found = {}
    for name in ("question", "prompt"):
        output = tmp_path / f"labels-{name}"
        status, _, error = s2t(*command, "--dataset", tmp_path / f"{name}.jsonl", "--output_dir", output)
        labels, header = read_labels(output)
        found[name] = labels["input_ids"]
        assert status == 0 and header.prompt_source["prompt_column"] == name and (note in error) == (name != "prompt")
    assert found["question"] == found["prompt"]
    status, _, error = s2t(*command, "--dataset", tmp_path / "column.jsonl", "--output_dir", tmp_path / "x")
    assert status == 2 and error.startswith("s2t label: `prompt_column`='prompt' is not in row 0")


# ---------------------------------------------------------------------------------------------------------------------
# Export


def save_selector(folder, **config):
    """A base model and a selector of it, whose reserved rows are trained."""
    model = tiny_model()
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    lora_model(model, name="default").save_pretrained(folder / "selector")
    settings = {"base_model": str(folder / "base"), "model_hash": model_hash(tiny_model())}
    SelectorConfig(RESERVED, **(settings | config)).save_pretrained(folder / "selector")


def test_the_papers_form_becomes_a_plain_checkpoint(s2t, tmp_path):
    save_selector(tmp_path, adapter_scope="sequence", proposals="adapted")
    arguments = ["--adapter", tmp_path / "selector", "--output_dir", tmp_path / "out"]
    status, out, error = s2t("export", *arguments, "--dtype", "float32")
    assert (status, error) == (0, "") and "merged" in out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(tiny_model(), tmp_path / "selector")
    with torch.no_grad():
        found, expected, base = (model(**prompts()).logits for model in (plain, adapted, tiny_model()))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found[..., list(RESERVED)] - base[..., list(RESERVED)]).abs().max() > 0.1, "the reserved rows are in it"
    assert plain.generation_config.suppress_tokens == sorted(RESERVED)
    inputs = prompts() | {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    written = plain.generate(**inputs)
    assert torch.equal(written, adapted.generate(**inputs, suppress_tokens=sorted(RESERVED)))
    assert not {file.name for file in (tmp_path / "out").iterdir()} & {"adapter_config.json", "s2t_config.json"}
    status, _, error = s2t("export", *arguments)
    assert status == 2 and "holds a model already" in error


def test_other_forms_say_why_they_are_not_exported(s2t, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "AutoModelForCausalLM", None)  # found out before a model is loaded
    for scope in ("candidate", "sequence"):
        save_selector(tmp_path / scope, adapter_scope=scope)
        output = tmp_path / scope / "out"
        status, _, error = s2t("export", "--adapter", tmp_path / scope / "selector", "--output_dir", output)
        assert status == 2 and error.startswith("s2t export: `adapter` must have proposals='adapted', got 'base' in ")
        assert "LocalSelector.from_pretrained(adapter, model)" in error and not output.exists()


def test_a_selector_of_another_model_is_not_exported(s2t, tmp_path):
    save_selector(tmp_path, adapter_scope="sequence", proposals="adapted", model_hash="0" * 33)
    status, _, error = s2t("export", "--adapter", tmp_path / "selector", "--output_dir", tmp_path / "out")
    assert status == 2 and "`model` has weights " in error and not (tmp_path / "out").exists()


def test_merge_still_refuses_selectors(s2t, tmp_path, monkeypatch):
    save_selector(tmp_path)
    monkeypatch.setattr(merge, "AutoModelForCausalLM", None)
    arguments = ["--model", tmp_path / "base", "--adapter", tmp_path / "selector", "--output_dir", tmp_path / "out"]
    status, _, error = s2t("merge", *arguments)
    assert status == 2 and error.startswith("s2t merge: `adapter` must be an adapter that writes text")


@pytest.mark.parametrize("error", [ValueError, ImportError])
def test_an_error_in_the_middle_of_the_work_keeps_its_traceback(error, capsys):
    def main(at_work):
        with commands.one_line_errors(), commands.work() if at_work else nullcontext():
            raise error("lost")

    with pytest.raises(error, match="lost"):
        main(at_work=True)
    with pytest.raises(SystemExit) as ended:
        main(at_work=False)
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("lost\n")


def test_a_full_disk_in_the_middle_of_the_work_is_one_line(capsys):
    with pytest.raises(SystemExit), commands.one_line_errors(), commands.work():
        raise OSError(28, "No space left on device")
    assert "No space left" in capsys.readouterr().err
