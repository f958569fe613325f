"""The bar of a terminal and the plain lines of a log."""

import io
import sys

import pytest

from s24jax import progress as progress_module
from s24jax.errors import BrokenEnvironment
from s24jax.progress import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


def test_a_plain_log_gets_a_line_for_each_tenth(capsys, clock):
    progress = Progress(1000)
    for step in range(1, 1001):
        clock.now += 0.001
        progress.update(step, loss=2.0, tokens_per_second=1234567.0, zero_share=0.9312)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == ("step 1/1000, loss 2.0000, 1,234,567 tokens/s, zeros 93.1 %, 00:00 left")
    assert [line.split("/")[0] for line in lines[1:3]] == ["step 101", "step 201"]
    assert lines[-1].startswith("step 1000/1000, ")


def test_a_slow_plain_log_gets_a_line_each_ten_seconds(capsys, clock):
    progress = Progress(100_000, start_step=50_000)
    for step in range(50_001, 50_101):
        clock.now += 1.0
        progress.update(step, loss=float("nan"), tokens_per_second=10.0)
    progress.say("step 50100: switched to 2:4")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines[:3]] == ["step 50001", "step 50011", "step 50021"]
    assert lines[1] == "step 50011/100000, loss nan, 10 tokens/s, 13:53:09 left"
    assert lines[-1] == "step 50100: switched to 2:4" and len(lines) == 11


def test_a_terminal_gets_a_bar_that_lines_do_not_tear(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(10, start_step=4)
    progress.update(5, loss=1.5, tokens_per_second=2000.0, zero_share=0.5)
    progress.say("step 5: switched to 2:4")
    progress.update(10, loss=1.25, tokens_per_second=2000.0, zero_share=0.5)
    progress.close()
    progress.close()
    lines = [line.split("\r")[-1] for line in terminal.getvalue().split("\n")]
    assert "step 5: switched to 2:4" in lines
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("step 10/10 ")
    assert last.rstrip().endswith("loss 1.2500, 2,000 tokens/s, zeros 50.0 %")


def test_progress_on_a_full_disk(monkeypatch):
    # What a full disk refused stays in the stream's buffer, and closing it tries once more.
    with pytest.raises(OSError), open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(BrokenEnvironment) as error:
            Progress(10).update(1, loss=1.0, zero_share=0.25)
    assert str(error.value) == (
        "the progress output (stderr) cannot be written (No space left on device): "
        "free some space, or choose another workdir"
    )


def test_progress_without_a_rate_or_a_zero_share(capsys):
    Progress(10).update(10, loss=1.0)
    assert capsys.readouterr().err == "step 10/10, loss 1.0000, 00:00 left\n"
