"""Many devices: the mesh, which part of what each device holds, and the sums between them.

    data      copies of the model; each takes its own sequences
    fsdp      the same, but every weight is cut along D, and gathered for the layer that needs it
    tensor    FFN weights are cut along F, attention's by heads; every device of a group takes the
              same sequences

A step runs in `jax.shard_map`: each device computes on its own sequences, its own features and its
own heads, and all that passes between devices is written down here:

    gather       the weights of a layer over fsdp; in the backward pass once more, and its
                 transpose, a sum of the gradients of which each device keeps its part
    tensor sum   over tensor the FFN's Y3 and attention's output; in the backward pass their dX,
                 and with remat "full" attention's output once more
    gradients    over data, once a step, and over fsdp of what is not cut
    means        of the loss and of metrics, a few numbers

Embedding and logits are the same on all devices of a tensor group. jax's types of values that vary
over an axis (`varying(x)`) put the sums of the backward pass in their places.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from s24jax.errors import InvalidInput
from s24jax.typing import Array

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = DATA, FSDP
"""The axes over which sequences are dealt out."""
SEQUENCES = P(BATCH)
SUMMED = "tensor_sum"
"""`checkpoint_name` of what a tensor group has summed."""
STACKED = "blocks"
"""Where in a model's parameters the layers are, stacked along their first axis."""

# By the end of a parameter's path; the optimizer's moments have the same paths. What has no rule,
# scales and counters, is whole on every device.
_RULES: Mapping[tuple[str, ...], P] = {
    ("w_up",): P(None, TENSOR, FSDP),  # layers, F, D
    ("w_gate",): P(None, TENSOR, FSDP),
    ("w_down",): P(None, TENSOR, FSDP),
    ("qkv", "kernel"): P(None, FSDP, TENSOR),  # layers, D, H * 3 C
    ("out", "kernel"): P(None, TENSOR, FSDP),  # layers, H * C, D
    ("embedding", "embedding"): P(None, FSDP),  # V, D
    ("unembedding", "kernel"): P(FSDP),  # D, V
}


