"""The bench that reads the clock: what it runs in which order, and what it makes of nvidia-smi."""

import stat

import pytest

from s24jax.bench import clock
from s24jax.bench.rows import KEYS
from s24jax.bench.table import table
from s24jax.errors import BrokenEnvironment, Unsupported

ENVIRONMENT = {"bench": "environment", "device": "gpu: H", "jax": "1", "torch": "2", "commit": "c"}


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(clock.device, "hopper_reason", lambda: None)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Tells four readings, then waits to be ended; its argument lists are in the file."""
    called = tmp_path / "called"
    program = tmp_path / "nvidia-smi"
    lines = r"1500, 690.5\n1480, 700.5\n[N/A], [N/A]\n1490, 695.5\n"
    program.write_text(f"#!/bin/sh\necho $@ >> {called}\nprintf '{lines}'\nexec sleep 60\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return called


def small(**changes):
    settings = {"size": 64, "seconds": 0.8, "rest": 0.0, "implementation": "reference"}
    return clock.bench(**settings | changes)


def test_one_way(hopper, nvidia_smi, monkeypatch):
    """No 2:4 product before the third row, and one then."""
    ran = []
    for name in ("matmul24", "matmul_sparsify24"):
        op = getattr(clock, name)
        monkeypatch.setattr(
            clock, name, lambda *a, op=op, name=name, **k: (ran.append(name), op(*a, **k))[1]
        )
    products = []
    for (row,), expected in zip(small(), (1, 2, 3, 3), strict=True):
        products.append(row["product"])
        assert len(ran) == expected, products
    assert ran == ["matmul_sparsify24", "matmul_sparsify24", "matmul24"]
    assert products == ["before", "after matmul_sparsify24", "after matmul24", "later"]


def test_rows(hopper, nvidia_smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    rows = [row for found in small() for row in found]
    for row in rows:
        assert tuple(row) == (*KEYS, "mhz", "watts", "idle_mhz", "idle_watts")
        assert (row["bench"], row["implementation"], row["M"]) == ("clock", "xla", 64)
        assert row["ms"] > 0
        assert row["tflops"] == pytest.approx(2 * 64**3 / row["ms"] / 1e9)
        assert (row["mhz"], row["watts"]) == (row["idle_mhz"], row["idle_watts"]) == (1490, 695.5)
    called = nvidia_smi.read_text().splitlines()
    assert len(called) == 2 * len(rows)
    wanted = "--id=3 --query-gpu=clocks.sm,power.draw.instant "
    assert all(line.startswith(wanted) for line in called)
    shown = table([ENVIRONMENT, *rows])
    assert "clock: TFLOP/s of one dense product (ms)" in shown
    header = [cell.strip() for cell in shown.splitlines()[4].split("|")]
    assert header[1:-1] == ["T, D, F", "product", "xla", "MHz", "W", "MHz idle", "W idle"]
    last = [cell.strip() for cell in shown.splitlines()[-1].split("|")]
    assert last[1:3] + last[4:-1] == ["64, 64, 64", "later", "1,490", "696", "1,490", "696"]


def test_a_gpu_that_tells_nothing(hopper, nvidia_smi):
    program = nvidia_smi.with_name("nvidia-smi")
    program.write_text("#!/bin/sh\necho No devices were found\n")
    (row,) = next(small())
    assert (row["mhz"], row["watts"], row["idle_watts"]) == (None, None, None)
    assert "| before" in table([ENVIRONMENT, row])


def test_errors(hopper, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BrokenEnvironment) as error:
        next(small())
    assert str(error.value).startswith("clock: nvidia-smi does not start ([Errno 2] No such file")
    assert str(error.value).endswith("it comes with the GPU's driver, put it on PATH")
    monkeypatch.setattr(clock.device, "hopper_reason", lambda: "no")
    with pytest.raises(Unsupported, match=r"^clock: no$"):
        next(small())
