"""Fused attention kernels for Hopper GPUs and CPUs, as PyTorch ops.

Each public function is a thin name for the op of the same name in ``torch.ops.fastattn``.
"""

from importlib.metadata import version as _version

from . import _library
from .attention import attention
from .merge_attention import merge_attention
from .plan import plan
from .sigmoid_attention import sigmoid_attention

_library.load()
__version__ = _version("fastattn")

__all__ = ["__version__", "attention", "merge_attention", "plan", "sigmoid_attention"]
