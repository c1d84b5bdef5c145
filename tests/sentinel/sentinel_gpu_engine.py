"""A made-up engine with a stand-in for PyTorch and, where ENGINE_LIBRARY names one, a library of CUDA mapped.

``sentinel_gpu_engine.py MODE ENGINE SHAPE FILE``: MODE of ``xpu_fake_torch``; ENGINE is the program to run.
"""

from __future__ import annotations

import mmap
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "xpu"))

import xpu_fake_torch

mode, engine = sys.argv[1:3]
if mode != "none":
    xpu_fake_torch.install(mode)
library = os.environ.get("ENGINE_LIBRARY")
if library:
    descriptor = os.open(library, os.O_RDONLY)
    kept = mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
sys.argv[:] = sys.argv[2:]
runpy.run_path(engine, run_name="__main__")
