"""INT4 experts multiplied directly on a GPU: no weight is written out, and each is read once for a tile of rows.

Triton is imported with this module, which only the GPU path of `capture.experts` imports.

A sum over inputs may be taken in any order, so the eight nibbles of a word need not be put side by side again: nibble j
of words i stands for inputs 8 i + j, and is multiplied with the inputs laid out likewise, [8, in / 8].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fits", "multiply"]

_WORDS = 32
"""Words of a row taken at a time: 256 inputs."""
_SHAPES = {
    (True, 16): (64, 4, 1),
    (True, 32): (64, 4, 1),
    (True, 64): (64, 4, 2),
    (True, 128): (64, 4, 1),
    (False, 16): (64, 4, 2),
    (False, 32): (64, 4, 2),
    (False, 64): (64, 4, 1),
    (False, 128): (128, 4, 1),
}
"""Columns of a block, warps and stages, by whether two projections are taken at once and by the rows of a tile.

The fastest of those measured on an H200."""


def fits(module: Any) -> bool:
    """Whether the kernel is made for these sizes."""
    whole = module.hidden % (8 * _WORDS) == 0 and module.inner % (8 * _WORDS) == 0
    return bool(whole and module.group % 8 == 0 and module.act == "silu")


def multiply(module: Any, x: Tensor, *, token: Tensor, ends: Tensor) -> Tensor:
    """Rows of the sorted (token, expert) pairs: [pairs, hidden].

    Parameters
    ----------
    module : Int4Experts
    x : bfloat16 [tokens, hidden]
    token : int64 [pairs]
        The row of `x` of each pair, sorted by expert.
    ends : int32 [experts]
        Where each expert's pairs end.
    """
    pairs = len(token)
    rows = torch.empty(pairs, module.hidden, dtype=x.dtype, device=x.device)
    if not pairs:
        return rows
    tiles = _Tiles(ends, pairs)
    inner = torch.empty(pairs, module.inner, dtype=x.dtype, device=x.device)
    identity = torch.arange(pairs, device=x.device)
    with torch.cuda.device(x.device):
        _launch(_spread(x), inner, tiles, source=token, module=module, names=("gate", "up"))
        _launch(_spread(inner), rows, tiles, source=identity, module=module, names=("down", "down"))
    return rows


def _spread(x: Tensor) -> Tensor:
    """Inputs 8 i + j as [rows, 8, in / 8]."""
    return x.view(len(x), -1, 8).transpose(1, 2).contiguous()


class _Tiles:
    """Which rows each program computes; found on the device, so that the host does not wait."""

    def __init__(self, ends: Tensor, pairs: int) -> None:
        experts = len(ends)
        mean = pairs / experts
        self.rows = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 96 else 128
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        counts = (ends - starts + self.rows - 1) // self.rows
        last = counts.cumsum(0).to(torch.int32)
        self.most = pairs // self.rows + min(experts, pairs)
        tile = torch.arange(self.most, device=ends.device, dtype=torch.int32)
        expert = torch.searchsorted(last, tile, right=True).to(torch.int32)
        self.expert = torch.where(expert < experts, expert, -1)
        safe = expert.clamp(max=experts - 1)
        self.start = starts[safe] + (tile - (last - counts)[safe]) * self.rows
        self.end = ends[safe]


def _launch(x: Tensor, out: Tensor, tiles: _Tiles, *, source: Tensor, module: Any, names: tuple[str, str]) -> None:
    first, second = names
    packed, scale = getattr(module, f"{first}_packed"), getattr(module, f"{first}_scale")
    gated = first != second
    other, other_scale = getattr(module, f"{second}_packed"), getattr(module, f"{second}_scale")
    columns, words = packed.shape[1], packed.shape[2]
    block, warps, stages = _SHAPES[gated, tiles.rows]
    grid = (triton.cdiv(columns, block), tiles.most)
    _kernel[grid](
        x,
        source,
        packed,
        scale,
        other,
        other_scale,
        out,
        tiles.expert,
        tiles.start,
        tiles.end,
        columns,
        words,
        module.group // 8,
        GATED=gated,
        ROWS=tiles.rows,
        COLUMNS=block,
        WORDS=_WORDS,
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit
def _nibble(bits, j: tl.constexpr):
    """Nibble j of each word as a signed bfloat16: 0x4300 is 128, whose last bits are ones."""
    return (((bits >> (4 * j)) & 15) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0


@triton.jit
def _kernel(
    x,
    source,
    packed,
    scale,
    other,
    other_scale,
    out,
    tile_expert,
    tile_start,
    tile_end,
    columns: tl.constexpr,
    words: tl.constexpr,
    group_words: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One tile of rows of one expert times one block of its columns, transposed: weights [COLUMNS, in] x inputs."""
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_start + tile) + tl.arange(0, ROWS)
    there = row < tl.load(tile_end + tile)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < columns
    word = tl.arange(0, WORDS)
    line = expert.to(tl.int64) * columns + column
    w_at = line[:, None] * words + word[None, :]
    s_at = line[:, None] * (words // group_words) + (word // group_words)[None, :]
    from_row = tl.load(source + row, mask=there, other=0).to(tl.int64)
    x_at = from_row[None, :] * (8 * words) + word[:, None]
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    if GATED:
        beside = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for start in range(0, words, WORDS):
        bits = tl.load(packed + w_at + start, mask=known[:, None], other=0)
        by = tl.load(scale + s_at + start // group_words, mask=known[:, None], other=0.0)
        if GATED:
            bits2 = tl.load(other + w_at + start, mask=known[:, None], other=0)
            by2 = tl.load(other_scale + s_at + start // group_words, mask=known[:, None], other=0.0)
        for j in tl.static_range(8):
            inputs = tl.load(x + x_at + start + j * words, mask=there[None, :], other=0.0)
            weights = _nibble(bits, j) * by
            total = tl.dot(weights, inputs, total)
            if GATED:
                weights2 = _nibble(bits2, j) * by2
                beside = tl.dot(weights2, inputs, beside)
    kind = out.dtype.element_ty
    if GATED:
        # Rounded where the separate operations round.
        gate = total.to(kind).to(tl.float32)
        total = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * beside.to(kind).to(tl.float32)
    at = row[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(out + at, total.to(kind), mask=known[:, None] & there[None, :])
