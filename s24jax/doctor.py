"""What s24jax finds on this machine, and what each op would resolve to, and why.

python -m s24jax.doctor
"""

from collections.abc import Callable
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp

from s24jax.compressed import compress24
from s24jax.errors import Unsupported
from s24jax.feature_split import FeatureSplit
from s24jax.ops import dispatch
from s24jax.ops.feature_wise24 import feature_wise24
from s24jax.ops.matmul24 import matmul24
from s24jax.ops.sparsify24 import sparsify24
from s24jax.recipe import Recipe
from s24jax.typing import Implementation
from s24jax.workdir import devices, versions

T, D, F = 16384, 2048, 8192  # the 1.5B model's FFN on 16,384 tokens


def report() -> str:
    """Versions, devices, and each op's resolution for every implementation name."""
    lines = ["versions"]
    lines += [f"  {name:20} {version}" for name, version in versions().items()]
    lines += ["devices"] + [f"  {device}" for device in devices()]
    lines.append(f"ops, for bfloat16 activations of T={T}, D={D}, F={F} and the full recipe")
    for op, trace in _ops().items():
        for name in get_args(Implementation):
            lines.append(f"  {op:15} {name:10} {_resolution(op, name, trace)}")
    return "\n".join(lines)


def _resolution(op: str, implementation: Implementation, trace: Callable) -> str:
    try:
        # Traced, not run: only shapes and types decide.
        trace(implementation)
    except Unsupported as error:
        return f"no: {error}"
    choice = next(c for c in reversed(dispatch.choices()) if c[:2] == (op, implementation))
    return f"{choice.implementation} ({choice.reason})"


def _ops() -> dict[str, Callable]:
    """Each op as a function of the implementation, on abstract arguments of a typical size."""
    y_TF = jax.ShapeDtypeStruct((T, F), jnp.bfloat16)
    w_FD = jax.ShapeDtypeStruct((F, D), jnp.bfloat16)
    y2 = jax.eval_shape(partial(compress24, axis=1), y_TF)
    recipe = Recipe()
    dense = recipe.dense_features(F)
    split = FeatureSplit(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (dense, F - dense)))
    weights = partial(feature_wise24, grouping=recipe.grouping, shared_mask=True)
    return {
        "sparsify24": lambda name: jax.eval_shape(partial(sparsify24, implementation=name), y_TF),
        "matmul24": lambda name: jax.eval_shape(partial(matmul24, implementation=name), y2, w_FD),
        "feature_wise24": lambda name: jax.eval_shape(
            partial(weights, implementation=name), y2, y2, split
        ),
    }


if __name__ == "__main__":
    print(report())
