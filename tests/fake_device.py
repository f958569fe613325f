"""A device for tests of timing, whose clock only its work moves."""

from s24jax.bench.timing import Contender


class FakeDevice:
    """Queued calls take their time when they are waited for."""

    def __init__(self):
        self.now, self.queued, self.calls = 0.0, 0.0, []

    def clock(self):
        return self.now

    def contender(self, name, seconds, error=0.0, **how):
        def call():
            self.calls.append(name)
            self.queued += seconds
            return name

        def wait(_):
            self.now += self.queued
            self.queued = 0.0

        def error_of(out):
            wait(out)
            return error

        return Contender(call, error_of, wait, spoil=wait, **how)
