"""Importing is quiet: no CUDA, no threads, no network, nothing but torch and numpy, no compiler."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import socket, sys, threading

def refuse(*arguments, **options):
    raise AssertionError("network at import")

socket.socket.connect = refuse
threads = threading.active_count()
import torch
before = set(sys.modules)
import embcompress
assert threading.active_count() == threads
assert not torch.cuda.is_initialized()
extras = {"pandas", "pyarrow", "rich", "typer", "sklearn", "matplotlib", "plotly", "fbgemm_gpu",
          "torchrec", "safetensors", "yaml", "xxhash"}
compiler = {"torch._dynamo", "torch._inductor"}  # takes as long to import as torch itself
assert not compiler & set(sys.modules) - before, compiler & set(sys.modules)
assert not extras & set(sys.modules), extras & set(sys.modules)
assert {"compress", "memory", "methods", "EmbeddingBag"} <= set(embcompress.__all__)
"""


def test_import_is_quiet() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
