"""Data: from files and catalogue datasets to batches. The oracles read the files themselves."""

import errno
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from s24jax import data, packing, text_corpus
from s24jax.errors import BrokenEnvironment, InvalidInput

L = 16
# 20 texts of 40 to 300 bytes, all different, in three folders.
TEXTS = {
    f"{folder}/{k}.txt": "".join(f"{folder}{k}:{i} " for i in range(8 + 3 * k)).encode()
    for folder, count in (("a", 7), ("b", 7), ("c", 6))
    for k in range(count)
}


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_config(source, data_dir, **changes) -> ConfigDict:
    fields = dict(
        source=str(source),
        pattern="**/*.txt",
        validation_share=0.25,
        data_dir=str(data_dir),
        text_feature="text",
    )
    return ConfigDict(fields | changes)


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_files(tmp_path / "corpus", TEXTS)


@pytest.fixture
def config(corpus, tmp_path) -> ConfigDict:
    return make_config(corpus, tmp_path / "data")


@pytest.fixture(scope="module")
def shared_config(tmp_path_factory) -> ConfigDict:
    """A corpus that no test changes."""
    folder = tmp_path_factory.mktemp("shared")
    return make_config(write_files(folder / "corpus", TEXTS), folder / "data")


def expected_streams(files: dict[str, bytes], share: float) -> dict[str, bytes]:
    """The packed stream of each split, by the rules of the documentation."""
    names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    contents = []
    for name in names:
        if files[name] and b"\0" not in files[name] and files[name] not in contents:
            contents.append(files[name])
    held_out = max(1, round(share * len(contents)))
    return {
        "validation": b"".join(content + b"\0" for content in contents[:held_out]),
        "train": b"".join(content + b"\0" for content in contents[held_out:]),
    }


def expected_windows(stream: bytes, length: int = L) -> list[bytes]:
    starts = range(0, len(stream) - length, length)
    return [stream[start : start + length + 1] for start in starts]


def rebuild(windows: list[bytes]) -> bytes:
    """The stream that overlapping windows were cut from."""
    return windows[0] + b"".join(window[1:] for window in windows[1:])


def read_windows(config, split: str, length: int = L) -> list[bytes]:
    """The windows of a split in the order on disk, read and parsed by tfds alone."""
    description = data.prepare(config, sequence_length=length).description
    folder = Path(config.data_dir) / "text_corpus" / description["name"] / "1.0.0"
    records = tfds.builder_from_directory(folder).as_data_source(split)
    return [record["tokens"].tobytes() for record in records]


def rows(batches) -> list[bytes]:
    for batch in batches:
        assert batch.dtype == np.int32
    return [row.astype(np.uint8).tobytes() for batch in batches for row in batch]


def iterate(config, *, sequence_length: int = L, **changes) -> grain.DatasetIterator:
    dataset = data.prepare(config, sequence_length=sequence_length)
    return data.train_iterator(dataset, **(dict(batch_size=4, seed=0) | changes))


def validation(config, *, sequence_length: int = L, **arguments) -> list[np.ndarray]:
    dataset = data.prepare(config, sequence_length=sequence_length)
    return data.validation_batches(dataset, **arguments)


def take(iterator, count: int) -> list[np.ndarray]:
    return list(itertools.islice(iterator, count))


def forbid(*_, **__):
    raise AssertionError("must not be called")


# Tokens


@given(st.text())
def test_text_survives_encoding(text):
    tokens = data.encode(text)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert bytes(tokens.tolist()) == text.encode("utf-8")
    assert data.decode(tokens) == text


@given(st.lists(st.integers(-3, 300)))
def test_decoding_takes_any_integers(tokens):
    text = data.decode(tokens)
    ascii_only = "".join(chr(t) for t in tokens if 0 <= t < 128)
    assert "".join(c for c in text if ord(c) < 128) == ascii_only


def test_what_is_no_text_is_replaced():
    assert data.decode([104, 105, 256, 255, -1, 33]) == "hi\ufffd\ufffd\ufffd!"
    assert data.decode(np.array(data.encode("né"))[:-1]) == "n\ufffd"
    assert data.decode([]) == ""


