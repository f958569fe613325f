"""nvcc: where it is, one shared library out of source files, and what it reports of each kernel."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax

from s24jax.errors import BrokenEnvironment

FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC"]
FLAGS += ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
# nvcc reads these itself, so they are flags too.
FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
USUAL = pathlib.Path("/usr/local/cuda/bin/nvcc")

_ERROR = re.compile(r"\b(error|fatal)\b|undefined reference|: not found", re.IGNORECASE)
# ptxas only informs that it serialized wgmma or ignored setmaxnreg; the kernel is right and slow.
_SLOW = re.compile(r"C7508|C7510|C7514|wgmma.*serializ|Potential Performance Loss")
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*\n"
    r".*Function properties for (?P=name)\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers"
)


class Kernel(NamedTuple):
    """What one kernel takes, per thread, as ptxas reports it."""

    name: str
    registers: int
    stack_bytes: int
    spilled_bytes: int  # stored and loaded


def find() -> pathlib.Path | None:
    """nvcc of $CUDA_HOME, of PATH, of the usual folder, or of NVIDIA's Python packages."""
    if os.environ.get("CUDA_HOME"):
        named = pathlib.Path(os.environ["CUDA_HOME"], "bin", "nvcc")
        if named.exists():
            return named
    on_path = shutil.which("nvcc")
    if on_path:
        return pathlib.Path(on_path)
    return USUAL if USUAL.exists() else next(_packaged(), None)


def reason_against() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if find() is None:
        return (
            "nvcc is not installed; pip install 's24jax[cuda]' brings it, or install the CUDA "
            "toolkit and put its bin folder on PATH"
        )
    if shutil.which("g++") is None and "NVCC_CCBIN" not in os.environ:
        return "nvcc needs g++, which is not on PATH; install a C++ compiler"
    return None


def version(nvcc: pathlib.Path) -> str:
    """Such as "13.0.88"; "unknown" where nvcc does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d[\d.]*)", said)
    return found[1] if found else "unknown"


def compile_library(
    nvcc: pathlib.Path, sources: Sequence[pathlib.Path], library: pathlib.Path, log: pathlib.Path
) -> None:
    """Compiles `sources` in parallel and links them into `library`, which appears whole or not.

    Args:
      nvcc: the compiler.
      sources: each becomes one object.
      library: replaced if it exists.
      log: receives every command and what it printed, also where one fails.

    Raises:
      BrokenEnvironment: a source does not compile, or to code that ptxas itself calls slow.
    """

    def compile_one(source: pathlib.Path, out: str) -> tuple[int, str]:
        command = [nvcc, *FLAGS, "-isystem", jax.ffi.include_dir(), "-c", source.name, "-o", out]
        return _run(command, source.parent)  # there, so that messages name the file alone

    with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        linked = pathlib.Path(folder) / library.name
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(compile_one, sources, objects))
        log.write_text("".join(text for _, text in said))
        for source, (status, text) in zip(sources, said, strict=True):
            _check(source.name, status, text, log)
        status, text = _run([nvcc, "-shared", *objects, "-o", linked], folder)
        with log.open("a") as file:
            file.write(text)
        _check(library.name, status, text, log)
        linked.replace(library)


def kernels(log: str) -> list[Kernel]:
    """The kernels whose compilation `log` tells of."""
    return [
        Kernel(name, int(registers), int(stack), int(stored) + int(loaded))
        for name, stack, stored, loaded, registers in _KERNEL.findall(log)
    ]


def demangled(names: Sequence[str]) -> list[str]:
    """`names` as the source has them, without parameters, where binutils is there to tell."""
    if not names or shutil.which("c++filt") is None:
        return list(names)
    command = ["c++filt", "--no-params", *names]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return said.replace("(anonymous namespace)::", "").splitlines()


def _packaged() -> Iterator[pathlib.Path]:
    """The nvcc of the nvidia-cuda-nvcc package, which jax[cuda13] installs."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from pathlib.Path(folder).glob("*/bin/nvcc")


def _run(command: Sequence, folder) -> tuple[int, str]:
    """Exit status, and the command with all that it printed."""
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, f"$ {shlex.join(map(str, command))}\n{done.stdout}"


def _check(name: str, status: int, text: str, log: pathlib.Path) -> None:
    """Raises where compiling or linking `name` failed, or made slow code."""
    lines = text.splitlines()[1:]
    if status:
        cause = next(filter(_ERROR.search, lines), lines[-1] if lines else f"status {status}")
        raise BrokenEnvironment(f"{name} cannot be built ({cause.strip()}); see {log}")
    slow = next(filter(_SLOW.search, lines), None)
    if slow:
        raise BrokenEnvironment(f"{name} would be slow ({' '.join(slow.split())}); see {log}")