def make_mesh(sizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration.

    Args:
      sizes: a mapping, of each of `AXES`; -1, for one of them, takes the devices that are left.
      devices: by default all.

    Raises:
      InvalidInput: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    written = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InvalidInput(f"mesh ({written}): sizes are 1 or more, or -1 for one of them")
    fixed = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if int(np.prod(shape)) != len(devices):
        mend = "use -1 for one axis to fill it" if -1 not in shape else "make them divide it"
        raise InvalidInput(f"mesh ({written}) does not fit {len(devices)} devices; {mend}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def one_device() -> Mesh:
    """The mesh of the first device alone."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def check_model(sizes: Mapping[str, int], model, batch_size: int) -> None:
    """Raises InvalidInput where a model's sizes or a batch cannot be cut into the mesh's parts.

    Args:
      sizes: of the mesh.
      model: width, heads and hidden of a configuration.
      batch_size: sequences of a microbatch.
    """
    shards = sizes[DATA] * sizes[FSDP]
    if batch_size % shards:
        raise InvalidInput(
            f"{batch_size} sequences at a time do not split over {shards} devices (mesh.data * "
            f"mesh.fsdp); make batch_size / accumulate a multiple"
        )
    if shards % jax.process_count():
        raise InvalidInput(
            f"{jax.process_count()} processes cannot each have sequences of its own on a mesh with "
            f"data * fsdp = {shards}; make that a multiple, so that mesh.tensor stays in a process"
        )
    if model.width % sizes[FSDP]:
        raise InvalidInput(
            f"model.width={model.width} does not split into mesh.fsdp={sizes[FSDP]} equal parts"
            "; make it a multiple"
        )
    if model.heads % sizes[TENSOR]:
        raise InvalidInput(
            f"model.heads={model.heads} do not split over mesh.tensor={sizes[TENSOR]} devices; "
            "make it a multiple"
        )
    if sizes[TENSOR] > 1 and model.hidden % (4 * sizes[TENSOR]):
        raise InvalidInput(
            f"model.hidden={model.hidden} does not split into mesh.tensor={sizes[TENSOR]} parts "
            f"of a multiple of 4; use a multiple of {4 * sizes[TENSOR]}"
        )


def specs(sizes: Mapping[str, int], tree: Any) -> Any:
    """The `PartitionSpec` of each leaf of a tree of parameters or of a train state."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _that_cut(sizes, _rule(path)), tree)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """`specs`, on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(mesh.shape, tree))


def on_mesh(mesh: Mesh, function: Callable, params: Any, results: Any) -> Callable:
    """`function(params, tokens)` on every device, with its part of both.

    On one device it is the function itself.

    Args:
      params: whose `specs` tell the parts.
      results: the specs of what the function returns; P() is what is the same on all devices.
    """
    if mesh.size == 1:
        return function
    operands = specs(mesh.shape, params), _that_cut(mesh.shape, SEQUENCES)
    return jax.shard_map(function, mesh=mesh, in_specs=operands, out_specs=results)


def mean_gradients(grads_of: Callable, params: Any, tokens: Array) -> tuple[Array, Any]:
    """Loss and gradients of the mean over all devices' sequences, from each device's own.

    Args:
      grads_of: (params, tokens) -> loss and gradients, where every device computes its own.
      params: of which each device has its part.
    """
    sequences = tuple(axis for axis in BATCH if axis in varying(tokens))
    if not sequences:
        return grads_of(params, tokens)

    def whole_on(leaf) -> tuple[str, ...]:
        return tuple(axis for axis in sequences if axis not in varying(leaf))

    # So marked, a gradient is a device's own until it is summed here, once.
    own = jax.tree.map(lambda leaf: vary(leaf, whole_on(leaf)), params)
    value, grads = grads_of(own, tokens)
    devices = math.prod(jax.lax.axis_size(axis) for axis in sequences)

    def mean(leaf, grad):
        axes = whole_on(leaf)
        return (jax.lax.psum(grad, axes) if axes else grad) / devices

    return jax.lax.pmean(value, sequences), jax.tree.map(mean, params, grads)


def gather(params: Any, dtype, *, of_one_layer: bool = False) -> Any:
    """Weights whole along D, from each device's part of them.

    They are rounded to `dtype`, in which they are multiplied, before they travel; so are their
    gradients on the way back. Outside `shard_map` it does nothing.

    Args:
      of_one_layer: `params` are one of the stacked layers, without the axis of layers; otherwise a
        whole model's, whose stacked layers stay in parts.
    """

    def whole(path, leaf):
        if _name(path[0]) == STACKED or FSDP not in varying(leaf):
            return leaf
        spec = tuple(_rule(path))[1 if of_one_layer else 0 :]
        if FSDP not in spec:
            return leaf
        part = leaf.astype(dtype)
        return jax.lax.all_gather(part, FSDP, axis=spec.index(FSDP), tiled=True)

    return jax.tree_util.tree_map_with_path(whole, params)


def all_but_gathered(primitive, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: all is kept for the backward pass but gathered weights.

    Nor is anything in another order, shape or type, which the weights may be in, and which costs
    next to nothing to make again.
    """
    return primitive not in (
        jax.lax.all_gather_p,
        jax.lax.convert_element_type_p,
        jax.lax.reshape_p,
        jax.lax.transpose_p,
    )


def in_parts(tree: Any) -> bool:
    """Whether some leaf is a device's part, cut along D: inside `shard_map`."""
    return any(FSDP in varying(leaf) for leaf in jax.tree.leaves(tree))


def tensor_sum(array: Array) -> Array:
    """The sum of what the devices of a tensor group computed, where they differ.

    It is named for a policy of `jax.checkpoint`, which should not have it travel again.
    """
    if TENSOR not in varying(array):
        return array
    return checkpoint_name(jax.lax.psum(array, TENSOR), SUMMED)


def mean_over_devices(tree: Any) -> Any:
    """The mean of each leaf over the devices on which it differs."""

    def mean(leaf):
        axes = varying(leaf)
        return jax.lax.pmean(leaf, axes) if axes else leaf

    return jax.tree.map(mean, tree)


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each marked as varying over every mesh axis over which one of them varies.

    A `custom_vjp` needs it: its gradient of one operand varies as the others do. The transpose is
    the sum over the axes that were added. Outside `shard_map` it does nothing.
    """
    some = {axis for array in arrays for axis in varying(array)}

    def alike(array):
        return vary(array, tuple(a for a in AXES if a in some and a not in varying(array)))

    return tuple(map(alike, arrays))


def vary_as(results: Any, *operands: Array) -> Any:
    """The results of a call into a library, marked as varying as its operands do.

    Inside `shard_map` jax takes them for the same on all devices.
    """
    leaves, tree = jax.tree.flatten(results)
    return tree.unflatten(vary_alike(*leaves, *operands)[: len(leaves)])


def varying(array: Array) -> tuple[str, ...]:
    """The mesh axes over which an array may differ, by its type; none outside `shard_map`.

    In the order of `AXES`: the order decides who talks to whom, and must be that of every process.
    """
    found = jax.typeof(array).manual_axis_type.varying
    return tuple(axis for axis in AXES if axis in found)


def vary(array: Array, axes: tuple[str, ...]) -> Array:
    """The array, marked as varying over further axes."""
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def _that_cut(sizes: Mapping[str, int], spec: P) -> P:
    """A spec without axes of size 1: what is not cut does not vary, so that nothing passes."""

    def of_one(axes):
        named = axes if isinstance(axes, tuple) else (axes,)
        return tuple(axis for axis in named if axis and sizes[axis] > 1) or None

    return P(*map(of_one, spec))


def _rule(path) -> P:
    names = tuple(_name(key) for key in path)
    for rule, spec in _RULES.items():
        # A parameter's path ends, in flax, on the key of its value.
        if names[-len(rule) :] == rule or names[-len(rule) - 1 : -1] == rule:
            return spec
    return P()


def _name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))
