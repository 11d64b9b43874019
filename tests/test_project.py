"""What surrounds the code says the same as the code: versions, citation, typing, the table of who imports whom."""

import re
import tomllib
from pathlib import Path

import yaml
from test_structure import MAY_IMPORT

import transformers_s2t


ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_one_version_everywhere():
    version = transformers_s2t.__version__
    assert PROJECT["project"]["version"] == CITATION["version"] == version
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version in newest[1]


def test_the_citation_has_what_its_format_requires():
    assert CITATION["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= CITATION.keys()
    assert CITATION["license"] == PROJECT["project"]["license"]
    assert CITATION["repository-code"] == PROJECT["project"]["urls"]["Repository"]
    (paper,) = CITATION["references"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["url"] == PROJECT["project"]["urls"]["Paper"]


def test_urls_point_to_files_of_this_repository():
    base = PROJECT["project"]["urls"]["Repository"]
    for name, url in PROJECT["project"]["urls"].items():
        if name != "Paper":
            assert url.startswith(base), name
        if "/blob/main/" in url:
            assert (ROOT / url.partition("/blob/main/")[2]).is_file(), url


def test_both_packages_are_typed():
    for package in ("transformers_s2t", "s2t_recipes"):
        assert (ROOT / "src" / package / "py.typed").is_file()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_the_table_of_imports_is_the_one_that_is_tested():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| wing or file | may import |\n|---|---|\n")[2].partition("\n\n")[0]
    told = {}
    for row in table.splitlines():
        wings, imports = (set(re.findall(r"`(\w+)`", cell)) for cell in row.strip("|").split("|"))
        told |= dict.fromkeys(wings, imports)
    assert told == MAY_IMPORT
