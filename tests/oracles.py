"""What s24jax must give, written from the contracts alone: numpy, loops over groups, float64.

Imports nothing of s24jax, so that a mistake there cannot hide here. The one table of tolerances
and the source of arbitrary floats are here too.
"""

import math
from decimal import Decimal
from typing import NamedTuple

import jaxtyping
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class Tolerance(NamedTuple):
    """|actual - expected| <= relative * |expected| + of_largest * max |expected|."""

    relative: float
    of_largest: float


# One rounding to the dtype may fall to the other side (an ulp); the second number is for float32
# sums that cancel. Never loosened for one test.
TOLERANCE = {
    "float32": Tolerance(1e-6, 2e-6),
    "bfloat16": Tolerance(2.0**-7, 2e-6),
    "float16": Tolerance(2.0**-10, 2e-6),
}


def assert_close(actual, expected, what: str = "") -> None:
    """Same shape, dtype and NaN positions; values within the dtype's tolerance."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    tolerance = TOLERANCE[actual.dtype.name]
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    if expected.size == 0:
        return
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=what)
    largest = np.abs(expected[finite]).max(initial=0.0)
    bound = tolerance.relative * np.abs(expected[finite]) + tolerance.of_largest * largest
    excess = np.abs(actual[finite] - expected[finite]) - bound
    worst = excess.max(initial=-1.0)
    assert worst <= 0, f"{what}: exceeds the tolerance by {worst:.3g}; largest value {largest:.3g}"


def assert_bits(actual, expected, what: str = "") -> None:
    """The same bits: tells -0.0 from +0.0 and one NaN from another."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    unsigned = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(unsigned),
        np.ascontiguousarray(expected).view(unsigned),
        err_msg=what,
    )


def bit_patterns(dtype: str, shape) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any bits of the dtype, with many ties and special values among them.

    Left out are subnormals (zeros of their sign instead): XLA on CPU flushes them in arithmetic, so
    which of them count as zero is the device's business. And NaN payloads: a copy through float32,
    which some backends use for 16-bit types, does not keep them.
    """
    kind = FLOATS[dtype]
    exponent, unsigned = {
        "float32": (0x7F800000, np.uint32),
        "bfloat16": (0x7F80, np.uint16),
        "float16": (0x7C00, np.uint16),
    }[dtype]
    sign = 1 << (8 * kind.itemsize - 1)
    special = np.array([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, np.inf, -np.inf, np.nan], kind)
    quiet_nan = int(special.view(unsigned)[-1]) & ~sign
    element = st.one_of(
        st.sampled_from(special.view(unsigned).tolist()),
        st.integers(0, int(np.iinfo(unsigned).max)),
    )

    def tidy(bits):
        magnitude = bits & unsigned(sign - 1)
        smallest_normal = exponent & -exponent  # the exponent field's lowest bit
        magnitude = np.where(magnitude < smallest_normal, 0, magnitude)
        magnitude = np.where(magnitude > exponent, quiet_nan, magnitude)
        return (magnitude | bits & unsigned(sign)).astype(unsigned).view(kind)

    return hnp.arrays(unsigned, shape, elements=element).map(tidy)


class without_type_checks:
    """Errors as users get them: pytest's run-time annotation checks would speak first."""

    def __enter__(self):
        jaxtyping.config.update("jaxtyping_disable", True)

    def __exit__(self, *_):
        jaxtyping.config.update("jaxtyping_disable", False)


