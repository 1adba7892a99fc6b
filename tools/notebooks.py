"""Write the notebooks of examples/notebooks: two example scripts and a page, cell by cell.

    python tools/notebooks.py            # write them
    python tools/notebooks.py --check    # fail where one is not what its script or page says

A script's docstring becomes text, its imports and each of its functions a cell, and the last cells
call `main` and show the picture that it draws; outputs are left out. A page's Python blocks become
cells, with what the page says that they print. tests/package/test_examples.py runs every notebook.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = ("force_field", "physics_informed")
PAGES = {"quick_start": "getting-started"}
"""Notebooks that are pages of the site, which is what they are called there."""

OPTIONS = 'options: list[str] = []  # ["--smoke"] for a short run'


Part = tuple[str, str, str]
"""Kind and text of a cell, and what it prints."""


def cell(part: Part, number: int) -> dict[str, Any]:
    kind, source, printed = part
    lines = source.strip("\n").splitlines(keepends=True)
    made: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        text = printed.splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": text}
        made |= {"execution_count": None, "outputs": [stream] if printed else []}
    return made | {"source": lines}


def sources(script: Path) -> list[Part]:
    text = script.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    title, _, about = docstring.partition("\n")
    found = [("markdown", f"# {title}\n{about}"), ("code", OPTIONS)]
    begin, plain = tree.body[0].end_lineno or 0, ""
    for node in tree.body[1:]:
        chunk = "".join(lines[begin : node.end_lineno])
        begin = node.end_lineno or 0
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if plain:
                found.append(("code", plain))
            found.append(("code", chunk))
            plain = ""
        elif not isinstance(node, ast.If):  # `if __name__ == "__main__":`
            plain += chunk
    if plain:
        found.append(("code", plain))
    picture = f"{script.stem}.png"
    found.append(("code", f'_ = main([*options, "--output", "{picture}"])'))
    found.append(("code", f'from IPython.display import Image\n\nImage("{picture}")'))
    return [(*part, "") for part in found]


def of_page(page: Path) -> list[Part]:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^This page is also a notebook.*?\n\n", "", text, flags=re.M | re.S)
    block = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    # Text, code and what it prints, in turn.
    words, *blocks = re.split(block, text, flags=re.M | re.S)
    found: list[Part] = [("markdown", words, "")]
    for code, printed, words in zip(*[iter(blocks)] * 3, strict=True):
        found += [("code", code, printed or ""), ("markdown", words, "")]

    # Links to other pages are seen from the notebooks' folder.
    def linked(words: str) -> str:
        return re.sub(r"\]\(([\w/-]+\.md)", r"](../../docs/\1", words)

    return [
        (kind, (source if kind == "code" else linked(source)).strip("\n"), printed)
        for kind, source, printed in found
        if source.strip()
    ]


def notebook(parts: list[Part]) -> str:
    cells = [cell(part, number) for number, part in enumerate(parts)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = []
    parts = {name: sources(EXAMPLES / f"{name}.py") for name in SCRIPTS}
    parts |= {name: of_page(ROOT / "docs" / f"{page}.md") for name, page in PAGES.items()}
    for name, found in parts.items():
        page, text = EXAMPLES / "notebooks" / f"{name}.ipynb", notebook(found)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            old.append(name)
            if not arguments.check:
                page.parent.mkdir(exist_ok=True)
                page.write_text(text, encoding="utf-8")
    if old:
        said = "differ from their scripts or pages" if arguments.check else "written"
        print(f"{said}: {', '.join(old)}")
    return int(bool(old) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
