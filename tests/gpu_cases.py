"""Operands of odd sizes for the GPU kernels, and one launch of every kernel on them.

As a program it runs those launches and no more, for compute-sanitizer to watch. Every array but a
kernel's workspace is an allocation of its own then, whose end is known.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from s24jax.compressed import BLOCK, Compressed24
from s24jax.feature_split import FeatureSplit
from s24jax.ops.feature_wise24 import SplitOperand, feature_wise24
from s24jax.ops.matmul24 import cuda
from s24jax.ops.matmul24.tuning import TILES, Schedule
from s24jax.ops.matmul_feature_wise24 import matmul_feature_wise24
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.ops.relu2_ffn import cuda as relu2_cuda
from s24jax.ops.sparsify24 import sparsify24, triton
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24
from s24jax.token_groups import TokenGrouping

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STRIDED, ADJACENT = TokenGrouping("strided"), TokenGrouping("adjacent")
# Every pair of positions i0 < i1 in a group of four, as i0 | i1 << 2.
NIBBLES = np.array([i0 | i1 << 2 for i1 in range(4) for i0 in range(i1)], np.uint32)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of their products are exact in float32, in any order."""
    return rng.integers(-3, 4, shape).astype(BFLOAT16)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(BFLOAT16)


DRAWS = {"integers": integers, "normal": normal}


