"""The house: who may import whom, and that every checked-in recipe still parses."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transformers_s2t"

#: file -> the files of the package that it may import. Trainer and decoder meet in config, proposals, fusion and
#: scoring only.
MAY_IMPORT = {
    "config": set(),
    "seen_problems": {"config"},
    "proposals": set(),
    "triggers": set(),
    "fingerprints": set(),
    "reserved_tokens": set(),
    "losses": set(),
    "fusion": {"config", "proposals", "losses"},
    "views": set(),
    "model_facts": set(),
    "shared_prefix": {"model_facts", "views"},
    "text_cache": set(),
    "scoring": {"proposals", "shared_prefix", "text_cache", "views"},
    "model_checks": {"model_facts", "scoring", "triggers"},
    "router": {"config", "fingerprints", "triggers", "views"},
    "selection": {"config", "fingerprints", "fusion", "model_checks", "proposals", "reserved_tokens", "router"}
    | {"scoring", "triggers", "views"},
    "call": {"shared_prefix"},
    "logits_process": {"call", "config", "model_checks", "proposals", "router", "selection"},
    "generation": {"call", "config", "logits_process", "model_checks", "proposals", "scoring"}
    | {"selection", "shared_prefix"},
    "cross_tokenizer": {"reserved_tokens", "scoring"},
    "trajectories": {"config", "fingerprints"},
    "teachers": {
        "cross_tokenizer",
        "model_checks",
        "model_facts",
        "scoring",
        "shared_prefix",
        "triggers",
        "trajectories",
        "views",
    },
    "labeling": {"config", "fingerprints", "model_checks", "proposals", "shared_prefix", "teachers"}
    | {"triggers", "trajectories"},
    "s2t_config": {"config"},
    "blocks": {"s2t_config", "scoring", "trajectories"},
    "s2t_trainer": {
        "blocks",
        "config",
        "fingerprints",
        "fusion",
        "losses",
        "model_checks",
        "reserved_tokens",
        "s2t_config",
        "scoring",
        "seen_problems",
        "shared_prefix",
        "text_cache",
        "views",
    }
    | {"trajectories"},
    "router_training": {"config", "losses", "proposals", "router", "teachers", "views"},
    "rates": {"config", "generation", "labeling", "selection", "triggers"},
    "calibration": {"config", "fusion", "losses", "proposals", "router_training", "scoring", "selection"}
    | {"trajectories", "triggers"},
}


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.stem)
def test_files_import_only_what_the_house_allows(file):
    if file.stem == "__init__":
        return
    assert file.stem in MAY_IMPORT, f"{file.name} has no place in the house yet"
    assert imports_of(file) <= MAY_IMPORT[file.stem]


def test_decoding_needs_neither_datasets_nor_trl():
    """The core dependencies are torch, transformers, peft and accelerate; the rest is for training and recipes."""
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('datasets', 'trl', 'evaluate', 'math_verify', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from transformers_s2t import S2T, LocalSelector, S2TDecodingConfig, TeacherSelector, s2t_generate\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# tests/test_distributed.py reads how they are launched, tests/test_paper.py the tables
ELSEWHERE = ("accelerate_configs", "paper")
RECIPE_FILES = sorted(f for f in (ROOT / "recipes").glob("*/*.yaml") if f.parent.name not in ELSEWHERE)
RECIPE_FILES += sorted((ROOT / "benchmarks").glob("*.yaml"))
RECIPES = {"label.yaml": "label", "train.yaml": "train", "paper.yaml": "train", "qlora.yaml": "train"}
RECIPES["objective-embedded.yaml"] = "train"


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_recipe_parses(file, tmp_path, monkeypatch):
    from trl import TrlParser

    from transformers_s2t import S2TConfig

    if RECIPES[file.name] == "label":
        from s2t_recipes.labeling.label import LabelArguments as Arguments

        required = {"model": "m", "teacher_model": "t", "dataset": "d", "output_dir": str(tmp_path)}
        parser = TrlParser(Arguments)
    else:
        from s2t_recipes.training.train import ScriptArguments as Arguments

        required = {"model": "m", "labels": "l", "output_dir": str(tmp_path), "use_cpu": "true", "bf16": "false"}
        parser = TrlParser((Arguments, S2TConfig))
    text = file.read_text(encoding="utf-8")
    missing = [part for name, value in required.items() if f"\n{name}:" not in text for part in (f"--{name}", value)]
    if "bf16: true" in text:  # a GPU setting: only the override can be parsed here
        missing += ["--bf16", "false", "--use_cpu", "true"]
    parsed = parser.parse_args_and_config(["--config", str(file), *missing], fail_with_unknown_args=True)
    assert parsed[0].model


def test_every_recipe_says_how_it_is_run():
    for file in (ROOT / "recipes").glob("*/*.yaml"):
        first = file.read_text(encoding="utf-8").split("\n\n")[0]
        assert first.startswith("#"), file
