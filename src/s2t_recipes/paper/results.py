"""Writes tables: from docs/results/*.json to Markdown beside them, and into other texts between their markers.

    python recipes/results.py            # rewrites docs/results/*.md and the tables of the README and docs/*.md
    python recipes/results.py --check    # says what is out of date, and changes nothing
    python recipes/results.py --same runs/again/results    # do two runs agree, in all but times?

Every number in a table comes from a JSON that recipes/paper.py wrote. Knows forms of numbers, nothing of models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from s2t_recipes.commands import RECIPES
from s2t_recipes.options import SmallParser


ROOT = RECIPES.parent
RESULTS = ROOT / "docs" / "results"
#: Texts with markers, see [`fill`].
TEXTS = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "real-models.md")
TEXTS += (ROOT / "recipes" / "babyllama" / "README.md",)


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A value as a table shows it; empty where there is none.

    Forms: "text", "count" (thousands apart), "0f" "1f" "2f" (decimals), "share" (of 1, shown in per cent), "p",
    "times", "interval" and "signed interval" (one decimal, with the interval under `key`_ci).
    """
    value = row.get(key)
    if value is None:
        return ""
    if form == "text":
        return str(value)
    if form == "count":
        return f"{round(value):,}".replace(",", " ")
    if form == "share":
        return f"{100 * value:.1f}"
    if form == "times":
        return f"{value:.2f}x"
    if form == "p":
        return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"
    if form.endswith("interval"):
        sign = "+" if form.startswith("signed") else ""
        low, high = row[f"{key}_ci"]
        return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
    return f"{value:.{form}}"


def table(columns: list, rows: list[dict[str, Any]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    texts = [[cell(row, key, form).replace("|", "\\|") for _, key, form in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in texts)]
    lines = ["| " + " | ".join(columns[i][0] for i in kept) + " |"]
    lines.append("|" + "|".join("---" if columns[i][2] == "text" else "---:" for i in kept) + "|")
    lines += ["| " + " | ".join(line[i] for i in kept) + " |" for line in texts]
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    """The Markdown of one file of results."""
    parts = [f"# {result['title']}", result["text"].strip()]
    parts.append(f"```bash\n{result['command']}\n```")
    for pair in result["pairs"].values():
        parts.append(f"## {pair['title']}")
        parts.append(table(pair["columns"], pair["rows"]))
        parts += ["\n".join(f"- {note}" for note in pair["notes"])] if pair["notes"] else []
        versions = ", ".join(f"{name} {version}" for name, version in pair["versions"].items())
        parts.append(f"Seeds {pair['seeds']}; {pair['device']}; {versions}.")
    return "\n\n".join(parts) + "\n"


def fill(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Replaces what is between `<!-- results: FILE PAIR -->` and `<!-- end -->` by a table of that file.

    Columns may be named after the pair, by their keys, separated by spaces; then only these are shown. Rows may be
    named after `rows`, by their place, e.g. `rows 0 2 3`.

    Raises:
        ValueError: for a marker without an end of its own, or one that names a table, column or row that there is not.
    """
    lines, done = text.split("\n"), []
    while lines:
        line = lines.pop(0)
        done.append(line)
        if not line.startswith("<!-- results: "):
            continue
        name, pair, *rest = line.removeprefix("<!-- results: ").removesuffix(" -->").split()
        if name not in results or pair not in results[name]["pairs"]:
            raise ValueError(f"{line!r} names results that there are not: have {sorted(results)}.")
        behind = [other for other in lines if other == "<!-- end -->" or other.startswith("<!-- results: ")]
        if not behind or behind[0] != "<!-- end -->":
            raise ValueError(f"{line!r} has no <!-- end --> behind it.")
        found = results[name]["pairs"][pair]
        cut = rest.index("rows") if "rows" in rest else len(rest)
        keys, places = rest[:cut], [int(place) for place in rest[cut + 1 :]]
        legal = [column[1] for column in found["columns"]]
        if not set(keys) <= set(legal) or not all(0 <= place < len(found["rows"]) for place in places):
            what = f"columns among {', '.join(legal)} and {len(found['rows'])} rows from 0"
            raise ValueError(f"{line!r} must name {what}.")
        columns = [column for column in found["columns"] if not keys or column[1] in keys]
        rows = [found["rows"][place] for place in places] if places else found["rows"]
        done += ["", table(columns, rows), "", "<!-- end -->"]
        del lines[: lines.index("<!-- end -->") + 1]
    return "\n".join(done)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> content of every file of results."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def pages(folder: Path = RESULTS, texts: tuple[Path, ...] = TEXTS) -> dict[Path, str]:
    """File -> what it should hold: a page for each result, and the texts with their tables."""
    results = read_results(folder)
    wanted = {folder / f"{name}.md": page(result) for name, result in results.items()}
    return wanted | {file: fill(file.read_text(encoding="utf-8"), results) for file in texts}


def comparable(results: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(table, pair) of what two runs both have and must agree on: all but tables that hold times."""
    return [
        (name, pair)
        for name in sorted(results.keys() & others.keys())
        for pair, found in results[name]["pairs"].items()
        if pair in others[name]["pairs"] and not found["holds_times"]
    ]


def differences(results: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> list[str]:
    """What two runs do not agree on: rows and notes of all that is [`comparable`]."""
    found = []
    for name, pair in comparable(results, others):
        one, other = results[name]["pairs"][pair], others[name]["pairs"][pair]
        if len(one["rows"]) != len(other["rows"]):
            found.append(f"{name}, {pair}: {len(one['rows'])} and {len(other['rows'])} rows")
        for number, (row, other_row) in enumerate(zip(one["rows"], other["rows"])):
            keys = [key for key in {**row, **other_row} if row.get(key) != other_row.get(key)]
            found += [f"{name}, {pair}, row {number}: {k} {row.get(k)} and {other_row.get(k)}" for k in keys]
        if one["notes"] != other["notes"]:
            found.append(f"{name}, {pair}: other notes")
    return found


def main() -> None:
    parser = SmallParser("What is done instead of writing")
    parser.add_argument("--check", action="store_true", help="Change nothing; exit status 1 where something differs.")
    parser.add_argument("--same", type=Path, metavar="FOLDER", help="Compare with the results of another run.")
    args = parser.parse_args()
    if args.same is not None:
        ours, others = read_results(RESULTS), read_results(args.same)
        compared = [f"{name} ({pair})" for name, pair in comparable(ours, others)]
        if not compared:
            raise ValueError(f"`same`: {str(args.same)!r} has no table of docs/results that could be compared.")
        found = differences(ours, others)
        print("\n".join(found) or f"the same: {', '.join(compared)}")
        sys.exit(1 if found else 0)
    wanted = pages()
    stale = [file for file in wanted if not file.is_file() or file.read_text(encoding="utf-8") != wanted[file]]
    for file in stale:
        print(f"{file}: {'out of date' if args.check else 'written'}")
        if not args.check:
            file.write_text(wanted[file], encoding="utf-8")
    if args.check and stale:
        sys.exit(1)