def test_bytes_of_a_command_line_come_through():
    assert data.encode(b"caf\xe9".decode(errors="surrogateescape"))[-1] == 0xE9


def test_import_is_light():
    program = "import sys, s24jax.data; print('tensorflow_datasets' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


# Local files: splits and packing


@pytest.mark.parametrize("share, length", [(0.25, 16), (0.01, 7), (0.5, 100), (0.25, 1)])
def test_windows_are_the_documents_in_order(corpus, tmp_path, share, length):
    config = make_config(corpus, tmp_path / "data", validation_share=share)
    description = data.prepare(config, sequence_length=length).description
    for split, stream in expected_streams(TEXTS, share).items():
        windows = read_windows(config, split, length)
        assert windows == expected_windows(stream, length)
        assert description["windows"][split] == len(windows)
        assert description["documents"][split] == stream.count(b"\0")
        assert description["bytes"][split] == len(stream) - stream.count(b"\0")
        rebuilt = rebuild(windows)
        assert stream.startswith(rebuilt) and len(stream) - len(rebuilt) < length


def test_shards_hold_the_same_windows(corpus, config, tmp_path, monkeypatch):
    one = [read_windows(config, split) for split in ("train", "validation")]
    batches = take(iterate(config), 30)
    monkeypatch.setattr(text_corpus, "_SHARD_BYTES", 5 * L)
    config.data_dir = str(tmp_path / "sharded")
    assert [read_windows(config, split) for split in ("train", "validation")] == one
    assert len(list(Path(config.data_dir).rglob("*train.array_record*"))) == -(-len(one[0]) // 5)
    np.testing.assert_array_equal(take(iterate(config), 30), batches)


def test_splits_share_no_text(shared_config):
    windows = {split: read_windows(shared_config, split) for split in ("train", "validation")}
    streams = {split: rebuild(some) for split, some in windows.items()}
    for name, content in TEXTS.items():
        assert sum(content[:20] in stream for stream in streams.values()) == 1, name
    assert not set(windows["train"]) & set(windows["validation"])


def test_unusable_files_are_left_out_and_counted(tmp_path):
    extra = {
        "copy1.txt": TEXTS["a/0.txt"],
        "z/copy2.txt": TEXTS["a/0.txt"],
        "copy3.txt": TEXTS["b/1.txt"],
        "binary.txt": b"text until\0 here " * 20,
        "empty1.txt": b"",
        "empty2.txt": b"",
        "latin1.txt": "é".encode("latin-1") * 40,
        "other.md": b"does not match the pattern",
        ".hidden/file.txt": b"hidden files do not match either",
    }
    config = make_config(write_files(tmp_path / "corpus", TEXTS | extra), tmp_path / "data")
    description = data.prepare(config, sequence_length=L).description
    assert description["skipped"] == {"empty": 2, "binary": 1, "duplicate": 3}
    matched = {
        k: v for k, v in (TEXTS | extra).items() if k not in ("other.md", ".hidden/file.txt")
    }
    for split, stream in expected_streams(matched, 0.25).items():
        assert read_windows(config, split) == expected_windows(stream)


def test_folder_and_glob_find_the_same_files(corpus, tmp_path, monkeypatch):
    by_folder = text_corpus.find_corpus(str(corpus), "**/*.txt")
    assert by_folder.paths == tuple(sorted(TEXTS))
    assert text_corpus.find_corpus(f"{corpus}/**/*.txt", "ignored") == by_folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_corpus.find_corpus("~/corpus/**/*.txt", "ignored") == by_folder
    monkeypatch.chdir(corpus)
    assert text_corpus.find_corpus("*/0.txt", "ignored").paths == ("a/0.txt", "b/0.txt", "c/0.txt")


def test_names_may_hold_any_character(tmp_path):
    root = write_files(
        tmp_path / "[x] é\udcff", {"a [1] é\udcff.txt": b"a" * 99, "b\n.txt": b"b" * 99}
    )
    assert len(text_corpus.find_corpus(str(root), "*.txt").paths) == 2
    description = data.prepare(make_config(root, tmp_path / "data"), sequence_length=L).description
    assert description["documents"] == {"train": 1, "validation": 1}


def test_stdlib_is_the_library_without_its_tests(tmp_path):
    paths = text_corpus.find_corpus("stdlib", "**/*.py").paths
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(paths)
    parts = set().union(*(Path(path).parts for path in paths))
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    config = make_config("stdlib", tmp_path, pattern="json/*.py")
    (batch,) = validation(config, sequence_length=64, batch_size=2, num_batches=1)
    folder = Path(json.__file__).parent
    text = b"\0".join(path.read_bytes() for path in folder.glob("*.py"))
    assert rows([batch])[0].split(b"\0")[0] in text


def test_python_is_the_library_and_all_packages():
    corpus = text_corpus.find_corpus("python", "**/*.py")
    assert corpus.name == "python"
    paths = {corpus.root / path for path in corpus.paths}
    assert {Path(json.__file__), Path(np.__file__), Path(pytest.__file__)} <= paths
    assert len(paths) == len(corpus.paths)
    stdlib = text_corpus.find_corpus("stdlib", "**/*.py")
    assert {stdlib.root / path for path in stdlib.paths} < paths


# Local files: the dataset on disk


def test_an_unchanged_corpus_is_reused(config, monkeypatch):
    first = data.prepare(config, sequence_length=L).description
    with monkeypatch.context() as patch:
        patch.setattr(text_corpus, "_write", forbid)
        patch.setattr(text_corpus, "split_by_file", forbid)
        assert data.prepare(config, sequence_length=L).description == first
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("change", ["content", "mtime", "new", "gone", "length", "share"])
def test_a_change_gives_a_new_dataset(corpus, config, change):
    first = data.prepare(config, sequence_length=L).description
    files, length = dict(TEXTS), L
    if change == "content":
        files["a/3.txt"] = b"something else " * 9
        write_files(corpus, {"a/3.txt": files["a/3.txt"]})
    elif change == "mtime":
        os.utime(corpus / "a/3.txt", ns=(1, 1))
    elif change == "new":
        files["d/new.txt"] = b"something new " * 9
        write_files(corpus, {"d/new.txt": files["d/new.txt"]})
    elif change == "gone":
        files.pop("a/3.txt")
        (corpus / "a/3.txt").unlink()
    elif change == "length":
        length = 20
    else:
        config.validation_share = 0.4
    second = data.prepare(config, sequence_length=length).description
    assert second["name"] != first["name"]
    # The name follows the files' state, the fingerprint their text alone.
    assert (second["fingerprint"] != first["fingerprint"]) == (change != "mtime")
    for split, stream in expected_streams(files, config.validation_share).items():
        assert read_windows(config, split, length) == expected_windows(stream, length)


def test_default_data_dir_is_the_cache(config, tmp_path, monkeypatch):
    config.data_dir = ""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    data.prepare(config, sequence_length=L)
    assert (tmp_path / "home/.cache/s24jax/datasets/text_corpus").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.prepare(config, sequence_length=L)
    assert (tmp_path / "xdg/s24jax/datasets/text_corpus").is_dir()


def test_preparing_is_quiet_and_stays_in_data_dir(config, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        data.prepare(config, sequence_length=L)
        once = capfd.readouterr()
        data.prepare(config, sequence_length=L)
        again = capfd.readouterr()
    finally:
        logging.set_verbosity(verbosity)
    assert once.out == again.out == again.err == ""
    assert once.err.count("\n") <= 1 and "tfds" not in once.err
    assert not (tmp_path / "home").exists()


def test_an_interrupted_preparation_leaves_nothing(config, monkeypatch):
    reread = text_corpus._reread
    documents = itertools.count()

    def interrupted(document):
        if next(documents) == 7:
            raise KeyboardInterrupt
        return reread(document)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_corpus, "_reread", interrupted)
        data.prepare(config, sequence_length=L)
    assert not list(Path(config.data_dir).rglob("*.array_record*"))
    for split, stream in expected_streams(TEXTS, 0.25).items():
        assert read_windows(config, split) == expected_windows(stream)


def test_a_killed_preparation_is_made_good(config):
    program = f"""
        import os, signal
        from ml_collections import ConfigDict
        from s24jax import data, packing, text_corpus
        reread = text_corpus._reread
        def killed(document):
            if document.path.name == "3.txt":
                os.kill(os.getpid(), signal.SIGKILL)
            return reread(document)
        text_corpus._reread = killed
        data.prepare(ConfigDict({config.to_dict()}), sequence_length={L})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(Path(config.data_dir).rglob("incomplete.*"))
    for split, stream in expected_streams(TEXTS, 0.25).items():
        assert read_windows(config, split) == expected_windows(stream)
    assert not list(Path(config.data_dir).rglob("incomplete.*"))


@pytest.mark.parametrize("moment", [0, 7])
def test_two_preparations_at_once(config, monkeypatch, moment):
    """A second one starts and ends while the first is at its document number `moment`."""
    reread = text_corpus._reread
    documents = itertools.count()
    other = []

    def overtaken(document):
        if next(documents) == moment:
            other.append(data.prepare(config, sequence_length=L).description)
        return reread(document)

    monkeypatch.setattr(text_corpus, "_reread", overtaken)
    assert data.prepare(config, sequence_length=L).description == other[0]
    for split, stream in expected_streams(TEXTS, 0.25).items():
        assert read_windows(config, split) == expected_windows(stream)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("write() failed: No space left on device; writing x; at byte 4096"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ],
)
def test_a_full_disk(config, monkeypatch, error):
    def full(_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(text_corpus, "_reread", full)
        check_error(BrokenEnvironment, ["full", config.data_dir], config)
    assert not list(Path(config.data_dir).rglob("*.array_record*"))
    data.prepare(config, sequence_length=L)


def test_a_file_that_changes_meanwhile(corpus, config, monkeypatch):
    split = text_corpus.split_by_file

    def split_then_change(*arguments):
        result = split(*arguments)
        write_files(corpus, {"b/2.txt": b"\0"})
        return result

    monkeypatch.setattr(text_corpus, "split_by_file", split_then_change)
    check_error(BrokenEnvironment, ["b/2.txt", "changed", "run again"], config)


@pytest.mark.parametrize("damage", ["gone", "cut", "empty json", "no json", "empty metadata"])
def test_a_damaged_dataset(config, damage):
    data.prepare(config, sequence_length=L)
    (folder,) = Path(config.data_dir).glob("text_corpus/*/1.0.0")
    (record,) = folder.glob("*train*")
    if damage == "gone":
        record.unlink()
    elif damage == "cut":
        os.truncate(record, 1000)
    elif damage == "empty json":
        (folder / "dataset_info.json").write_text("")
    elif damage == "no json":
        (folder / "dataset_info.json").unlink()
    else:
        (folder / "metadata.json").write_text("")
    check_error(BrokenEnvironment, [str(folder), "delete it"], config)


# Local files: errors


def check_error(kind, words, config, length=L):
    with pytest.raises(kind) as caught:
        data.prepare(config, sequence_length=length)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert all(word in message for word in words), message


def test_wrong_sources(corpus, tmp_path):
    for source, pattern, words in [
        (
            "/no/such/folder",
            "**/*.py",
            ["/no/such/folder", "no such folder", "'stdlib', 'python' or"],
        ),
        ("", "**/*.py", ["''", "no such folder"]),
        (corpus / "a/0.txt", "*", ["0.txt", "no such folder"]),
        (corpus / "*.nothing", "*", ["*.nothing", "no file"]),
        ("/no/such/folder/*.txt", "*", ["no file", "/no/such/folder"]),
        (corpus, "**/*.py", [str(corpus), "'**/*.py'", "no file"]),
        ("stdlib", "*.nothing", ["stdlib", "'*.nothing'"]),
    ]:
        config = make_config(source, tmp_path / "data", pattern=pattern)
        check_error(InvalidInput, words, config)
    assert not (tmp_path / "data").exists()


def test_too_little_text(corpus, tmp_path):
    one = write_files(tmp_path / "one", {"a.txt": b"text", "b.txt": b"text", "c.txt": b"\0"})
    check_error(InvalidInput, ["1 of 3 files", "duplicate"], make_config(one, tmp_path / "data"))
    few = write_files(tmp_path / "few", {"a.txt": b"short", "b.txt": b"text " * 99})
    small = make_config(few, tmp_path / "data", validation_share=0.1)
    order = sorted(["a.txt", "b.txt"], key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    split = "validation" if order[0] == "a.txt" else "train"
    check_error(InvalidInput, [f"6 bytes for {split}", "takes 17", "sequence_length"], small)
    config = make_config(corpus, tmp_path / "data")
    check_error(InvalidInput, ["sequence_length", "takes 100001"], config, 100_000)
    everything = make_config(few, tmp_path / "data", validation_share=0.9)
    check_error(InvalidInput, ["0 bytes for train", "validation_share"], everything)


def test_wrong_numbers(config):
    check_error(InvalidInput, ["sequence_length 0"], config, 0)
    right = config.validation_share
    config.unlock()
    for share in (0.0, 1.0, -0.1, 1.5):
        config.validation_share = share
        check_error(InvalidInput, [f"validation_share {share}"], config)
    config.validation_share = right
    for changes, words in [
        (dict(batch_size=0), "batch_size 0"),
        (dict(seed=-1), "seed -1"),
        (dict(process_count=0), "process_count 0"),
        (dict(process_index=2, process_count=2), "process_index 2"),
        (dict(process_index=-1, process_count=2), "process_index -1"),
    ]:
        with pytest.raises(InvalidInput, match=words):
            iterate(config, **changes)
    with pytest.raises(InvalidInput, match="num_batches 0"):
        validation(config, batch_size=1, num_batches=0)


def test_data_dir_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(corpus, tmp_path / "file" / "data")
    check_error(BrokenEnvironment, [config.data_dir, "cannot be written", "Not a dir"], config)


def test_a_file_that_cannot_be_read(corpus, config):
    (corpus / "a/0.txt").unlink()
    os.symlink("/proc/self/mem", corpus / "a/0.txt")  # a regular file, and reading it fails
    check_error(InvalidInput, ["a/0.txt", "cannot be read"], config)


# Batches


def test_an_epoch_is_a_permutation(shared_config):
    windows = read_windows(shared_config, "train")
    n = len(windows)
    epochs = {}
    for seed in (0, 1):
        seen = rows(take(iterate(shared_config, batch_size=1, seed=seed), 3 * n))
        for epoch in range(3):
            epochs[seed, epoch] = tuple(seen[epoch * n : (epoch + 1) * n])
            assert sorted(epochs[seed, epoch]) == sorted(windows)
    # Each epoch of each seed has an order of its own (grain alone would give seed 0, epoch 1 the
    # order of seed 1, epoch 0).
    assert len(set(epochs.values())) == len(epochs)
    assert tuple(windows) not in epochs.values()


def test_batches_are_the_same_stream_whatever_their_size(shared_config):
    single = rows(take(iterate(shared_config, batch_size=1), 300))
    for batch_size in (7, 300):
        batches = take(iterate(shared_config, batch_size=batch_size), 300 // batch_size)
        assert {batch.shape for batch in batches} == {(batch_size, L + 1)}
        assert rows(batches) == single[: 300 // batch_size * batch_size]


@pytest.mark.parametrize("count, batch_size", [(2, 6), (3, 4), (4, 3), (12, 1)])
def test_processes_share_out_the_global_batch(shared_config, count, batch_size):
    whole = take(iterate(shared_config, batch_size=12), 40)
    parts = [
        take(
            iterate(shared_config, batch_size=batch_size, process_index=p, process_count=count), 40
        )
        for p in range(count)
    ]
    for step, batch in enumerate(whole):
        assert sorted(rows([batch])) == sorted(rows([part[step] for part in parts]))


def check_resume(iterator, restored, before: int, after: int, through_json: bool):
    """`restored`, itself somewhere else, goes on where `iterator` was after `before` batches."""
    take(iterator, before)
    state = iterator.get_state()
    if through_json:
        state = json.loads(json.dumps(state))
    expected = take(iterator, after)
    take(restored, 2)
    restored.set_state(state)
    np.testing.assert_array_equal(take(restored, after), expected)


RESUME = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RESUME
@given(
    before=st.integers(0, 120),
    after=st.integers(1, 60),
    batch_size=st.sampled_from([1, 3, 8]),
    through_json=st.booleans(),
)
def test_local_iterator_resumes_exactly(shared_config, before, after, batch_size, through_json):
    """An epoch has about 180 windows: most examples cross its end."""
    pair = [iterate(shared_config, batch_size=batch_size) for _ in range(2)]
    check_resume(*pair, before, after, through_json)


def test_validation_is_always_the_same(shared_config):
    def batches(batch_size, num_batches):
        return validation(shared_config, batch_size=batch_size, num_batches=num_batches)

    windows = read_windows(shared_config, "validation")
    some = batches(4, 5)
    assert [batch.shape for batch in some] == [(4, L + 1)] * 5
    np.testing.assert_array_equal(some, batches(4, 5))
    np.testing.assert_array_equal(some[:2], batches(4, 2))
    every = rows(batches(1, 10_000))
    assert sorted(every) == sorted(windows) and every != windows
    assert rows(some) == every[:20]
    full = len(windows) // 4
    assert len(batches(4, full + 10)) == full
    # Spread over the split, not its head.
    assert len(set(rows(some)) & set(windows[:20])) < 20
    with pytest.raises(InvalidInput, match="fewer windows.*batch_size 1000.*validation_share"):
        batches(1000, 1)


# Packing while reading


def document_iterator(documents, length, read_ahead):
    source = grain.MapDataset.source(documents).map(lambda d: packing.join_documents([d]))
    options = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=2 * read_ahead)
    return iter(packing.CutWindows(source.to_iter_dataset(options), length))


DOCUMENTS = st.lists(st.binary(max_size=30), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(1, 20), st.sampled_from([0, 2]))
def test_packing_is_concatenation(documents, length, read_ahead):
    windows = [w.tobytes() for w in document_iterator(documents, length, read_ahead)]
    assert windows == expected_windows(b"".join(d + b"\0" for d in documents), length)


@given(DOCUMENTS, st.integers(1, 20))
def test_packing_resumes_everywhere(documents, length):
    expected = [w.tobytes() for w in document_iterator(documents, length, 0)]
    iterator, restored = (document_iterator(documents, length, 0) for _ in range(2))
    for k in range(len(expected) + 1):
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        assert [w.tobytes() for w in restored] == expected[k:]
        next(iterator, None)


# Catalogue datasets


def write_catalogue_dataset(data_dir, name, splits, config=None, version="1.0.0"):
    """A dataset as tfds writes it: {split: documents} with an id and a text."""

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {"text": tfds.features.Text(), "id": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for k, text in enumerate(splits[split]):
                yield k, {"text": text, "id": k}

    Written.name = name
    with text_corpus.quiet():
        options = {"config": tfds.core.BuilderConfig(name=config)} if config else {}
        builder = Written(data_dir=data_dir, file_format="array_record", **options)
        builder.download_and_prepare()
    return Path(builder.data_dir)


TRAIN = [f"train document {k}: " + "word " * (k % 11) for k in range(60)]
HELD_OUT = [f"held out {k}: " + "other " * (k % 7) for k in range(25)]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("catalogue")
    write_catalogue_dataset(data_dir, "tales", {"train": TRAIN, "validation": HELD_OUT})
    write_catalogue_dataset(data_dir, "tested", {"train": TRAIN, "test": HELD_OUT})
    write_catalogue_dataset(data_dir, "trainonly", {"train": TRAIN})
    write_catalogue_dataset(data_dir, "tiny", {"train": ["a", "b"], "validation": HELD_OUT})
    write_catalogue_dataset(data_dir, "single", {"train": ["a" * 99]})
    write_catalogue_dataset(data_dir, "headless", {"test": HELD_OUT})
    write_catalogue_dataset(data_dir, "sized", {"train": TRAIN, "test": HELD_OUT}, config="small")
    write_catalogue_dataset(data_dir, "sized", {"train": TRAIN}, config="large")
    write_catalogue_dataset(data_dir, "older", {"train": TRAIN}, version="9.0.0")
    write_catalogue_dataset(data_dir, "older", {"train": TRAIN[:40]}, version="10.0.0")
    return data_dir


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", forbid)
    monkeypatch.setattr(socket, "getaddrinfo", forbid)


def rebuild_texts(batches) -> set[str]:
    """The complete documents in windows that follow each other."""
    return set(rebuild(rows(batches)).decode().split("\0")[1:-1])


def texts_within(batches) -> set[str]:
    """The documents that lie completely within some window."""
    return {text for row in rows(batches) for text in row.decode().split("\0")[1:-1]}


@pytest.fixture
def unshuffled(monkeypatch):
    """Catalogue windows in the order of the stream."""
    monkeypatch.setattr(data, "_SHUFFLED_TOGETHER", 1)


def test_catalogue_batches(catalogue, monkeypatch):
    monkeypatch.setattr(data, "_SHUFFLED_TOGETHER", 50)
    config = make_config("tfds:tales", catalogue)
    description = data.prepare(config, sequence_length=200).description
    assert description["name"] == "tales/1.0.0"
    assert description["documents"] == {"train": 60, "validation": 25}
    assert json.loads(json.dumps(description)) == description
    batches = take(iterate(config, sequence_length=200), 30)
    assert {batch.shape for batch in batches} == {(4, 201)}
    assert texts_within(batches) == set(TRAIN)
    other = take(iterate(config, sequence_length=200, seed=1), 30)
    assert not np.array_equal(batches, other)
    np.testing.assert_array_equal(take(iterate(config, sequence_length=200), 30), batches)


def test_catalogue_epoch_packs_every_document_once(catalogue, unshuffled):
    size = sum(len(text) + 1 for text in TRAIN)
    iterator = iterate(make_config("tfds:tales", catalogue), batch_size=1)
    windows = rows(take(iterator, 2 * size // L + 2))
    stream = rebuild(windows)
    epochs = [stream[:size], stream[size : 2 * size]]
    for epoch in epochs:
        assert sorted(epoch.decode().split("\0")) == sorted(["", *TRAIN])
    assert epochs[0] != epochs[1]


def test_catalogue_windows_are_shuffled(catalogue, monkeypatch):
    config = make_config("tfds:tales", catalogue)
    monkeypatch.setattr(data, "_SHUFFLED_TOGETHER", 1)
    ordered = rows(take(iterate(config, batch_size=1), 64))
    monkeypatch.setattr(data, "_SHUFFLED_TOGETHER", 64)
    shuffled = rows(take(iterate(config, batch_size=1), 64))
    assert sorted(shuffled) == sorted(ordered) and shuffled != ordered


def test_catalogue_processes_read_different_documents(catalogue, unshuffled):
    config = make_config("tfds:tales", catalogue)
    read = []
    for index in range(3):
        iterator = iterate(config, batch_size=1, process_index=index, process_count=3)
        windows = rows(take(iterator, 100))
        stream = rebuild(windows)
        read.append(stream.decode().split("\0")[:20])
    assert all(len(set(texts)) == 20 for texts in read)
    assert set().union(*read) == set(TRAIN)


@RESUME
@given(
    before=st.integers(0, 90),
    after=st.integers(1, 40),
    batch_size=st.sampled_from([1, 3]),
    through_json=st.booleans(),
)
def test_catalogue_iterator_resumes_exactly(
    catalogue, monkeypatch, before, after, batch_size, through_json
):
    """An epoch has about 200 windows, shuffled 64 by 64 (grain is slow where there are few)."""
    monkeypatch.setattr(data, "_SHUFFLED_TOGETHER", 64)
    monkeypatch.setattr(data, "_READ_TOGETHER", 3)
    monkeypatch.setattr(data, "_READ_AHEAD", grain.ReadOptions(1, prefetch_buffer_size=2))
    config = make_config("tfds:tales", catalogue)
    pair = [iterate(config, batch_size=batch_size) for _ in range(2)]
    check_resume(*pair, before, after, through_json)


@pytest.mark.parametrize("source", ["tales", "tested", "sized/small"])
def test_catalogue_validation_split(catalogue, source):
    config = make_config(f"tfds:{source}", catalogue)
    arguments = dict(sequence_length=100, batch_size=2)
    batches = validation(config, num_batches=99, **arguments)
    assert texts_within(batches) <= set(HELD_OUT)
    assert len(rows(batches)) == (sum(len(t) + 1 for t in HELD_OUT) - 1) // 100 // 2 * 2
    again = validation(config, num_batches=2, **arguments)
    np.testing.assert_array_equal(again, batches[:2])


def test_catalogue_without_validation_split_holds_out_documents(catalogue, unshuffled):
    config = make_config("tfds:trainonly", catalogue)
    dataset = data.prepare(config, sequence_length=L)
    assert dataset.description["documents"] == {"train": 45, "validation": 15}
    held_out = rebuild_texts(validation(config, batch_size=1, num_batches=9999))
    trained_on = rebuild_texts(take(iterate(config, batch_size=1), 400))
    assert len(held_out) >= 13 and len(trained_on) == 45
    assert not held_out & trained_on and held_out | trained_on <= set(TRAIN)


def test_catalogue_takes_the_newest_version(catalogue):
    """10.0.0, not 9.0.0 with the greater name; and not one that is still being written."""
    (catalogue / "older" / "incomplete.ABCDEF_11.0.0").mkdir(exist_ok=True)
    (catalogue / "older" / "incomplete.ABCDEF_11.0.0" / "dataset_info.json").write_text("{}")
    description = data.prepare(make_config("tfds:older", catalogue), sequence_length=L).description
    assert description["name"] == "older/10.0.0"
    assert sum(description["documents"].values()) == 40


def test_separators_within_a_document_vanish(tmp_path, unshuffled):
    write_catalogue_dataset(tmp_path, "nul", {"train": ["one\0two " * 9] * 3})
    batches = take(iterate(make_config("tfds:nul", tmp_path), batch_size=1), 20)
    assert b"onetwo" in b"".join(rows(batches))


@pytest.mark.parametrize(
    "source, kind, words",
    [
        ("lm1b", BrokenEnvironment, ["not in data_dir", "downloads nothing", "array_record"]),
        ("c4", BrokenEnvironment, ["not in data_dir", "without TensorFlow"]),
        ("wiki40b/en", BrokenEnvironment, ["tfds:wiki40b/en", "without TensorFlow"]),
        ("wikipedia", BrokenEnvironment, ["not in data_dir", "without TensorFlow"]),
        ("tiny_shakespear", InvalidInput, ["did you mean", "tfds:tiny_shakespeare"]),
        ("qqqqqq", InvalidInput, ["'qqqqqq'", "check the name"]),
        ("", InvalidInput, ["tfds:NAME/CONFIG"]),
        ("../tales", InvalidInput, ["tfds:NAME/CONFIG"]),
        ("tales:1.0.0", InvalidInput, ["tfds:NAME/CONFIG"]),
        ("sized", InvalidInput, ["tfds:sized/large", "tfds:sized/small"]),
        ("sized/medium", InvalidInput, ["tfds:sized/large", "tfds:sized/small"]),
        ("tales/small", InvalidInput, ["tfds:tales"]),
        ("tiny", InvalidInput, ["'train'", "one window of 17 bytes", "sequence_length"]),
        ("single", InvalidInput, ["{'train': 1}", "2 documents"]),
        ("headless", InvalidInput, ["{'test': 25}", "train split"]),
    ],
)
def test_catalogue_errors(catalogue, source, kind, words):
    check_error(kind, words, make_config(f"tfds:{source}", catalogue))


def test_catalogue_text_feature(catalogue):
    missing = make_config("tfds:tales", catalogue, text_feature="body")
    check_error(InvalidInput, ["'body'", "['id', 'text']"], missing)
    number = make_config("tfds:tales", catalogue, text_feature="id")
    check_error(InvalidInput, ["'id'", "not one text", "int64_list"], number)


def test_catalogue_dataset_of_another_format(tmp_path):
    folder = write_catalogue_dataset(tmp_path, "tales", {"train": TRAIN})
    for path in [*folder.glob("*array_record*"), folder / "dataset_info.json"]:
        renamed = path.with_name(path.name.replace("array_record", "tfrecord"))
        path.rename(renamed)
    information = folder / "dataset_info.json"
    information.write_text(information.read_text().replace("array_record", "tfrecord"))
    config = make_config("tfds:tales", tmp_path)
    check_error(BrokenEnvironment, [str(folder), "tfrecord", "array_record"], config)
