"""The benchmarked ops."""

from . import (
    attention,
    block_sparse_attention,
    neighborhood_attention,
    paro_attention,
    quantized_attention,
    sale_attention,
    sigmoid_attention,
    varlen_attention,
)

_MODULES = (
    attention,
    block_sparse_attention,
    neighborhood_attention,
    paro_attention,
    quantized_attention,
    sale_attention,
    sigmoid_attention,
    varlen_attention,
)
OPS = {module.OP.name: module.OP for module in _MODULES}
