"""A small GPT in plain PyTorch, trained on device "jax": the whole step is one XLA program.

    python examples/gpt_on_jax.py             # a minute: train, then write
    python examples/gpt_on_jax.py --smoke     # a few seconds: does everything work?

The model, the loss, `backward()` and the optimizer are PyTorch's own, unchanged. `device.jit` makes
one compiled program of them. The text is the licence of Python, which ships with Python.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from torch2jax import device

LENGTH = 64


def text() -> str:
    """Return text that every Python has."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    return path.read_text(encoding="utf-8") if path.exists() else license.__doc__ * 200


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, letters: int, width: int = 96, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.letter(tokens) + self.place(places)
        return self.head(self.norm(self.blocks(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short training, and a check")
    steps = 40 if parser.parse_args().smoke else 600

    device.enable()
    torch.manual_seed(0)
    words = text()
    letters = sorted(set(words))
    index = {c: i for i, c in enumerate(letters)}
    data = torch.tensor([index[c] for c in words])

    model = GPT(len(letters)).to("jax")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, capturable=True)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = device.jit(step)
    first = last = 0.0
    started = time.perf_counter()
    for n in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (16,)).tolist()
        batch = torch.stack([data[s : s + LENGTH + 1] for s in starts]).to("jax")
        loss = compiled(batch)
        if n == 0:
            first = loss.item()
        if n % 100 == 0 or n == steps - 1:
            last = loss.item()
            print(f"step {n:4d}   loss {last:.3f}   {time.perf_counter() - started:5.1f} s")

    model.eval()
    written = data[:LENGTH].to("jax")[None]
    forward = device.jit(model)
    with torch.no_grad():
        for _ in range(20 if steps < 100 else 200):
            logits = forward(written[:, -LENGTH:])[:, -1]
            chosen = torch.multinomial(torch.softmax(logits, -1), 1)
            written = torch.cat([written, chosen], 1)
    print("".join(letters[i] for i in written[0, LENGTH:].tolist()))
    assert last < 0.8 * first, f"the loss only went from {first:.3f} to {last:.3f}"


if __name__ == "__main__":
    main()
