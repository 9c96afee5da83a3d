"""Triton kernels are tested in their own process: the interpreter is chosen when a kernel is decorated."""

from __future__ import annotations

import os

import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["interpreter"]
