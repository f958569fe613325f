"""What an op resolves to, that it says so once, and that nothing falls back in silence."""

import functools
import importlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from s24jax import Recipe, TokenGrouping, compress24, ffn24, matmul24, sparsify24
from s24jax.errors import InvalidInput, Unsupported
from s24jax.ops import dispatch
from s24jax.ops.dispatch import Candidate, Choice
from s24jax.ops.feature_wise24 import feature_wise24
from s24jax.ops.matmul_feature_wise24 import matmul_feature_wise24
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.ops.relu2_ffn import relu2_ffn
from s24jax.ops.split_features import reference as split_features_reference
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24

OPS = [
    *("sparsify24", "matmul24", "split_features", "feature_wise24", "split_matmul24"),
    *("matmul_sparsify24", "matmul_feature_wise24", "relu2_ffn"),
]
Y = jnp.arange(32.0).reshape(4, 8)


def api_of(op: str):
    return importlib.import_module(f"s24jax.ops.{op}.api")


def call(op: str, implementation: str):
    """The op on arguments that it takes."""
    how = {"implementation": implementation}
    if op == "sparsify24":
        return sparsify24(Y, **how)
    if op == "matmul24":
        return matmul24(compress24(Y, 1), Y.T, **how)
    if op == "split_features":
        return split_features(jnp.arange(8), 4, **how)
    if op == "matmul_sparsify24":
        return matmul_sparsify24(Y, Y, **how)
    if op == "relu2_ffn":
        return relu2_ffn(Y, Y, Y, **how)
    split = split_features_reference.split_features(jnp.arange(8), 4)
    prune = {"grouping": TokenGrouping(), "shared_mask": True}
    if op == "matmul_feature_wise24":
        y2 = compress24(jnp.square(Y), 1)
        return matmul_feature_wise24(Y, jnp.ones((8, 8)), y2, split, **prune, **how)
    weights = functools.partial(feature_wise24, Y, Y, split, **prune)
    if op == "feature_wise24":
        return weights(**how)
    return split_matmul24(weights(implementation="reference")[0], Y, split, **how)


def never(*_, **__):
    raise AssertionError("an implementation ran that must not")


def refuses(reason: str):
    return lambda *args, **kwargs: reason


@pytest.mark.parametrize("op", OPS)
def test_reference_exists_and_is_what_runs_by_name(op):
    call(op, "reference")
    assert Choice(op, "reference", "reference", "named by the caller") in dispatch.choices()


@pytest.mark.parametrize("op", OPS)
def test_auto_runs_here_and_is_recorded_with_a_reason(op):
    call(op, "auto")
    chosen = [c for c in dispatch.choices() if (c.op, c.requested) == (op, "auto")]
    assert chosen
    assert all(c.implementation and c.reason for c in chosen)


@pytest.mark.parametrize("op", OPS)
def test_every_candidate_has_a_known_name_and_reference_comes_last(op):
    """For "auto" takes the first that can, and the reference always can."""
    names = [candidate.name for candidate in api_of(op).CANDIDATES]
    assert set(names) <= {"reference", "triton", "cuda"}
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


@pytest.mark.parametrize("op", OPS)
def test_a_named_implementation_that_does_not_exist_raises(op, monkeypatch):
    monkeypatch.setattr(api_of(op), "CANDIDATES", [Candidate("reference", never)])
    with pytest.raises(Unsupported) as error:
        call(op, "cuda")
    assert oracles.assert_one_line(error) == (
        f"{op}: implementation 'cuda' cannot run (it exists as reference); use 'auto'"
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["fast", "", "Reference", None])
def test_an_unknown_name_raises(op, name):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        call(op, name)
    existing = ", ".join(candidate.name for candidate in api_of(op).CANDIDATES)
    assert oracles.assert_one_line(error) == (
        f"{op}: implementation {name!r} does not exist; use 'auto' or one of {existing}"
    )


def test_a_named_implementation_that_refuses_raises_with_its_reason():
    candidates = [Candidate("triton", never, refuses("needs a GPU")), Candidate("reference", never)]
    with pytest.raises(Unsupported) as error:
        dispatch.resolve("fake.refuses", "triton", candidates, 1)
    assert oracles.assert_one_line(error) == (
        "fake.refuses: implementation 'triton' cannot run (triton: needs a GPU); use 'auto'"
    )
    assert not [c for c in dispatch.choices() if c.op == "fake.refuses"]


def test_auto_that_every_candidate_refuses_raises_with_all_reasons():
    candidates = [
        Candidate("triton", never, refuses("needs a GPU")),
        Candidate("cuda", never, refuses("F=6 is too small")),
    ]
    with pytest.raises(Unsupported) as error:
        dispatch.resolve("fake.none", "auto", candidates)
    message = oracles.assert_one_line(error)
    assert "fake.none" in message
    assert "triton: needs a GPU; cuda: F=6 is too small" in message
    assert "use 'auto'" not in message, "that is what did not work"


