"""The benchmarked ops."""

from . import attention, block_sparse_attention, neighborhood_attention, sigmoid_attention

OPS = {op.name: op for op in (attention.OP, block_sparse_attention.OP, neighborhood_attention.OP, sigmoid_attention.OP)}
