"""How sparse a model's activations are, and what 2:4 would drop of them, layer by layer.

Always computed by the reference on a dense forward pass of one batch, so that the figures do not
depend on what a fused kernel can see. They are also defined for a model that trains dense: then
they say what the recipe would drop.
"""

import jax
import jax.numpy as jnp

from s24jax.activation import relu2
from s24jax.compressed import compress24
from s24jax.model import FFN
from s24jax.numerics import round_to
from s24jax.ops.sparsify24 import reference
from s24jax.ops.split_features import reference as split_reference
from s24jax.recipe import Recipe
from s24jax.typing import Array, Float

SQUARED_RELU = ("relu2", "relu2_24")
"""The FFN kinds whose activations these metrics describe."""
BLOCK_TOKENS, BLOCK_FEATURES = 128, 32
"""The block of Y2 that a kernel could skip where it is zero: a tile's tokens, a step of its K."""
PROFILE_BINS = 64


def observe_ffn(ffn: FFN, x: Float[Array, "B L D"]) -> dict[str, Float[Array, "..."]]:
    """`sparsity` of one layer; an `observe` for `Transformer.__call__`."""
    x_TD = x.reshape(-1, x.shape[-1])
    return sparsity(round_to(ffn.pre_activation(x_TD), x.dtype), ffn.recipe)


def sparsity(y1_TF: Float[Array, "T F"], recipe: Recipe) -> dict[str, Float[Array, "..."]]:
    """What one layer's pre-activations give, and what `recipe`'s groupings and split drop.

    Token-wise and feature-wise pruning are applied one after the other whatever the recipe turns
    off, so that a dense run and every ablation are described in the same terms. On a mesh each
    device describes its own tokens and features, as it prunes them, and the means are reported:
    but for zeros and what is dropped token-wise they depend on the mesh.

    Returns (shares lie in 0..1; "energy" is the sum of squares of Y2):
      zero_share: zeros in Y2.
      dropped_token_wise: of Y2's non-zeros, those dropped in groups of 4 features.
      dropped_token_wise_energy: the share of Y2's energy in them.
      dropped_feature_wise: of Y2's non-zeros, those that the weight gradients do not see: dropped
        token-wise, or after that in groups of 4 tokens outside the dense features.
      dropped_feature_wise_energy: the share of Y2's energy in them.
      dense_feature_density, sparse_feature_density: mean share of non-zeros in the features that
        the split makes dense, and in the others.
      inactive_features: features without a non-zero in this batch.
      inactive_blocks: of the blocks of 128 successive tokens and 32 features, in order of their
        density, those without a non-zero.
      density_profile: [64], the density of the features in that order, averaged over 64 equal
        parts of them; one value a feature where F is smaller.
    """
    tokens = y1_TF.shape[0]
    y1_TF = jnp.pad(y1_TF, ((0, -tokens % 4), (0, 0)))
    y2_TF = relu2(y1_TF).astype(jnp.float32)
    y2, counts_F = reference.sparsify24(y1_TF)
    token_wise_TF = y2.decompress().astype(jnp.float32)
    split = split_reference.split_features(counts_F, recipe.dense_features(counts_F.size))
    sparse_TF = token_wise_TF[:, split.sparse]
    feature_wise_TF = token_wise_TF.at[:, split.sparse].set(
        compress24(sparse_TF, axis=0, grouping=recipe.grouping).decompress()
    )
    density_F = counts_F / tokens
    densest_first = jnp.argsort(-counts_F)
    return {
        "zero_share": 1 - density_F.mean(),
        "dropped_token_wise": _lost(y2_TF != 0, token_wise_TF != 0),
        "dropped_token_wise_energy": _lost(y2_TF**2, token_wise_TF**2),
        "dropped_feature_wise": _lost(y2_TF != 0, feature_wise_TF != 0),
        "dropped_feature_wise_energy": _lost(y2_TF**2, feature_wise_TF**2),
        "dense_feature_density": density_F[split.dense].sum() / max(split.dense.size, 1),
        "sparse_feature_density": density_F[split.sparse].mean(),
        "inactive_features": (counts_F == 0).mean(),
        "inactive_blocks": _inactive_blocks(y2_TF[:tokens, densest_first]),
        "density_profile": _profile(density_F[densest_first]),
    }


def _inactive_blocks(y2_TF: Float[Array, "T F"]) -> Float[Array, ""]:
    tokens, features = y2_TF.shape
    # Zeros beyond the edge change no block, and begin none.
    padded = jnp.pad(y2_TF, ((0, -tokens % BLOCK_TOKENS), (0, -features % BLOCK_FEATURES)))
    blocks = padded.reshape(-1, BLOCK_TOKENS, padded.shape[1] // BLOCK_FEATURES, BLOCK_FEATURES)
    return 1 - (blocks != 0).any(axis=(1, 3)).mean()


def _profile(density_F: Float[Array, "F"]) -> Float[Array, "bins"]:
    features = density_F.size
    bins = min(PROFILE_BINS, features)
    bin_F = jnp.arange(features) * bins // features
    ones_F = jnp.ones_like(density_F)
    total, count = (jax.ops.segment_sum(a, bin_F, bins) for a in (density_F, ones_F))
    return total / count


def _lost(before: Array, after: Array) -> Float[Array, ""]:
    """1 - sum(after) / sum(before), and 0 where there was nothing to lose."""
    total = before.sum(dtype=jnp.float32)
    return jnp.where(total > 0, 1 - after.sum(dtype=jnp.float32) / total, 0.0)
