"""The compiled ops: one library, loaded once, for every Python and every torch that the package admits."""

import ctypes
from pathlib import Path

import torch

path = Path(__file__).with_name("fastattn_torch.so")


def load() -> None:
    """Hand the library's kernels to torch's dispatcher."""
    if not path.exists():
        raise ImportError(
            f"fastattn's op library is missing: there is no {path}. Install the package (`pip install .`); a source "
            "tree on PYTHONPATH holds no compiled library."
        )
    torch.ops.load_library(str(path))


def cpu_instruction_set() -> str:
    """What the CPU kernels use on this machine."""
    function = ctypes.CDLL(str(path)).fastattn_cpu_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())


def built_with_cuda() -> bool:
    function = ctypes.CDLL(str(path)).fastattn_built_with_cuda
    function.restype = ctypes.c_bool
    return bool(function())
