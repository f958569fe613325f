"""The CUDA library: built once, loaded only if it fits, called with what the handler decodes.

Most of it runs on a handler made for it, which computes on the host, so that XLA really calls it.
"""

import ctypes
import logging
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import oracles
import pytest

from s24jax import cuda_library, device, nvcc
from s24jax.errors import BrokenEnvironment
from s24jax.ops import dispatch

ROOT = pathlib.Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(
    nvcc.reason_against() is not None, reason=str(nvcc.reason_against())
)

TOY = """
#include "toy.cuh"
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

__global__ void toy_kernel(float* x) { *x = SCALE; }

static ffi::Error toy(Floats x, ffi::ResultBuffer<ffi::F32> y, int32_t times, float factor,
                      bool negate) {
  for (size_t i = 0; i < x.element_count(); ++i)
    y->typed_data()[i] = x.typed_data()[i] * times * factor * (negate ? -SCALE : SCALE);
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_toy, toy, ffi::Ffi::Bind()
    .Arg<Floats>().Ret<Floats>()
    .Attr<int32_t>("times").Attr<float>("factor").Attr<bool>("negate"));
"""

# Writes down its arguments, prints what it is told to, and makes an empty file of what it is asked
# for; slowly, so that two that start together overlap.
FAKE_NVCC = """#!/bin/sh
here=$(dirname "$0")
[ "$1" = --version ] && exec cat "$here/version"
echo "$*" >> "$here/calls"
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
sleep 0.2
cat "$here/output"
: > "$out"
exit $(cat "$here/status")
"""


