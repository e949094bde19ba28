"""Neighborhood attention's own schedule, the C++ that its kernels walk, run from Python."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple, TypeVar

from . import _library
from .axes import WHOLE_AXIS, AxisOptions

MAX_AXES = 3
MAX_SLOTS = 2**31 - 1

T = TypeVar("T")

Tile = tuple[int, ...]
"""The extents of a box of tokens."""


class Tiles(NamedTuple):
    """How the tokens of the two sides are cut."""

    q: Tile
    k: Tile


# The structs of csrc/torch/plan.cpp.


class _Axis(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_int),
        ("window", ctypes.c_int),
        ("stride", ctypes.c_int),
        ("dilation", ctypes.c_int),
        ("causal", ctypes.c_bool),
    ]


class _Tiles(ctypes.Structure):
    _fields_ = [("q", ctypes.c_int * MAX_AXES), ("k", ctypes.c_int * MAX_AXES)]


class _Census(ctypes.Structure):
    _fields_ = [
        ("q_slots", ctypes.c_int),
        ("k_slots", ctypes.c_int),
        ("query_tiles", ctypes.c_long),
        ("key_tiles", ctypes.c_long),
        ("visited", ctypes.c_long),
        ("full", ctypes.c_long),
        ("most_visited", ctypes.c_long),
        ("kept", ctypes.c_long),
    ]


class _Interval(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_int), ("end", ctypes.c_int)]


class Counts(NamedTuple):
    query_tiles: int
    key_tiles: int
    visited: int
    """Tiles of scores, summed over the query tiles."""
    full: int
    """Visited tiles that need no mask."""
    most_visited: int
    """By one query tile."""
    kept: int
    """Scores."""


class View(NamedTuple):
    """What one query sees, and what its tile visits."""

    keys: tuple[range, ...]
    """Along each axis, the coordinates of the keys that the query sees: their product is all of them."""
    grid: tuple[int, ...]
    """Key tiles along each axis, of the query's dilation group."""
    visits: bytes
    """For each key tile of the grid, row-major: 0 empty, 1 partial, 2 full."""


@cache
def _core() -> ctypes.CDLL:
    return ctypes.CDLL(str(_library.path))


def compiled_tiles(shape: Sequence[int], device: str) -> Tiles:
    """What the kernels for a problem of that shape are compiled for: leading axes of length 1 are no axes to them."""
    axes, tiles = len(shape), _Tiles()
    while axes > 1 and shape[-axes] == 1:
        axes -= 1
    _core().fastattn_neighborhood_tiles(axes, device == "cuda", ctypes.byref(tiles))
    return Tiles(tuple(tiles.q)[-len(shape) :], tuple(tiles.k)[-len(shape) :])


@dataclass(frozen=True)
class Schedule:
    """A problem cut into tiles. Its options are those of `axes.axis_options`."""

    shape: tuple[int, ...]
    options: AxisOptions
    tiles: Tiles

    def slots(self, tile: Tile) -> int:
        """The number of tokens and of what pads their tiles."""
        return prod(
            dilation * count * extent
            for dilation, count, extent in zip(self._dilation(), self._grid(tile), tile, strict=True)
        )

    def count(self) -> Counts:
        """The census."""
        census = _Census()
        _core().fastattn_neighborhood_census(self._axes(), self._tiles(), ctypes.byref(census))
        return Counts(*(getattr(census, field) for field in Counts._fields))

    def view(self, query: Sequence[int]) -> View:
        dilation, grid = self._dilation(), self._grid(self.tiles.k)
        at = (ctypes.c_int * MAX_AXES)(*with_three_axes(query, 0))
        kept, visits = (_Interval * MAX_AXES)(), (ctypes.c_uint8 * prod(grid))()
        _core().fastattn_neighborhood_view(self._axes(), self._tiles(), at, kept, visits)
        keys = (
            range(positions.begin * d + x % d, positions.end * d + x % d, d)
            for positions, x, d in zip(kept[-len(grid) :], query, dilation, strict=True)
        )
        return View(tuple(keys), grid, bytes(visits))

    def _dilation(self) -> tuple[int, ...]:
        """As many groups as are not empty."""
        return tuple(map(min, self.options.dilation, self.shape))

    def _grid(self, tile: Tile) -> tuple[int, ...]:
        """Tiles of a dilation group, along each axis."""
        return tuple(
            ceil_div(ceil_div(length, dilation), extent)
            for length, dilation, extent in zip(self.shape, self._dilation(), tile, strict=True)
        )

    def _axes(self) -> Any:
        """A window or stride beyond an axis means what its length does, and that fits into 32 bits."""
        window, stride = (map(min, values, self.shape) for values in (self.options.window, self.options.stride))
        axes = (
            _Axis(*axis) for axis in zip(self.shape, window, stride, self._dilation(), self.options.causal, strict=True)
        )
        return (_Axis * MAX_AXES)(*with_three_axes(tuple(axes), _Axis(1, WHOLE_AXIS, 1, 1, False)))

    def _tiles(self) -> Any:
        return ctypes.byref(_Tiles(with_three_axes(self.tiles.q, 1), with_three_axes(self.tiles.k, 1)))


def with_three_axes(values: Sequence[T], filler: T) -> tuple[T, ...]:
    """A problem of fewer axes leads with axes of length 1."""
    return (filler,) * (MAX_AXES - len(values)) + tuple(values)


def ceil_div(x: int, y: int) -> int:
    return (x + y - 1) // y
