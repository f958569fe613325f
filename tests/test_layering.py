"""One direction of dependency, and imports that do nothing but import."""

import ast
import fnmatch
import graphlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# The floors, lowest first. A module imports from its own floor and from those below it, and within
# a floor there is no circle. Every module stands in exactly one floor; a new one is placed here on
# purpose. An exact name goes before a pattern.
FLOORS = [
    ["s24jax.errors", "s24jax.typing"],
    ["s24jax.mesh", "s24jax.numerics"],
    ["s24jax.activation", "s24jax.prune24", "s24jax.token_groups"],
    ["s24jax.compressed", "s24jax.feature_split"],
    ["s24jax.recipe"],
    ["s24jax.device", "s24jax.nvcc", "s24jax.triton_ptx"],
    ["s24jax.cuda_library", "s24jax.triton_bridge"],  # the one adapter of each kind of kernel
    ["s24jax.ops", "s24jax.ops.dispatch"],
    ["s24jax.ops.*"],
    ["s24jax.ffn"],
    ["s24jax"],  # the package's face: what it re-exports is all below
    ["s24jax.attention"],
    ["s24jax.model"],
    [
        "s24jax.bench",
        "s24jax.bench.*",
        "s24jax.build",
        "s24jax.catalogue",
        "s24jax.checkpoint",
        "s24jax.data",
        "s24jax.distributed",
        "s24jax.doctor",
        "s24jax.evaluate",
        "s24jax.figure_style",
        "s24jax.meter",
        "s24jax.optimizer",
        "s24jax.packing",
        "s24jax.plots",
        "s24jax.progress",
        "s24jax.results",
        "s24jax.results_plot",
        "s24jax.sample",
        "s24jax.schedules",
        "s24jax.sparsity_metrics",
        "s24jax.summary",
        "s24jax.sweep",
        "s24jax.sweep_plot",
        "s24jax.text_corpus",
        "s24jax.train",
        "s24jax.train_step",
        "s24jax.workdir",
        "s24jax.writer",
    ],
    ["experiments", "experiments.*"],
]
PACKAGES = ["s24jax", "experiments"]


def modules(root: pathlib.Path = ROOT) -> dict[str, pathlib.Path]:
    """Module name -> file, for every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: pathlib.Path, known) -> set[str]:
    """Modules among `known` that the file names in import statements, wherever they stand in it.

    `from package import name` counts as package.name where that is a module, else as the package.
    """
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join((above if node.level else []) + ([node.module] if node.module else []))
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in known else base)
    return (found & set(known)) - {name}


def floors_of(name: str) -> list[int]:
    exact = [i for i, floor in enumerate(FLOORS) for entry in floor if entry == name]
    return exact or [
        i for i, floor in enumerate(FLOORS) for entry in floor if fnmatch.fnmatchcase(name, entry)
    ]


def violations(root: pathlib.Path = ROOT) -> list[str]:
    known = modules(root)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    faults = []
    for name in known:
        if len(floors_of(name)) != 1:
            faults.append(
                f"{name} stands in {len(floors_of(name))} floors; "
                "place it in one floor of FLOORS in tests/test_layering.py"
            )
    if faults:
        return faults
    floor = {name: floors_of(name)[0] for name in known}
    for name, targets in graph.items():
        faults += [
            f"{name} (floor {floor[name]}) imports {target} (floor {floor[target]}) above it"
            for target in sorted(targets)
            if floor[target] > floor[name]
        ]
    level = {
        name: {target for target in targets if floor[target] == floor[name]}
        for name, targets in graph.items()
    }
    try:
        graphlib.TopologicalSorter(level).prepare()
    except graphlib.CycleError as error:
        faults.append("circular imports: " + " -> ".join(error.args[1]))
    return faults


def test_every_arrow_points_down():
    faults = violations()
    assert not faults, "\n" + "\n".join(faults)


def test_no_name_stands_twice():
    entries = [entry for floor in FLOORS for entry in floor]
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("s24jax/prune24.py", "from s24jax.ffn import ffn24", "s24jax.prune24 .* s24jax.ffn"),
        ("s24jax/compressed.py", "from s24jax import ffn", "s24jax.compressed .* s24jax.ffn"),
        ("s24jax/ffn.py", "def f():\n    import s24jax.model", "s24jax.ffn .* s24jax.model"),
        ("s24jax/prune24.py", "from . import ffn", "s24jax.prune24 .* s24jax.ffn"),
        ("s24jax/ops/a/api.py", "from ...ffn import x", "s24jax.ops.a.api .* s24jax.ffn"),
        ("s24jax/model.py", "import experiments.train", "s24jax.model .* experiments.train"),
        ("s24jax/ffn.py", "from s24jax import ffn24", "s24jax.ffn .* imports s24jax .*"),
        ("s24jax/newcomer.py", "", "s24jax.newcomer stands in 0 floors; place it"),
        ("s24jax/activation.py", "import s24jax.prune24", "circular imports"),
        ("s24jax/activation.py", "import jax, os\nfrom s24jax import errors", None),
    ],
)
def test_the_walk_sees(tmp_path, file, source, fault):
    """The walk itself, on a package made for it: one file at fault (or none) among good ones."""
    files = {
        "s24jax/activation.py": "",
        "s24jax/__init__.py": "from s24jax.ffn import ffn24",
        "s24jax/errors.py": "",
        "s24jax/ffn.py": "from s24jax.prune24 import a",
        "s24jax/model.py": "from s24jax import ffn24",
        "s24jax/ops/__init__.py": "",
        "s24jax/ops/a/__init__.py": "from s24jax.ops.a import api",
        "s24jax/prune24.py": "from s24jax.activation import a",
        "experiments/__init__.py": "",
        "experiments/train.py": "import s24jax.model",
        file: source,
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    faults = violations(tmp_path)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert re.search(fault, faults[0])


IMPORT_EVERYTHING = """
import importlib, json, sys

def state():
    from jax._src import xla_bridge
    from absl import flags
    return {
        "backends": sorted(xla_bridge._backends),
        "flags_parsed": flags.FLAGS.is_parsed(),
    }

import s24jax
heavy = [name for name in ("tensorflow_datasets", "matplotlib") if name in sys.modules]
after = {"s24jax": state()}
for name in sys.argv[1].split(","):
    importlib.import_module(name)
    after[name] = state()
print(json.dumps({"heavy": heavy, "after": after}))
"""


@pytest.fixture(scope="module")
def after_importing_everything():
    names = [name for name in modules() if name.startswith("s24jax")]
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_EVERYTHING, ",".join(names)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_importing_touches_no_device_and_reads_no_flags(after_importing_everything):
    for name, state in after_importing_everything["after"].items():
        assert state == {"backends": [], "flags_parsed": False}, name


def test_importing_the_package_is_light(after_importing_everything):
    """Who only wants ffn24 does not wait for data sets and plots."""
    assert after_importing_everything["heavy"] == []
