"""What a sweep is: a configuration shared by its rows, and the keys that each row changes."""

from ml_collections import ConfigDict


def sweep_of(name: str, config: ConfigDict, *rows: ConfigDict, baseline: str) -> ConfigDict:
    """A sweep of rows (see `row`), one of which, the baseline, the others are compared with."""
    return ConfigDict({"name": name, "config": config, "rows": rows, "baseline": baseline})


def row(name: str, **changes) -> ConfigDict:
    """One run of the sweep: the keys of the shared configuration that it changes."""
    return ConfigDict({"name": name, "changes": changes})
