"""sparsify24 as one pass in Triton: 2 bytes read and 1.14 written for each element."""

import jax
import jax.numpy as jnp

from s24jax import device, triton_bridge
from s24jax.compressed import BLOCK, Compressed24, metadata_shape
from s24jax.typing import Array, Float, Int

# The fastest of six pairs on an H200.
COLUMNS = 256  # of y1 that one program takes; a power of two from 64
WARPS = 4


def reason_against(y1: Float[Array, "T F"]) -> str | None:
    """Why this implementation cannot take `y1` here; None where it can."""
    reason = device.hopper_reason() or triton_bridge.reason_against()
    if reason is None and y1.dtype != jnp.bfloat16:
        reason = f"y1 is {y1.dtype}; cast it to bfloat16"
    return reason


def sparsify24(y1: Float[Array, "T F"]) -> tuple[Compressed24, Int[Array, "F"]]:
    """See `s24jax.ops.sparsify24.api`."""
    tokens, features = y1.shape
    blocks = metadata_shape(tokens, features)
    outputs = [
        jax.ShapeDtypeStruct((tokens, features // 2), y1.dtype),
        jax.ShapeDtypeStruct(blocks, jnp.uint32),
        jax.ShapeDtypeStruct((blocks[0], features), jnp.uint8),
    ]
    if y1.size:
        values, metadata, counts = _launch(y1, outputs)
    else:
        values, metadata, counts = (jnp.zeros(output.shape, output.dtype) for output in outputs)
    # Not added up in the kernel: a second, tiny pass is deterministic and needs no zeroed output.
    counts_F = jnp.sum(counts, axis=0, dtype=jnp.int32)
    return Compressed24(values, metadata, axis=1, shape=y1.shape), counts_F


def _launch(y1: Float[Array, "T F"], outputs: list[jax.ShapeDtypeStruct]) -> list[Array]:
    from s24jax.ops.sparsify24.triton_kernel import relu2_prune_compress_kernel

    tokens, features = y1.shape
    return triton_bridge.call(
        relu2_prune_compress_kernel,
        y1,
        out_shape=outputs,
        grid=(-(-tokens // BLOCK) * -(-features // COLUMNS),),
        num_warps=WARPS,
        T=tokens,
        F=features,
        COLUMNS=COLUMNS,
    )
