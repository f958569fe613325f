"""Text as bytes: from a source to batches of token windows.

    source              "stdlib", "python", a folder, a glob, or "tfds:NAME" (a tensorflow-datasets
                        dataset)
    prepare             -> two random-access sources on disk, train and validation
    train_iterator      -> batches without end, shuffled, sharded by process, exactly resumable
    validation_batches  -> always the same batches

A token is a byte: nothing is learnt before training, and every text is in the vocabulary. Local
files are packed into windows once, on disk (text_corpus.py); catalogue documents while they are
read. A window has sequence_length + 1 tokens: all but its last are the inputs, all but its first
the targets.

`config` has the fields source; pattern (a glob below a folder or the stdlib); validation_share (of
the files; of the documents where a catalogue dataset has no validation split); data_dir ("" is
s24jax/datasets in the user's cache); text_feature (a catalogue dataset's key for the text).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from s24jax.catalogue import catalogue_splits, find_in_catalogue
from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.packing import SEPARATOR, CutWindows, join_documents

VOCABULARY = 256

_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
# Catalogue documents: 16 are read at once, which costs little more than one; 4096 windows are
# shuffled together, so that a batch is not one long document.
_READ_TOGETHER = 16
_SHUFFLED_TOGETHER = 4096


def encode(text: str) -> np.ndarray:
    """The UTF-8 bytes of `text`, int32 [number of bytes]; of a command line, the bytes as typed."""
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)


def decode(tokens: Any) -> str:
    """The text of integer `tokens` [n]; what is not UTF-8, or no byte at all, becomes U+FFFD."""
    tokens = np.asarray(tokens, dtype=np.int64)
    no_byte = (tokens < 0) | (tokens >= VOCABULARY)
    # 255 occurs nowhere in UTF-8.
    return np.where(no_byte, 255, tokens).astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class PackedWindows:
    """Windows on disk, one per record."""

    records: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.records)

    def batches(self, order: grain.MapDataset, batch_size: int) -> grain.IterDataset:
        """int32 [batch_size, sequence_length + 1] of the records that `order` lists."""
        indices = order.batch(batch_size, drop_remainder=True)
        return indices.map(self._read).to_iter_dataset(_READ_AHEAD)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        windows = _read_feature(self.records, indices, "tokens")
        return np.frombuffer(b"".join(windows), np.uint8).astype(np.int32).reshape(len(indices), -1)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents on disk, one per record, packed into windows while they are read."""

    records: Sequence[bytes]
    sequence_length: int
    text_feature: str

    def __len__(self) -> int:
        return len(self.records)

    def windows(self, order: grain.MapDataset) -> grain.IterDataset:
        """uint8 [sequence_length + 1] of the documents that `order` lists, in this order."""
        pieces = order.batch(_READ_TOGETHER).map(self._read).to_iter_dataset(_READ_AHEAD)
        return CutWindows(pieces, self.sequence_length)

    def batches(self, order: grain.MapDataset, batch_size: int) -> grain.IterDataset:
        """int32 [batch_size, sequence_length + 1] of the documents that `order` lists."""
        windows = grain.experimental.WindowShuffleIterDataset(
            self.windows(order), window_size=_SHUFFLED_TOGETHER, seed=0
        )
        return windows.batch(batch_size, drop_remainder=True, batch_fn=_stack)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        texts = _read_feature(self.records, indices, self.text_feature)
        return join_documents(text.replace(bytes([SEPARATOR]), b"") for text in texts)