def assert_one_line(error) -> str:
    """The message of a caught error, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------- groups of four


def consecutive(length: int) -> list[list[int]]:
    return [[4 * g, 4 * g + 1, 4 * g + 2, 4 * g + 3] for g in range(length // 4)]


def token_groups(kind: str, seed: int, tokens: int) -> list[list[int]]:
    """The groups, in order, each with its members in order."""
    if kind == "adjacent":
        return consecutive(tokens)
    quarter = tokens // 4
    if kind == "strided":
        return [[j, j + quarter, j + 2 * quarter, j + 3 * quarter] for j in range(quarter)]
    permutation = np.random.default_rng(seed).permutation(tokens).tolist()
    return [[permutation[i] for i in group] for group in consecutive(tokens)]


def two_of_four(group) -> list[int]:
    """Positions kept of four values, ascending: NaN first, then magnitude, then lowest index."""
    values = [float(value) for value in group]
    by_rank = sorted(range(4), key=lambda i: (not math.isnan(values[i]), -abs(values[i]), i))
    return sorted(by_rank[:2])


def prune_mask(y: np.ndarray, axis: int, groups: list[list[int]] | None = None) -> np.ndarray:
    """True where `prune24` keeps; `groups` are the positions along `axis` that compete."""
    lines = np.moveaxis(np.asarray(y).astype(np.float64), axis, -1)
    mask = np.zeros(lines.shape, bool)
    groups = consecutive(lines.shape[-1]) if groups is None else groups
    for line in np.ndindex(*lines.shape[:-1]):
        for group in groups:
            for kept in two_of_four([lines[line][i] for i in group]):
                mask[(*line, group[kept])] = True
    return np.moveaxis(mask, -1, axis)


def keep(y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`y` where the mask is True, +0.0 elsewhere; bits untouched."""
    kept = np.zeros_like(y)
    kept[mask] = y[mask]
    return kept


class Stored(NamedTuple):
    """The layout that compressed.py documents."""

    values: np.ndarray
    indices: np.ndarray
    metadata: np.ndarray


