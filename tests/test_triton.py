"""Triton kernels without a GPU: compiled for Hopper, lowered by jax, and run in the interpreter.

What they compute on a GPU is in test_ops.py, with every other implementation.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import triton_interpreter
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from s24jax import device, triton_bridge
from s24jax.mesh import DATA, varying
from s24jax.ops.sparsify24 import triton as sparsify24

BFLOAT16 = oracles.FLOATS["bfloat16"]
BRIDGE_REASON = triton_bridge.reason_against()
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason=f"{BRIDGE_REASON}")
needs_bridge = pytest.mark.skipif(BRIDGE_REASON is not None, reason=f"{BRIDGE_REASON}")


# -------------------------------------------------------------------------------------- the bridge

MEND = "python -m pip install 'triton==3.6.0' 'jax-triton==0.3.1'"


@pytest.mark.parametrize(
    "versions, reason",
    [
        ({"jax-triton": "0.3.1"}, f"triton is not installed; {MEND}"),
        ({"triton": "3.6.0"}, f"jax-triton is not installed; {MEND}"),
        (
            {"triton": "3.7.1", "jax-triton": "0.3.1"},
            f"triton 3.7.1 is installed, not 3.6.0; {MEND}",
        ),
        (
            {"triton": "3.6.0", "jax-triton": "0.4.1"},
            f"jax-triton 0.4.1 is installed, not 0.3.1; {MEND}",
        ),
        (
            {"triton": "3.6.0", "jax-triton": "0.3.1"},
            "jax-triton finds no CUDA plugin of jax; "
            f"python -m pip install 'jax[cuda13]=={jax.__version__}'",
        ),
    ],
)
def test_what_is_missing(monkeypatch, versions, reason):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def no_plugin():
        raise ImportError

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(triton_bridge, "_jax_triton", no_plugin)
    assert triton_bridge.reason_against() == reason


@pytest.mark.parametrize("found", ["3.6.0", "3.6.2", "3.6.0+local"])
def test_any_patch_release_will_do(monkeypatch, found):
    versions = {"triton": found, "jax-triton": "0.3.1"}
    monkeypatch.setattr(importlib.metadata, "version", versions.get)
    monkeypatch.setattr(triton_bridge, "_jax_triton", lambda: None)
    assert triton_bridge.reason_against() is None


@needs_bridge
@pytest.mark.parametrize("directory", [None, "somewhere"])
def test_jax_triton_leaves_the_cache_directory_alone(directory):
    """Its import sets it to nothing, and then `triton.compile` fails."""
    program = (
        "import os; from s24jax import triton_bridge; before = os.environ.get('TRITON_CACHE_DIR');"
        "assert triton_bridge.reason_against() is None;"
        "import jax_triton; assert os.environ.get('TRITON_CACHE_DIR') == before, before"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
    environment |= {"TRITON_CACHE_DIR": directory} if directory else {}
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, cwd=triton_interpreter.ROOT
    )


# ------------------------------------------------------------------------------------- every kernel

# Functions that launch a kernel, with the shapes and dtype of their arguments: whole tiles, tails.
LAUNCHES = [
    (sparsify24.sparsify24, shape, jnp.bfloat16) for shape in [(16384, 8192), (130, 264), (12, 20)]
]
launches = pytest.mark.parametrize(
    "function, shape, dtype",
    LAUNCHES,
    ids=[f"{function.__name__}-{shape[0]}x{shape[1]}" for function, shape, _ in LAUNCHES],
)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The kernel that a function launches, compiled with that launch's constants."""

    def compile_launch(function, shape, dtype):
        kernels = []

        def call(kernel, *arrays, out_shape, grid, **constants):
            dtypes = [array.dtype for array in (*arrays, *out_shape)]
            kernels.append(triton_bridge.compile_ahead(kernel, dtypes, **constants))
            return [jnp.zeros(out.shape, out.dtype) for out in out_shape]

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(triton_bridge, "call", call)
        # A new function, since jax remembers what it has traced.
        jax.eval_shape(lambda *args: function(*args), jax.ShapeDtypeStruct(shape, dtype))
        (kernel,) = kernels
        return kernel

    return compile_launch


