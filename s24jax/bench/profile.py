"""Operands whose features are active as often as those of recorded runs."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from s24jax.bench.ffn_operands import Case, make_operands, some_layers
from s24jax.bench.shapes import Shape
from s24jax.errors import InvalidInput
from s24jax.results import PROFILE, read_results


def profiled(written: str, shapes: Sequence[Shape]) -> Iterator[Case]:
    """Synthetic operands of each shape with the features of some layers at a run's last probe.

    F features are cut into as many equal parts as the profile has; those of a part are equally
    active. Tokens are independent.

    Args:
      written: FILE or FILE:ROW, the results of a sweep (`s24jax.results`) and one of its rows,
        which may be left out where only one has a profile.

    Raises:
      InvalidInput: no such file or row, or none with Squared ReLU.
    """
    name, curve = _profile(written)
    step, layers = curve["step"][-1], np.array(curve["profile"][-1], dtype=float)
    for shape in shapes:
        for layer in some_layers(len(layers)):
            parts = np.arange(shape.F) * layers.shape[1] // shape.F
            density_F = jnp.asarray(layers[layer][parts], jnp.float32)
            source = f"{name}, layer {layer + 1} of {len(layers)}, step {step}"
            yield Case(source, make_operands(shape, density_F))


def _profile(written: str) -> tuple[str, dict]:
    """The name of the row, and its profile over steps."""
    path, _, chosen = written.partition(".json:")
    path = f"{path}.json" if chosen else path
    curves = {row["name"]: row["curves"]["main"] for row in read_results(path)["rows"]}
    profiles = {name: curve[PROFILE] for name, curve in curves.items() if PROFILE in curve}
    if not profiles:
        raise InvalidInput(f"--profile: no row of {path} has Squared ReLU; use another file")
    if chosen in profiles:
        return chosen, profiles[chosen]
    if chosen or len(profiles) > 1:
        raise InvalidInput(
            f"--profile: {written} names no row with a profile; "
            f"write {path}:ROW with one of {', '.join(profiles)}"
        )
    return next(iter(profiles.items()))
