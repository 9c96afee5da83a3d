"""One thread a test process: workers side by side would fight over the cores, and the last digits of a sum depend on
the number of threads."""

from __future__ import annotations

import os

# Before torch starts its pools, and for every command a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
