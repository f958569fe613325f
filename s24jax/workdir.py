"""Who owns a workdir: the run record `run.json`, written before anything else in it.

A workdir belongs to one configuration and one corpus. A second run with the same ones resumes; with
others it is refused, so that nothing in it is ever overwritten or mixed.
"""

import importlib.metadata
import pathlib
import platform
import subprocess
import sys
import time

import jax
import ml_collections

from s24jax.errors import InvalidInput
from s24jax.ops import dispatch
from s24jax.writer import read_json, write_json

PACKAGES = (
    "s24jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
)
OUTPUTS = ("checkpoints", "metrics.jsonl", "summary.json", "samples.txt", "plots", "tensorboard")


def read_config(workdir) -> ml_collections.ConfigDict:
    """The configuration that a run was started with.

    Raises:
      InvalidInput: `workdir` holds no run.
    """
    record = _read_record(workdir)
    if record is None:
        raise InvalidInput(f"no run.json in {workdir}; name the workdir of a run")
    return ml_collections.ConfigDict(record["config"]).lock()


def check_owner(workdir, config, data: dict) -> pathlib.Path:
    """Checks that `workdir` is free or this configuration's; writes nothing.

    Args:
      workdir: need not exist.
      config: the whole configuration.
      data: the corpus, the `description` of `s24jax.data.Dataset`; its "fingerprint" identifies it.

    Raises:
      InvalidInput: it belongs to another configuration or corpus, or holds results of unknown
        origin.
    """
    workdir = pathlib.Path(workdir)
    record = _read_record(workdir)
    if record is None:
        strangers = [name for name in OUTPUTS if (workdir / name).exists()]
        if strangers:
            raise InvalidInput(
                f"{workdir} holds {strangers[0]} but no run.json, so whose it is cannot "
                "be told; use another --workdir"
            )
        return workdir
    # A run may go on with another number of devices.
    configs = [
        {k: v for k, v in c.items() if k != "mesh"} for c in (record["config"], config.to_dict())
    ]
    key, there, here = first_difference(*configs)
    if key:
        raise InvalidInput(
            f"{workdir} belongs to another config: {key} is {there!r} there, {here!r} "
            "here; use another --workdir, or that value to resume"
        )
    there, here = record["data"]["fingerprint"], data["fingerprint"]
    if there != here:
        raise InvalidInput(
            f"the corpus of {workdir} has changed since its first step (fingerprint "
            f"{there} then, {here} now); use another --workdir"
        )
    return workdir


def claim(workdir: pathlib.Path, config, data: dict) -> None:
    """Makes a free `workdir` this configuration's: the first thing that is written into it."""
    if _read_record(workdir) is None:
        write_json(workdir / "run.json", _record(config, data))


def record_implementations(workdir) -> None:
    """Adds to run.json which implementation each op got so far, and why."""
    path = pathlib.Path(workdir) / "run.json"
    chosen = [choice._asdict() for choice in dispatch.choices()]
    write_json(path, read_json(path) | {"implementations": chosen})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """The devices that jax computes on."""
    return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]


def _read_record(workdir) -> dict | None:
    path = pathlib.Path(workdir) / "run.json"
    return read_json(path) if path.exists() else None


def _record(config, data: dict) -> dict:
    return {
        "name": config.name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git_commit": git_commit(),
        "versions": versions(),
        "devices": devices(),
        "data": data,
        "config": config.to_dict(),
        "implementations": [],
    }


def git_commit() -> str:
    """The commit of the checkout that s24jax runs from; "-dirty" with uncommitted changes."""
    folder = pathlib.Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def first_difference(there: dict, here: dict, prefix: str = "") -> tuple:
    """The first key, in the config's order, whose values differ, and both values; else None."""
    for key in {**here, **there}:
        old, new = there.get(key, "absent"), here.get(key, "absent")
        if isinstance(old, dict) and isinstance(new, dict):
            found = first_difference(old, new, f"{prefix}{key}.")
            if found[0]:
                return found
        elif old != new:
            return f"{prefix}{key}", old, new
    return None, None, None
