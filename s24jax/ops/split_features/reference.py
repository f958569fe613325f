"""split_features in pure JAX: a sort."""

import jax.numpy as jnp

from s24jax.feature_split import FeatureSplit
from s24jax.typing import Array, Int


def split_features(counts: Int[Array, "F"], dense_features: int) -> FeatureSplit:
    """See `s24jax.ops.split_features.api`."""
    order = jnp.argsort(-counts, stable=True)
    return FeatureSplit(jnp.sort(order[:dense_features]), jnp.sort(order[dense_features:]))
