"""These operators check values in PyTorch's code; for traced operands the check is left out.

``torch.cov`` asks whether weights are negative, and ``torch.istft`` whether windows overlap. A
compiled program cannot answer these questions. Where the operands are known PyTorch's own code
runs.
"""

from __future__ import annotations

from typing import Any

import torch
from jax.core import Tracer

from ..tensors.tensor import Tensor, known, read
from .operands import moved

__all__ = ["cov", "istft"]

aten = torch.ops.aten


def _is_traced(x: Any) -> bool:
    return type(x) is Tensor and isinstance(read(x), Tracer)


def cov(x: Any, *, correction: int = 1, fweights: Any = None, aweights: Any = None) -> Any:
    """Return the sum of w (x - m)(x - m)^H / f, where m is the mean by the weights w.

    The weights w are counts times importance."""
    if not (_is_traced(fweights) or _is_traced(aweights)):
        weights = {"fweights": fweights, "aweights": aweights}
        return aten.cov.default.decompose(x, correction=correction, **weights)
    if x.ndim > 2:
        raise RuntimeError(
            "cov(): expected input to have two or fewer dimensions but got an input with "
            f"{x.ndim} dimensions"
        )
    rows = x.reshape(1, -1) if x.ndim < 2 else x
    given = [w for w in (fweights, aweights) if w is not None]
    for w in given:
        if w.ndim > 1 or w.numel() != rows.shape[1]:
            raise RuntimeError(
                "cov(): expected fweights and aweights to have one dimension and as many elements "
                f"as there are observations ({rows.shape[1]}), got {tuple(w.shape)}"
            )
    w = given[0] if len(given) == 1 else fweights * aweights
    total = w.sum()
    spread = total - correction
    if aweights is not None and correction:
        spread = total - correction * (w * aweights).sum() / total
    spread = torch.where(spread > 0, spread, torch.zeros_like(spread))
    centred = rows - (rows * w).sum(1, keepdim=True) / total
    return ((centred @ (centred * w).mT.conj()) / spread).squeeze()


def istft(
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Any:
    """Overlap-add the frames, each times the window, over the sum of the squared windows.

    PyTorch's code in Python takes an odd ``n_fft`` for the even one below it.
    """
    if type(x) is Tensor:
        window = moved(window)
    if not _is_traced(window) and n_fft % 2 == 0:
        options = (center, normalized, onesided, length, return_complex)
        return aten.istft.default.decompose(x, n_fft, hop_length, win_length, window, *options)
    hop = n_fft // 4 if hop_length is None else hop_length
    size = n_fft if win_length is None else win_length
    if window is None:
        window = torch.ones(size, dtype=x.dtype.to_real(), device=x.device)
    if not 0 < hop <= size <= n_fft or tuple(window.shape) != (size,):
        raise RuntimeError(
            "istft: expected 0 < hop_length <= win_length <= n_fft and a window of win_length "
            f"elements, got hop_length={hop}, win_length={size}, n_fft={n_fft} and a window of "
            f"{tuple(window.shape)}"
        )
    onesided = not return_complex and x.shape[-2] != n_fft if onesided is None else onesided
    wanted = n_fft // 2 + 1 if onesided else n_fft
    if not x.is_complex() or x.ndim not in (2, 3) or x.shape[-2] != wanted or not x.numel():
        raise RuntimeError(
            f"istft: expected a complex tensor of shape ([batch,] {wanted}, frames) with elements, "
            f"got {x.dtype} of {tuple(x.shape)}"
        )
    if onesided and return_complex:
        raise RuntimeError("istft: cannot have onesided output if window or input is complex")
    if window.is_complex() and not return_complex:
        raise RuntimeError("istft: a complex window needs return_complex=True")
    frames = x.unsqueeze(0) if x.ndim == 2 else x
    count = frames.shape[2]
    left = (n_fft - size) // 2
    window = torch.nn.functional.pad(window, (left, n_fft - size - left))
    by, spectrum = "ortho" if normalized else "backward", frames.mT
    if return_complex:
        parts = torch.fft.ifft(spectrum, norm=by)
    else:
        parts = torch.fft.irfft(spectrum[..., : n_fft // 2 + 1], n_fft, norm=by)
    full = n_fft + hop * (count - 1)
    start = n_fft // 2 if center else 0
    end = start + length if length is not None else full - (n_fft // 2 if center else 0)

    def add_up(y: Any) -> Any:
        return aten.unfold_backward(y, [y.shape[0], full], 1, n_fft, hop)[:, start:end]

    squares = window.pow(2).expand(1, count, n_fft)
    envelope = add_up(squares)
    lowest = envelope.abs().min()
    lowest = known(lowest) if type(lowest) is Tensor else lowest
    if not isinstance(lowest, Tracer) and float(lowest) <= 1e-11:
        raise RuntimeError(f"istft: window overlap add min: {float(lowest)}")
    y = add_up(parts * window) / envelope
    if end > full:
        y = torch.nn.functional.pad(y, (0, end - full))
    return y.squeeze(0) if x.ndim == 2 else y
