"""What a sweep is: a configuration shared by its rows, and the keys that each row changes."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import base

Shapes = Mapping[str, Mapping[str, int]]
_SMALL = {"layers": 1, "width": 16, "heads": 1, "hidden": 64}


def sweep_of(name: str, config: ConfigDict, *rows: ConfigDict, baseline: str) -> ConfigDict:
    """A sweep of rows (see `row`), one of which, the baseline, the others are compared with."""
    return ConfigDict({"name": name, "config": config, "rows": rows, "baseline": baseline})


def shared(config: ConfigDict, mode: str) -> ConfigDict:
    """What the rows of a sweep have in common: Python source, and, as only their metrics are kept,
    one checkpoint and a short sample."""
    config.data.source = "python"
    config.checkpoint_every = config.steps
    config.sample.tokens = 100
    return base.vary(config, mode)


def shapes_in(mode: str, shapes: Shapes) -> Shapes:
    """The shapes of a sweep over models; in the smoke variant all of them are small."""
    return dict.fromkeys(shapes, _SMALL) if mode else shapes


def row(name: str, **changes) -> ConfigDict:
    """One run of the sweep: the keys of the shared configuration that it changes."""
    return ConfigDict({"name": name, "changes": changes})
