"""Axis glossary and array types.

    B  batch (sequences)            L  sequence length
    T  tokens, B * L                D  model width
    F  hidden width of the FFN      V  vocabulary
    M, K, N  rows, contraction and columns of a matrix product

Inside functions a suffix names the axes (`y1_TF` has shape [T, F]); in signatures the annotation
does (`Float[Array, "T F"]`).
"""

from typing import Literal

from jax import Array
from jaxtyping import Bool, Float, Int, UInt8, UInt32

Implementation = Literal["auto", "reference", "triton", "cuda"]
FFNMode = Literal["dense", "sparse24"]

__all__ = ["Array", "Bool", "FFNMode", "Float", "Implementation", "Int", "UInt8", "UInt32"]
