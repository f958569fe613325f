"""The parts of an FFN, one kernel or product each, with the pass that each belongs to."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from s24jax.activation import relu2
from s24jax.bench.ffn_operands import Operands
from s24jax.bench.operands import STRIDED, dense_features
from s24jax.bench.timing import Contender
from s24jax.ops import dispatch
from s24jax.ops.matmul24 import matmul24
from s24jax.ops.matmul_feature_wise24 import matmul_feature_wise24
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.ops.relu2_ffn import CANDIDATES
from s24jax.ops.relu2_ffn import cuda as relu2_cuda
from s24jax.ops.sparsify24 import sparsify24
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24
from s24jax.typing import Array

Makers = dict[str, Callable[[], Contender]]

PARTS = {
    "up": "forward",
    "y3": "forward",
    "split": "backward",
    "mid": "backward",
    "dx": "backward",
    "dw_down": "backward",
    "dw_up": "backward",
}


def part_makers(operands: Operands) -> dict[str, Makers]:
    """The contenders of each part, on operands that the reference has made of those before it."""
    x, w_up, w_down, dy3 = operands
    y1_dense = jax.jit(lambda x, w: x @ w.T)(x, w_up)
    y2_dense = jax.jit(relu2)(y1_dense)
    dense = dense_features(w_up.shape[0])
    y2, counts = jax.jit(partial(sparsify24, implementation="reference"))(y1_dense)
    split = jax.jit(partial(split_features, dense_features=dense, implementation="reference"))(
        counts
    )

    @jax.jit
    def backward(dy3, w_down, y2, split):
        return matmul_feature_wise24(
            dy3,
            w_down,
            y2,
            split,
            grouping=STRIDED,
            shared_mask=True,
            implementation="reference",
        )

    dy1, y2_split, dy1_split = backward(dy3, w_down, y2, split)
    dy1_dense = jax.jit(lambda dy1: dy1.decompress())(dy1)
    ours = {"implementation": "cuda"}
    mid = partial(matmul_feature_wise24, grouping=STRIDED, shared_mask=True, **ours)
    plain = {
        "y3": (lambda a, b: a @ b, y2_dense, w_down),
        "dx": (lambda a, b: a @ b, dy1_dense, w_up),
        "dw_down": (lambda a, b: a.T @ b, y2_dense, dy3),
        "dw_up": (lambda a, b: a.T @ b, dy1_dense, x),
    }
    cuda = {
        "up": (partial(matmul_sparsify24, **ours), x, w_up),
        "y3": (partial(matmul24, **ours), y2, w_down),
        "split": (partial(split_features, dense_features=dense, **ours), counts),
        "mid": (mid, dy3, w_down, y2, split),
        "dx": (partial(matmul24, **ours), dy1, w_up),
        "dw_down": (partial(split_matmul24, **ours), y2_split, dy3, split),
        "dw_up": (partial(split_matmul24, **ours), dy1_split, x, split),
    }
    fused_dense = {
        "up": (relu2_cuda.y2_of, x, w_up),
        "mid": (relu2_cuda.dy1_of, dy3, w_down, y2_dense),
    }
    xla = plain | {
        "up": (lambda x, w: jnp.square(jax.nn.relu(x @ w.T)), x, w_up),
        "mid": (lambda dy3, w, y1: 2 * jax.nn.relu(y1) * (dy3 @ w.T), dy3, w_down, y1_dense),
    }
    calls = {"cuda": cuda, "xla_dense": xla}
    makers = {
        part: {n: partial(_contender, *parts[part]) for n, parts in calls.items() if part in parts}
        for part in PARTS
    }
    for part, call in fused_dense.items():
        makers[part]["relu2_cuda"] = partial(_dense_contender, *call)
    return makers


def _contender(function: Callable, *arguments) -> Contender:
    return Contender(partial(jax.jit(function), *arguments))


def _dense_contender(function: Callable, a_TD: Array, w_FD: Array, *more) -> Contender:
    """Of a kernel of `relu2_ffn`, which raises where that does."""
    dispatch.resolve("relu2_ffn", "cuda", CANDIDATES, a_TD, w_FD, w_FD)
    return _contender(function, a_TD, w_FD, *more)
