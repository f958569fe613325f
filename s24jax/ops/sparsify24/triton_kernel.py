"""The Triton kernel of sparsify24. Imported by `triton.py` when it is first needed.

A group of four bfloat16 is one uint64, so that nothing moves between threads. Its halves, `ab` and
`cd`, hold two elements each, and both are worked on together, as 16-bit fields of a 32-bit word. At
3.2 TB/s an SM has time for 30 instructions for each element, 15 of them on integers; this takes 10.
"""

from typing import no_type_check

import triton
import triton.language as tl

from s24jax.triton_ptx import cvt_bf16x2, dp4a, max_nan_bf16x2, mul_ftz, prmt

# no_type_check: a run-time type checker would wrap the function, and Triton wants the function.


@triton.jit
@no_type_check
def relu2_prune_compress_kernel(
    y1_ptr,
    values_ptr,
    metadata_ptr,
    counts_ptr,
    T: tl.constexpr,
    F: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program takes 64 rows by COLUMNS (a power of two from 64) of y1 [T, F].

    Writes values [T, F/2], metadata [ceil(T/64), ceil(F/64), 128] as `s24jax.compressed` lays it
    out, and counts [ceil(T/64), F] uint8, the non-zeros of these rows. What lies outside of y1 is
    read as zero, which gives the padding of the metadata.
    """
    y1_ptr = y1_ptr.to(tl.pointer_type(tl.uint64))
    values_ptr = values_ptr.to(tl.pointer_type(tl.uint32))
    counts_ptr = counts_ptr.to(tl.pointer_type(tl.uint32))
    tiles: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    blocks: tl.constexpr = (F + 63) // 64
    tile = tl.program_id(0) % tiles
    row_block = tl.program_id(0) // tiles

    # Words of metadata join two rows, r and r + 8: two loads, so that both are in one thread.
    word_row = tl.arange(0, 32)  # 8w + r
    row = word_row + word_row // 8 * 8  # 16w + r
    group = tile * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    offset = row[:, None] * (F // 4) + group[None, :]
    start = row_block.to(tl.int64) * 64 * (F // 4)
    group_inside = _inside(group, F // 4, COLUMNS // 4)
    inside = group_inside[None, :] & _inside(64 * row_block + row, T, 64)[:, None]
    inside_8 = group_inside[None, :] & _inside(64 * row_block + row + 8, T, 64)[:, None]
    eight_rows: tl.constexpr = 8 * (F // 4)
    y1 = tl.load(y1_ptr + start + offset, inside, other=0)
    y1_8 = tl.load(y1_ptr + start + offset + eight_rows, inside_8, other=0)

    values, positions, nonzero = _group(y1)
    values_8, positions_8, nonzero_8 = _group(y1_8)
    tl.store(values_ptr + start + offset, values, inside)
    tl.store(values_ptr + start + offset + eight_rows, values_8, inside_8)

    words = prmt(_nibbles(positions), _nibbles(positions_8), 0x6420)
    column = tl.arange(0, COLUMNS // 16)
    block, q = tile * (COLUMNS // 64) + column // 4, column % 4
    word = block[None, :] * 128 + word_row[:, None] * 4 + q[None, :]
    block_inside = _inside(block, blocks, COLUMNS // 64)[None, :]
    metadata_ptr += row_block.to(tl.int64) * blocks * 128
    tl.store(metadata_ptr + word, words, block_inside)

    counts = tl.sum(nonzero + nonzero_8, axis=0)  # four bytes that stay below 65
    tl.store(counts_ptr + row_block.to(tl.int64) * (F // 4) + group, counts, group_inside)


@triton.jit
@no_type_check
def _inside(index, length: tl.constexpr, step: tl.constexpr):
    """index < length, without a comparison where whole steps fill the length."""
    if length % step == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < length


@triton.jit
@no_type_check
def _group(y1):
    """Groups of four bfloat16, each a uint64.

    Returns the squares of the two kept, packed; their positions, a byte i0 | i1 << 4; and a byte
    for each of the four, 1 where its square is not zero.
    """
    # Ranks: relu's bits, 0 to 0x7FFF, which sort like the numbers. All NaN are 0x7FFF.
    ab = max_nan_bf16x2(y1.to(tl.uint32), 0)
    cd = max_nan_bf16x2((y1 >> 32).to(tl.uint32), 0)
    # Which of a, b, c are kept, as the bits of a number from 1 to 6: dp4a of bytes 0 or -1.
    kept = dp4a(_kept(ab, cd), 0x00FCFEFF, 0)
    # Two tables of bytes: from that number to the positions, and from a position to the two bytes
    # of the element in cd:ab.
    positions = prmt(0x10313000, 0x00212032, kept)
    pair = prmt(ab, cd, prmt(0x76543210, 0, positions))
    # A square in bfloat16 is normal if the rank is that of 2^-63 or more: a carry into the sign.
    nonzero = prmt(ab + 0x60006000, cd + 0x60006000, 0xFDB9) & 0x01010101
    return _square(pair), positions, nonzero


@triton.jit
@no_type_check
def _kept(ab, cd):
    """A byte for each of a, b, c, d: 0xFF for the two that win two of their three comparisons.

    In each half of x + 0x8000 - y the sign bit says x >= y, and nothing is borrowed from the other
    half. In a comparison of equals the first wins; 0x7FFF instead of 0x8000 makes it x > y.
    """
    ba, dc = prmt(ab, 0, 0x1032), prmt(cd, 0, 0x1032)
    ab_inner = ab + 0x7FFF8000 - ba  # a >= b, b > a
    cd_inner = cd + 0x7FFF8000 - dc  # c >= d, d > c
    ac_bd = ab + 0x80008000 - cd  # a >= c, b >= d
    ad_bc = ab + 0x80008000 - dc  # a >= d, b >= c
    bc_ad = ba + 0x80008000 - cd  # b >= c, a >= d
    ab_kept = _majority(ab_inner, ac_bd, ad_bc)
    cd_kept = _majority(cd_inner, ac_bd ^ 0xFFFFFFFF, bc_ad ^ 0xFFFFFFFF)
    return prmt(ab_kept, cd_kept, 0xFDB9)  # the signs of the four halves


@triton.jit
@no_type_check
def _majority(x, y, z):
    return (x & y) | (x & z) | (y & z)


@triton.jit
@no_type_check
def _square(pair):
    """The squares of two bfloat16, taken in float32 and rounded once (`numerics.round_to`)."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    return cvt_bf16x2(mul_ftz(high, high), mul_ftz(low, low))


@triton.jit
@no_type_check
def _nibbles(positions):
    """[32, groups] of i0 | i1 << 4 -> [32, groups/4] with four nibbles in the bytes 0 and 2."""
    byte = 8 * (tl.arange(0, positions.shape[1]) % 4)
    positions = positions << byte.to(tl.uint32)[None, :]
    bytes_ = tl.sum(tl.reshape(positions, [32, positions.shape[1] // 4, 4]), axis=2)
    nibbles = (bytes_ | bytes_ >> 2) & 0x0F0F0F0F
    return nibbles | nibbles >> 4
