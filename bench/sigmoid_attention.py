"""sigmoid_attention: the dense cases of attention, against our own softmax of the same inputs and the plain formula."""

from functools import partial

import fastattn
from fastattn import reference

from . import attention
from .attention import BandCase
from .op import Attention, Contestant, Op, UnsupportedCaseError


def ours(case: BandCase) -> Attention:
    return partial(fastattn.sigmoid_attention, **case.mask)


def _eager(case: BandCase) -> Attention:
    if case.scores > 1 << 30:
        raise UnsupportedCaseError("its matrices of scores take too much memory")
    return partial(reference.sigmoid_attention, **case.mask)


PEERS = {"softmax": Contestant(attention.ours, yardstick=True), "eager": Contestant(_eager)}

OP = Op(
    name="sigmoid_attention",
    kind=BandCase,
    formula=reference.masked_sigmoid_attention,
    ours=Contestant(ours),
    peers={"cpu": PEERS, "cuda": PEERS},
    cases={"cpu": ("b1_s4096_h8_d64", "b1_s4096_h8_d64_causal"), "cuda": attention.DENSE_GPU_CASES},
)
