"""The dense FFN with Squared ReLU: what 2:4 is compared with, and what runs before it."""

from s24jax.ops.relu2_ffn.api import CANDIDATES, relu2_ffn
from s24jax.ops.relu2_ffn.saved import SAVED_HIDDEN

__all__ = ["CANDIDATES", "SAVED_HIDDEN", "relu2_ffn"]
