"""What a library is linked with, and what it may be linked with."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEM = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|ld-linux-[\w-]+)\.so\.\d+"
"""What may be linked."""


def needed(library: Path) -> list[str]:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run(
        [readelf, "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)