def _stack(windows: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(windows).astype(np.int32)


def _read_feature(records: Sequence[bytes], indices: np.ndarray, name: str) -> list[bytes]:
    """The bytes of one feature. A record is a tf.train.Example; to let tfds decode all of it takes
    1.7 times as long (64 windows of 257 bytes), to read record by record 3.5 times."""
    from tensorflow_datasets.proto import tf_example_pb2

    values = []
    for record in records.__getitems__(indices.tolist()):
        feature = tf_example_pb2.Example.FromString(record).features.feature[name]
        if len(feature.bytes_list.value) != 1:
            kind = feature.WhichOneof("kind")
            raise InvalidInput(f"text_feature {name!r} is not one text but a {kind}")
        values.append(feature.bytes_list.value[0])
    return values


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two random-access sources, and what a run's record says of them (plain JSON values):

    name, source, fingerprint (changes with the data and the packing), sequence_length, and per
    split documents, bytes of text and windows (None where only reading everything could tell);
    skipped: files left out of a local corpus.
    """

    train: PackedWindows | Documents
    validation: PackedWindows | Documents
    description: dict[str, Any]


def prepare(config: Any, *, sequence_length: int) -> Dataset:
    """Finds the dataset of `config` on disk; packs local files first where that was not yet done.

    Nothing is ever downloaded.

    Raises:
        InvalidInput: the source names nothing, or too little text.
        BrokenEnvironment: a catalogue dataset is not on disk (as array_record); data_dir cannot be
            written, is full or damaged.
    """
    _require_positive(sequence_length=sequence_length)
    if not 0 < config.validation_share < 1:
        raise InvalidInput(f"validation_share {config.validation_share} must lie between 0 and 1")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "s24jax" / "datasets"
    data_dir = Path(config.data_dir or cache).expanduser().absolute()
    if config.source.startswith("tfds:"):
        return _catalogue_dataset(config, sequence_length, data_dir)
    return _local_dataset(config, sequence_length, data_dir)


def train_iterator(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches without end: int32 numpy arrays [batch_size, sequence_length + 1].

    Each epoch has its own global shuffle, a function of seed and epoch. The shuffled records are
    dealt out to the processes in turn: together they read each record once per epoch, and of a
    local corpus the global batch does not depend on process_count (batch_size is per process).
    `get_state()` is JSON-able and `set_state()` goes on exactly there.

    Raises:
        InvalidInput: batch_size, seed or process_index is wrong.
    """
    _require_positive(batch_size=batch_size, process_count=process_count)
    if not 0 <= process_index < process_count:
        raise InvalidInput(
            f"process_index {process_index} is not below process_count {process_count}"
        )
    if seed < 0:
        raise InvalidInput(f"seed {seed} must not be negative")
    train = dataset.train
    # Through .seed, which hashes: shuffle(seed=s) has the epochs of shuffle(seed=s + 1), one later.
    order = grain.MapDataset.range(len(train)).seed(seed).shuffle().repeat()
    return iter(train.batches(order[process_index::process_count], batch_size))


def validation_batches(dataset: Dataset, *, batch_size: int, num_batches: int) -> list[np.ndarray]:
    """Up to num_batches int32 arrays [batch_size, sequence_length + 1], always the same.

    A fixed shuffle spreads them over the validation split; no window occurs twice.

    Raises:
        InvalidInput: the split holds less than one batch; batch_size or num_batches is wrong.
    """
    _require_positive(batch_size=batch_size, num_batches=num_batches)
    order = grain.MapDataset.range(len(dataset.validation)).seed(0).shuffle()
    batches = dataset.validation.batches(order, batch_size)
    batches = list(itertools.islice(batches, num_batches))
    if not batches:
        sequence_length = dataset.description["sequence_length"]
        raise InvalidInput(
            f"{dataset.description['source']}: the validation split holds fewer windows of "
            f"sequence_length {sequence_length} than one batch, batch_size {batch_size}: lower one "
            "of them or raise validation_share"
        )
    return batches


def _local_dataset(config: Any, sequence_length: int, data_dir: Path) -> Dataset:
    from s24jax import text_corpus

    directory = text_corpus.prepare_text_corpus(
        text_corpus.find_corpus(config.source, config.pattern),
        sequence_length=sequence_length,
        validation_share=config.validation_share,
        data_dir=data_dir,
    )
    builder = _open(directory)
    sources = {split: PackedWindows(_records(builder, split)) for split in ("train", "validation")}
    with _blaming(directory):
        description = dict(builder.info.metadata)
    return Dataset(**sources, description=description)


def _catalogue_dataset(config: Any, sequence_length: int, data_dir: Path) -> Dataset:
    directory = find_in_catalogue(config.source.removeprefix("tfds:"), data_dir)
    builder = _open(directory)
    if config.text_feature not in builder.info.features:
        raise InvalidInput(
            f"{directory} has no text_feature {config.text_feature!r}, only "
            f"{sorted(builder.info.features)}"
        )
    splits = catalogue_splits(builder, config.validation_share)
    sources = {}
    for name, split in splits.items():
        records = _records(builder, split)
        sources[name] = Documents(records, sequence_length, config.text_feature)
        if next(iter(sources[name].windows(grain.MapDataset.range(len(records)))), None) is None:
            raise InvalidInput(
                f"{directory}: the text of split {split!r} does not fill one window of "
                f"{sequence_length + 1} bytes: lower sequence_length"
            )
    packing = f"{sequence_length} {splits} {config.text_feature}"
    state = (directory / "dataset_info.json").read_bytes() + packing.encode()
    description = {
        "name": builder.info.full_name,
        "source": str(directory),
        "fingerprint": hashlib.sha256(state).hexdigest()[:12],
        "sequence_length": sequence_length,
        "documents": {name: len(documents) for name, documents in sources.items()},
        "bytes": dict.fromkeys(splits),
        "windows": dict.fromkeys(splits),
        "skipped": {},
    }
    return Dataset(**sources, description=description)


def _open(directory: Path) -> Any:
    """The read-only tfds builder of the dataset in `directory`."""
    import tensorflow_datasets as tfds

    with _blaming(directory):
        builder = tfds.builder_from_directory(directory)
        for split in builder.info.splits.values():
            for path in split.filepaths:
                os.stat(path)
    if (file_format := builder.info.file_format.value) != "array_record":
        raise BrokenEnvironment(
            f"{directory} is stored as {file_format}, which has no random access: prepare it in "
            "another data_dir with file_format='array_record'"
        )
    return builder


def _records(builder: Any, split: str) -> Sequence[bytes]:
    import tensorflow_datasets as tfds

    undecoded = tfds.decode.DeserializeMethod.RAW_BYTES
    with _blaming(builder.data_dir):
        records = builder.as_data_source(split, deserialize_method=undecoded)
        records[len(records) - 1]  # noqa: B018 (a file that was cut off shows now, not in training)
    return records


@contextlib.contextmanager
def _blaming(directory: Path | str) -> Iterator[None]:
    """What fails while a dataset is opened is the dataset: tfds, protobuf and array_record each
    have their own exceptions for a missing, empty or cut-off file."""
    from s24jax.text_corpus import quiet

    try:
        with quiet():
            yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BrokenEnvironment(
            f"{directory} cannot be opened ({reason}): if it is damaged, delete it and run again"
        ) from error


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InvalidInput(f"{name} {value} must be 1 or more")
