"""Write the documents that follow from the program: `python -m hf_merge.derive`, or `--check` that they are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hf_merge.controls import in_words
from hf_merge.method import MergeMethod, get_method, list_methods

_PART = re.compile(r"(<!-- derived: (\S+) -->\n).*?(<!-- /derived -->)", re.DOTALL)
COMMANDS = ("", "merge", "plan", "check", "extract", "measure", "push", "methods", "demo", "search",
            "search adamerging", "search soup", "train-router", "deploy", "space", "register")  # fmt: skip


def main() -> None:
    """Write the derived files of the checkout, or with --check exit with 1 if one is stale."""
    root = Path(__file__).parent.parent
    stale = [path for path, text in derived_files(root).items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        names = ", ".join(str(path.relative_to(root)) for path in stale)
        sys.exit(f"Stale: {names}. Run `make derive`." if stale else 0)
    for path in stale:
        path.write_text(derived_files(root)[path])


def derived_files(root: Path) -> dict[Path, str]:
    """Return every file that is derived, wholly or in marked parts, with the text it should have."""
    parts = {"methods": method_table(), "cli": cli_help(), "tree": file_tree(root)}
    files = {root / "docs" / "methods.md": method_pages()}
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = path.read_text() if path.is_file() else ""
        if "<!-- derived: " in text:
            files[path] = _PART.sub(lambda found: f"{found[1]}{parts[found[2]]}\n{found[3]}", text)
    return files


def method_table() -> str:
    """One row for each method."""
    rows = ["| method | merges | parameters | in one sentence |", "|---|---|---|---|"]
    for method in map(get_method, list_methods()):
        names = ", ".join(f"`{name}`" for name in method.parameters)
        rows.append(f"| [{method.name}]({method.paper}) | {method.space} | {names} | {method.summary} |")
    return "\n".join(rows)


def method_pages() -> str:
    """One section for each method: all that its signature and docstring say."""
    head = "# Merge methods\n\nWritten by `make derive` from the methods' signatures and docstrings.\n"
    return "\n".join([head, *map(_page, map(get_method, list_methods()))])


def _page(method: MergeMethod) -> str:
    count = method.number_of_models + (" beside the base" if method.base == "required" else "")
    scope = {True: "model", False: "merge"}
    rows = [
        f"| `{p.name}` | {p.words.replace('|', 'or')} | {scope[p.per_model]} | `{p.default}` | {p.help} |"
        for p in method.parameters.values()
    ]
    table = "\n".join(["| parameter | values | one for each | default | |", "|---|---|---|---|---|", *rows])
    good_for = f"\n\nGood for: {method.good_for}" if method.good_for else ""
    words = f"\nWith the defaults: {in_words(method, {})}\n" if method.in_words else ""
    notes = f"\n{method.notes}\n" if method.notes else ""
    return (
        f"## {method.name}\n\n{method.summary} Merges {count} ({method.space}); base: {method.base}. "
        f"[Source]({method.paper}).{good_for}\n\n```text\n{method.formula}\n```\n\n{table}\n{words}{notes}"
    )


def cli_help() -> str:
    """What `--help` prints for every command."""
    return "\n\n".join(
        f"```text\n$ {f'hf-merge {command}'.strip()} --help\n{_help(command)}\n```" for command in COMMANDS
    )


@cache
def _help(command: str) -> str:
    call = [sys.executable, "-m", "hf_merge.cli", *command.split(), "--help"]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    shown = subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout
    return shown.replace("python -m hf_merge.cli", "hf-merge").replace("cli.py", "hf-merge").strip()


def file_tree(root: Path) -> str:
    """Every module of the package with the first sentence of its docstring."""
    return "\n".join(["```text", *_tree(root / "hf_merge", root), "```"])


def _tree(folder: Path, root: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(root))
        yield f"{name:<38} {path.read_text().lstrip().removeprefix(chr(34) * 3).split(chr(10))[0].rstrip(chr(34))}"


if __name__ == "__main__":
    main()
