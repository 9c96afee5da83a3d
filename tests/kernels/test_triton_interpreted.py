"""Runs `interpreter/` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_triton_kernels_agree_with_the_reference() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).parent / "interpreter"),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "VISTOK_KERNELS": "triton",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