def compress(y, axis: int, groups: list[list[int]] | None = None, choose_by=None) -> Stored:
    """Two of each group along `axis`, chosen on `choose_by`'s magnitudes (`y`'s own if None)."""
    y = np.asarray(y)
    choose_by = y if choose_by is None else np.asarray(choose_by)
    lines, rank = (a if axis == 1 else a.T for a in (y, choose_by))
    rows, length = lines.shape
    groups = consecutive(length) if groups is None else groups
    values = np.zeros((rows, length // 2), y.dtype)
    indices = np.zeros((rows, length // 4, 2), np.uint8)
    # Every nibble 0x4 at first: padding keeps positions 0 and 1.
    metadata = np.full((math.ceil(rows / 64), math.ceil(length / 64), 128), 0x44444444, np.uint32)
    for row in range(rows):
        for g, group in enumerate(groups):
            i0, i1 = two_of_four([rank[row, i] for i in group])
            values[row, 2 * g] = lines[row, group[i0]]
            values[row, 2 * g + 1] = lines[row, group[i1]]
            indices[row, g] = i0, i1
            lane = 32 * (row % 64 // 16) + 4 * (row % 8) + g % 16 // 4
            bit = 16 * (row % 16 // 8) + 4 * (g % 4)
            word = int(metadata[row // 64, g // 16, lane])
            word = word & ~(0xF << bit) | (i0 + 4 * i1) << bit
            metadata[row // 64, g // 16, lane] = word
    return Stored(values, indices, metadata)


def dense_planes(y: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """Features [T, F] in the layout that operand.py documents: two 2:4 rows for each, [2, F, T/2].

    The first has members 0 and 1 of every group of tokens, the second members 2 and 3.
    """
    planes = np.zeros((2, y.shape[1], len(y) // 2), y.dtype)
    for g, group in enumerate(groups):
        for member, token in enumerate(group):
            planes[member // 2, :, 2 * g + member % 2] = y[token]
    return planes


# ------------------------------------------------------------------------------------------ values


def rounded(x, dtype) -> np.ndarray:
    """A float32 result rounded once to `dtype`."""
    with np.errstate(over="ignore"):  # to infinity, as IEEE says
        return np.asarray(x).astype(np.float32).astype(dtype)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b as if summed exactly, rounded once to a's dtype."""
    return rounded(a.astype(np.float64) @ b.astype(np.float64), a.dtype)


def relu(y1: np.ndarray) -> np.ndarray:
    # Compared in float32: numpy warns of NaN in a 16-bit comparison.
    return np.where(y1.astype(np.float32) < 0, np.zeros_like(y1), y1)


def relu2(y1: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return rounded(relu(y1).astype(np.float32) ** 2, y1.dtype)


def relu2_gradient(y2: np.ndarray, dy2: np.ndarray) -> np.ndarray:
    return rounded(2 * np.sqrt(y2.astype(np.float32)) * dy2.astype(np.float32), y2.dtype)


def dense_feature_count(features: int, share: float, multiple: int) -> int:
    """`share * features` in decimal arithmetic, rounded up to `multiple`."""
    wanted, dense = Decimal(str(share)) * features, 0
    while dense < wanted:
        dense += multiple
    return dense


def densest(counts, dense: int) -> list[int]:
    """The `dense` features with most non-zeros, densest first, the lowest first among equals."""
    return sorted(range(len(counts)), key=lambda f: (-int(counts[f]), f))[:dense]


class FFN(NamedTuple):
    """Results of `ffn`, and what decided them."""

    y3: np.ndarray
    dx: np.ndarray
    dw_up: np.ndarray
    dw_down: np.ndarray
    y1: np.ndarray
    token_mask: np.ndarray  # True where the forward pass keeps Y2
    y2_kept: np.ndarray  # [T padded, F]: dW_down = y2_kept^T @ dY3
    dy1_kept: np.ndarray  # [T padded, F]: dW_up = dy1_kept^T @ X


def ffn(
    x,
    w_up,
    w_down,
    dy3,
    *,
    token_wise,
    mask_consistency,
    feature_wise,
    token_grouping,
    grouping_seed,
    dense_share,
    dense_multiple,
    shared_feature_mask,
    y1=None,
) -> FFN:
    """method.md's equations for x [T, D], with `Recipe`'s fields.

    `y1` [T, F], where given, replaces X @ W_up^T: in bfloat16 the choice hangs on its last bit.
    """
    tokens, padding = len(x), -len(x) % 4
    x, dy3 = (np.concatenate([a, np.zeros((padding, a.shape[1]), a.dtype)]) for a in (x, dy3))
    if y1 is None:
        y1 = product(x, w_up.T)
    else:
        y1 = np.concatenate([y1, np.zeros((padding, y1.shape[1]), y1.dtype)])
    y2 = relu2(y1)
    counts = [int(np.count_nonzero(y2[:, f])) for f in range(y2.shape[1])]

    token_mask = np.ones(y2.shape, bool)
    if token_wise:
        token_mask = prune_mask(relu(y1), axis=1)
    y3 = product(keep(y2, token_mask), w_down)

    # The backward pass starts from what was saved: dropped values never return, or never left.
    saved = keep(y2, token_mask) if mask_consistency else y2
    dy2 = product(dy3, w_down.T)
    dy1 = relu2_gradient(saved, dy2)
    dx = product(dy1, w_up)

    y2_mask = dy1_mask = np.ones(y2.shape, bool)
    if feature_wise:
        groups = token_groups(token_grouping, grouping_seed, tokens + padding)
        y2_mask = prune_mask(saved, 0, groups)
        dy1_mask = y2_mask.copy() if shared_feature_mask else prune_mask(dy1, 0, groups)
        for f in densest(counts, dense_feature_count(len(counts), dense_share, dense_multiple)):
            y2_mask[:, f] = dy1_mask[:, f] = True
    y2_kept, dy1_kept = keep(saved, y2_mask), keep(dy1, dy1_mask)
    dw_down = product(y2_kept.T, dy3)
    dw_up = product(dy1_kept.T, x)
    return FFN(y3[:tokens], dx[:tokens], dw_up, dw_down, y1, token_mask, y2_kept, dy1_kept)
