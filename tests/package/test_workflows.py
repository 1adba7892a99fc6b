"""What runs elsewhere says what the tree says: workflows, issue templates, the release."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml: Any = pytest.importorskip("yaml", reason="the extra `test` is not installed")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github"
if not FOLDER.exists():
    pytest.skip("not in a source tree", allow_module_level=True)

WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (FOLDER / "workflows").iterdir()
}
TEMPLATES = sorted((FOLDER / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
JOBS = [
    (name, job, content)
    for name, flow in WORKFLOWS.items()
    for job, content in flow["jobs"].items()
]


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job.get("steps", [])]


def commands() -> list[str]:
    return [step["run"] for name in WORKFLOWS for step in steps(name) if "run" in step]


def combinations(job: dict[str, Any], name: str) -> set[str]:
    """Return all values of a name of a job's matrix."""
    matrix = job["strategy"]["matrix"]
    return {*matrix.get(name, []), *(row[name] for row in matrix.get("include", []) if name in row)}


def release() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("release")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_the_workflows_are_there() -> None:
    assert set(WORKFLOWS) == {"docs", "release", "releases", "tests", "wheels"}


def test_commands_are_those_of_the_tree() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.M), ".venv/.test"}
    variables = set(re.findall(r"^([A-Z]+) +\?=", makefile, re.M))
    made = set()
    for command in commands():
        words = command.split()
        if words[0] == "make":
            target, *given = words[1:]
            named = WORKFLOWS["tests"]["jobs"]["sanitizers"]["strategy"]["matrix"]["target"]
            for one in named if target == "${{" else [target]:
                assert one in targets, command
                made.add(one)
            assert {word.partition("=")[0] for word in given if "=" in word} <= variables, command
        for file in re.findall(r"(?:tools|\.ci)/[\w.]+", command):
            assert (ROOT / file).is_file(), command
    assert made >= {"test", "docs", "asan", "tsan", "soak"}
    assert ".ci/run" in commands()


def test_pythons_are_those_of_the_project() -> None:
    tests = WORKFLOWS["tests"]["jobs"]
    told = {step["with"]["python-version"] for step in steps("tests") if "with" in step}
    run = {x for x in told if "{" not in x} | combinations(tests["newest"], "python")
    declared = {
        text.rpartition(" ")[2]
        for text in PROJECT["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", text)
    }
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert declared <= run
    assert min(run, key=lambda x: int(x.partition(".")[2])) == oldest


def test_rows_are_those_of_the_matrix() -> None:
    text = (ROOT / "tools" / "matrix.py").read_text("utf-8")
    cells = re.search(r"^CELLS = \((.*)\)$", text, re.M)
    assert cells
    rows = combinations(WORKFLOWS["tests"]["jobs"]["oldest"], "row")
    python = {f"python{x}" for x in combinations(WORKFLOWS["tests"]["jobs"]["newest"], "python")}
    assert set(re.findall(r'"([\w.-]+)"', cells[1])) <= rows | python


def test_wheels_are_those_of_cibuildwheel() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    asked = {*settings["linux"]["archs"], *settings["macos"]["archs"]}
    assert combinations(WORKFLOWS["wheels"]["jobs"]["wheels"], "arch") == asked
    # Its manylinux images are named for each architecture.
    images = {
        key.partition("-")[2].removesuffix("-image")
        for key in settings["linux"]
        if key.endswith("-image")
    }
    assert images == set(settings["linux"]["archs"])


@pytest.mark.parametrize(
    ("name", "job", "content"), JOBS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_job_may_only_read_and_ends(name: str, job: str, content: dict[str, Any]) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    for step in content.get("steps", []):
        if "uses" in step:
            assert re.search(r"@(v\d|release/v\d)|:\d+\.", step["uses"]), step
    if any("make" in step.get("run", "") for step in content.get("steps", [])):
        assert content["timeout-minutes"] <= 180


def test_packages_are_published_from_a_tag_alone() -> None:
    flow = WORKFLOWS["release"]
    assert flow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as a boolean
    assert flow["jobs"]["packages"]["uses"] == "./.github/workflows/wheels.yml"
    assert flow["jobs"]["pypi"]["needs"] == "packages"
    writers = {job for _, job, content in JOBS if content.get("permissions")}
    assert writers == {"publish", "pypi", "github"}


# --- the release ---------------------------------------------------------------------------------


def test_all_files_say_one_version() -> None:
    assert set(release().versions().values()) == {PROJECT["project"]["version"]}


def test_notes_are_the_section_of_the_version() -> None:
    text = "# Changelog\n\n## 0.2.0 (2027-01-02)\n\n- New.\n\n## 0.1.0 (unreleased)\n\n- First.\n"
    assert release().notes("0.2.0", text) == "- New."
    with pytest.raises(SystemExit, match=r"no day for 0\.1\.0"):
        release().notes("0.1.0", text)
    with pytest.raises(SystemExit, match=r"no section 0\.3\.0"):
        release().notes("0.3.0", text)


def test_a_tag_of_another_version_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "release.py"), "v9.9.9"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the tag says 9.9.9, but pyproject.toml" in done.stderr


# --- what people read and fill in ----------------------------------------------------------------


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_ask_for_the_doctors_report(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    assert {"name", "description", "body"} <= set(form)
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)
    (asked,) = [part for part in form["body"] if part["id"] == "doctor"]
    assert "`python -m torch2jax --json`" in asked["attributes"]["label"]


def test_the_citation_is_of_this_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    for page in ("SECURITY.md", "CODE_OF_CONDUCT.md"):
        for link in re.findall(r"\]\(([\w./-]+)\)", (ROOT / page).read_text("utf-8")):
            assert (ROOT / link).exists(), f"{page}: {link}"
