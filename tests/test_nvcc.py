"""Finding nvcc, and what is made of its output. Real compilations are in test_cuda_library.py."""

import pathlib

import oracles
import pytest

from s24jax import build, nvcc
from s24jax.errors import BrokenEnvironment

# As nvcc 13.0 prints it for two kernels, one of which spills and calls a function.
LOG = """$ nvcc -c a.cu -o a.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aILi3EEvPKfPfif' for 'sm_90a'
ptxas info    : Function properties for _Z1aILi3EEvPKfPfif
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compile time = 3.869 ms
ptxas info    : Compiling entry function '_ZN6s24jax12_GLOBAL__N_11bEv' for 'sm_90a'
ptxas info    : Function properties for _ZN6s24jax12_GLOBAL__N_11bEv
    104 bytes stack frame, 400 bytes spill stores, 432 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 104 bytes cumulative stack size
ptxas info    : Compile time = 2.5 ms
ptxas info    : Function properties for _Z6calledi
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An nvcc at every place where one is looked for, the first first."""
    found = {
        "CUDA_HOME": tmp_path / "home" / "bin" / "nvcc",
        "PATH": tmp_path / "path" / "nvcc",
        "usual": tmp_path / "usual" / "nvcc",
        "package": tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc",
    }
    for path in found.values():
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    (found["PATH"].parent / "g++").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(found["PATH"].parent))
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    monkeypatch.setattr(nvcc, "USUAL", found["usual"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    return found


def test_it_is_looked_for_where_it_may_be(places, monkeypatch):
    """What the user names goes before what happens to be there."""
    for path in places.values():
        assert nvcc.find() == path
        assert nvcc.reason_against() is None
        path.unlink()
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: None)
    assert nvcc.find() is None
    assert "pip install 's24jax[cuda]'" in nvcc.reason_against()


def test_a_packaged_one_needs_a_cpp_compiler(places, monkeypatch):
    (places["PATH"].parent / "g++").unlink()
    assert nvcc.reason_against() == ("nvcc needs g++, which is not on PATH; install a C++ compiler")
    monkeypatch.setenv("NVCC_CCBIN", "clang++")
    assert nvcc.reason_against() is None


def test_what_kernels_take():
    assert nvcc.kernels(LOG) == [
        nvcc.Kernel("_Z1aILi3EEvPKfPfif", 12, 0, 0),
        nvcc.Kernel("_ZN6s24jax12_GLOBAL__N_11bEv", 168, 104, 832),
    ]


def test_the_table():
    head, first, second = build.table(LOG).splitlines()
    assert head == "registers  stack  spilled  kernel"
    assert first.startswith("       12      0        0  ")
    assert second.startswith("      168    104      832  ")


def test_names_are_the_sources(monkeypatch):
    if nvcc.shutil.which("c++filt"):
        assert nvcc.demangled(["_Z1aILi3EEvPKfPfif", "_ZN6s24jax12_GLOBAL__N_11bEv"]) == [
            "a<3>",
            "s24jax::b",
        ]
    assert nvcc.demangled([]) == []
    monkeypatch.setenv("PATH", "")
    assert nvcc.demangled(["_Z1av"]) == ["_Z1av"]


@pytest.mark.parametrize(
    "output, cause",
    [
        ('a.cu(3): warning #177-D\na.cu(4): error: "x"', 'a.cu(4): error: "x"'),
        ("sh: 1: gcc: not found\nnvcc fatal : no host", "sh: 1: gcc: not found"),
        ("ptxas fatal   : Unresolved", "ptxas fatal   : Unresolved"),
        ("a.o: undefined reference to `f'\ncollect2: error", "a.o: undefined reference to `f'"),
        ("\nKilled", "Killed"),
        ("", "status 1"),
    ],
)
def test_the_first_error_is_told_in_one_line(output, cause):
    with pytest.raises(BrokenEnvironment) as error:
        nvcc._check("a.cu", 1, f"$ nvcc\n{output}", pathlib.Path("a.log"))
    assert oracles.assert_one_line(error) == f"a.cu cannot be built ({cause}); see a.log"


@pytest.mark.parametrize(
    "line",
    [
        "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine",
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to",
        "(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to",
        "(C9999) wgmma.mma_async instructions were serialized",
    ],
)
def test_slow_code_fails(line):
    with pytest.raises(BrokenEnvironment) as error:
        nvcc._check("a.cu", 0, f"{LOG}ptxas info    : {line}\n", pathlib.Path("a.log"))
    assert oracles.assert_one_line(error) == f"a.cu would be slow (ptxas info : {line}); see a.log"


def test_registers_and_spills_do_not_fail():
    nvcc._check("a.cu", 0, LOG, pathlib.Path("a.log"))
    # The command's own line is not output: a folder may be called so.
    nvcc._check("a.cu", 0, "$ nvcc -o /wgmma/serialized.o\n", pathlib.Path("a.log"))
