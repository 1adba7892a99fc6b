"""A process that times what it is told to: one JSON request a line in, one answer a line out.

{"do": "versions"}                                        -> {"python": ..., "jax": ...}
{"do": "prepare", "subject": ..., "case": ...}            -> {"calls": n} or {"skip": reason}
{"do": "sample", "subject": ..., "case": ...}             -> {"us": microseconds a call}
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from subjects.cases import CASES, Thunk
from subjects.peers import SUBJECTS, Skip, Subject, versions

TARGET_S = 0.01
"""About how long one sample takes."""
MOST_CALLS = 20_000


class Worker:
    def __init__(self) -> None:
        self._subjects: dict[str, Subject] = {}
        self._ready: dict[tuple[str, str], tuple[Thunk, int]] = {}

    def answer(self, request: dict[str, str]) -> dict[str, Any]:
        if request["do"] == "versions":
            return versions()
        key = request["subject"], request["case"]
        if request["do"] == "prepare":
            try:
                return {"calls": self._prepare(*key)}
            except (Skip, ImportError) as reason:
                return {"skip": str(reason)}
        thunk, calls = self._ready[key]
        return {"us": _seconds(thunk) / calls * 1e6}

    def _prepare(self, name: str, case_name: str) -> int:
        if name not in self._subjects:
            self._subjects[name] = SUBJECTS[name]()
        subject, case = self._subjects[name], CASES[case_name]
        trial = 20
        thunk = case.make(subject, trial)
        thunk()
        once = min(_seconds(thunk) for _ in range(3)) / trial
        calls = min(max(int(TARGET_S / once), 2), MOST_CALLS)
        case.check(subject)
        thunk = case.make(subject, calls)
        thunk()
        self._ready[name, case_name] = thunk, calls
        return calls


def _seconds(thunk: Thunk) -> float:
    start = time.perf_counter()
    thunk()
    return time.perf_counter() - start


def main() -> None:
    # Libraries print while they build themselves: only answers go to the real standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # torch warns of the callbacks' read-only arrays
    torch.set_num_threads(1)  # tensors are small: a second thread adds nothing but noise
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
