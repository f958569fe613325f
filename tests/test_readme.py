"""What the README says is so: its commands, its links, its library example, its quickstart table.

The two commands of its `bash` blocks are run as printed by .ci/run.
"""

import functools
import importlib
import json
import operator
import pathlib
import re
import shlex

import pytest

from configs import base

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MODULES = [
    line.split(" -m ")[1]
    for kind, block in BLOCKS
    if kind != "python"
    for line in block.splitlines()
    if " -m " in line and "venv" not in line.split(" -m ")[1]
]


def test_ci_runs_its_two_commands():
    commands = [block for kind, block in BLOCKS if kind == "bash"]
    assert len(commands) == 2
    assert "experiments.train --config=configs/quickstart.py" in commands[0]
    assert "pytest" in commands[1]
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme_command 1" in script
    assert "readme_command 2" in script


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", MODULES)
def test_command_lines_exist_with_these_flags(command):
    module, *arguments = shlex.split(command)
    if module == "pytest":
        return
    source = importlib.util.find_spec(module)
    assert source is not None
    text = pathlib.Path(source.origin).read_text()
    for argument in arguments:
        if not argument.startswith("--"):
            assert f" {argument}|" in text or f"|{argument}|" in text  # which bench
            continue
        name, value = re.fullmatch(r"--([\w.]+)(?:=(.*))?", argument).groups()
        flag, *keys = name.split(".")
        assert f'"{flag}"' in text
        if keys:
            functools.reduce(operator.getitem, keys, base.get_config())
        if name in ("config", "sweep"):
            assert (ROOT / value.partition(":")[0]).exists()


def test_the_library_example_runs():
    (example,) = (block for kind, block in BLOCKS if kind == "python")
    names = {}
    exec(example, names)
    assert names["y"].shape == names["x"].shape
    assert names["mask"].sum() * 2 == names["x"].size


def test_the_quickstart_table_is_a_closing_table():
    """The printed figures are one run's; the form is the program's."""
    from s24jax.summary import closing_table

    (table,) = re.findall(r"^\| quickstart, step \d+ \|.*?(?=\n\n)", README, re.M | re.DOTALL)
    figures = dict.fromkeys(
        (
            "validation_loss", "validation_loss_dense", "bits_per_byte", "tokens_per_second",
            "zero_share", "dropped_token_wise", "dropped_feature_wise", "inactive_features",
        ),
        0.0,
    )  # fmt: skip
    summary = {"name": "quickstart", "steps": 300, "mode": "sparse24", "dense_twin": figures}
    summary["tokens_per_second_before_switch"] = 0.0
    printed = [line.split("|")[1] for line in table.splitlines()]
    assert printed == [line.split("|")[1] for line in closing_table(summary | figures).splitlines()]


def test_the_quickstart_of_this_checkout_shows_what_the_readme_promises():
    """Reads the run that README's first command leaves behind, where it was run (as in CI)."""
    summary = ROOT / "runs" / "quickstart" / "summary.json"
    if not summary.exists():
        pytest.skip("README's first command has not been run in this checkout")
    found = json.loads(summary.read_text())
    twin = found["dense_twin"]
    assert found["mode"] == "sparse24"
    assert found["zero_share"] > 0.8
    assert abs(found["validation_loss"] - twin["validation_loss"]) < 0.03
    assert found["validation_loss"] < 2.0
    records = map(json.loads, (summary.parent / "metrics.jsonl").read_text().splitlines())
    zeros = {
        r["step"]: sum(r["zero_share"]) / len(r["zero_share"])
        for r in records
        if (r["kind"], r["run"]) == ("sparsity", "main")
    }
    assert zeros[140] > 0.8  # before the switch
    assert zeros[1] < 0.6
    assert sorted(path.name for path in (summary.parent / "plots").iterdir()) == [
        "dropped_share.png", "gap.png", "loss.png", "zero_share.png",
    ]  # fmt: skip
