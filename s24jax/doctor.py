"""What s24jax finds on this machine, and what each op would resolve to, and why. Builds nothing.

python -m s24jax.doctor
"""

from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from s24jax import cuda_library, device, triton_bridge
from s24jax.errors import Unsupported
from s24jax.ops import (
    dispatch,
    feature_wise24,
    matmul24,
    matmul_feature_wise24,
    matmul_sparsify24,
    relu2_ffn,
    sparsify24,
    split_features,
    split_matmul24,
)
from s24jax.recipe import Recipe
from s24jax.typing import Implementation
from s24jax.workdir import devices, versions

T, D, F = 16384, 2048, 8192  # the 1.5B model's FFN on 16,384 tokens


class _Case(NamedTuple):
    """An op's candidates, and what they are asked about: arrays of a typical size, of which only
    shapes and types exist, and what is no array.
    """

    candidates: list[dispatch.Candidate]
    arrays: tuple[Any, ...]
    static: dict[str, Any]


def report() -> str:
    """Versions, devices, the GPU path, and each op's resolution for every implementation name."""
    lines = ["versions"]
    lines += [f"  {name:20} {version}" for name, version in versions().items()]
    lines += ["devices"] + [f"  {name}" for name in devices()]
    lines.append("GPU path")
    lines.append(f"  {'device':15} {device.hopper_reason() or 'Hopper'}")
    lines.append(f"  {'CUDA library':15} {cuda_library.state()}")
    lines.append(f"  {'Triton':15} {triton_bridge.reason_against() or 'ready'}")
    lines.append(f"ops, for bfloat16 activations of T={T}, D={D}, F={F} and the full recipe")
    for op, case in _cases().items():
        for name in get_args(Implementation):
            lines.append(f"  {op:21} {name:10} {_resolution(op, name, case)}")
    return "\n".join(lines)


def _resolution(op: str, implementation: Implementation, case: _Case) -> str:
    def resolve(*arrays) -> None:
        dispatch.resolve(op, implementation, case.candidates, *arrays, **case.static)

    try:
        jax.eval_shape(resolve, *case.arrays)
    except Unsupported as error:
        return f"no: {error}"
    choice = next(c for c in reversed(dispatch.choices()) if c[:2] == (op, implementation))
    return f"{choice.implementation} ({choice.reason})"


def _cases() -> dict[str, _Case]:
    recipe = Recipe()
    dense = recipe.dense_features(F)
    how = {"grouping": recipe.grouping, "shared_mask": True}
    y1 = jax.ShapeDtypeStruct((T, F), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((F, D), jnp.bfloat16)
    dy3 = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
    # What each op makes of them; the reference's outputs are like any other's.
    y2, counts = jax.eval_shape(sparsify24.reference.sparsify24, y1)
    split = jax.eval_shape(
        partial(split_features.reference.split_features, dense_features=dense), counts
    )
    y2_split, _ = jax.eval_shape(
        partial(feature_wise24.reference.feature_wise24, **how), y2, y2, split
    )
    return {
        "matmul_sparsify24": _Case(matmul_sparsify24.CANDIDATES, (dy3, w), {}),
        "matmul_feature_wise24": _Case(matmul_feature_wise24.CANDIDATES, (dy3, w, y2, split), how),
        "relu2_ffn": _Case(relu2_ffn.CANDIDATES, (dy3, w, w), {}),
        "sparsify24": _Case(sparsify24.CANDIDATES, (y1,), {}),
        "matmul24": _Case(matmul24.CANDIDATES, (y2, w), {}),
        "split_features": _Case(split_features.CANDIDATES, (counts,), {"dense_features": dense}),
        "feature_wise24": _Case(feature_wise24.CANDIDATES, (y2, y2, split), how),
        "split_matmul24": _Case(split_matmul24.CANDIDATES, (y2_split, dy3, split), {}),
    }


if __name__ == "__main__":
    print(report())
