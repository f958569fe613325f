"""Who owns a workdir: claim, refuse, resume."""

import json
import subprocess

import pytest
from ml_collections import ConfigDict

from s24jax import workdir
from s24jax.errors import InvalidInput
from s24jax.ops import dispatch

DATA = {"fingerprint": "abc", "name": "corpus"}


def claim(folder, config, data):
    """As a run does it: check, then write."""
    folder = workdir.check_owner(folder, config, data)
    workdir.claim(folder, config, data)
    return folder


def make_config(**changes) -> ConfigDict:
    config = ConfigDict({"name": "run", "steps": 10, "model": {"width": 8, "recipe": {"a": 0.05}}})
    config.update(changes)
    return config


def test_claim_records_the_run_and_takes_it_back(tmp_path):
    folder = claim(tmp_path / "a" / "b", make_config(), DATA)
    record = json.loads((folder / "run.json").read_text())
    assert record["config"] == make_config().to_dict()
    assert record["data"] == DATA
    assert record["name"] == "run"
    assert record["devices"] == workdir.devices()
    assert record["versions"]["jax"].count(".") >= 2
    assert set(record["versions"]) == {"python", *workdir.PACKAGES}
    before = (folder / "run.json").read_bytes()
    assert claim(folder, make_config(), DATA) == folder
    assert (folder / "run.json").read_bytes() == before


def test_the_commit_is_git_s_own(tmp_path):
    folder = claim(tmp_path / "w", make_config(), DATA)
    record = json.loads((folder / "run.json").read_text())
    git = subprocess.run(
        ["git", "-C", workdir.__file__.rsplit("/", 2)[0], "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    expected = git.stdout.strip() if git.returncode == 0 else "unknown"
    assert record["git_commit"].removesuffix("-dirty") == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 20}, "steps is 10 there, 20 here"),
        ({"model": {"recipe": {"a": 0.1}}}, "model.recipe.a is 0.05 there, 0.1 here"),
        ({"model": {"width": 16}, "name": "run"}, "model.width is 8 there, 16 here"),
    ],
)
def test_another_config_is_refused(tmp_path, changes, words):
    claim(tmp_path, make_config(), DATA)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InvalidInput) as error:
        claim(tmp_path, make_config(**changes), DATA)
    message = str(error.value)
    assert message.startswith(f"{tmp_path} belongs to another config: {words}")
    assert message.endswith("use another --workdir, or that value to resume")
    assert (tmp_path / "run.json").read_bytes() == before


def test_another_corpus_is_refused(tmp_path):
    claim(tmp_path, make_config(), DATA)
    with pytest.raises(
        InvalidInput, match="has changed since its first step .fingerprint abc then, x"
    ):
        claim(tmp_path, make_config(), DATA | {"fingerprint": "x"})


@pytest.mark.parametrize("name", workdir.OUTPUTS)
def test_results_of_unknown_origin_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(InvalidInput, match=f"holds {name} but no run.json.*use another --workdir"):
        claim(tmp_path, make_config(), DATA)
    assert (tmp_path / name).read_text() == "precious"
    assert not (tmp_path / "run.json").exists()


def test_other_files_are_no_obstacle(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, make_config(), DATA)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_read_config(tmp_path):
    with pytest.raises(InvalidInput, match="no run.json in .*; name the workdir of a run"):
        workdir.read_config(tmp_path)
    claim(tmp_path, make_config(), DATA)
    config = workdir.read_config(tmp_path)
    assert config.to_dict() == make_config().to_dict()
    assert config.is_locked


def test_implementations_are_added_to_the_record(tmp_path):
    claim(tmp_path, make_config(), DATA)
    dispatch.resolve("some op", "auto", [dispatch.Candidate("reference", len)])
    workdir.record_implementations(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert {
        "op": "some op",
        "requested": "auto",
        "implementation": "reference",
        "reason": "the only implementation",
    } in record["implementations"]
    assert record["config"] == make_config().to_dict()
