"""How far a run is: a bar on a terminal, plain lines in a log."""

import io
import sys
import time

from tqdm import tqdm

from s24jax.writer import writing

_PLAIN_LINE_S = 10.0


class Progress:
    """A progress bar on stderr; where stderr is no terminal, a plain line now and then.

    A plain line is printed when 10 s or a tenth of the run have passed since the last one.

    Args:
      total_steps: the step at which the run ends.
      start_step: the step at which it starts, other than 0 in a resumed run.
      quiet: shows nothing.

    Raises (all methods):
      BrokenEnvironment: stderr is a file on a full disk.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, quiet: bool = False):
        self._total, self._start = total_steps, start_step
        self._stream = io.StringIO() if quiet else sys.stderr
        self._started = time.monotonic()
        self._next_line, self._next_step = self._started, start_step
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                # Without it tqdm guesses how many steps to skip, and sleeps through slow ones.
                miniters=1,
                bar_format="step {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
            )

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float | None = None,
        zero_share: float | None = None,
    ) -> None:
        """Shows the state after step: loss in nats, tokens per second, zero share in 0..1."""
        text = f"loss {loss:.4f}"
        if tokens_per_second is not None:
            text += f", {tokens_per_second:,.0f} tokens/s"
        if zero_share is not None:
            text += f", zeros {100 * zero_share:.1f} %"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() >= self._next_line or step >= min(self._next_step, self._total):
            self._print(f"step {step}/{self._total}, {text}, {self._eta(step)} left")
            self._next_line = time.monotonic() + _PLAIN_LINE_S
            self._next_step = step + self._total / 10

    def say(self, line: str) -> None:
        """Prints a line of its own, without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._print(line)

    def close(self) -> None:
        """Leaves the bar at its last state; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str) -> None:
        with writing("the progress output (stderr)"):
            print(line, file=self._stream, flush=True)

    def _eta(self, step: int) -> str:
        elapsed = time.monotonic() - self._started
        done = max(1, step - self._start)
        return tqdm.format_interval(elapsed / done * max(0, self._total - step))
