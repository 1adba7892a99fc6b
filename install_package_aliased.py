#!/usr/bin/env python3
"""Install this package under another import name.

    python install_package_aliased.py NAME --install           # pip-installs it as NAME
    python install_package_aliased.py NAME --test              # tests it as NAME, then removes it
    python install_package_aliased.py NAME --install --test    # installs it, tests it, keeps it
    python install_package_aliased.py NAME                     # writes the renamed tree, says where

Two projects are called torch2jax. Under a name of its own this one lives beside the other, or
beside another version of itself, in one process: everything by which the package names itself to
another system derives from its import name. So a renamed copy differs in three places: the folder
under `src`, the variable PACKAGE in CMakeLists.txt and the names in pyproject.toml.
"""

from __future__ import annotations

import argparse
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "torch2jax"
ROOT = Path(__file__).resolve().parent

# What a build or the tests need, by name: a work tree also holds environments and build folders.
PARTS = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "cpp",
    "src",
    "tests",
    "examples",
)
# Built by hand or by another interpreter.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.pyd", "*.png", ".*_cache")


def replace_once(path: Path, pattern: str, replacement: str) -> None:
    """Replace the only match of a pattern in a file; a silent miss would install a mixture."""
    text, count = re.subn(
        pattern, replacement, path.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    if count != 1:
        sys.exit(f"{path.name} has {count} matches of {pattern!r}, expected one.")
    path.write_text(text, encoding="utf-8")


def rename_imports(text: str, name: str) -> str:
    """Point a Python or Markdown source at the renamed package.

    Imports inside strings are meant to change too: tests pass programs to other processes. The
    main function bears the package's name, so only what can be nothing but the module changes.

    >>> rename_imports("from torch2jax import torch2jax", "mine")
    'from mine import torch2jax'
    >>> rename_imports("import torch2jax", "mine")
    'import mine as torch2jax'
    >>> rename_imports("import torch2jax as t; from torch2jax._errors import TARGET", "mine")
    'import mine as t; from mine._errors import TARGET'
    >>> rename_imports("import torch2jax._errors", "mine")
    'import mine._errors, mine as torch2jax'
    >>> rename_imports('run("-m", "torch2jax"); import_module("torch2jax._errors")', "mine")
    'run("-m", "mine"); import_module("mine._errors")'
    """
    module = rf"{PACKAGE}((?:\.\w+)*)"
    text = re.sub(rf"\bfrom {module}(?= import\b)", rf"from {name}\1", text)
    # `import x` is the statement only where nothing but a prompt or a separator stands before it.
    statement = r"(^[ \t]*(?:>>> )?|[;:] ?|[\"'(])"
    flags = re.MULTILINE
    text = re.sub(
        rf"{statement}import {module}(?= as \w)", rf"\1import {name}\2", text, flags=flags
    )
    text = re.sub(
        rf"{statement}import {PACKAGE}((?:\.\w+)+)",
        rf"\1import {name}\2, {name} as {PACKAGE}",
        text,
        flags=flags,
    )
    text = re.sub(
        rf"{statement}import {PACKAGE}\b", rf"\1import {name} as {PACKAGE}", text, flags=flags
    )
    text = re.sub(rf"([\"']){PACKAGE}((?:\.\w+)+)([\"'])", rf"\1{name}\2\3", text)
    text = re.sub(rf"import_module\(([\"']){PACKAGE}\1", rf"import_module(\1{name}\1", text)
    text = re.sub(rf"(-m[\"']?,? [\"']?){PACKAGE}\b", rf"\1{name}", text)
    return re.sub(rf"\bsrc/{PACKAGE}\b", f"src/{name}", text)


def make_tree(name: str, tree: Path) -> None:
    """Write the renamed source tree."""
    tree.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=LEFT_OUT)
        elif source.exists():
            shutil.copy2(source, tree / part)
    (tree / "src" / PACKAGE).rename(tree / "src" / name)

    replace_once(tree / "CMakeLists.txt", rf"^set\(PACKAGE {PACKAGE}\)", f"set(PACKAGE {name})")
    settings = tree / "pyproject.toml"
    text = settings.read_text(encoding="utf-8")
    distribution = re.search(r'^name = "([^"]+)"', text, flags=re.MULTILINE)
    if distribution is None or PACKAGE not in distribution[1]:
        sys.exit("pyproject.toml does not name the distribution.")
    text = text.replace(distribution[1], name)
    settings.write_text(re.sub(rf"\b{PACKAGE}\b", name, text), encoding="utf-8")
    for path in tree.rglob("*"):
        if path.suffix in (".py", ".pyi", ".md"):
            text = path.read_text(encoding="utf-8")
            path.write_text(rename_imports(text, name), encoding="utf-8")


def install(tree: Path, target: Path | None, isolated: bool) -> None:
    """Pip-install the tree: for good, or without its dependencies into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", str(tree)]
    if not isolated:
        command.insert(-1, "--no-build-isolation")
    if target is not None:
        command[-1:-1] = ["--no-deps", "--target", str(target)]
    subprocess.run(command, check=True)


def test(tree: Path, target: Path | None, pytest_args: list[str]) -> int:
    """Run the renamed tests; pytest's exit status."""
    path = [str(target)] if target is not None else []
    path += [entry for entry in (os.environ.get("PYTHONPATH"),) if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    # test_alias.py is about the original: it would make an alias of an alias.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--ignore=tests/extension/test_alias.py",
        *(pytest_args or ["-q"]),
    ]
    return subprocess.run(command, cwd=tree, env=environment).returncode


def package_name(text: str) -> str:
    """A name that can be imported, and that is not the original's."""
    if not text.isidentifier() or not text.isascii() or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name that Python can import.")
    if text == PACKAGE:
        raise argparse.ArgumentTypeError("that is the package's own name: use pip install.")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="What follows -- goes to pytest: NAME --test -- -q tests/conversions",
    )
    parser.add_argument(
        "name", type=package_name, metavar="NAME", help="the import name to install it under"
    )
    parser.add_argument(
        "--install", action="store_true", help="pip-install it into this interpreter"
    )
    parser.add_argument("--test", action="store_true", help="run the tests against it")
    parser.add_argument(
        "--target", type=Path, metavar="DIR", help="install it into DIR, without its dependencies"
    )
    parser.add_argument(
        "--no-build-isolation",
        action="store_true",
        help="build with the scikit-build-core, nanobind and jaxlib of this interpreter",
    )
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    arguments, pytest_args = parser.parse_args(words[:split]), words[split + 1 :]
    if arguments.install and arguments.target:
        parser.error("--install and --target exclude each other.")

    if not (arguments.install or arguments.test or arguments.target):
        tree = Path(tempfile.mkdtemp(prefix=f"{arguments.name}-")) / arguments.name
        make_tree(arguments.name, tree)
        print(f"The renamed tree is {tree}; `pip install {tree}` installs it.")
        return 0

    with tempfile.TemporaryDirectory(prefix=f"{arguments.name}-") as folder:
        tree = Path(folder) / arguments.name
        make_tree(arguments.name, tree)
        target = None
        if not arguments.install:
            target = (arguments.target or Path(folder) / "site").resolve()
        install(tree, target, isolated=not arguments.no_build_isolation)
        return test(tree, target, pytest_args) if arguments.test else 0


if __name__ == "__main__":
    sys.exit(main())
