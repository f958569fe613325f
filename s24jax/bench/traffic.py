"""What passes between the devices of a mesh in one call of a program, by its jaxpr."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

# What a device receives of n that pass pieces around in a ring, in sizes of its own operand: a
# gather the others' parts, a scattered sum its own part from each, a sum both. Source: Patarasuk
# and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002.
_RECEIVED = {
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "psum_invariant": lambda n: 2 * (n - 1) / n,
}
# Others with names of axes, which only say where an array differs.
_SILENT = ("axis_index", "pcast", "pvary", "shard_map")


def received_bytes(jaxpr: Any, sizes: Mapping[str, int], *, times: int = 1) -> Counter[str]:
    """Bytes that each device receives, by the first of the mesh axes over which they come.

    What XLA makes of the program may be less, where it finds the same operation twice. The sums
    that it adds outside `shard_map`, of a few numbers each, are left out.

    Args:
      jaxpr: of a program whose loops over layers are scans.
      sizes: of the mesh.
      times: how often it runs.

    Raises:
      NotImplementedError: a collective operation that this project did not use before.
    """
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        axes = [axis for axis in _named_axes(params) if sizes[axis] > 1]
        if axes and name not in _SILENT:
            if name not in _RECEIVED:
                raise NotImplementedError(f"collective operation {name}: see traffic.py")
            devices = math.prod(sizes[axis] for axis in axes)
            own = sum(array.aval.size * array.aval.dtype.itemsize for array in equation.invars)
            found[axes[0]] += round(times * own * _RECEIVED[name](devices))
        inside = times * params["length"] if name == "scan" else times
        for value in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                found += received_bytes(getattr(value, "jaxpr", value), sizes, times=inside)
    return found


def _named_axes(params: Mapping[str, Any]) -> list[str]:
    axes = params.get("axes", params.get("axis_name", ()))
    return [
        axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(axis, str)
    ]


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
