"""Whether the device that jax would use is a Hopper GPU."""

from types import SimpleNamespace

import jax
import pytest

from s24jax import device

CPU = "the default device is a CPU; needs an NVIDIA GPU of compute capability 9.0 (Hopper)"


@pytest.mark.cpu_only
def test_the_cpu_is_none():
    assert device.hopper_reason() == CPU


@pytest.mark.parametrize("named", ["cpu", None])
def test_the_default_device_counts(named):
    """A CPU can be the default where a GPU is there too."""
    with jax.default_device(named or jax.devices("cpu")[0]):
        assert device.hopper_reason() == CPU


@pytest.mark.parametrize(
    "platform, capability, hopper",
    [("gpu", "9.0", True), ("gpu", "8.0", False), ("gpu", "10.0", False), ("tpu", None, False)],
)
def test_other_devices(platform, capability, hopper, monkeypatch):
    fake = SimpleNamespace(platform=platform, device_kind="Some Chip")
    if capability:
        fake.compute_capability = capability
    monkeypatch.setattr(device, "_default_device", lambda: fake)
    reason = device.hopper_reason()
    assert (reason is None) == hopper
    if not hopper:
        assert reason == (
            f"the default device is 'Some Chip' ({capability}); "
            "needs an NVIDIA GPU of compute capability 9.0 (Hopper)"
        )