def test_auto_takes_the_first_that_can():
    candidates = [Candidate(name, never) for name in ("cuda", "triton", "reference")]
    assert dispatch.resolve("fake.first", "auto", candidates).name == "cuda"
    choice = dispatch.choices()[-1]
    assert choice[:3] == ("fake.first", "auto", "cuda")
    assert choice.reason


def test_auto_says_once_why_it_passed_over_a_candidate(caplog):
    candidates = [Candidate("triton", never, refuses("needs a GPU")), Candidate("reference", never)]
    before = len(dispatch.choices())
    with caplog.at_level(logging.INFO, logger="s24jax.ops.dispatch"):
        for _ in range(3):
            assert dispatch.resolve("fake.once", "auto", candidates).name == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "fake.once: reference (triton: needs a GPU)"
    ]
    assert dispatch.choices()[before:] == [
        Choice("fake.once", "auto", "reference", "triton: needs a GPU")
    ]


def test_another_reason_is_another_choice():
    """The same op may resolve differently for another shape; the run's record shows both."""
    candidates = [
        Candidate("triton", never, lambda size: None if size > 8 else f"size {size}"),
        Candidate("reference", never),
    ]
    before = len(dispatch.choices())
    names = [
        dispatch.resolve("fake.sizes", "auto", candidates, size).name for size in (4, 16, 4, 8)
    ]
    assert names == ["reference", "triton", "reference", "reference"]
    first, preferred, second = dispatch.choices()[before:]
    assert (first.implementation, first.reason) == ("reference", "triton: size 4")
    assert preferred.implementation == "triton"
    assert (second.implementation, second.reason) == ("reference", "triton: size 8")


def test_choices_is_a_copy():
    dispatch.choices().clear()
    dispatch.resolve("fake.copy", "auto", [Candidate("reference", never)])
    assert dispatch.choices()


@pytest.mark.parametrize("op", OPS)
def test_a_candidate_is_asked_about_the_very_arguments_it_would_get(op, monkeypatch):
    asked, ran = [], []
    reference = api_of(op).CANDIDATES[-1]

    def run(*args, **kwargs):
        ran.append((args, kwargs))
        return reference.run(*args, **kwargs)

    def ask(*args, **kwargs):
        asked.append((args, kwargs))

    monkeypatch.setattr(api_of(op), "CANDIDATES", [Candidate("triton", run, ask), reference])
    result = call(op, "triton")
    assert len(asked) == len(ran) == 1
    assert [id(a) for a in asked[0][0]] == [id(a) for a in ran[0][0]]
    assert asked[0][1] == ran[0][1]
    for actual, expected in zip(
        jax.tree.leaves(result), jax.tree.leaves(call(op, "reference")), strict=True
    ):
        oracles.assert_bits(actual, expected)


FUSED = [
    ["matmul_sparsify24", "matmul24"],
    [
        *("split_features", "matmul_feature_wise24"),
        *("split_matmul24", "split_matmul24", "matmul24"),
    ],
]


@pytest.mark.parametrize(
    "recipe, forward, backward",
    [
        (Recipe(dense_multiple=8), *FUSED),
        (Recipe(dense_multiple=8, shared_feature_mask=False), *FUSED),
        # Saves the unpruned Y2, whose dY1 is dense.
        (
            Recipe(dense_multiple=8, mask_consistency=False),
            ["sparsify24", "matmul24"],
            ["split_features", "feature_wise24", "split_matmul24", "split_matmul24"],
        ),
    ],
)
def test_ffn24_hands_the_name_to_every_op_in_both_passes(recipe, forward, backward, monkeypatch):
    """Else a part of the layer would run on another implementation than the one asked for."""
    ran = []
    for op in OPS:
        reference = api_of(op).CANDIDATES[-1]

        def run(*args, op=op, reference=reference, **kwargs):
            ran.append(op)
            return reference.run(*args, **kwargs)

        # "auto" would take the first, which must not run.
        monkeypatch.setattr(
            api_of(op), "CANDIDATES", [Candidate("reference", never), Candidate("triton", run)]
        )

    def both_passes(*args):
        y3, pull = jax.vjp(functools.partial(ffn24, recipe=recipe, implementation="triton"), *args)
        assert ran == forward
        return pull(y3)

    x, w = jnp.ones((8, 8)), jnp.ones((32, 8))
    jax.make_jaxpr(both_passes)(x, w, w)
    assert ran[2:] == backward


def test_ffn24_refuses_by_name_too():
    x, w = jnp.ones((8, 8)), jnp.ones((32, 8))
    with oracles.without_type_checks(), pytest.raises(InvalidInput, match="'fast' does not exist"):
        ffn24(x, w, w, recipe=Recipe(dense_multiple=8), implementation="fast")


def test_ffn24_by_name_equals_auto_on_this_machine():
    rng = np.random.default_rng(0)
    x, w_up, w_down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 8), (32, 8), (32, 8))
    )
    recipe = Recipe(dense_multiple=8)
    named, auto = (
        jax.jit(functools.partial(ffn24, recipe=recipe, implementation=name))(x, w_up, w_down)
        for name in ("reference", "auto")
    )
    oracles.assert_close(named, auto)
