"""Run pytest in a process with fake GPUs: ``python tests/gpu/inside.py tests/gpu/test_bed.py``.

PyTorch asks at its import whether there is a GPU, so the driver is compiled and loaded before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def torch_folder() -> Path:
    """Return where PyTorch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """Compile the driver, if it is not there already; return the library."""
    sources, torch = sorted(_HERE.glob("fake_*")), torch_folder()
    text = b"".join(s.read_bytes() for s in sources)
    text += importlib.metadata.version("torch").encode() + str(torch).encode()
    library = folder / hashlib.sha256(text).hexdigest()[:16] / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                *("g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
                *("-isystem", str(torch / "include"), f"-L{torch / 'lib'}"),
                *(str(s) for s in sources if s.suffix == ".cc"),
                *("-lc10", "-ltorch_cpu", "-Wl,-soname,libcuda.so.1", "-o", str(part)),
            ],
            check=True,
        )
        part.rename(library)
    return library


def load(library: Path) -> None:
    """Load the driver under its name, by which the extension's dlopen finds it."""
    for needed in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / needed), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_GLOBAL)


if __name__ == "__main__":
    path = build(_HERE.parents[1] / ".pytest_cache" / "d" / "fake_gpu")
    load(path)
    os.environ["T2J_FAKE_GPU"] = str(path)
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
