"""Whether other threads run Python while a call waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def runs_elsewhere(
    gpu: Any, call: Callable[[], None], blocked: AbstractContextManager[None]
) -> bool:
    """Whether Python runs while a call waits in the driver."""
    errors = []

    def guarded() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    caller = threading.Thread(target=guarded, daemon=True)
    with blocked:
        # The driver itself ends the wait after two seconds, which a thread without Python would not.
        gpu.driver.fake_unblock_after(2000)
        caller.start()
        waiting = gpu.wait_until_blocked()
        ticks, end = 0, time.perf_counter() + 0.3
        while time.perf_counter() < end:
            ticks += 1
            time.sleep(0.001)
        still = bool(gpu.driver.fake_waiting())
    caller.join()
    assert errors == []
    return waiting and still and ticks > 3
