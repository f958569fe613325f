"""Local text files, split by file and packed into byte windows, as a tensorflow-datasets dataset.

The way of a byte:

    find_corpus       a source (folder, glob, "stdlib", "python") -> the files it names
    split_by_file     files -> documents: no binaries, no duplicates; each in train or validation
    CutWindows        documents -> one stream with separators -> windows of sequence_length + 1
    TextCorpus        windows -> array_record files below data_dir, one record per window

Everything here is a function of the files alone: no seed, no clock. Shuffling is up to the reader.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.packing import SEPARATOR, CutWindows, join_documents

# Below which folders of this interpreter a named source looks, and which ones it leaves out.
_NAMED = {"stdlib": ("stdlib",), "python": ("stdlib", "purelib", "platlib")}
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SHARD_BYTES = 64 << 20  # tfds holds one shard in memory while it writes it
_IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files below one folder, found but not yet read: a short name, the folder, relative paths."""

    name: str
    root: Path
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A usable file: its path, its size in bytes and the SHA-256 of its content."""

    path: Path
    size: int
    digest: bytes


def find_corpus(source: str, pattern: str) -> Corpus:
    """Finds the files of `source`.

    Sources: "stdlib", Python's standard library without its tests; "python", the standard library
    and all installed packages; a folder (with `pattern` below it); or a glob. Hidden files and
    folders are found only by a pattern that names them, as in a shell.

    Raises:
        InvalidInput: there is no such folder, or no file matches.
    """
    folder = Path(source).expanduser()
    if source in _NAMED:
        folders = {Path(sysconfig.get_path(name)).resolve() for name in _NAMED[source]}
    elif source and folder.is_dir():
        folders = {folder.resolve()}
    elif wild := [i for i, part in enumerate(folder.parts) if set(part) & set("*?[")]:
        folders = {Path(*folder.parts[: wild[0]]).resolve()}
        pattern = str(Path(*folder.parts[wild[0] :]))
    else:
        raise InvalidInput(
            f"source {source!r}: no such folder; give a folder, a glob, 'stdlib', 'python' or "
            "'tfds:NAME'"
        )
    excluded = _STDLIB_EXCLUDED if source == "stdlib" else set()
    root = Path(os.path.commonpath(folders))
    paths = {
        str((below / path).relative_to(root))
        for below in folders
        for path in glob.glob(pattern, root_dir=below, recursive=True)
        if (below / path).is_file() and not excluded & set(Path(path).parts)
    }
    if not paths:
        raise InvalidInput(f"source {source!r}: no file below {root} matches {pattern!r}")
    name = source if source in _NAMED else re.sub(r"[^\w.-]", "_", root.name)[:40]
    return Corpus(name or "root", root, tuple(sorted(paths)))


def _state_of_files(corpus: Corpus, sequence_length: int, validation_share: float) -> str:
    """12 hex digits that change with the files (path, size, time of change) and the packing.

    Names the dataset on disk: cheap to find out, but files that were only touched pack again.
    """
    files = []
    for path in corpus.paths:
        status = os.stat(corpus.root / path)
        files.append((path, status.st_size, status.st_mtime_ns))
    key = json.dumps([str(corpus.root), files, sequence_length, validation_share])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _fingerprint(splits: dict[str, list[Document]], sequence_length: int) -> str:
    """12 hex digits that change with the text of either split and with the packing."""
    digests = {split: [d.digest.hex() for d in documents] for split, documents in splits.items()}
    key = json.dumps([digests, sequence_length, str(TextCorpus.VERSION)])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def split_by_file(
    corpus: Corpus, validation_share: float
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Reads every file once; returns the documents of each split and how many files were skipped.

    The order, here and in the packed stream, is that of the hash of the relative path. Skipped are
    files that are empty, binary (contain a NUL byte) or a copy of an earlier one: a text in both
    splits would make validation a test of memory. The first max(1, round(share * n)) of the n
    documents are for validation.

    Raises:
        InvalidInput: a file cannot be read, or fewer than 2 are usable.
    """
    seen: set[bytes] = set()
    documents: list[Document] = []
    skipped = collections.Counter(empty=0, binary=0, duplicate=0)
    for relative in sorted(corpus.paths, key=lambda p: hashlib.sha256(os.fsencode(p)).digest()):
        path = corpus.root / relative
        content = _read(path)
        digest = hashlib.sha256(content).digest()
        if not content:
            skipped["empty"] += 1
        elif SEPARATOR in content:
            skipped["binary"] += 1
        elif digest in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(digest)
            documents.append(Document(path, len(content), digest))
    if len(documents) < 2:
        raise InvalidInput(
            f"{corpus.root}: {len(documents)} of {len(corpus.paths)} files are usable text "
            f"(skipped: {dict(skipped)}), 2 are needed: one for train, one for validation"
        )
    validation = max(1, round(validation_share * len(documents)))
    return {"train": documents[validation:], "validation": documents[:validation]}, dict(skipped)


