"""From documents to windows: one stream of bytes, cut into training examples."""

import collections
from collections.abc import Iterable
from typing import Any

import grain
import numpy as np

SEPARATOR = 0  # the token after every document; no document contains it


class CutWindows(grain.IterDataset):
    """Pieces of a stream (uint8 [n]) to windows (uint8 [sequence_length + 1]), exactly resumable.

    Window k starts at byte k * sequence_length of the stream: the last target of a window is the
    first input of the next, so every byte but the first is a target once. The tail that fills no
    window is dropped.

    grain's own ConcatThenSplit has no such overlap, and loses a document when its state went
    through JSON, as it does in a checkpoint (0.2.18: it compares a tuple with a list).
    """

    def __init__(self, pieces: grain.IterDataset, sequence_length: int):
        super().__init__(pieces)
        self._sequence_length = sequence_length

    def __iter__(self) -> grain.DatasetIterator:
        return _WindowIterator(iter(self._parent), self._sequence_length)


class _WindowIterator(grain.DatasetIterator):
    def __init__(self, pieces: grain.DatasetIterator, sequence_length: int):
        super().__init__(pieces)
        self._sequence_length = sequence_length
        # The pieces that the next window may touch, each with the parent's state before it.
        self._pieces: collections.deque[tuple[dict[str, Any], np.ndarray]] = collections.deque()
        self._start = 0  # of the next window, within the first piece

    def __next__(self) -> np.ndarray:
        end = self._start + self._sequence_length + 1
        available = sum(len(piece) for _, piece in self._pieces)
        while available < end:
            state = self._parent.get_state()
            piece = next(self._parent)
            self._pieces.append((state, piece))
            available += len(piece)
        window = np.empty(self._sequence_length + 1, np.uint8)
        start, filled = self._start, 0
        for _, piece in self._pieces:
            part = piece[start : start + len(window) - filled]
            window[filled : filled + len(part)] = part
            start, filled = 0, filled + len(part)
        self._start += self._sequence_length
        # The next window starts with the last byte of this one, so a piece is always left.
        while self._start >= len(self._pieces[0][1]):
            self._start -= len(self._pieces.popleft()[1])
        return window

    def get_state(self) -> dict[str, Any]:
        pieces = self._pieces[0][0] if self._pieces else self._parent.get_state()
        return {"pieces": pieces, "start": self._start}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["pieces"])
        self._pieces.clear()
        self._start = state["start"]


def join_documents(documents: Iterable[bytes]) -> np.ndarray:
    """A piece of the stream: the documents, each followed by SEPARATOR."""
    separator = bytes([SEPARATOR])
    return np.frombuffer(b"".join(document + separator for document in documents), np.uint8)
