"""The benchmarked ops."""

from . import attention, block_sparse_attention, neighborhood_attention, sale_attention, sigmoid_attention

OPS = {
    module.OP.name: module.OP
    for module in (attention, block_sparse_attention, neighborhood_attention, sale_attention, sigmoid_attention)
}
