"""A sweep over models that nobody tuned this package to: values and all gradients beside PyTorch.

    python tools/sweep.py                             # architectures of transformers, and timm
    python tools/sweep.py --only mixtral 'timm/res*'  # some of them, by pattern
    python tools/sweep.py --surface bridge lower      # some surfaces
    python tools/sweep.py --again build/sweep.json    # those that were not right there
    python tools/sweep.py --table build/sweep.json    # the table of a sweep

Models are tiny, their weights random. They run on the CPU, in processes of their own: one that
crashes or takes longer than `--limit` seconds is counted as such, and the sweep goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

SURFACES = ("bridge", "lower", "device", "device.jit")


def worker(names: list[str], surfaces: list[str], output: Path) -> None:
    """Checks models one after the other, and writes a line of JSON for each."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    from sweeps import tiny

    tiny.with_torchvision("torchvision")
    import transformers
    from sweeps.surfaces import check

    transformers.logging.set_verbosity_error()
    with output.open("a") as file:
        for name in names:
            print(json.dumps({"begin": name}), file=file, flush=True)
            start = time.perf_counter()
            row: dict[str, Any] = {"name": name}
            try:
                subject = tiny.subject(name)
                row["model"] = type(subject.model).__name__
                row["inputs"] = {
                    k: list(x.shape) for k, x in subject.inputs.items() if hasattr(x, "shape")
                }
                row |= {k: list(v) for k, v in check(subject, surfaces).items()}
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                row["refused"] = f"{type(error).__name__}: {error}"[:2000]
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(json.dumps(row), file=file, flush=True)


def run(
    names: list[str], surfaces: list[str], limit: float, batch: int, output: Path
) -> list[dict[str, Any]]:
    """All models, in processes; one that ends without its line has crashed, or was too slow."""
    rows: dict[str, dict[str, Any]] = {}
    left = list(names)
    lines = output.with_suffix(".lines")
    # Compiling takes most of the time of a tiny model, and speed is no matter here.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {"XLA_FLAGS": flags, **os.environ, "OMP_NUM_THREADS": "1"}
    while left:
        lines.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", str(lines), "--surface", *surfaces]
        process = subprocess.Popen([*command, "--only", *left[:batch]], env=environment)
        seen, since, current = 0, time.monotonic(), left[0]
        while True:
            done = process.poll() is not None
            found = (
                [json.loads(x) for x in lines.read_text().splitlines() if x.endswith("}")]
                if lines.exists()
                else []
            )
            if len(found) > seen:
                for row in found[seen:]:
                    current = row.get("begin", current)
                    if "name" in row:
                        rows[row["name"]] = row
                        show(row, surfaces, len(rows), len(names))
                seen, since = len(found), time.monotonic()
            if done:
                break
            if time.monotonic() - since > limit + 30 * (seen == 0):
                process.kill()
                process.wait()
                break
            time.sleep(0.3)
        if current not in rows and (process.returncode != 0):
            how = (
                f"over {limit:.0f} s"
                if process.returncode == -9
                else f"exit status {process.returncode}"
            )
            rows[current] = {"name": current} | {s: ["crash", how] for s in surfaces}
            show(rows[current], surfaces, len(rows), len(names))
        left = [n for n in left if n not in rows]
        output.write_text(json.dumps(list(rows.values()), indent=1))
    lines.unlink(missing_ok=True)
    return list(rows.values())


def show(row: dict[str, Any], surfaces: list[str], k: int, n: int) -> None:
    words = [f"{s} {row[s][0]}" for s in surfaces if s in row] or [
        f"refused: {row.get('refused', '')[:90]}"
    ]
    print(f"{k}/{n} {row['name']}: {', '.join(words)} ({row.get('seconds', '?')} s)", flush=True)


def kind(verdict: list[str]) -> str:
    """What a verdict counts as: errors by their type and their first words."""
    if verdict[0] != "error":
        return verdict[0]
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\d+|\[.*?\]|\(.*?\)", "_", verdict[1])
    return f"error: {text[:90]}"


def table(rows: list[dict[str, Any]]) -> str:
    """Counts for each library and surface, and then what was not right, by kind."""
    lines = []
    for library in sorted({r["name"].split("/")[0] for r in rows}):
        mine = [r for r in rows if r["name"].startswith(library + "/")]
        ran = [r for r in mine if "refused" not in r]
        lines += [f"## {library}: {len(ran)} models, {len(mine) - len(ran)} without a tiny one", ""]
        lines += [
            "| surface | right | wrong | error | crash | random |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for surface in SURFACES:
            counts = Counter(r[surface][0] for r in ran if surface in r)
            if counts:
                lines.append(
                    f"| {surface} | "
                    + " | ".join(
                        str(counts[k]) for k in ("right", "wrong", "error", "crash", "random")
                    )
                    + " |"
                )
        lines.append("")
        for surface in SURFACES:
            kinds: dict[str, list[str]] = {}
            for r in ran:
                if surface in r and r[surface][0] not in ("right", "random"):
                    kinds.setdefault(kind(r[surface]), []).append(r["name"].split("/", 1)[1])
            for text, names in sorted(kinds.items(), key=lambda x: -len(x[1])):
                lines.append(f"- {surface}, {text}: {', '.join(names)}")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names or patterns of them")
    parser.add_argument("--surface", nargs="+", default=list(SURFACES[:3]), choices=SURFACES)
    parser.add_argument("--limit", type=float, default=180, help="seconds for a model")
    parser.add_argument("--batch", type=int, default=40, help="models in a process")
    parser.add_argument("--output", type=Path, default=Path("build/sweep.json"))
    parser.add_argument("--again", type=Path, help="what was not right in this file")
    parser.add_argument("--table", type=Path, help="print the table of this file")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if given.worker:
        worker(given.only, given.surface, given.worker)
        return 0
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return 0
    if given.again:
        rows = json.loads(given.again.read_text())
        names = [
            r["name"] for r in rows if any(r[s][0] != "right" for s in given.surface if s in r)
        ]
    else:
        names = all_names(given.only)
    if given.only:
        names = [
            n
            for n in names
            if any(
                fnmatch.fnmatch(n, p) or fnmatch.fnmatch(n.split("/", 1)[1], p) for p in given.only
            )
        ]
    random.Random(0).shuffle(names)  # the first part of a sweep is a sample, too
    if given.list:
        print("\n".join(names))
        return 0
    given.output.parent.mkdir(parents=True, exist_ok=True)
    rows = run(names, given.surface, given.limit, given.batch, given.output)
    print(table(rows))
    return 0


def all_names(patterns: list[str] | None) -> list[str]:
    from sweeps import tiny

    tiny.with_torchvision("torchvision")
    names = [f"transformers/{n}" for n in tiny.architectures()]
    if patterns and not any(p.startswith("timm/") or p == "*" for p in patterns):
        return names
    return names + [f"timm/{n}" for n in tiny.timm_names()]


if __name__ == "__main__":
    sys.exit(main())
