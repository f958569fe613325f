"""The training loop: dense warm-up, the switch to 2:4, and all that is recorded on the way.

Reads top to bottom as a run goes: `train` claims the workdir and restores, `_Run.advance` takes one
step, and `_Run.after_step` logs, probes, validates and saves when the configuration says so.
"""

import signal
import time

import jax
import jax.numpy as jnp
import numpy as np

from s24jax import data, distributed, plots, sample
from s24jax.checkpoint import Checkpoints
from s24jax.errors import Diverged, InvalidInput
from s24jax.evaluate import bits_per_byte, mean_loss
from s24jax.meter import Meter
from s24jax.progress import Progress
from s24jax.schedules import ffn_mode
from s24jax.sparsity_metrics import SQUARED_RELU
from s24jax.summary import summarize
from s24jax.train_step import TrainState, make_program, trace
from s24jax.typing import FFNMode
from s24jax.workdir import check_owner, claim, record_implementations
from s24jax.writer import MetricWriter, NoWriter, read_json, read_metrics, write_bytes, write_json


def train(config, workdir) -> dict | None:
    """Trains a configuration to its last step, going on from `workdir`'s last checkpoint.

    Args:
      config: a whole configuration (see configs/).
      workdir: the run's folder; made, or resumed where it holds the same configuration.

    Returns:
      The summary (see `summary.json`), or None where a signal stopped the run after a save.

    Raises:
      InvalidInput: the configuration cannot work, or `workdir` belongs to another one.
      BrokenEnvironment: corpus, disk or checkpoint.
      Diverged: the loss is not finite.
    """
    check(config)
    corpus = distributed.first_alone(
        lambda: data.prepare(config.data, sequence_length=config.sequence_length), "corpus"
    )
    workdir = check_owner(workdir, config, corpus.description)
    if (workdir / "summary.json").exists():
        return read_json(workdir / "summary.json")
    program = make_program(config)
    trace(program, config)
    iterator = data.train_iterator(
        corpus,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    validation = data.validation_batches(
        corpus, batch_size=config.batch_size, num_batches=config.validation_batches
    )
    validation = [distributed.own_rows(batch) for batch in validation]
    # All that can be wrong with the configuration is known by now.
    distributed.first_alone(lambda: claim(workdir, config, corpus.description), "workdir")
    with _Run(config, workdir, program, iterator, validation) as run:
        for step in range(run.step + 1, config.steps + 1):
            try:
                run.advance(step)
                run.after_step(step)
            except jax.errors.JaxRuntimeError as error:
                if jax.process_count() > 1:
                    raise distributed.lost_the_others(error, step - 1) from error
                raise
            run.stop_requested |= distributed.stop_requested(step)
            if run.stop_requested and step < config.steps:
                run.stop(step)
                return None
        return run.finish()


def check(config) -> None:
    """Raises InvalidInput where numbers of the configuration do not fit each other."""
    intervals = (
        "log_every",
        "probe_every",
        "validate_every",
        "checkpoint_every",
        "keep_checkpoints",
    )
    for name in ("steps", "batch_size", "accumulate", "sequence_length", *intervals):
        if config[name] < 1:
            raise InvalidInput(f"{name}={config[name]} must be at least 1")
    if config.batch_size % config.accumulate:
        raise InvalidInput(
            f"batch_size={config.batch_size} does not split into "
            f"accumulate={config.accumulate} equal parts; make it a multiple"
        )
    if config.model.vocabulary < data.VOCABULARY:
        raise InvalidInput(
            f"model.vocabulary={config.model.vocabulary} does not hold the {data.VOCABULARY} "
            f"values of a byte; make it {data.VOCABULARY}"
        )
    sample.check_request(context=config.sequence_length, **config.sample)
    if config.dense_twin and config.model.ffn != "relu2_24":
        raise InvalidInput(
            f"dense_twin=True needs model.ffn=relu2_24, not {config.model.ffn!r}; "
            "set dense_twin=False"
        )


class _Run:
    """One run in progress: its states, its data, and where it writes.

    `states` holds "main" and, after the switch of a run with `dense_twin`, "dense_twin": a copy of
    the state at the switch that goes on dense on the same batches.
    """

    def __init__(self, config, workdir, program, iterator, validation):
        self.config, self.workdir, self.program = config, workdir, program
        self.iterator, self.validation = iterator, validation
        self.checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        self.states = self._restore_or_init()
        self.step = int(self.states["main"].step)
        first = distributed.is_first()
        self.writer = MetricWriter(workdir, resume_step=self.step) if first else NoWriter()
        self.progress = Progress(config.steps, self.step, quiet=not first)
        self.meter = Meter(config.batch_size * config.sequence_length)
        if jax.process_count() > 1:
            self.progress.say(distributed.what_holds())
        self.pending: list[tuple] = []
        self.zero_share = None
        self.stop_requested = False

    def __enter__(self):
        # Of several processes jax tells all when one gets SIGTERM: `distributed.stop_requested`.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._handlers = {number: signal.signal(number, self._request_stop) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.progress.close()
        try:
            self.checkpoints.close()
        finally:
            self.writer.close()

    def _request_stop(self, number, frame):
        self.stop_requested = True
        signal.signal(number, self._handlers[number])  # a second signal ends the run at once

    def _restore_or_init(self) -> dict[str, TrainState]:
        state = self.program.init()
        if not self.checkpoints.steps():
            return {"main": state}
        _, state, twin = self.checkpoints.restore(state, iterator=self.iterator)
        return {"main": state} if twin is None else {"main": state, "dense_twin": twin}

    def advance(self, step: int) -> None:
        """Takes one optimizer step, of the twin too where there is one."""
        mode = ffn_mode(step, self.config)
        if mode != ffn_mode(step - 1, self.config):
            self._switch(step, mode)
        started = time.perf_counter()
        tokens = self.program.place(next(self.iterator))
        for name, state in self.states.items():
            own_mode = mode if name == "main" else "dense"
            first = self.meter.is_first((name, own_mode))
            self.states[name], metrics = self.program.train_step(state, tokens, mode=own_mode)
            if first or len(self.states) > 1:
                # Only then is the time since `started` this state's alone.
                jax.block_until_ready(metrics)
            if not first:
                self.meter.add((name, own_mode), started, steps=1)
            self.pending.append((name, step, own_mode, metrics))
            started = time.perf_counter()

    def _switch(self, step: int, mode: FFNMode) -> None:
        self._flush()
        self.writer.write("switch", run="main", step=step, mode=mode)
        self.progress.say(f"step {step}: switch to 2:4 ({mode})")
        if self.config.dense_twin:
            self.states["dense_twin"] = jax.tree.map(jnp.copy, self.states["main"])
            self.progress.say(f"step {step}: a dense twin goes on beside it on the same batches")

    def after_step(self, step: int) -> None:
        """Logs, probes, validates and saves at the steps that the configuration names."""
        config, last = self.config, step == self.config.steps
        probe = last or step == 1 or step % config.probe_every == 0
        validate = last or step % config.validate_every == 0
        save = last or step % config.checkpoint_every == 0
        if probe or validate or save or self.stop_requested or step % config.log_every == 0:
            self._flush()
        if probe:
            self._probe(step)
        loss = self._validate(step) if validate else None
        if save:
            self._save(step, loss)

    def _flush(self) -> None:
        """Fetches and writes the metrics of the steps since the last call; stops at a bad loss."""
        if not self.pending:
            return
        started = time.perf_counter()
        fetched = jax.device_get([metrics for *_, metrics in self.pending])
        name, _, mode, _ = self.pending[-1]
        self.meter.add((name, mode), started)
        rates = self.meter.read()
        for (name, step, mode, _), metrics in zip(self.pending, fetched, strict=True):
            values = {key: float(value) for key, value in metrics.items()}
            rate = rates.get((name, mode))
            self.writer.write(
                "train", run=name, step=step, mode=mode, tokens_per_second=rate, **values
            )
            if not np.isfinite(values["loss"]):
                raise self._diverged(name, step, mode, values["loss"])
            if name == "main":
                self.progress.update(
                    step, loss=values["loss"], tokens_per_second=rate, zero_share=self.zero_share
                )
        self.pending = []

    def _diverged(self, name: str, step: int, mode: FFNMode, loss: float) -> Diverged:
        saved = self.checkpoints.steps()
        good = f"checkpoint of step {saved[-1]}" if saved else "start; no checkpoint was saved yet"
        run = "" if name == "main" else f" of the {name}"
        return Diverged(
            f"the loss{run} is {loss} at step {step} (mode {mode}); the last good state is the "
            f"{good}; try a lower optimizer.peak_learning_rate, a longer learning-rate warm-up, a "
            "lower optimizer.clip_norm or model.dtype=float32, in another workdir"
        )

    def _probe(self, step: int) -> None:
        """Sparsity of every layer on one fixed validation batch."""
        if self.config.model.ffn not in SQUARED_RELU:
            return
        for name, state in self.states.items():
            observed = jax.device_get(
                self.program.probe(state.params, self.program.place(self.validation[0]))
            )
            self.writer.write("sparsity", run=name, step=step, **observed)
            if name == "main":
                self.zero_share = float(observed["zero_share"].mean())

    def _validate(self, step: int) -> float:
        """Validation loss in the step's own mode and dense; returns main's in its own mode."""
        losses = {}
        for name, state in self.states.items():
            mode = ffn_mode(step, self.config) if name == "main" else "dense"
            dense = mean_loss(self.program, state.params, self.validation, "dense")
            own = dense
            if mode != "dense":
                own = mean_loss(self.program, state.params, self.validation, mode)
            losses[name] = own
            self.writer.write(
                "validation",
                run=name,
                step=step,
                mode=mode,
                loss=own,
                loss_dense=dense,
                bits_per_byte=bits_per_byte(own),
            )
            # The last update can spoil the weights behind a loss that was still finite.
            if not np.isfinite(own):
                raise self._diverged(name, step, mode, own)
        return losses["main"]

    def _save(self, step: int, validation_loss: float | None) -> None:
        self.checkpoints.save(
            step,
            self.states["main"],
            self.iterator,
            twin=self.states.get("dense_twin"),
            validation_loss=validation_loss,
        )
        if distributed.is_first():
            record_implementations(self.workdir)

    def stop(self, step: int) -> None:
        """Saves because a signal asked for it."""
        self._flush()
        self._save(step, None)
        self.checkpoints.wait()
        self.progress.say(f"stopped by a signal; step {step} is saved; the same command resumes")

    def finish(self) -> dict:
        """Samples, draws, and writes the summary, which ends a run."""
        self.checkpoints.wait()
        if jax.process_count() == 1:
            self._sample()
        else:
            self.progress.say(
                "no sample, since the weights lie on several hosts: "
                f"python -m experiments.sample --workdir={self.workdir} --prompt=TEXT draws one"
            )
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.states["main"].params))
        return distributed.first_alone(lambda: self._summarize(parameters), "summary")

    def _summarize(self, parameters: int) -> dict:
        path = self.workdir / "summary.json"
        if distributed.is_first():
            plots.plot_run(self.workdir)
            write_json(path, summarize(self.config, parameters, read_metrics(self.workdir)))
        return read_json(path)

    def _sample(self) -> None:
        config, state = self.config, self.states["main"]
        text = sample.generate(
            self.program.model,
            state.params,
            config.sample.prompt,
            tokens=config.sample.tokens,
            temperature=config.sample.temperature,
            rng=jax.random.wrap_key_data(state.rng),
            mode=ffn_mode(config.steps, config),
            context=config.sequence_length,
        )
        write_bytes(self.workdir / "samples.txt", f"step {config.steps}\n{text}\n".encode())