def random_24(
    rng: np.random.Generator,
    m: int,
    k: int,
    draw: Draw,
    *,
    axis: int = 1,
    grouping: TokenGrouping = ADJACENT,
) -> Compressed24:
    """M rows, compressed along K. Metadata are drawn, padding included: any that are legal do."""
    blocks = (-(-m // BLOCK), -(-k // BLOCK), 128)
    nibbles = rng.choice(NIBBLES, (*blocks, 8)) << np.arange(0, 32, 4, dtype=np.uint32)
    return Compressed24(
        jnp.asarray(draw(rng, (m, k // 2))),
        jnp.asarray(nibbles.sum(-1, dtype=np.uint32)),
        axis=axis,
        shape=(m, k) if axis == 1 else (k, m),
        grouping=grouping,
    )


def random_split(
    rng: np.random.Generator, features: int, dense: int, *, ascending: bool = False
) -> FeatureSplit:
    """Ascending as `split_features` gives it, or in any order, which is as good."""
    order = rng.permutation(features).astype(np.int32)
    parts = order[:dense], order[dense:]
    return FeatureSplit(*(jnp.asarray(np.sort(part) if ascending else part) for part in parts))


def random_operand(
    rng: np.random.Generator,
    tokens: int,
    split: FeatureSplit,
    draw: Draw,
    grouping: TokenGrouping = STRIDED,
) -> SplitOperand:
    """As `feature_wise24` would return it."""
    sparse = random_24(rng, split.sparse.size, tokens, draw, axis=0, grouping=grouping)
    return SplitOperand(sparse, jnp.asarray(draw(rng, (2, split.dense.size, tokens // 2))))


# M, K, N of products that the kernel cuts along K: tiles for more than two waves, of which the last
# ones are cut, and a single tile. tests/test_schedule.py checks that they are.
CUT_PRODUCTS = [(8200, 4016, 1608), (72, 8016, 72)]


class Launch(NamedTuple):
    """A function that launches one kernel, and its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def launches() -> dict[str, Launch]:
    """Every kernel, tile and walk, where neither axis is a multiple of a tile."""
    rng = np.random.default_rng(0)
    y1 = jnp.asarray(normal(rng, (130, 272)))
    sparsify = {
        name: functools.partial(sparsify24, implementation=name) for name in ("cuda", "triton")
    }
    if triton.reason_against(y1):
        del sparsify["triton"]
    y2 = random_24(rng, 144, 272, integers)
    dy1 = y2.with_values(jnp.asarray(integers(rng, y2.values.shape)))
    feature_split = random_split(rng, 272, 40)
    # K is so long that the one tile is cut.
    long_a, long_b = random_24(rng, 72, 8016, normal), jnp.asarray(normal(rng, (8016, 72)))
    a = random_24(rng, 300, 208, normal, grouping=STRIDED)
    b = jnp.asarray(normal(rng, (208, 200)))
    listed_a = random_24(rng, 1100, 528, normal)
    listed_b = jnp.asarray(normal(rng, (528, 264)))
    # Two tiles of a dense product below each other and two side by side, filled in part, and cut
    # into narrow ones; and so many that they are not cut.
    x, w = jnp.asarray(normal(rng, (270, 136))), jnp.asarray(normal(rng, (272, 136)))
    dy3 = jnp.asarray(normal(rng, (144, 136)))
    y2_dense = jnp.asarray(np.abs(normal(rng, (270, 272))))
    many_x, many_w = jnp.asarray(normal(rng, (1300, 72))), jnp.asarray(normal(rng, (1040, 72)))
    many_y2, many_split = random_24(rng, 1300, 1040, integers), random_split(rng, 1040, 80)
    # One tile of sparse rows and one of dense ones, cut likewise.
    split = random_split(rng, 144, 40)
    operand = random_operand(rng, 2576, split, normal)
    return {
        **{f"sparsify24 {name}": Launch(op, (y1,)) for name, op in sparsify.items()},
        "split_features": Launch(
            functools.partial(split_features, dense_features=40, implementation="cuda"),
            (jnp.asarray(rng.integers(0, 99, 1000, np.int32)),),
        ),
        **{
            f"feature_wise24 {grouping.kind}": Launch(
                functools.partial(
                    feature_wise24, grouping=grouping, shared_mask=True, implementation="cuda"
                ),
                (y2, dy1, feature_split),
            )
            for grouping in (STRIDED, ADJACENT)
        },
        "matmul_sparsify24": Launch(
            functools.partial(matmul_sparsify24, implementation="cuda"), (x, w)
        ),
        "matmul_sparsify24 many tiles": Launch(
            functools.partial(matmul_sparsify24, implementation="cuda"), (many_x, many_w)
        ),
        **{
            f"matmul_feature_wise24 {case}": Launch(
                functools.partial(
                    matmul_feature_wise24,
                    grouping=grouping,
                    shared_mask=True,
                    implementation="cuda",
                ),
                (dy3, w, y2.with_values(abs(y2.values)), split),
            )
            for case, grouping, dy3, w, y2, split in (
                ("strided", STRIDED, dy3, w, y2, feature_split),
                ("adjacent", ADJACENT, dy3, w, y2, feature_split),
                ("many tiles", STRIDED, many_x, many_w, many_y2, many_split),
            )
        },
        "relu2_ffn y2": Launch(relu2_cuda.y2_of, (x, w)),
        "relu2_ffn dy1": Launch(relu2_cuda.dy1_of, (x, w, y2_dense)),
        **{
            f"matmul24 tile {tile}": Launch(
                functools.partial(cuda.matmul24, schedule=Schedule(tile, 4), out_dtype=jnp.float32),
                (a, b),
            )
            for tile in range(len(TILES))
        },
        **{
            f"matmul24 tile {tile} cut": Launch(
                functools.partial(cuda.matmul24, schedule=Schedule(tile, 4)), (long_a, long_b)
            )
            for tile in range(len(TILES))
        },
        "matmul24 lists": Launch(
            lambda a, b, lists: cuda.matmul24(a, b, k_blocks=lists),
            (listed_a, listed_b, block_lists([[4, 0, 3], [1], list(range(5))], blocks=5)),
        ),
        "split_matmul24": Launch(
            functools.partial(split_matmul24, implementation="cuda"),
            (operand, jnp.asarray(normal(rng, (2576, 72))), split),
        ),
    }


def block_lists(lists: list[list[int]], blocks: int) -> cuda.KBlocks:
    """The lists of all tiles of rows; what is behind a list's end must not be read."""
    padded = np.full((len(lists), blocks), 2**30, np.int32)
    for row, numbers in zip(padded, lists, strict=True):
        row[: len(numbers)] = numbers
    counts = np.array([len(numbers) for numbers in lists], np.int32)
    return cuda.KBlocks(jnp.asarray(padded), jnp.asarray(counts))


if __name__ == "__main__":
    for name, launch in launches().items():
        jax.block_until_ready(jax.jit(launch.function)(*launch.arguments))
        print(name, flush=True)
