"""The shapes that the benches run on, and what a user writes to choose others."""

from typing import NamedTuple

from s24jax.errors import InvalidInput


class Shape(NamedTuple):
    """An FFN on T tokens, with model width D and hidden width F."""

    T: int
    D: int
    F: int

    def __str__(self) -> str:
        return f"{self.T}x{self.D}x{self.F}"


class Size(NamedTuple):
    """A product [M, K] @ [K, N]."""

    M: int
    N: int
    K: int

    @property
    def flops(self) -> int:
        """Of the dense product: a sparse one is credited with the zeros that it skips."""
        return 2 * self.M * self.N * self.K


SHAPES = (
    Shape(16384, 2048, 8192),
    Shape(16384, 4096, 16384),
    Shape(32768, 2048, 8192),
    Shape(8192, 8192, 28672),
)


def parse_shapes(text: str) -> list[Shape]:
    """The shapes of a flag, "TxDxF,TxDxF,...".

    Raises:
      InvalidInput: one of them is no shape, or T or F cannot be cut into groups of four.
    """
    return [_parse(part.strip()) for part in text.split(",")]


def _parse(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise InvalidInput(f"--shapes: {text!r} is no shape; write TxDxF, as {SHAPES[0]}")
    shape = Shape(*map(int, parts))
    for name, size in (("T", shape.T), ("F", shape.F)):
        if size % 4:
            raise InvalidInput(
                f"--shapes: {name}={size} of {text!r} is no multiple of 4; use {size + -size % 4}"
            )
    return shape


def parse_counts(flag: str, text: str) -> list[int]:
    """The positive numbers of a flag, "N,N,...".

    Raises:
      InvalidInput: one of them is none.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or not int(part):
            raise InvalidInput(f"--{flag}: {part!r} is no positive number; write N,N,...")
    return [int(part) for part in parts]


def parse_names(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a flag, "a,b,...", in the order of `known`.

    Raises:
      InvalidInput: one of them is not in `known`.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InvalidInput(f"--{flag}: {name!r} does not exist; use some of {', '.join(known)}")
    return tuple(name for name in known if name in names)
