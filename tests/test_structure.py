"""The house: who may import whom, and that every checked-in recipe still parses."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transformers_s2t"

#: What stands on nothing but each other.
GROUND = {"config", "files", "fingerprints", "fusion", "losses", "proposals", "reserved_tokens", "selector_card"}
GROUND |= {"selector_files", "triggers"}
#: Wing, or a file that belongs to none -> the wings and files that it may import, beside the ground and itself.
MAY_IMPORT = {
    "models": set(),
    "scoring": {"models"},
    "model_checks": {"models", "scoring"},
    "router": {"models"},
    "labels": set(),
    "decoding": {"model_checks", "models", "router", "scoring"},
    "labeling": {"labels", "model_checks", "models", "scoring"},
    "training": {"labels", "model_checks", "models", "scoring"},
    "calibration": {"decoding", "labeling", "labels", "models", "router", "scoring"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(file: Path, package: str = "transformers_s2t") -> set[str]:
    """Modules of a package that a file imports when it is imported itself, and inside of functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {child for node in ast.walk(tree) if isinstance(node, ast.If) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types and (node.module or "").split(".")[0] == package:
            _, _, module = node.module.partition(".")
            is_file = (PACKAGE.parent / package / f"{module.replace('.', '/')}.py").is_file()
            found |= {module} if is_file else {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
    return found


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "__init__"], ids=name_of)
def test_wings_import_downwards_only(file):
    wing = name_of(file).split(".")[0]
    assert wing in GROUND | MAY_IMPORT.keys(), f"{file.name} has no place in the house yet"
    assert {name.split(".")[0] for name in imports_of(file)} <= GROUND | {wing} | MAY_IMPORT.get(wing, set())


def test_no_file_imports_itself_by_way_of_others():
    graph = {name_of(file): imports_of(file) for file in FILES if file.stem != "__init__"}
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph


def test_the_library_knows_nothing_of_the_recipes():
    for file in FILES:
        assert not imports_of(file, "s2t_recipes"), file


def test_scripts_of_recipes_import_no_other_script():
    scripts = {file.stem for file in (ROOT / "recipes").glob("*.py")}
    for file in (ROOT / "recipes").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert all(isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in scripts for node in imports)


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
