"""Two threads in one function whose graphs are kept."""

from __future__ import annotations

import threading

import pytest
import torch

from torch2jax._bridge.torch_side.derivatives import UserProgram
from torch2jax._bridge.torch_side.tape import kept_graph, programs


def test_one_call_does_not_decide_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that holds a view of its operand keeps no graph, whatever another call finds.

    The other call has begun when nothing was known of the function, and ends while this one
    decides.
    """
    views: list[torch.Tensor] = []
    begun, go_on = threading.Event(), threading.Event()

    def fn(x: torch.Tensor) -> tuple[torch.Tensor]:
        if threading.current_thread() is other:
            begun.set()
            assert go_on.wait(60)
        else:
            views.append(x.detach().view(-1))
        return (x.sin(),)

    policy = kept_graph.GraphPolicy("fn", (0,), seeded=False)
    keep = programs.KeepGraph(UserProgram(fn, None, True, ()), policy)
    found: list[kept_graph.KeptGraph | None] = []
    other = threading.Thread(target=lambda: found.append(keep.forward((torch.ones(3),))[1]))
    empty = programs.empty

    def empty_after_other(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if threading.current_thread() is not other and other.is_alive():
            go_on.set()
            other.join(60)
        return empty(dtype, device)

    monkeypatch.setattr(programs, "empty", empty_after_other)
    other.start()
    assert begun.wait(60)
    (out,), graph = keep.forward((torch.ones(3),))
    assert not other.is_alive()  # it ended before this call had decided
    assert torch.equal(out, torch.ones(3).sin())
    assert len(views) == 1
    assert graph is None
    assert found[0] is not None  # it held nothing, and keeps its graph
    again = keep.forward((torch.ones(3),))[1]
    assert again is not None
    assert again.owned  # what was learnt is not forgotten
