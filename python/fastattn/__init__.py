"""Fused attention kernels for Hopper GPUs and CPUs, as PyTorch ops.

Each public function is a thin name for the op of the same name in ``torch.ops.fastattn``.
"""

from importlib.metadata import version as _version

from . import _library
from .attention import attention
from .block_list import BlockList
from .block_sparse_attention import block_sparse_attention
from .estimate_blocks import estimate_blocks
from .merge_attention import merge_attention
from .neighborhood_attention import neighborhood_attention
from .paro import ParoPlan, calibrate_paro, paro_attention
from .plan import plan
from .quantize_tokens import QuantizedTokens, quantize_tokens
from .quantized_attention import quantized_attention
from .sale import SalePlan, calibrate_sale, sale_attention
from .sigmoid_attention import sigmoid_attention
from .varlen_attention import varlen_attention

_library.load()
__version__ = _version("fastattn")

__all__ = [
    "BlockList",
    "ParoPlan",
    "QuantizedTokens",
    "SalePlan",
    "__version__",
    "attention",
    "block_sparse_attention",
    "calibrate_paro",
    "calibrate_sale",
    "estimate_blocks",
    "merge_attention",
    "neighborhood_attention",
    "paro_attention",
    "plan",
    "quantize_tokens",
    "quantized_attention",
    "sale_attention",
    "sigmoid_attention",
    "varlen_attention",
]
