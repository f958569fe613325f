"""Datasets of the tensorflow-datasets catalogue that are on this machine's disk.

Nothing here turns to the network: a catalogue dataset is prepared with tensorflow-datasets itself,
once, and read from its folder.
"""

import difflib
import re
from pathlib import Path
from typing import Any

from s24jax.errors import BrokenEnvironment, InvalidInput


def find_in_catalogue(name: str, data_dir: Path) -> Path:
    """The folder of the newest version of NAME or NAME/CONFIG below data_dir.

    Read off the disk: tfds itself would turn to the network, and hang for minutes without one.
    """
    if not re.fullmatch(r"\w+(/[\w.-]+)?", name):
        raise InvalidInput(f"source 'tfds:{name}': write tfds:NAME or tfds:NAME/CONFIG")
    dataset = name.partition("/")[0]
    variants = {key: versions[-1] for key, versions in _variants(data_dir, dataset).items()}
    if name in variants:
        return variants[name]
    if name == dataset and len(variants) == 1:
        return next(iter(variants.values()))
    if variants:
        raise InvalidInput(
            f"source 'tfds:{name}': {data_dir} holds {', '.join(f'tfds:{key}' for key in variants)}"
        )
    raise _not_on_disk(name, data_dir)


def _variants(data_dir: Path, dataset: str) -> dict[str, list[Path]]:
    """NAME or NAME/CONFIG -> the folders of its versions, oldest first."""
    variants: dict[str, list[Path]] = {}
    for depth in ("*", "*/*"):
        for information in (data_dir / dataset).glob(f"{depth}/dataset_info.json"):
            folder = information.parent
            if re.fullmatch(r"\d+\.\d+\.\d+", folder.name):  # not one that is being written
                variant = folder.parent.relative_to(data_dir).as_posix()
                variants.setdefault(variant, []).append(folder)
    for versions in variants.values():
        versions.sort(key=lambda folder: [int(part) for part in folder.name.split(".")])
    return variants


def _not_on_disk(name: str, data_dir: Path) -> Exception:
    import tensorflow_datasets as tfds

    dataset = name.partition("/")[0]
    registered = set(tfds.list_builders(with_community_datasets=False))
    unregistered = _builders_in_source(Path(tfds.__file__).parent) - registered
    missing = f"'tfds:{name}' is not in data_dir {data_dir}, and s24jax downloads nothing"
    recipe = (
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
        f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    )
    if dataset in registered:
        return BrokenEnvironment(f"{missing}: where there is a network, run {recipe}")
    if dataset in unregistered:
        return BrokenEnvironment(
            f"{missing}: it cannot be prepared here, without TensorFlow; where TensorFlow and a "
            f"network are, run {recipe}"
        )
    close = difflib.get_close_matches(dataset, registered | unregistered, n=3)
    hint = f"did you mean {', '.join(f'tfds:{c}' for c in close)}?" if close else "check the name"
    return InvalidInput(f"{missing}; the tfds catalogue has no {dataset!r} either: {hint}")


def _builders_in_source(package: Path) -> set[str]:
    """The names of all datasets of tfds, read off its class definitions: without TensorFlow it
    registers 246 of 446."""
    from tensorflow_datasets.core.naming import camelcase_to_snakecase

    definition = re.compile(r"^class (\w+)\((?!.*(?:Config|Test))", re.MULTILINE)
    return {
        camelcase_to_snakecase(builder)
        for path in package.rglob("*.py")
        if "core" not in path.parts[len(package.parts) :]
        for builder in definition.findall(path.read_text(encoding="utf-8"))
    }


def catalogue_splits(builder: Any, validation_share: float) -> dict[str, str]:
    """The tfds splits to read: validation is "validation", "test" or the head of "train"."""
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    train = sizes.get("train", 0)
    held_out = max(1, round(validation_share * train))
    if train <= held_out:
        raise InvalidInput(
            f"{builder.data_dir} has the splits {sizes}: a train split of 2 documents or more is "
            f"needed, and validation_share {validation_share} must leave some of them"
        )
    for name in ("validation", "test"):
        if sizes.get(name):
            return {"train": "train", "validation": name}
    return {"train": f"train[{held_out}:]", "validation": f"train[:{held_out}]"}
