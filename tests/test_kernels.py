"""The CUDA and Triton implementations without a GPU: what they refuse, and what calls them.

What they compute is in test_ops.py and test_gpu.py. Here they are asked as if there were a Hopper
GPU, programs are lowered for one, and calls go as far as the handler, which looks at its arguments.
"""

import collections
import functools
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import oracles
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from s24jax import (
    Recipe,
    TokenGrouping,
    compress24,
    cuda_library,
    device,
    ffn,
    ffn24,
    nvcc,
    triton_bridge,
)
from s24jax.errors import InvalidInput, Unsupported
from s24jax.feature_split import FeatureSplit
from s24jax.mesh import AXES, DATA, TENSOR, tensor_sum
from s24jax.ops import dispatch
from s24jax.ops.feature_wise24 import SplitOperand
from s24jax.ops.matmul24 import cuda as matmul24_cuda
from s24jax.ops.matmul24.tuning import Schedule
from s24jax.ops.relu2_ffn import SAVED_HIDDEN, relu2_ffn
from s24jax.ops.relu2_ffn import cuda as relu2_ffn_cuda

T, D, F, DENSE = 144, 72, 272, 16
RECIPE = Recipe(dense_multiple=DENSE)
KERNELS = [
    ("sparsify24", "triton"),
    ("sparsify24", "cuda"),
    ("matmul24", "cuda"),
    ("split_features", "cuda"),
    ("feature_wise24", "cuda"),
    ("split_matmul24", "cuda"),
    ("matmul_sparsify24", "cuda"),
    ("matmul_feature_wise24", "cuda"),
    ("relu2_ffn", "cuda"),
]
OPS = list(dict.fromkeys(op for op, _ in KERNELS))
kernels = pytest.mark.parametrize("op, name", KERNELS, ids=["-".join(kernel) for kernel in KERNELS])
needs_nvcc = pytest.mark.skipif(
    nvcc.reason_against() is not None, reason=str(nvcc.reason_against())
)
BRIDGE_REASON = triton_bridge.reason_against()
needs_bridge = pytest.mark.skipif(BRIDGE_REASON is not None, reason=str(BRIDGE_REASON))


STORE = jax.jit(compress24, static_argnames=("axis", "grouping"))


def api_of(op: str):
    return importlib.import_module(f"s24jax.ops.{op}.api")


def candidate(op: str, name: str) -> dispatch.Candidate:
    (found,) = (c for c in api_of(op).CANDIDATES if c.name == name)
    return found


