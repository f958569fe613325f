"""Causal self-attention with rotary positions, with or without a key-value cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from s24jax.ops import dispatch
from s24jax.typing import Array


def rotate(x_BLHC: Array, positions_L: Array, theta: float) -> Array:
    """Rotary position embedding: channel pairs (c, c + C/2) turn by position * theta^(-2c/C).

    Computed in float32. Source: Su et al. 2021, arXiv 2104.09864.
    """
    half = x_BLHC.shape[-1] // 2
    angle_LC = positions_L[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = (f(angle_LC)[None, :, None, None, :] for f in (jnp.cos, jnp.sin))
    # The halves have an axis of their own: the gradients of queries, keys and values are then
    # joined where they are read, and not by a pass over memory for each layer.
    x_BLH2C = x_BLHC.astype(jnp.float32).reshape(*x_BLHC.shape[:-1], 2, half)
    sign = jnp.array([-1.0, 1.0])[:, None]
    turned = x_BLH2C * cos + x_BLH2C[..., ::-1, :] * (sign * sin)
    return turned.reshape(x_BLHC.shape).astype(x_BLHC.dtype)


def _against_cudnn(dtype) -> str | None:
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, jax runs on {jax.default_backend()}"
    return None if dtype.itemsize == 2 else f"takes 16-bit types, model.dtype is {dtype}"


ATTENTION = [
    dispatch.Candidate("cudnn", nnx.identity, _against_cudnn),
    dispatch.Candidate("xla", nnx.identity),
]


class Attention(nnx.Module):
    """Causal multi-head self-attention through `jax.nn.dot_product_attention`.

    softmax(q k^T / sqrt(C)) v over the tokens up to each one's own, for heads of C channels, of
    which q and k are turned by `rotate`; then a product with the output projection.

    On a mesh that cuts its weights by heads it computes those heads, and their part of the output's
    sum: columns of `qkv` are the queries, keys and values of the first head, then of the next.

    Args:
      config: width, heads, rope_theta, attention (the implementation: auto, xla, cudnn).
      output_gain: factor on the output projection's initial weights.
      dtype: computation; parameters are float32.

    Raises:
      InvalidInput: no implementation of that name.
      Unsupported: the named implementation cannot run here.
    """

    def __init__(self, config, *, output_gain: float, dtype, rngs: nnx.Rngs):
        self.head_width, self.theta = config.width // config.heads, config.rope_theta
        chosen = dispatch.resolve("attention", config.attention, ATTENTION, dtype)
        self.implementation = chosen.name
        linear = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        scale = config.width**-0.5
        normal = nnx.initializers.normal
        self.qkv = nnx.Linear(config.width, 3 * config.width, kernel_init=normal(scale), **linear)
        self.out = nnx.Linear(
            config.width, config.width, kernel_init=normal(output_gain * scale), **linear
        )

    def __call__(self, x_BLD: Array, past: tuple[Array, Array, Array] | None = None):
        """Attends to x itself and, where there is one, to the past.

        Args:
          x_BLD: normalized activations.
          past: one layer's keys and values [B, S, H, C] and the number of valid tokens.

        Returns:
          the output [B, L, D] and the updated keys and values (None without a past).
        """
        B, L, _ = x_BLD.shape
        by_head = self.qkv(x_BLD).reshape(B, L, -1, 3 * self.head_width)
        q, k, v = jnp.split(by_head, 3, axis=-1)
        start = 0 if past is None else past[2]
        positions_L = start + jnp.arange(L)
        q, k = (rotate(y, positions_L, self.theta) for y in (q, k))
        if past is None:
            return self.out(self._among_themselves(q, k, v).reshape(B, L, -1)), None
        keys = jax.lax.dynamic_update_slice_in_dim(past[0], k, start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(past[1], v, start, axis=1)

        def over_all_past():
            visible_LS = jnp.arange(keys.shape[1])[None, :] <= positions_L[:, None]
            return jax.nn.dot_product_attention(q, keys, values, mask=visible_LS[None, None])

        if L == 1:
            mixed = over_all_past()
        else:
            # A prompt that begins a sequence has no past: no mask over the room in the cache.
            mixed = jax.lax.cond(start == 0, lambda: self._among_themselves(q, k, v), over_all_past)
        return self.out(mixed.reshape(B, L, -1)), (keys, values)

    def _among_themselves(self, q_BLHC: Array, k_BLHC: Array, v_BLHC: Array) -> Array:
        return jax.nn.dot_product_attention(
            q_BLHC, k_BLHC, v_BLHC, is_causal=True, implementation=self.implementation
        )
