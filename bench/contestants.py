"""fastattn and its peers, each as a function of q, k and v in [batch, seq, heads, head_dim].

Peers that want [batch, heads, seq, head_dim] get a transposed view of the same memory: the layout in which a model's
projections leave their results.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastattn

from .cases import Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnsupportedCaseError(Exception):
    """This contestant has no such case."""


def ours(case: Case) -> Attention:
    return partial(fastattn.attention, causal=case.causal, window=case.window)


def _transposed(attention: Attention) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return call


def _sdpa(backend: SDPBackend) -> Callable[[Case], Attention]:
    def build(case: Case) -> Attention:
        if case.window is not None:
            raise UnsupportedCaseError("no sliding window")
        if case.causal and case.seq_q != case.seq_k:
            raise UnsupportedCaseError("its causal mask is aligned with the first key")
        options = {"is_causal": case.causal, "enable_gqa": case.kv_heads != case.heads}

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, **options)

        return _transposed(call)

    return build


def _flex(case: Case) -> Attention:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    diagonal = case.seq_k - case.seq_q
    left = case.seq_k if case.window is None else case.window[0]

    def keeps(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + diagonal) & (k >= q + diagonal - left)

    mask = create_block_mask(keeps, None, None, case.seq_q, case.seq_k, device="cuda") if case.causal else None
    torch.compiler.reset()  # each case is compiled afresh; past a number of recompilations torch would stop compiling
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over one forward
    compiled = torch.compile(flex_attention, dynamic=False)
    return _transposed(partial(compiled, block_mask=mask, enable_gqa=case.kv_heads != case.heads))


def _fa4(case: Case) -> Attention:
    from flash_attn.cute.interface import flash_attn_func

    options = {"causal": True} if case.window is None and case.causal else {"window_size": case.window or (None, None)}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    return call


CPU_PEERS: Mapping[str, Callable[[Case], Attention]] = {"sdpa": _sdpa(SDPBackend.FLASH_ATTENTION)}
GPU_PEERS: Mapping[str, Callable[[Case], Attention]] = {
    "fa4": _fa4,
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flex": _flex,
}


_MODULES = {"fa4": "flash_attn.cute.interface", "flex": "triton"}


def absent_peers(names: Iterable[str]) -> dict[str, str]:
    """Those of the peers that cannot be imported here, and why."""
    absent = {}
    for name in names:
        try:
            importlib.import_module(_MODULES.get(name, "torch"))
        except ImportError as error:
            absent[name] = str(error)
    return absent
