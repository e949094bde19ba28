"""The benchmarked ops."""

from . import attention, sigmoid_attention

OPS = {op.name: op for op in (attention.OP, sigmoid_attention.OP)}