@pytest.fixture(autouse=True)
def nothing_prebuilt(monkeypatch):
    monkeypatch.delenv(cuda_library.PREBUILT, raising=False)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The library of a toy, built with the real nvcc, instead of that of `ffi/`."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "toy.cu").write_text(TOY)
    (folder / "toy.cuh").write_text("#pragma once\nconstexpr float SCALE = 1.0f;\n")
    monkeypatch.setattr(cuda_library, "SOURCES", folder)
    monkeypatch.setattr(cuda_library, "TARGETS", ("s24jax_toy",))
    monkeypatch.setattr(cuda_library, "_loaded", [])
    library = cuda_library.build()  # once: its name depends on the sources, not on their place
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(library))["s24jax_toy"])
    jax.ffi.register_ffi_target("s24jax_toy", handler, platform="cpu")
    return library


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of an nvcc that only pretends, with a cache and sources of its own."""
    folder = tmp_path / "cuda" / "bin"
    sources = tmp_path / "ffi"
    folder.mkdir(parents=True)
    sources.mkdir()
    (folder / "nvcc").write_text(FAKE_NVCC)
    (folder / "nvcc").chmod(0o755)
    tell(folder)
    for name in ("a.cu", "b.cu", "c.cuh", "README.md"):
        (sources / name).write_text(name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("NVCC_CCBIN", "g++")
    monkeypatch.setenv(cuda_library.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_library, "SOURCES", sources)
    monkeypatch.setattr(cuda_library, "_loaded", [])
    return folder


def tell(folder, output="", status=0, version="V13.0.88"):
    """What the pretended nvcc prints from now on, and how it ends."""
    (folder / "output").write_text(output)
    (folder / "status").write_text(str(status))
    (folder / "version").write_text(f"Cuda compilation tools, release 13.0, {version}\n")


def calls(folder) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def scale(x, **attributes):
    attributes = {"times": 2, "factor": 0.5, "negate": True} | attributes
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return cuda_library.call("s24jax_toy", result, x, **attributes)


def lowered(function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# ------------------------------------------------------------------------------------------- calls


@needs_nvcc
@pytest.mark.cpu_only
def test_the_handler_decodes_pythons_numbers(toy):
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(jax.jit(scale)(x), -x)
    np.testing.assert_array_equal(scale(x, times=6, factor=1.5, negate=False), 9 * x)
    np.testing.assert_array_equal(scale(x, times=np.int32(-2), factor=np.float32(1)), 2 * x)


@needs_nvcc
@pytest.mark.cpu_only
def test_vmap_calls_it_for_each(toy):
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.vmap(scale)(x), -x)


@needs_nvcc
def test_an_int_beyond_32_bits_is_refused(toy):
    """Rather than cut in silence."""
    with pytest.raises(OverflowError):
        scale(jnp.ones(2), times=2**31)


@needs_nvcc
def test_it_lowers_for_cuda_without_a_gpu(toy):
    text = lowered(scale, jnp.ones(4))
    assert "stablehlo.custom_call @s24jax_toy" in text
    for attribute in ("times = 2 : i32", "factor = 5.000000e-01 : f32", "negate = true"):
        assert attribute in text


@needs_nvcc
def test_without_a_gpu_a_test_can_pretend(toy, monkeypatch):
    """So that what runs on a GPU alone is lowered, and looked at, anywhere."""
    candidates = [
        dispatch.Candidate("cuda", scale, lambda x: device.hopper_reason()),
        dispatch.Candidate("reference", lambda x: -x),
    ]

    def op(x):
        return dispatch.resolve("fake.toy", "auto", candidates, x).run(x)

    monkeypatch.setattr(device, "hopper_reason", lambda: "no")
    assert "s24jax_toy" not in lowered(lambda x: op(x), jnp.ones(4))
    monkeypatch.setattr(device, "hopper_reason", lambda: None)
    assert "s24jax_toy" in lowered(lambda x: op(x), jnp.ones(4))


@needs_nvcc
def test_handlers_are_registered_once(toy, monkeypatch):
    """Also when the threads of a data pipeline or a server trace together."""
    registered = []
    monkeypatch.setattr(cuda_library, "_loaded", [])
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda *args, **kwargs: registered.append((args[0], kwargs))
    )
    threads = [threading.Thread(target=cuda_library._register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registered == [("s24jax_toy", {"platform": "CUDA"})]


# ----------------------------------------------------------------------------------------- loading


@needs_nvcc
def test_a_prebuilt_library_is_loaded_and_nothing_built(toy, monkeypatch):
    monkeypatch.setenv(cuda_library.PREBUILT, os.path.relpath(toy))
    monkeypatch.setattr(cuda_library, "_loaded", [])
    monkeypatch.setattr(cuda_library, "build", lambda: pytest.fail("it was built"))
    assert cuda_library.reason_against() is None
    assert cuda_library.state() == f"{os.path.relpath(toy)}, named by S24JAX_CUDA_LIBRARY"
    assert "s24jax_toy" in lowered(lambda x: scale(x), jnp.ones(4))


@needs_nvcc
def test_one_for_another_jaxlib_is_refused(toy, monkeypatch):
    """Before XLA sees it, whose backend would not come up."""
    version = jaxlib.__version__
    monkeypatch.setattr(jaxlib, "__version__", "0.0.1")
    with pytest.raises(BrokenEnvironment) as error:
        cuda_library._load(toy)
    assert oracles.assert_one_line(error) == (
        f"the CUDA library {toy} was built for jaxlib {version}, this is 0.0.1; build it again "
        "with python -m s24jax.build --force, or unset S24JAX_CUDA_LIBRARY"
    )


@needs_nvcc
def test_one_that_lacks_a_handler_is_refused(toy, monkeypatch):
    monkeypatch.setattr(cuda_library, "TARGETS", ("s24jax_toy", "s24jax_absent"))
    with pytest.raises(BrokenEnvironment, match="is broken .*undefined symbol: s24jax_absent"):
        cuda_library._load(toy)


def test_what_is_no_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_library, "_loaded", [])
    path = tmp_path / "some.so"
    monkeypatch.setenv(cuda_library.PREBUILT, str(path))
    with pytest.raises(BrokenEnvironment) as error:
        cuda_library.call("s24jax_toy", jax.ShapeDtypeStruct((), jnp.float32))
    assert oracles.assert_one_line(error).startswith(f"the CUDA library {path} does not exist; ")
    path.write_text("nothing")
    with pytest.raises(BrokenEnvironment, match="some.so is broken .*; build it again") as error:
        cuda_library.call("s24jax_toy", jax.ShapeDtypeStruct((), jnp.float32))
    assert oracles.assert_one_line(error).count(str(path)) == 1
    assert cuda_library._loaded == []


# ---------------------------------------------------------------------------------------- building


def test_one_object_of_each_source_then_one_library(fake):
    library = cuda_library.build()
    assert library.name.endswith("-nvcc13.0.88.so")
    *compiled, linked = calls(fake)
    assert sorted(command.split(" -c ")[1].split()[0] for command in compiled) == [
        "a.cu",
        "b.cu",
        "built_for.cpp",
    ]
    for command in compiled:
        assert "-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC" in command
        assert "-gencode=arch=compute_90a,code=sm_90a -Xptxas -v -isystem" in command
    assert linked.startswith("-shared ")
    assert linked.count(".o ") == 3
    log = cuda_library.log_of(library).read_text()
    assert log.count("$ ") == 4
    assert {path.name for path in library.parent.iterdir()} == {
        library.name,
        cuda_library.log_of(library).name,
        "build.lock",
    }


def test_it_is_built_once_and_says_so(fake, caplog):
    with caplog.at_level(logging.WARNING, logger="s24jax"):
        first = cuda_library.build()
        assert cuda_library.build() == first
    assert caplog.messages == ["building the CUDA library (takes about half a minute, once)"]
    assert len(calls(fake)) == 4
    assert cuda_library.build(force=True) == first
    assert len(calls(fake)) == 8


@pytest.mark.parametrize("change", ["source", "header", "new", "name", "flags", "nvcc", "jaxlib"])
def test_all_that_it_depends_on_makes_another(fake, change, monkeypatch):
    first = cuda_library.build()
    if change == "source":
        (cuda_library.SOURCES / "a.cu").write_text("other")
    elif change == "header":
        (cuda_library.SOURCES / "c.cuh").write_text("other")
    elif change == "new":
        (cuda_library.SOURCES / "d.cuh").touch()
    elif change == "name":
        (cuda_library.SOURCES / "c.cuh").rename(cuda_library.SOURCES / "d.cuh")
    elif change == "flags":
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    elif change == "nvcc":
        tell(fake, version="V13.1.2")
    else:
        monkeypatch.setattr(jaxlib, "__version__", "0.0.1")
    second = cuda_library.build()
    assert second != first
    assert first.exists() and second.exists()


def test_sources_that_change_while_they_are_compiled(fake, monkeypatch):
    """Else the new sources' library would be found under the old ones' name, or the reverse."""
    compile_library = nvcc.compile_library

    def edit_too(*args):
        compile_library(*args)
        (cuda_library.SOURCES / "a.cu").write_text("other")

    monkeypatch.setattr(nvcc, "compile_library", edit_too)
    with pytest.raises(BrokenEnvironment, match="changed while it was compiled; try again"):
        cuda_library.build()
    assert not list(pathlib.Path(os.environ[cuda_library.CACHE]).glob("*.so"))


def test_the_readme_is_no_source(fake):
    first = cuda_library.build()
    (cuda_library.SOURCES / "README.md").write_text("other")
    assert cuda_library.build() == first


def test_two_processes_build_it_once(fake):
    program = (
        "import pathlib, sys; from s24jax import cuda_library;"
        "cuda_library.SOURCES = pathlib.Path(sys.argv[1]); print(cuda_library.build())"
    )
    command = [sys.executable, "-c", program, str(cuda_library.SOURCES)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    first, second = (process.communicate(timeout=60)[0] for process in both)
    assert first == second != b""
    assert len(calls(fake)) == 4


def test_a_failure_names_the_error_and_the_log_and_leaves_no_library(fake):
    tell(fake, 'a.cu(3): warning: odd\na.cu(5): error: identifier "x" is undefined\nmore\n', 1)
    with pytest.raises(BrokenEnvironment) as error:
        cuda_library.build()
    (log,) = pathlib.Path(os.environ[cuda_library.CACHE]).glob("*.log")
    assert oracles.assert_one_line(error) == (
        f'a.cu cannot be built (a.cu(5): error: identifier "x" is undefined); see {log}'
    )
    assert "a.cu(3): warning: odd" in log.read_text()
    assert {path.suffix for path in log.parent.iterdir()} == {".log", ".lock"}
    tell(fake)
    assert cuda_library.build().exists()


def test_a_failure_to_rebuild_keeps_the_old_one(fake):
    library = cuda_library.build()
    tell(fake, "error", 1)
    with pytest.raises(BrokenEnvironment):
        cuda_library.build(force=True)
    assert cuda_library.build() == library


def test_a_cache_that_cannot_be_written(fake, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(cuda_library.CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(BrokenEnvironment, match="name a folder with S24JAX_CACHE_DIR") as error:
        cuda_library.build()
    oracles.assert_one_line(error)


def test_the_cache_is_where_it_is_named_to_be(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(cuda_library.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cuda_library.build().parent == tmp_path / ".cache" / "s24jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cuda_library.build().parent == tmp_path / "xdg" / "s24jax"


def test_without_nvcc_what_is_built_serves_and_else_it_says_what_is_missing(fake, monkeypatch):
    assert cuda_library.reason_against() is None
    assert cuda_library.state().startswith("not built yet; ")
    built = cuda_library.build()
    monkeypatch.setattr(nvcc, "find", lambda: None)
    assert cuda_library.reason_against() is None
    assert cuda_library.build() == built
    assert cuda_library.state() == str(built)
    built.unlink()
    reason = cuda_library.reason_against()
    assert reason.startswith("nvcc is not installed; pip install 's24jax[cuda]'")
    assert cuda_library.state() == f"none: {reason}"
    with pytest.raises(BrokenEnvironment) as error:
        cuda_library.build()
    assert str(error.value) == f"the CUDA library cannot be built: {reason}"
    assert len(calls(fake)) == 4


def test_without_sources(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_library, "SOURCES", tmp_path / "none")
    reason = f"there are no CUDA sources in {tmp_path / 'none'}; install s24jax again"
    assert cuda_library.reason_against() == reason
    with pytest.raises(BrokenEnvironment, match="install s24jax again"):
        cuda_library.build()


@needs_nvcc
def test_a_real_kernel_that_ptxas_calls_slow_fails(tmp_path, monkeypatch):
    """The words of the real ptxas: a register budget that it could not keep."""
    (tmp_path / "slow.cu").write_text(
        "__global__ void k(float* x, int n) {\n"
        '  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");\n'
        "  x[threadIdx.x] = n;\n}\n"
    )
    monkeypatch.setattr(cuda_library, "SOURCES", tmp_path)
    with pytest.raises(BrokenEnvironment) as error:
        cuda_library.build()
    assert oracles.assert_one_line(error).startswith("slow.cu would be slow (ptxas info : (C7508)")


# ------------------------------------------------------------------------------- the real library


def run_build(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "s24jax.build", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# Of the handlers whose kernel is a product and is known by its epilogue.
KERNELS = {
    "s24jax_matmul_feature_wise24": "dense_matmul_kernel<s24jax::FeatureWise>",
    "s24jax_matmul_sparsify24": "dense_matmul_kernel<s24jax::Sparsify>",
    "s24jax_relu2_ffn_dy1": "Elementwise<true, s24jax::Relu2Gradient>",
    "s24jax_relu2_ffn_y2": "Elementwise<false, s24jax::Relu2>",
}


@needs_nvcc
def test_the_kernels_of_this_package_compile_load_and_register(monkeypatch):
    """Once for the whole suite, and for the next one if nothing changed: see conftest."""
    built = run_build()
    assert built.returncode == 0, built.stderr
    path, head, *kernels = built.stdout.splitlines()
    assert head.split() == ["registers", "stack", "spilled", "kernel"]
    for target in cuda_library.TARGETS:
        assert any(KERNELS.get(target, f"{target[7:]}_kernel") in kernel for kernel in kernels)
    monkeypatch.setattr(cuda_library, "_loaded", [])
    assert str(cuda_library.build()) == path
    cuda_library._register()
    assert cuda_library.state() == path
    # XLA looks at handlers once their backend is there. So register them for the CPU's, to see that
    # their version is accepted; under other names, for none of them may run there.
    jax.devices("cpu")
    for target in cuda_library.TARGETS:
        handler = jax.ffi.pycapsule(cuda_library._loaded[0][target])
        jax.ffi.register_ffi_target(f"{target}_looked_at", handler, platform="cpu")


def test_nothing_else_lies_among_the_sources():
    """What is neither hashed nor installed must not be included by a source."""
    files = [path for path in cuda_library.SOURCES.iterdir() if not path.name.startswith(".")]
    assert {path.suffix for path in files} <= {".cu", ".cuh", ".md"}


def test_the_command_line_ends_with_one_line_of_error(fake, monkeypatch):
    tell(fake, "a.cu(5): error: bad\n", 1)
    failed = run_build("--force")
    assert (failed.returncode, failed.stdout) == (1, "")
    *_, last = failed.stderr.splitlines()
    assert "Traceback" not in failed.stderr
    assert last.startswith("error: ")
    assert "cannot be built (a.cu(5): error: bad); see " in last
