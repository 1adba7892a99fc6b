"""Write the notebooks of examples/notebooks: two of the example scripts, cell by cell.

    python tools/notebooks.py            # write them
    python tools/notebooks.py --check    # fail where one is not what its script says

The script's docstring becomes text, its imports and each of its functions a cell, and the last
cells call `main` and show the picture that it draws. Outputs are left out:
tests/package/test_examples.py runs every notebook, in its short form.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = ("force_field", "physics_informed")

OPTIONS = 'options: list[str] = []  # ["--smoke"] for a short run'


def cell(kind: str, source: str, number: int) -> dict[str, Any]:
    lines = source.strip("\n").splitlines(keepends=True)
    made: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        made |= {"execution_count": None, "outputs": []}
    return made | {"source": lines}


def sources(script: Path) -> list[tuple[str, str]]:
    """Kind and text of the cells."""
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
    return found


def notebook(script: Path) -> str:
    cells = [cell(kind, source, number) for number, (kind, source) in enumerate(sources(script))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = []
    for name in SCRIPTS:
        page, text = EXAMPLES / "notebooks" / f"{name}.ipynb", notebook(EXAMPLES / f"{name}.py")
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            old.append(name)
            if not arguments.check:
                page.parent.mkdir(exist_ok=True)
                page.write_text(text, encoding="utf-8")
    if old:
        print(f"{'differ from their scripts' if arguments.check else 'written'}: {', '.join(old)}")
    return int(bool(old) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