@needs_triton
@launches
def test_compiles_for_hopper_without_spills(compiled, tmp_path, function, shape, dtype):
    import triton

    assembly = compiled(function, shape, dtype).asm
    assert ".target sm_90a" in assembly["ptx"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(assembly["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


@needs_bridge
@launches
def test_lowers_to_a_call_of_the_kernel(function, shape, dtype):
    for batch in [(), (3,)]:
        f = jax.vmap(function) if batch else lambda *args: function(*args)
        argument = jax.ShapeDtypeStruct(batch + shape, dtype)
        lowered = jax.jit(f).trace(argument).lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("custom_call @triton_kernel_call") == 1
        assert ("stablehlo.while" in lowered) == bool(batch)


@needs_bridge
@launches
def test_inside_shard_map_results_are_a_devices_own(function, shape, dtype):
    found = []

    def local(array):
        results = function(array)
        found.extend(map(varying, jax.tree.leaves(results)))
        return results

    mesh = AbstractMesh((2,), (DATA,), axis_types=(AxisType.Auto,))
    parts = P(DATA)
    whole = jax.ShapeDtypeStruct((2 * shape[0], *shape[1:]), dtype)
    jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=parts, out_specs=parts), whole)
    assert found and set(found) == {(DATA,)}


# --------------------------------------------------------------------------------------- sparsify24


def test_sparsify24_says_why_it_cannot(monkeypatch):
    y1 = jnp.zeros((4, 8), jnp.float32)
    monkeypatch.setattr(device, "hopper_reason", lambda: "no Hopper")
    monkeypatch.setattr(triton_bridge, "reason_against", lambda: "no Triton")
    assert sparsify24.reason_against(y1) == "no Hopper"
    monkeypatch.setattr(device, "hopper_reason", lambda: None)
    assert sparsify24.reason_against(y1) == "no Triton"
    monkeypatch.setattr(triton_bridge, "reason_against", lambda: None)
    assert sparsify24.reason_against(y1) == "y1 is float32; cast it to bfloat16"
    assert sparsify24.reason_against(y1.astype(jnp.bfloat16)) is None


@needs_triton
def test_sparsify24_moves_16_bytes_at_a_time(compiled):
    ptx = compiled(sparsify24.sparsify24, (16384, 8192), jnp.bfloat16).asm["ptx"]
    assert set(re.findall(r"ld\.global\S*", ptx)) == {"ld.global.v2.b64"}
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_sparsify24_of_nothing(shape):
    """No kernel: a grid of no programs cannot be launched."""
    y2, counts = sparsify24.sparsify24(jnp.zeros(shape, jnp.bfloat16))
    assert y2.values.shape == (shape[0], shape[1] // 2)
    assert y2.decompress().shape == shape
    np.testing.assert_array_equal(counts, [0] * shape[1])


def sparsify24_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def of_bits(bits):
        return np.asarray(bits, np.uint16).view(BFLOAT16)

    zeros, one, nan, infinity = 0x0000, 0x3F80, 0x7FC0, 0x7F80
    negative = 0x8000
    special = [zeros, negative, one, one | negative, infinity, infinity | negative]
    special += [nan, nan | negative, 0x7F81, 0xFFFF]  # a signalling NaN, one with all bits
    special += [0x0001, 0x007F, 0x0080, 0x1FFF, 0x2000, 0x2001]  # subnormal; square normal or not
    tied = rng.choice(of_bits([zeros, negative, one, 0x4000]), (70, 64))
    sparse = rng.normal(size=(64, 256)) * (rng.random((64, 256)) < 0.1)
    return {
        "normal": rng.normal(size=(64, 128)).astype(BFLOAT16),
        "12x20": rng.normal(size=(12, 20)).astype(BFLOAT16),
        "130x132": rng.normal(size=(130, 132)).astype(BFLOAT16),
        "130x264": rng.normal(size=(130, 264)).astype(BFLOAT16),
        "one row": rng.normal(size=(1, 8)).astype(BFLOAT16),
        "mostly zeros": sparse.astype(BFLOAT16),
        "all zero": np.zeros((64, 64), BFLOAT16),
        "all negative": -np.ones((64, 64), BFLOAT16),
        "full and equal": np.ones((64, 64), BFLOAT16),
        "tied": tied,
        # every group of four that these sixteen can make
        "special": of_bits(np.stack(np.meshgrid(*[special] * 4), -1).reshape(256, -1)),
        "any bits": of_bits(rng.integers(0, 2**16, (192, 260))),
    }


@needs_triton
def test_sparsify24_interpreted():
    """Bit for bit what the oracle says; NaN stays NaN, of any payload."""
    cases = sparsify24_cases()
    results = triton_interpreter.interpret(
        "s24jax.ops.sparsify24.triton:sparsify24", list(cases.values())
    )
    for (name, y1), (values, metadata, counts) in zip(cases.items(), results, strict=True):
        with np.errstate(invalid="ignore"):
            y2 = oracles.relu2(y1)
        # `numerics.round_to`: what is below the smallest normal number is zero
        y2 = np.where(y2.astype(np.float32) < 2.0**-126, np.zeros_like(y2), y2)
        expected = oracles.compress(y2, 1, choose_by=oracles.relu(y1))
        np.testing.assert_array_equal(metadata, expected.metadata, err_msg=name)
        oracles.assert_bits(*(canonical(a) for a in (values, expected.values)), name)
        np.testing.assert_array_equal(counts, np.sum(y2 != 0, axis=0), err_msg=name)
        assert counts.dtype == np.int32


def canonical(values: np.ndarray) -> np.ndarray:
    """Every NaN the same NaN."""
    return np.where(np.isnan(values.astype(np.float32)), np.array(np.nan, BFLOAT16), values)
