"""Runs functions that launch Triton kernels on a CPU, in Triton's interpreter.

`interpret` starts this file as a process of its own, since Triton decides on its first import
whether it compiles or interprets. PTX instructions (`s24jax.triton_ptx`), which the interpreter
does not know, are given here from the PTX ISA's text.
"""

import importlib
import os
import pathlib
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAN = 0x7FFF  # the canonical NaN of PTX's bfloat16 instructions


def interpret(function: str, cases: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The leaves of `function(case)` for each case; "package.module:name" names the function."""
    finished = subprocess.run(
        [sys.executable, __file__, function],
        input=pickle.dumps(cases),
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr.decode()
    return pickle.loads(finished.stdout)


def _halves(words: np.ndarray) -> np.ndarray:
    """[...] uint32 -> [..., 2] uint16, the low one first."""
    return np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16)


def _words(halves: np.ndarray) -> np.ndarray:
    return halves[..., 0] | halves[..., 1].astype(np.uint32) << 16


def _bytes(words: np.ndarray) -> np.ndarray:
    return np.stack([words >> 8 * i & 0xFF for i in range(4)], -1).astype(np.uint8)


def _max_nan_bf16x2(x, y):
    x, y = _halves(x), _halves(y)
    x_float, y_float = (a.view(BFLOAT16).astype(np.float32) for a in (x, y))
    larger = np.where(x_float > y_float, x, np.where(x_float < y_float, y, x & y))
    return _words(np.where(np.isnan(x_float) | np.isnan(y_float), np.uint16(NAN), larger))


def _prmt(x, y, selector):
    table = np.concatenate([_bytes(x), _bytes(y)], -1)
    result = np.zeros_like(x)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = np.take_along_axis(table, (nibble & 7).astype(np.intp)[..., None], -1)[..., 0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        result |= byte.astype(np.uint32) << 8 * i
    return result


def _dp4a(x, y, z):
    products = _bytes(x).view(np.int8).astype(np.int64) * _bytes(y).view(np.int8)
    return (z + products.sum(-1)).astype(np.uint32)


def _mul_ftz(x, y):
    def flush(a):
        return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)

    with np.errstate(all="ignore"):
        return flush(flush(x) * flush(y))


def _cvt_bf16x2(high, low):
    with np.errstate(over="ignore"):
        pair = np.stack([low, high], -1).astype(BFLOAT16)
    return _words(np.where(np.isnan(pair.astype(np.float32)), np.uint16(NAN), pair.view(np.uint16)))


INSTRUCTIONS = {
    "max.NaN.bf16x2": _max_nan_bf16x2,
    "prmt.b32": _prmt,
    "dp4a.s32.s32": _dp4a,
    "mul.rn.ftz.f32": _mul_ftz,
    "cvt.rn.bf16x2.f32": _cvt_bf16x2,
}


class _Array:
    """What the interpreter asks of a tensor, for a numpy array that is changed in place."""

    def __init__(self, data: np.ndarray):
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def data_ptr(self):
        return self.data.ctypes.data

    def untyped_storage(self):
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__):
        return _Array(self.data)

    def set_(self, *_):
        pass

    copy_ = set_

    def storage_offset(self):
        return 0

    size = stride = storage_offset


def _inline_asm(builder, asm, constraints, values, types, pure, pack):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    class Result:
        def get_result(self, index):
            assert index == 0
            return TensorHandle(data, tl.float32 if data.dtype == np.float32 else tl.uint32)

    operands = [np.asarray(value.data) for value in values]
    operands = [a if a.dtype == np.float32 else a.astype(np.uint32) for a in operands]
    data = INSTRUCTIONS[asm.split()[0]](*np.broadcast_arrays(*operands))
    return Result()


def _call(kernel, *arrays, out_shape, grid, num_warps, **constants):
    """`triton_bridge.call`. Outputs start as garbage, as they do on a GPU."""
    inputs = [_Array(np.array(array)) for array in arrays]
    outputs = [_Array(np.empty(out.shape, out.dtype)) for out in out_shape]
    for output in outputs:
        output.data.view(np.uint8)[...] = 0xA5
    kernel[grid](*inputs, *outputs, **constants)
    return [output.data for output in outputs]


def main():
    import jax
    import jax.numpy as jnp
    from triton.runtime.interpreter import InterpreterBuilder

    from s24jax import triton_bridge

    InterpreterBuilder.create_inline_asm = _inline_asm
    triton_bridge.call = _call
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    cases = pickle.load(sys.stdin.buffer)
    results = [[np.asarray(a) for a in jax.tree.leaves(function(jnp.asarray(y)))] for y in cases]
    pickle.dump(results, sys.stdout.buffer)


if __name__ == "__main__":
    main()