def arguments(
    op: str,
    *,
    tokens=T,
    features=F,
    width=D,
    dtype=jnp.bfloat16,
    counts=jnp.int32,
    grouping="strided",
    compressed=True,
    shared_mask=True,
):
    """Of an op, of sizes that every kernel takes, up to what is given."""
    y_TF, b_TD = jnp.zeros((tokens, features), dtype), jnp.zeros((tokens, width), dtype)
    w_FD = jnp.zeros((features, width), dtype)
    grouping = TokenGrouping(grouping)
    split = FeatureSplit(jnp.arange(DENSE), jnp.arange(DENSE, features))
    if op == "sparsify24":
        return (y_TF,), {}
    if op == "matmul24":
        return (STORE(y_TF, 0, grouping=grouping), b_TD), {}
    if op == "split_features":
        return (jnp.zeros(features, counts),), {"dense_features": DENSE}
    if op == "feature_wise24":
        y2 = STORE(y_TF, 1) if compressed else y_TF
        return (y2, y2, split), {"grouping": grouping, "shared_mask": shared_mask}
    if op == "matmul_sparsify24":
        return (b_TD, w_FD), {}
    if op == "matmul_feature_wise24":
        how = {"grouping": grouping, "shared_mask": shared_mask}
        return (b_TD, w_FD, STORE(y_TF, 1), split), how
    if op == "relu2_ffn":
        return (b_TD, w_FD, w_FD), {}
    sparse = STORE(y_TF[:, DENSE:], 0, grouping=grouping)
    return (SplitOperand(sparse, jnp.zeros((2, DENSE, tokens // 2), dtype)), b_TD, split), {}


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU, a CUDA library and Triton, as far as anyone asks."""
    monkeypatch.setattr(device, "hopper_reason", lambda: None)
    monkeypatch.setattr(cuda_library, "reason_against", lambda: None)
    monkeypatch.setattr(cuda_library, "_register", lambda: None)
    monkeypatch.setattr(triton_bridge, "reason_against", lambda: None)


# ---------------------------------------------------------------------------------------- refusals


def test_every_kernel_is_looked_at():
    existing = [(op, c.name) for op in OPS for c in api_of(op).CANDIDATES if c.name != "reference"]
    assert existing == KERNELS


@kernels
def test_what_a_kernel_runs_on(op, name, hopper, monkeypatch):
    args, how = arguments(op)
    reason_against = candidate(op, name).reason_against
    assert reason_against(*args, **how) is None
    monkeypatch.setattr(
        cuda_library if name == "cuda" else triton_bridge, "reason_against", lambda: "no library"
    )
    assert reason_against(*args, **how) == "no library"
    monkeypatch.setattr(device, "hopper_reason", lambda: "no Hopper")
    assert reason_against(*args, **how) == "no Hopper"


NO_RANDOM = "it has no random groups of tokens; use strided or adjacent ones"
ONE_MASK = "dY1 has a mask of its own; it takes one mask for both (shared_feature_mask)"
PRODUCT = [
    ({"dtype": jnp.float32}, "the operands are float32; cast them to bfloat16"),
    ({"grouping": "random"}, NO_RANDOM),
    ({"grouping": "adjacent"}, None),
    ({"tokens": 0}, "K=0, N=72 is an empty product"),
    ({"width": 0}, "K=144, N=0 is an empty product"),
    ({"tokens": 152}, "K=152, N=72; pad K to a multiple of 16 and N to a multiple of 8"),
    ({"width": 76}, "K=144, N=76; pad K to a multiple of 16 and N to a multiple of 8"),
    ({"features": 20}, None),
]
FUSED = [
    ({"dtype": jnp.float32}, "the operands are float32; cast them to bfloat16"),
    ({"tokens": 0}, "T=0, D=72, F=272 is an empty product"),
    ({"width": 0}, "T=144, D=0, F=272 is an empty product"),
    ({"features": 0}, "T=144, D=72, F=0 is an empty product"),
    ({"width": 76}, "D=76, F=272; pad D to a multiple of 8 and F to a multiple of 16"),
    ({"features": 280}, "D=72, F=280; pad D to a multiple of 8 and F to a multiple of 16"),
    ({"tokens": 4, "width": 8, "features": 16}, None),
]
REFUSALS = {
    ("sparsify24", "cuda"): [
        ({"dtype": jnp.float32}, "y1 is float32; cast it to bfloat16"),
        ({"features": 280}, "F=280; pad it to a multiple of 16"),
        ({"tokens": 3}, None),
    ],
    ("sparsify24", "triton"): [
        ({"dtype": jnp.float16}, "y1 is float16; cast it to bfloat16"),
        ({"tokens": 3, "features": 20}, None),
    ],
    ("matmul24", "cuda"): PRODUCT,
    ("split_features", "cuda"): [
        ({"counts": jnp.int16}, "counts are int16; cast them to int32"),
        ({"features": 20}, None),
    ],
    ("feature_wise24", "cuda"): [
        (
            {"compressed": False},
            "Y2 and dY1 are dense; it starts from token-wise compressed ones (mask_consistency)",
        ),
        ({"shared_mask": False}, ONE_MASK),
        ({"grouping": "random"}, NO_RANDOM),
        ({"grouping": "adjacent"}, None),
        ({"dtype": jnp.float32}, "Y2 is float32; cast it to bfloat16"),
        ({"tokens": 0}, "T=0: there are no tokens"),
        ({"features": 280}, "F=280; pad it to a multiple of 16"),
        ({"tokens": 148}, None),
    ],
    ("split_matmul24", "cuda"): [
        *PRODUCT,
        ({"features": DENSE}, "every feature is dense, so this is no sparse product"),
    ],
    ("matmul_sparsify24", "cuda"): [*FUSED, ({"tokens": 3}, None)],
    ("matmul_feature_wise24", "cuda"): [
        *FUSED,
        ({"shared_mask": False}, ONE_MASK),
        ({"grouping": "random"}, NO_RANDOM),
        ({"grouping": "adjacent"}, None),
        ({"features": DENSE}, None),
    ],
    ("relu2_ffn", "cuda"): [*FUSED, ({"tokens": 3}, None)],
}


@pytest.mark.parametrize(
    "op, name, changes, reason",
    [(*kernel, *refusal) for kernel, refusals in REFUSALS.items() for refusal in refusals],
)
def test_what_a_kernel_takes(op, name, changes, reason, hopper):
    args, how = arguments(op, **changes)
    assert candidate(op, name).reason_against(*args, **how) == reason


@pytest.mark.cpu_only
@kernels
def test_a_kernel_that_is_named_raises_on_a_cpu(op, name):
    args, how = arguments(op)
    with pytest.raises(Unsupported) as error:
        getattr(api_of(op), op)(*args, **how, implementation=name)
    assert oracles.assert_one_line(error) == (
        f"{op}: implementation {name!r} cannot run ({name}: {device.hopper_reason()}); use 'auto'"
    )


@pytest.mark.cpu_only
@pytest.mark.parametrize("op", OPS)
def test_auto_says_why_it_is_the_reference_on_a_cpu(op):
    args, how = arguments(op)
    jax.eval_shape(lambda *args: getattr(api_of(op), op)(*args, **how), *args)
    names = [name for kernel, name in KERNELS if kernel == op]
    reason = "; ".join(f"{name}: {device.hopper_reason()}" for name in names)
    assert dispatch.Choice(op, "auto", "reference", reason) in dispatch.choices()


# ------------------------------------------------------------------------ what a program lowers to


def one_layer(layer, x, w_up, w_down):
    return layer(x, w_up, w_down)


def scanned(layer, x, w_up, w_down):
    return jax.lax.scan(lambda x, weights: (layer(x, *weights), None), x, (w_up, w_down))[0]


def mapped(layer, x, w_up, w_down):
    return jax.vmap(layer, (0, None, None))(x, w_up, w_down)


def on_a_mesh(layer, x, w_up, w_down):
    """Each device's own tokens and features."""
    mesh = AbstractMesh((2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)

    def local(x, w_up, w_down):
        return tensor_sum(layer(x, w_up, w_down))

    features = P(TENSOR)
    operands = (P(DATA), features, features)
    return jax.shard_map(local, mesh=mesh, in_specs=operands, out_specs=P(DATA))(x, w_up, w_down)


def lower(layers, recipe=RECIPE, implementation="auto", remat=lambda layer: layer) -> str:
    """The program of the value and gradients of ffn24, for a GPU."""
    layer = functools.partial(ffn24, recipe=recipe, implementation=implementation)
    return lower_gradients(layers, remat(layer))


def lower_gradients(layers, layer) -> str:
    def loss(*args):
        return jnp.sum(layers(layer, *args).astype(jnp.float32) ** 2)

    # On the mesh each of two devices has a half.
    tokens, features = (2 * T, 2 * F) if layers is on_a_mesh else (T, F)
    x = jax.ShapeDtypeStruct((3, T, D) if layers is mapped else (tokens, D), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((3, F, D) if layers is scanned else (features, D), jnp.bfloat16)
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x, w, w)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def calls(program: str) -> dict[str, int]:
    """Which handlers a program calls, and at how many places."""
    return dict(collections.Counter(re.findall(r"stablehlo.custom_call @(\w+)", program)))


def products(program: str) -> list[str]:
    """The types of the results of a program's dense products."""
    return re.findall(r"stablehlo\.dot_general .* -> tensor<(\w+)>", program)


# Of the full recipe. The products of matmul24 are Y3, dX, dW_down and dW_up.
ALL_CALLS = {
    "s24jax_matmul_sparsify24": 1,
    "s24jax_matmul24": 4,
    "s24jax_split_features": 1,
    "s24jax_matmul_feature_wise24": 1,
}
every_layers = pytest.mark.parametrize("layers", [one_layer, scanned, mapped, on_a_mesh])


@pytest.fixture
def no_triton(hopper, monkeypatch):
    monkeypatch.setattr(triton_bridge, "reason_against", lambda: "no Triton")


@every_layers
def test_every_product_is_a_kernels(layers, hopper):
    """So neither Y1 nor dY2 is ever in memory, and no A was decompressed."""
    program = lower(layers)
    # Under vmap a call is made for each of the batch.
    assert calls(program) == ALL_CALLS
    assert products(program) == []


def test_nothing_is_moved_between_the_kernels(hopper):
    """The features stay in their places, the tokens in their order."""
    program = lower(one_layer)
    for operation in ("gather", "scatter", "sort", "dynamic_slice"):
        assert f"stablehlo.{operation}" not in program


SAVE_Y2 = jax.checkpoint_policies.save_only_these_names(ffn.SAVED_Y2)


@pytest.mark.parametrize("layers", [one_layer, scanned])
@pytest.mark.parametrize("policy, again", [(None, 1), (SAVE_Y2, 0)], ids=["full", "save_y2"])
def test_remat_makes_y2_again_or_keeps_it(layers, policy, again, hopper):
    program = lower(layers, remat=functools.partial(jax.checkpoint, policy=policy))
    assert calls(program) == ALL_CALLS | {"s24jax_matmul_sparsify24": 1 + again}
    assert products(program) == []


def users(name: str, lines: list[str]) -> list[str]:
    """Of a value, until its name is another one's, in a later region."""
    again = re.compile(rf"\s*{name}(:\d+)? = ")
    until = itertools.takewhile(lambda line: not again.match(line), lines)
    return [line for line in until if re.search(rf"{name}\b", line)]


def test_who_uses_a_kernels_results_does_so_behind_a_barrier(hopper):
    """Otherwise XLA runs the kernel once for the stack of a scan and once for its other users."""
    found = 0
    for function in lower(scanned).split("func.func"):
        lines = function.splitlines()
        for i, line in enumerate(lines):
            call = re.match(r"\s*(%\w+)(:\d+)? = stablehlo.custom_call @s24jax", line)
            if call:
                (user,) = users(call[1], lines[i + 1 :])
                assert "stablehlo.optimization_barrier" in user
                found += 1
    assert found == sum(ALL_CALLS.values())


def test_cuda_by_name_is_the_same_program(hopper):
    assert lower(one_layer, implementation="cuda") == lower(one_layer)


@needs_bridge
def test_auto_sparsifies_in_triton_where_it_does_not_save_what_it_pruned(hopper):
    program = lower(one_layer, Recipe(dense_multiple=DENSE, mask_consistency=False))
    assert calls(program) == {
        "triton_kernel_call": 1,
        "s24jax_matmul24": 3,
        "s24jax_split_features": 1,
    }


REFUSED = [
    ({"width": 76}, "D=76, F=272; pad D to a multiple of 8 and F to a multiple of 16"),
    ({"features": 280}, "D=72, F=280; pad D to a multiple of 8 and F to a multiple of 16"),
    ({"dtype": jnp.float32}, "the operands are float32; cast them to bfloat16"),
]


@pytest.mark.parametrize("changes, reason", REFUSED)
@pytest.mark.parametrize(
    "op, layer",
    [
        ("matmul_sparsify24", functools.partial(ffn24, recipe=RECIPE)),
        ("relu2_ffn", relu2_ffn),
    ],
    ids=["ffn24", "relu2_ffn"],
)
def test_a_layer_tells_why_its_kernel_refuses(op, layer, changes, reason, hopper):
    args, _ = arguments("relu2_ffn", **changes)
    with pytest.raises(Unsupported) as error:
        jax.eval_shape(functools.partial(layer, implementation="cuda"), *args)
    assert oracles.assert_one_line(error) == (
        f"{op}: implementation 'cuda' cannot run (cuda: {reason}); use 'auto'"
    )
    jax.eval_shape(layer, *args)
    assert dispatch.Choice(op, "auto", "reference", f"cuda: {reason}") in dispatch.choices()


@pytest.mark.cpu_only
def test_without_a_gpu_no_handler_is_called():
    program = lower(one_layer)
    assert calls(program) == {}
    assert len(products(program)) > 4


# A recipe, which op of CUDA's refuses it, and why; which handlers it calls all the same.
RECIPES = [
    (
        Recipe(dense_multiple=DENSE, token_grouping="random"),
        "matmul_feature_wise24",
        NO_RANDOM,
        # The operands of the weight gradients, and their products, are the reference's.
        {"s24jax_matmul_sparsify24": 1, "s24jax_matmul24": 2, "s24jax_split_features": 1},
    ),
    (
        Recipe(dense_multiple=DENSE, mask_consistency=False),
        "feature_wise24",
        "Y2 and dY1 are dense",
        {"s24jax_sparsify24": 1, "s24jax_matmul24": 3, "s24jax_split_features": 1},
    ),
    (
        Recipe(dense_multiple=DENSE, token_wise=False),
        "feature_wise24",
        "Y2 and dY1 are dense",
        {"s24jax_matmul24": 2, "s24jax_split_features": 1},
    ),
    (
        Recipe(dense_multiple=DENSE, shared_feature_mask=False),
        "matmul_feature_wise24",
        "dY1 has a mask of its own",
        {"s24jax_matmul_sparsify24": 1, "s24jax_matmul24": 4, "s24jax_split_features": 1},
    ),
]
recipes = pytest.mark.parametrize(
    "recipe, op, reason, expected",
    RECIPES,
    ids=["random", "inconsistent", "feature-wise", "own-masks"],
)


@recipes
def test_a_recipe_that_the_kernels_lack_raises_where_they_are_named(
    recipe, op, reason, expected, no_triton
):
    with pytest.raises(Unsupported) as error:
        lower(one_layer, recipe, "cuda")
    message = oracles.assert_one_line(error)
    assert message.startswith(f"{op}: implementation 'cuda' cannot run (cuda: {reason}")


@recipes
def test_auto_takes_the_kernels_that_a_recipe_leaves(recipe, op, reason, expected, no_triton):
    assert calls(lower(one_layer, recipe)) == expected


@pytest.mark.parametrize("implementation", ["auto", "cuda"])
def test_a_recipe_without_feature_wise_pruning(implementation, hopper):
    """dY2 and its weight gradients are dense products."""
    program = lower(one_layer, Recipe(feature_wise=False), implementation)
    assert calls(program) == {"s24jax_matmul_sparsify24": 1, "s24jax_matmul24": 2}
    assert products(program) == [f"{T}x{F}xf32"] + [f"{F}x{D}xf32"] * 2


@every_layers
@pytest.mark.parametrize("implementation", ["auto", "cuda"])
def test_relu2_ffn_leaves_four_products(layers, implementation, hopper):
    """To XLA: Y3, dX and the weight gradients. Those of Y1 and dY2 are kernels of their own."""
    layer = functools.partial(relu2_ffn, implementation=implementation)
    program = lower_gradients(layers, layer)
    assert calls(program) == {"s24jax_relu2_ffn_y2": 1, "s24jax_relu2_ffn_dy1": 1}
    if layers is mapped:
        assert len(products(program)) == 4
    else:
        assert sorted(products(program)) == [f"{T}x{D}xbf16"] * 2 + [f"{F}x{D}xbf16"] * 2


@pytest.mark.parametrize("leading", [(T,), (2, T // 2)])
def test_relu2_ffn_saves_x_the_weights_and_y2(leading, hopper):
    x, w = (jax.ShapeDtypeStruct((*axes, D), jnp.bfloat16) for axes in (leading, (F,)))
    saved = jax.eval_shape(lambda *args: jax.vjp(relu2_ffn, *args)[1], x, w, w)
    kinds = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(saved))
    assert kinds == [((T, D), "bfloat16"), ((T, F), "bfloat16")] + [((F, D), "bfloat16")] * 2


SAVE_HIDDEN = jax.checkpoint_policies.save_only_these_names(SAVED_HIDDEN)


@pytest.mark.parametrize("layers", [one_layer, scanned])
@pytest.mark.parametrize("policy, again", [(None, 1), (SAVE_HIDDEN, 0)], ids=["full", "save_y2"])
def test_remat_makes_the_dense_y2_again_or_keeps_it(layers, policy, again, hopper):
    layer = jax.checkpoint(functools.partial(relu2_ffn, implementation="cuda"), policy=policy)
    program = lower_gradients(layers, layer)
    assert calls(program) == {"s24jax_relu2_ffn_y2": 1 + again, "s24jax_relu2_ffn_dy1": 1}
    assert len(products(program)) == 4


@pytest.mark.parametrize("policy, again", [(None, 1), (SAVE_HIDDEN, 0)], ids=["full", "save_y2"])
def test_so_does_xla_with_y1(policy, again, hopper):
    layer = jax.checkpoint(functools.partial(relu2_ffn, implementation="reference"), policy=policy)
    program = lower_gradients(scanned, layer)
    assert calls(program) == {}
    assert products(program).count(f"{T}x{F}xbf16") == 2 + again  # Y1, dY2


# -------------------------------------------------------------------------- what a handler is given


@pytest.fixture
def handlers(monkeypatch):
    """The handlers of this package, under other names and for the CPU's backend.

    There they look at their arguments, find no stream to run on, and tell.
    """
    monkeypatch.setattr(cuda_library, "_loaded", [])
    cuda_library._register()
    for target in cuda_library.TARGETS:
        handler = jax.ffi.pycapsule(cuda_library._loaded[0][target])
        jax.ffi.register_ffi_target(f"{target}_looked_at", handler, platform="cpu")
    ffi_call = jax.ffi.ffi_call
    monkeypatch.setattr(
        jax.ffi,
        "ffi_call",
        lambda target, *args, **how: ffi_call(f"{target}_looked_at", *args, **how),
    )


def refused(function, *args, **how) -> str:
    """Which of its arguments a handler could not decode, the stream being number 0."""
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(jax.jit(functools.partial(function, **how))(*args))
    (found,) = re.findall(r"bad operands at: ([\d, ]+)\)", str(error.value))
    return found


@needs_nvcc
@pytest.mark.cpu_only
@pytest.mark.parametrize("op", OPS)
def test_calls_are_what_handlers_decode(op, handlers):
    """Number, order and types of arrays, results and attributes, but for matmul24's arrays."""
    args, how = arguments(op)
    assert refused(candidate(op, "cuda").run, *args, **how) == "0"


@needs_nvcc
@pytest.mark.cpu_only
def test_so_is_the_call_of_relu2_ffns_backward_pass(handlers):
    (x_TD, w_FD, _), _ = arguments("relu2_ffn")
    saved = x_TD, w_FD, w_FD, jnp.zeros((T, F), jnp.bfloat16)
    assert refused(relu2_ffn_cuda._backward, saved, x_TD) == "0"


@needs_nvcc
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "how",
    [
        {"schedule": Schedule(1, 4)},
        {"schedule": Schedule(0, 4), "out_dtype": jnp.float32},
        {"k_blocks": matmul24_cuda.KBlocks(jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32))},
    ],
    ids=["schedule", "float32", "lists"],
)
def test_so_are_all_calls_of_matmul24(how, handlers):
    args, _ = arguments("matmul24")
    assert refused(matmul24_cuda.matmul24, *args, **how) == "0"


@pytest.mark.parametrize("blocks, counts", [((2, 2), 1), ((1, 3), 1), ((1, 2), 2)])
def test_lists_of_k_blocks_fit_the_operands(blocks, counts):
    args, _ = arguments("matmul24")
    lists = matmul24_cuda.KBlocks(jnp.zeros(blocks, jnp.int32), jnp.zeros(counts, jnp.int32))
    m, k = args[0].values.shape[0], args[1].shape[0]
    with pytest.raises(InvalidInput) as error:
        matmul24_cuda.matmul24(*args, k_blocks=lists)
    assert str(error.value) == (
        f"matmul24: k_blocks has shapes {blocks} and ({counts},), M={m} and K={k} need (1, 2) "
        "and (1,)"
    )


@needs_nvcc
@pytest.mark.cpu_only
def test_a_handler_would_tell(handlers):
    """Else the tests above could not fail: 1 is Y1, 2 are the values."""
    args, _ = arguments("sparsify24", dtype=jnp.float32)
    assert refused(candidate("sparsify24", "cuda").run, *args) == "0, 1, 2"
