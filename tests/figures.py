"""Records of a made-up run, and what the tests of figures read off a figure."""

import json

import numpy as np

STEPS, SWITCH, LAYERS = 240, 80, 5
BITS_PER_NAT = 0.5


def record(kind, step, run="main", **values):
    return {"kind": kind, "run": run, "step": step, **values}


def losses(steps, rng, floor=0.6):
    return floor + 5.3 * np.exp(-steps / 30) * (1 + rng.normal(0, 0.01, len(steps)))


def make_records(*, twin=True, sparsity=True, cost=0.02, seed=0):
    """A run like the measured ones: losses fall with noise, zero share rises, a cost from 2:4."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, STEPS + 1)
    dense = losses(steps, rng)
    main = dense + np.where(steps >= SWITCH, cost, 0.0) + rng.normal(0, 0.002, STEPS)
    records = [record("switch", SWITCH, mode="sparse24")]
    for step, own, other in zip(steps.tolist(), main.tolist(), dense.tolist(), strict=True):
        runs = [("main", own), ("dense_twin", other)][: 2 if twin and step >= SWITCH else 1]
        for run, loss in runs:
            records.append(record("train", step, run, mode="dense", loss=loss))
            if step % 20 == 0:
                values = {"loss": loss + 0.1, "bits_per_byte": (loss + 0.1) * BITS_PER_NAT}
                records.append(record("validation", step, run, **values))
        if sparsity and step % 10 == 0:
            zeros = 0.5 + np.linspace(0.35, 0.48, LAYERS) * (1 - np.exp(-step / 40))
            shares = {"dropped_token_wise": 0.2 * (1 - zeros), "dropped_feature_wise": 1 - zeros}
            lists = {
                name: share.tolist() for name, share in {"zero_share": zeros, **shares}.items()
            }
            records.append(record("sparsity", step, **lists))
    return records


def save_records(workdir, records):
    workdir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    return workdir


def make_row(name, **changes):
    """A row of results: what is left of `make_records`."""
    records = make_records(**{"twin": False, **changes})
    curves = {}
    for kind in ("train", "validation", "sparsity"):
        found = [r for r in records if r["kind"] == kind]
        columns = [key for key in found[0] if key not in ("kind", "run", "mode")] if found else []
        curves[kind] = {key: [r[key] for r in found] for key in columns}
    curves["validation"]["seconds"] = [0.25 * step for step in curves["validation"]["step"]]
    profile = [np.geomspace(0.5, 10.0 ** -(3 + layer), 64).tolist() for layer in range(LAYERS)]
    curves["density_profile"] = {"step": [STEPS], "profile": [profile]}
    curves = {kind: columns for kind, columns in curves.items() if columns}
    if not changes.get("sparsity", True):
        del curves["density_profile"]
    summary = {"validation_loss": curves["validation"]["loss"][-1], "zero_share": 0.95}
    return {
        "name": name,
        "config": {"choice": name, "seed": 0},
        "summary": summary | {"switch_step": SWITCH},
        "environment": {"devices": ["gpu: NVIDIA H200"]},
        "curves": {"main": curves},
    }


def pick(records, kind, run, key):
    found = [r for r in records if r["kind"] == kind and r["run"] == run]
    return [r["step"] for r in found], [r[key] for r in found]


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def width_and_height(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def drawn_texts(axes):
    """Title, axis labels, marks, and the tick labels that lie inside the limits."""
    yield from (axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
    for i, axis in enumerate((axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        labels = axis.get_ticklabels()
        yield from (label for label in labels if low <= label.get_position()[i] <= high)


def assert_no_overlap(figure):
    """No two labels overlap, and none leaves the figure."""
    figure.draw_without_rendering()
    axes = [part for axes in figure.axes for part in (axes, *axes.child_axes)]
    found = [text for part in axes for text in drawn_texts(part) if text.get_text().strip()]
    found += figure.legends
    boxes = [text.get_window_extent().padded(-1) for text in found]
    for i, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), found[i]
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), found[i]
        assert [str(found[j]) for j in range(i) if box.overlaps(boxes[j])] == [], found[i]
    assert len(found) > 10
