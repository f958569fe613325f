"""Builds the CUDA library ahead of its first use; prints where it is and what its kernels take.

python -m s24jax.build [--force]
"""

import argparse
import sys

from s24jax import cuda_library, nvcc
from s24jax.errors import EXPECTED


def table(log: str) -> str:
    """Registers, stack and spilled bytes of a thread, for every kernel in the compiler's output.

    Bytes spilled in a main loop cost more than any other flaw: they wait for memory.
    """
    kernels = nvcc.kernels(log)
    names = nvcc.demangled([kernel.name for kernel in kernels])
    lines = ["registers  stack  spilled  kernel"]
    for kernel, name in zip(kernels, names, strict=True):
        numbers = f"{kernel.registers:9}  {kernel.stack_bytes:5}  {kernel.spilled_bytes:7}"
        lines.append(f"{numbers}  {name}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s24jax.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="compile it even if it is there")
    arguments = parser.parse_args()
    try:
        library = cuda_library.build(arguments.force)
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    log = cuda_library.log_of(library)
    print(library)
    print(table(log.read_text()) if log.exists() else f"{log} is missing; --force makes it again")


if __name__ == "__main__":
    main()
