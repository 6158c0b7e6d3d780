"""Captions as numbers: cut like `spaced` cuts them, millions of tokens at a time, without a Python
object per token.

A token is what stands between spaces of the spaced caption. It may be empty ("a  b" holds one), and
the seven marks are tokens of their own. UTF-8 lets all of it happen on bytes: the separators are
ASCII, and no byte of a longer character looks like ASCII.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MARKS = b",.;:?!`"
_SPACE, _OWN, _LAST = 1, 2, 3  # bytes that part words; the latter two are tokens themselves
_KIND = bytes(_OWN if c in MARKS else _SPACE if c in b" \t\n\r" else 0 for c in range(256))
# Two bytes that UTF-8 never uses: the end of a caption, and a NUL, as words are padded with zeros.
_END, _NOTHING = pa.scalar(b"\xfe", pa.large_binary()), pa.scalar(b"", pa.large_binary())
_NO_NUL = bytes([0xFF, *range(1, 256)])
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_WORD = 8
_LONG = 2 * _WORD  # bytes of the longest token that is looked up by its words


@dataclass(frozen=True)
class Cut:
    """Tokens of a batch, caption after caption, each caption followed by one token that is nobody's
    ("\\n"), so that no run of tokens reaches into the next caption.

    text: uint8, padded. start, length: bytes, (T,). row: caption of each token, (T,) int64.
    """

    text: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row: np.ndarray


def encoded(captions: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    """The captions as one Arrow array of bytes, large_binary.

    Raises ValueError naming the position of what is no string or cannot be written as UTF-8.
    """
    if isinstance(captions, str):
        raise ValueError("captions is one string: give a list of strings")
    array = captions
    if not isinstance(captions, pa.Array | pa.ChunkedArray):
        try:
            array = pa.array(captions)
        except (pa.ArrowException, UnicodeEncodeError):
            raise _not_text(captions) from None
    is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    if array.null_count or (len(array) and not is_text):
        raise _not_text(array.to_pylist() if captions is array else captions)
    if isinstance(array, pa.ChunkedArray):
        array = array.cast(pa.large_string()).combine_chunks()
    return array.cast(pa.large_binary())


def _not_text(captions: Sequence[object]) -> ValueError:
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            return ValueError(
                f"caption {position} is {caption!r}, not a string: drop such pairs first"
            )
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            return ValueError(f"caption {position} is not text ({error}): drop such pairs first")
    raise AssertionError("Arrow refuses what Python calls text")


def cut(captions: pa.Array) -> Cut:
    """The tokens of `encoded` captions.

    Price: up to 30 times the bytes of the captions in memory; see `pieces`.
    """
    # one byte more per caption marks its end
    joined = pc.binary_join_element_wise(captions, _END, _NOTHING)
    ends = np.frombuffer(joined.buffers()[1], np.int64)[1 : len(captions) + 1] - 1
    data = bytearray(joined.buffers()[2] or b"")[: ends[-1] + 1 if len(ends) else 0]
    kind = np.frombuffer(data.translate(_KIND), np.uint8)
    kind[ends] = _LAST
    gap = np.flatnonzero(kind != 0)
    kind = kind[gap]
    own = np.flatnonzero(kind >= _OWN)
    # A gap ends a word, perhaps an empty one; a mark is the token behind its word.
    word = np.arange(len(gap)) + np.cumsum(kind >= _OWN)
    word[own] -= 1
    start = np.empty(len(gap) + len(own), np.int64)
    length = np.ones(len(start), np.int64)
    after = np.concatenate([np.zeros(1, np.int64), gap[:-1] + 1])
    start[word] = after
    length[word] = gap - after
    start[word[own] + 1] = gap[own]
    if 0 in data:
        data = data.translate(_NO_NUL)
    last = word[np.flatnonzero(kind == _LAST)] + 1
    row = np.repeat(np.arange(len(ends)), np.diff(last, prepend=-1))
    return Cut(np.frombuffer(data + bytes(_LONG), np.uint8), start, length, row)


def pieces(captions: pa.Array, max_bytes: int) -> list[pa.Array]:
    """Slices of at most `max_bytes` of text, or of one longer caption."""
    offsets = np.frombuffer(captions.buffers()[1], np.int64)
    offsets = offsets[captions.offset : captions.offset + len(captions) + 1]
    found, start = [], 0
    while start < len(captions):
        stop = int(np.searchsorted(offsets, offsets[start] + max_bytes, side="right")) - 1
        stop = max(start + 1, min(stop, len(captions)))
        found.append(captions.slice(start, stop - start))
        start = stop
    return found


class KeyTable:
    """An exact map from keys, (n, k) uint64 and distinct, to values, (n,) above 0 and distinct:
    open addressing, all keys of a batch looked up together.

    A table that stays, because Arrow's `index_in` and `dictionary_encode` build theirs for every
    batch. A third full on average, so most keys are found at first sight.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray):
        num_keys, width = keys.shape
        bits = max(4, int(2 * num_keys).bit_length())
        self._shift = np.uint64(64 - bits)
        self._last = (1 << bits) - 1
        self._value = np.zeros(1 << bits, np.int64)
        self._keys = np.zeros((width, int(values.max(initial=0)) + 1), np.uint64)  # of each value
        self._keys[:, values] = keys.T
        slot, waiting = self._slot([*keys.T]), values
        while len(waiting):
            free = np.flatnonzero(self._value[slot] == 0)
            _, first = np.unique(slot[free], return_index=True)  # one key a slot
            placed = free[first]
            self._value[slot[placed]] = waiting[placed]
            slot = (np.delete(slot, placed) + 1) & self._last
            waiting = np.delete(waiting, placed)

    def _slot(self, keys: list[np.ndarray]) -> np.ndarray:
        mixed = keys[0] * np.uint64(0x9E3779B97F4A7C15)
        for key in keys[1:]:
            mixed ^= key * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= self._shift
        return mixed.view(np.int64)

    def find(self, *keys: np.ndarray) -> np.ndarray:
        """The value of each key, 0 for those that are not in the table; int64."""
        return self._look(self._slot([*keys]), [*keys])

    def _look(self, slot: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        stored = self._value[slot]
        same = self._keys[0][stored] == keys[0]
        for column, key in zip(self._keys[1:], keys[1:], strict=True):
            same &= column[stored] == key
        value = stored * same
        further = np.flatnonzero(value != stored)
        if len(further):
            slot = (slot[further] + 1) & self._last
            value[further] = self._look(slot, [key[further] for key in keys])
        return value


class Vocabulary:
    """Numbers tokens: 1..n in the given order, 0 for all others. tokens: distinct, bytes."""

    def __init__(self, tokens: Sequence[bytes]):
        sized: tuple[dict[bytes, int], ...] = ({}, {}, {})  # of one word, of two, of more
        for number, token in enumerate(tokens, 1):
            size = (len(token) > _WORD) + (len(token) > _LONG)
            sized[size][token.translate(_NO_NUL)] = number
        self._tables = [_table(sized[0], 1), _table(sized[1], 2)]
        self._long = sized[2]
        self._longest = max(map(len, self._long), default=0)

    def numbers(self, cut: Cut) -> np.ndarray:
        """The number of each token, (T,) int64."""
        # the eight bytes from each position on
        view = np.ndarray((len(cut.text) - _WORD + 1,), "<u8", cut.text, strides=(1,))
        first = view[cut.start] & _LOW_BYTES[np.minimum(cut.length, _WORD)]
        number = self._tables[0].find(first)
        longer = np.flatnonzero(cut.length > _WORD)
        rest = cut.length[longer] - _WORD
        second = view[cut.start[longer] + _WORD] & _LOW_BYTES[np.minimum(rest, _WORD)]
        number[longer] = self._tables[1].find(first[longer], second)
        for i in longer[rest > _WORD].tolist():
            start, length = int(cut.start[i]), int(cut.length[i])
            token = cut.text[start : start + length].tobytes() if length <= self._longest else b""
            number[i] = self._long.get(token, 0)
        return number


def _table(tokens: dict[bytes, int], words: int) -> KeyTable:
    text = b"".join(token.ljust(words * _WORD, b"\0") for token in tokens)
    keys = np.frombuffer(text, "<u8").reshape(-1, words)
    return KeyTable(keys, np.fromiter(tokens.values(), np.int64, len(tokens)))
