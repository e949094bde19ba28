"""The options that neighborhood attention takes for each axis of its tokens."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

WHOLE_AXIS = -1
"""A window over all of an axis."""

T = TypeVar("T", bound=int)


class AxisOptions(NamedTuple):
    """One value for each axis, outermost first."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]


def per_axis(name: str, value: T | Sequence[T], count: int) -> tuple[T, ...]:
    """A value for each of ``count`` axes, from one for all of them or one for each."""
    values = (value,) * count if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != count or not all(isinstance(each, int) for each in values):
        raise ValueError(f"{name} must be one value for all axes or a sequence of {count}, one for each, got {value!r}")
    return values


def axis_options(
    count: int,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> AxisOptions:
    """The options of ``count`` axes.

    A window is at least 1, or -1 for the whole axis; one that is longer than the axis or its dilation group is cut to
    that. A stride is at least 1 and at most the window as it was given, uncut: a model keeps its stride on a smaller
    input. Where the window is the whole axis, a stride changes nothing and any will do.

    Raises:
        ValueError: for any other value, naming the argument, what came and what is allowed.
    """
    options = AxisOptions(
        per_axis("window", window, count),
        per_axis("stride", stride, count),
        per_axis("dilation", dilation, count),
        tuple(bool(each) for each in per_axis("causal", causal, count)),
    )
    for axis, (width, step) in enumerate(zip(options.window, options.stride, strict=True)):
        if width != WHOLE_AXIS and width < 1:
            raise ValueError(f"window must be at least 1, or -1 for the whole axis, got {width} for axis {axis}")
        if step < 1 or (width != WHOLE_AXIS and step > width):
            limit = "" if width == WHOLE_AXIS else f" and at most the window, {width}"
            raise ValueError(f"stride must be at least 1{limit}, got {step} for axis {axis}")
    for axis, spread in enumerate(options.dilation):
        if spread < 1:
            raise ValueError(f"dilation must be at least 1, got {spread} for axis {axis}")
    return options
