"""matmul24 by `wgmma.mma_async.sp`: the kernel of ffi/matmul24.cu and what it can take."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s24jax import cuda_library, device
from s24jax.compressed import Compressed24
from s24jax.errors import InvalidInput
from s24jax.ops.matmul24 import tuning
from s24jax.typing import Array, Float, Int

# Into how many parts the kernel may cut a tile along K (dense rows, twice as long, into twice as
# many), and of how many parts of all tiles it may leave a sum in the workspace.
MOST_PARTS, MOST_PARTIAL_SUMS = 16, 144
LIST_TILE = 0  # the tile whose rows share a list of K blocks
LIST_ROWS, LIST_BLOCK = tuning.TILES[LIST_TILE].rows, 128


class KBlocks(NamedTuple):
    """Which blocks of 128 positions along K each 512 rows of A multiply; the others are skipped.

    Attributes:
      blocks: [ceil(M/512), ceil(K/128)], block numbers; the first `counts` of a row are read.
      counts: [ceil(M/512)], how many.
    """

    blocks: Int[Array, "tiles blocks"]
    counts: Int[Array, "tiles"]


def reason_against(a: Compressed24, b: Float[Array, "K N"]) -> str | None:
    """Why this implementation cannot take the product here; None where it can."""
    reason = device.hopper_reason() or cuda_library.reason_against()
    if reason is not None:
        return reason
    if a.dtype != jnp.bfloat16:
        return f"the operands are {a.dtype}; cast them to bfloat16"
    if a.grouping.kind == "random":
        return "it has no random groups of tokens; use strided or adjacent ones"
    k, n = b.shape
    if k == 0 or n == 0:
        return f"K={k}, N={n} is an empty product"
    # The copy engine takes rows whose length in bytes is a multiple of 16.
    if k % 16 or n % 8:
        return f"K={k}, N={n}; pad K to a multiple of 16 and N to a multiple of 8"
    return None


def matmul24(
    a: Compressed24,
    b: Float[Array, "K N"],
    *,
    schedule: tuning.Schedule | None = None,
    out_dtype=None,
    k_blocks: KBlocks | None = None,
) -> Float[Array, "M N"]:
    """See `s24jax.ops.matmul24.api`.

    Args:
      schedule: instead of the tuned one.
      out_dtype: bfloat16 (None) or float32, which is the sum itself.
      k_blocks: skip all other blocks along K, as if A were zero there. The tile is then LIST_TILE,
        whatever the schedule says.

    Raises:
      InvalidInput: `k_blocks` has the wrong shapes.
    """
    m = a.values.shape[0]
    if m == 0:
        return jnp.zeros((0, b.shape[1]), out_dtype or b.dtype)
    strided = a.grouping.kind == "strided"
    if schedule is None:
        schedule = tuning.schedule_for(m, b.shape[1], b.shape[0], strided)
    if k_blocks is not None:
        _check_k_blocks(k_blocks, m, b.shape[0])
        schedule = tuning.Schedule(LIST_TILE, schedule.group)
    return launch(
        a.values,
        a.metadata,
        b,
        strided=strided,
        rows=m,
        schedule=schedule,
        out_dtype=out_dtype,
        k_blocks=k_blocks,
    )


def _check_k_blocks(k_blocks: KBlocks, m: int, k: int) -> None:
    tiles, blocks = -(-m // LIST_ROWS), -(-k // LIST_BLOCK)
    if k_blocks.blocks.shape != (tiles, blocks) or k_blocks.counts.shape != (tiles,):
        raise InvalidInput(
            f"matmul24: k_blocks has shapes {k_blocks.blocks.shape} and {k_blocks.counts.shape}, "
            f"M={m} and K={k} need {(tiles, blocks)} and {(tiles,)}"
        )


def launch(
    values: Float[Array, "M kept"],
    metadata: Array,
    b: Float[Array, "K N"],
    *,
    strided: bool,
    rows: int,
    schedule: tuning.Schedule,
    dense: Float[Array, "2 Md kept"] | None = None,
    places: tuple[Int[Array, "M"], Int[Array, "Md"]] | None = None,
    k_blocks: KBlocks | None = None,
    out_dtype=None,
) -> Float[Array, "rows N"]:
    """One launch of the kernel.

    Args:
      values, metadata: of the compressed A.
      strided: B's rows are taken in strided groups of four, not in adjacent ones.
      rows: of the result.
      dense: further rows of A, each as the sum of two 2:4 rows (`SplitOperand.dense`).
      places: the row of the result where each row of A goes, and each of `dense`.
    """
    no_array = jnp.zeros((0,), jnp.int32)
    tile = tuning.TILES[schedule.tile]
    # In float32, each with four counters. Lists of K blocks are not cut.
    partial_sums = 0 if k_blocks is not None else most_partial_sums(rows, b.shape[1], tile)
    workspace = partial_sums * 4 * (tile.rows * tile.columns + 4)
    out, _ = cuda_library.call(
        "s24jax_matmul24",
        [
            jax.ShapeDtypeStruct((rows, b.shape[1]), out_dtype or b.dtype),
            jax.ShapeDtypeStruct((workspace,), jnp.uint8),
        ],
        values,
        metadata,
        jnp.zeros((2, 0, 0), b.dtype) if dense is None else dense,
        b,
        *((no_array, no_array) if places is None else places),
        *((no_array, no_array) if k_blocks is None else k_blocks),
        tile=schedule.tile,
        group=schedule.group,
        strided=int(strided),
    )
    return out


def most_partial_sums(rows: int, columns: int, tile: tuning.Tile) -> int:
    """Of parts of tiles, for a result of that size."""
    # A tile more for dense rows, which have tiles of their own.
    tiles = (-(-rows // tile.rows) + 1) * -(-columns // tile.columns)
    return min(MOST_PARTIAL_SUMS, MOST_PARTS * tiles)
