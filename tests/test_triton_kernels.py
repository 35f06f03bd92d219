"""The generated Triton kernels give the numbers of their definition: interpreted, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_interpreted_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LATENT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "triton_interpreted.py"]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_latent_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import latent.kernels.generated, latent.kernels.triton_library"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
