"""Checkpoints: what is kept, exact restore, and damage told apart from a foreign model."""

import gc
import json
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s24jax.checkpoint import Checkpoints
from s24jax.errors import BrokenEnvironment, InvalidInput


def make_state(value: float, width: int = 3) -> dict:
    return {"w": jnp.full((2, width), value, jnp.float32), "step": jnp.int32(value)}


def make_iterator():
    return iter(grain.MapDataset.range(100).seed(1).shuffle().repeat().to_iter_dataset())


def save_steps(checkpoints, losses: dict) -> None:
    for step, loss in losses.items():
        checkpoints.save(step, make_state(step), make_iterator(), validation_loss=loss)
    checkpoints.wait()


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5})
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()
    # And what an earlier process measured still counts after a restart.
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, {6: 1.5, 7: None})
    assert checkpoints.steps() == [2, 6, 7]
    checkpoints.close()


def test_restores_state_twin_and_data_position(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    iterator = make_iterator()
    taken = [int(next(iterator)) for _ in range(7)]
    checkpoints.save(3, make_state(3), iterator, twin=make_state(30))
    checkpoints.wait()
    straight = [int(next(iterator)) for _ in range(120)]  # over the end of an epoch
    resumed = make_iterator()
    restored = checkpoints.restore(jax.eval_shape(lambda: make_state(0)), iterator=resumed)
    assert restored.step == 3
    np.testing.assert_array_equal(restored.state["w"], np.full((2, 3), 3.0))
    np.testing.assert_array_equal(restored.twin["w"], np.full((2, 3), 30.0))
    assert [int(next(resumed)) for _ in range(120)] == straight
    assert straight[:93] != taken  # the comparison is not of two fresh iterators
    checkpoints.close()


def test_data_that_several_processes_had_read(tmp_path):
    """Equally far in packed windows, which one can take up; else each at a place of its own."""
    checkpoints = Checkpoints(tmp_path)
    ahead, behind = make_iterator(), make_iterator()
    for _ in range(7):
        next(ahead)
    checkpoints.save(3, make_state(3), ahead)
    checkpoints.wait()
    (file,) = tmp_path.glob("checkpoints/3/data/metadata")
    (state,) = json.loads(file.read_text())["states"]
    like = jax.eval_shape(lambda: make_state(0))
    file.write_text(json.dumps({"states": [state] * 4}))
    resumed = make_iterator()
    checkpoints.restore(like, iterator=resumed)
    assert next(resumed) == next(ahead)
    file.write_text(json.dumps({"states": [state, behind.get_state()]}))
    with pytest.raises(InvalidInput) as error:
        checkpoints.restore(like, iterator=make_iterator())
    assert str(error.value) == (
        f"checkpoint {tmp_path / 'checkpoints' / '3'} was saved by 2 processes, each at a place of "
        "its own in its documents; resume with as many, not 1"
    )
    checkpoints.close()


def test_what_is_saved_survives_donation(tmp_path):
    """The save runs in the background while the next step overwrites the donated state."""
    checkpoints = Checkpoints(tmp_path)
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints.save(1, state, make_iterator())
    state = overwrite(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored = checkpoints.restore(jax.eval_shape(lambda: {"w": jnp.zeros(1 << 20)}))
    np.testing.assert_array_equal(restored.state["w"], np.arange(1 << 20, dtype=np.float32))
    checkpoints.close()


def test_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), make_iterator())
    checkpoints.save(1, make_state(2), make_iterator())
    restored = checkpoints.restore(make_state(0), step=1)
    assert int(restored.state["step"]) == 1
    checkpoints.close()


def test_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InvalidInput, match="no checkpoint in .*train into this workdir first"):
        checkpoints.restore(make_state(0))
    save_steps(checkpoints, {4: None})
    with pytest.raises(InvalidInput, match="no checkpoint of step 9 in .*; there are 4"):
        checkpoints.restore(make_state(0), step=9)
    checkpoints.close()


def test_another_model_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save_steps(checkpoints, {4: None})
    with pytest.raises(InvalidInput) as error:
        checkpoints.restore(make_state(0, width=5))
    message = str(error.value)
    assert "holds another model: ['w'] is float32[2, 3] there, float32[2, 5] here" in message
    assert "use the config that it was trained with, or another workdir" in message
    assert "\n" not in message
    checkpoints.close()


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(folder, how: str) -> None:
    """Damages every file of the state's arrays, or takes one away."""
    data = sorted((folder / "state").rglob("*"), key=lambda path: str(path))
    data = [path for path in data if path.is_file() and "d/" in str(path.relative_to(folder))]
    assert data
    for path in data:
        content = bytearray(path.read_bytes())
        if how == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif how == "flip":
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
        else:
            path.unlink()


@pytest.fixture
def late_reads(monkeypatch):
    """When one array cannot be read orbax closes its event loop; tensorstore's reads of the others
    end after that and find nobody to tell, or never began, which python reports as exceptions that
    it ignores."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: ignored.append(str(report.exc_value)))
    yield
    time.sleep(0.5)
    gc.collect()
    late = [text for text in ignored if not text.endswith("was never awaited")]
    assert set(late) <= {"Event loop is closed"}


@pytest.mark.parametrize("how", ["cut", "flip", "remove"])
def test_damage_is_told_and_left_untouched(tmp_path, late_reads, how):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, {4: None, 8: None})
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "8", how)
    before = files_below(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(BrokenEnvironment) as error:
        checkpoints.restore(make_state(0))
    message = str(error.value)
    assert f"checkpoint {tmp_path / 'checkpoints' / '8'} cannot be read" in message
    assert "it was left as it is; move that folder away to go on from step 4" in message
    assert "\n" not in message
    checkpoints.close()
    assert files_below(tmp_path) == before


def test_a_failed_save_names_the_last_good_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save_steps(checkpoints, {4: None})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(BrokenEnvironment) as error:
        checkpoints.save(5, make_state(5), make_iterator())
    message = str(error.value)
    assert "No space left on device" in message
    assert "the last good checkpoint is step 4; free disk space" in message
    checkpoints.close()