class TextCorpus(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes documents as windows, in order. Not a GeneratorBasedBuilder: that one shuffles what
    it is given, in memory up to 1 GB and with TensorFlow beyond."""

    VERSION = tfds.core.Version("1.0.0")  # to be raised whenever the same files pack differently

    def __init__(self, splits: dict[str, list[Document]], metadata: dict[str, Any], **options: Any):
        self._documents = splits
        self._metadata = metadata
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self._metadata["sequence_length"] + 1,)
        tokens = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Any]]:
        del dl_manager
        return {split: self._shards(split) for split in self._documents}

    def _shards(self, split: str) -> list[Any]:
        """One callable per shard. They are called in order, so they can share one iterator."""
        sequence_length = self._metadata["sequence_length"]
        pieces = grain.MapDataset.source(self._documents[split]).map(_reread)
        windows = CutWindows(pieces.to_iter_dataset(_IN_THIS_THREAD), sequence_length)
        examples = ((k, {"tokens": window}) for k, window in enumerate(windows))
        count, size = self._metadata["windows"][split], max(1, _SHARD_BYTES // sequence_length)
        sizes = (min(size, count - start) for start in range(0, count, size))
        return [functools.partial(itertools.islice, examples, n) for n in sizes]


def prepare_text_corpus(
    corpus: Corpus, *, sequence_length: int, validation_share: float, data_dir: Path
) -> Path:
    """The folder of the dataset of `corpus`, written first if these files have no dataset yet.

    Safe to interrupt, and to call from several processes at once: tfds writes into a folder of its
    own and renames it when it is complete, so the first one to be complete counts.

    Raises:
        InvalidInput: too few usable files, or too little text for one window in a split.
        BrokenEnvironment: data_dir cannot be written or is full; a file changed meanwhile.
    """
    state = _state_of_files(corpus, sequence_length, validation_share)
    name = f"{corpus.name}-{sequence_length}-{state}"
    directory = data_dir / TextCorpus.name / name / str(TextCorpus.VERSION)
    if directory.exists():
        return directory
    _require_writable(data_dir)
    splits, skipped = split_by_file(corpus, validation_share)
    metadata = {
        "name": name,
        "source": str(corpus.root),
        "fingerprint": _fingerprint(splits, sequence_length),
        "sequence_length": sequence_length,
        "documents": {split: len(documents) for split, documents in splits.items()},
        "bytes": {split: sum(d.size for d in documents) for split, documents in splits.items()},
        "windows": _count_windows(corpus, splits, sequence_length),
        "skipped": skipped,
    }
    logging.info("writing %s to %s: %s", name, directory, metadata)
    _write(splits, metadata, directory, data_dir)
    return directory


def _count_windows(
    corpus: Corpus, splits: dict[str, list[Document]], sequence_length: int
) -> dict[str, int]:
    windows = {}
    for split, documents in splits.items():
        stream = sum(document.size + 1 for document in documents)
        windows[split] = (stream - 1) // sequence_length
        if windows[split] < 1:
            raise InvalidInput(
                f"{corpus.root}: {stream} bytes for {split}, one window takes "
                f"{sequence_length + 1}: lower sequence_length, change validation_share or add text"
            )
    return windows


def _write(
    splits: dict[str, list[Document]], metadata: dict[str, Any], directory: Path, data_dir: Path
) -> None:
    config = tfds.core.BuilderConfig(name=metadata["name"])
    try:
        with quiet():
            builder = TextCorpus(splits, metadata, data_dir=data_dir, config=config)
            builder.download_and_prepare()
    except (OSError, RuntimeError) as error:
        if directory.exists():  # another process was faster
            return
        # array_record raises a RuntimeError, without an error number.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise BrokenEnvironment(
                f"data_dir {str(data_dir)!r} is full: free about "
                f"{sum(metadata['bytes'].values()) * 2 >> 20 or 1} MiB or set another data_dir"
            ) from error
        raise
    # What killed processes left; one that is still at it falls back on the result above.
    for leftover in directory.parent.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps tfds from printing and logging; errors still come as exceptions."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _require_writable(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise BrokenEnvironment(
            f"data_dir {str(data_dir)!r} cannot be written ({error.strerror}): set another data_dir"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read ({error.strerror}): change its permissions or leave it out"
        ) from error


def _reread(document: Document) -> np.ndarray:
    content = _read(document.path)
    if hashlib.sha256(content).digest() != document.digest:
        raise BrokenEnvironment(f"{document.path} changed while it was being packed: run again")
    return join_documents([content])
