"""Which device the kernels would run on.

Asked when an op is traced, never on import. Every implementation that needs a Hopper GPU asks
here, by `device.hopper_reason()`: the one place that a test replaces to pretend that there is one.
"""

import jax

HOPPER = "9.0"  # the kernels use wgmma, which exists in this compute capability alone


def hopper_reason() -> str | None:
    """Why the device that jax would run on now is no Hopper GPU; None where it is one."""
    device = _default_device()
    needs = f"needs an NVIDIA GPU of compute capability {HOPPER} (Hopper)"
    if device.platform == "cpu":
        return f"the default device is a CPU; {needs}"
    capability = getattr(device, "compute_capability", None)
    if capability != HOPPER:
        return f"the default device is {device.device_kind!r} ({capability}); {needs}"
    return None


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device
    if isinstance(device, jax.Device):
        return device
    return jax.local_devices(backend=device)[0]  # the name of a platform, or None
