"""All entries that stand between spaces in captions, as a join of the captions' tokens with a trie
of the entries' tokens (the matching of MetaCLIP, arXiv:2309.16671, sec. 3.2).

`" " + entry + " "` is a substring of the spaced caption exactly where the entry's tokens are a run
of the caption's tokens. So all positions of a batch walk down the trie together: one look-up of
(node, next token) a level, and most stop at the first.
Price: 120,000 entries take 0.3 s and 8 MB; benchmarks/results/matching.md has the speed.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from curation.metadata.tokens import KeyTable, Vocabulary, cut, pieces

_MAX_PAIRS = 1 << 22  # (caption, entry) pairs that wait for sorting; many only in made-up captions


class TokenJoin:
    """entries: distinct strings; their ids are positions.

    max_bytes: text that is worked on at a time; it takes 15 to 70 times as much memory. A caption
        is never parted, so a longer one takes more.
    """

    def __init__(self, entries: Sequence[str], *, max_bytes: int = 1 << 18):
        self.max_bytes = max_bytes
        self._num_entries = max(1, len(entries))
        runs = [entry.encode().split(b" ") for entry in entries]
        # tokens that begin an entry come first: their numbers are the trie's first nodes
        begin = dict.fromkeys(run[0] for run in runs)
        self._num_first = len(begin)
        begin.update((token, None) for run in runs for token in run)
        self._vocabulary = Vocabulary(list(begin))
        self._grow(runs, {token: number for number, token in enumerate(begin, 1)})

    def _grow(self, runs: list[list[bytes]], number: dict[bytes, int]) -> None:
        """Nodes level by level: 0 is no node, then one per distinct run of tokens that begins an
        entry.
        """
        depth = np.fromiter(map(len, runs), np.int64, len(runs))
        tokens = np.fromiter((number[token] for run in runs for token in run), np.int64)
        first = np.cumsum(depth) - depth
        node, num_nodes = tokens[first], self._num_first + 1
        entry = np.arange(len(runs))
        ends, keys, level = [(node[depth == 1], entry[depth == 1])], [np.empty(0, np.int64)], 1
        while len(entry := entry[depth[entry] > level]):
            key, child = np.unique(
                node[entry] << 32 | tokens[first[entry] + level], return_inverse=True
            )
            node[entry] = num_nodes + child
            num_nodes += len(key)
            keys.append(key)
            level += 1
            done = entry[depth[entry] == level]
            ends.append((node[done], done))
        key = np.concatenate(keys)
        children = self._num_first + 1 + np.arange(len(key))
        self._edges = KeyTable(key.astype(np.uint64)[:, None], children)
        self._terminal = np.full(num_nodes, -1, np.int64)
        for nodes, ids in ends:
            self._terminal[nodes] = ids
        self._inner = np.zeros(num_nodes, bool)
        self._inner[key >> 32] = True
        # what is looked up often fits the cache better when it is small
        self._continues = np.zeros(len(number) + 1, bool)
        self._continues[key & 0xFFFFFFFF] = True

    def match(self, captions: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, ids) of `encoded` captions: those of caption i are ids[offsets[i]:
        offsets[i + 1]], ascending and distinct; offsets int64 (len + 1), ids int32.
        """
        counts, ids = [np.zeros(1, np.int64)], [np.empty(0, np.int32)]
        for piece in pieces(captions, self.max_bytes):
            row, entry = np.divmod(self._pairs(piece), self._num_entries)
            counts.append(np.bincount(row, minlength=len(piece)))
            ids.append(entry.astype(np.int32))
        return np.cumsum(np.concatenate(counts)), np.concatenate(ids)

    def _pairs(self, captions: pa.Array) -> np.ndarray:
        """caption * num_entries + entry of each match: ascending, distinct, int64."""
        tokens = cut(captions)
        number = self._vocabulary.numbers(tokens)
        position = np.flatnonzero(number != 0)
        node = number[position]
        begins = node <= self._num_first
        position, node = position[begins], node[begins]
        pairs, waiting = [], 0
        while len(position):
            entry = self._terminal[node]
            ending = np.flatnonzero(entry >= 0)
            pairs.append(tokens.row[position[ending]] * self._num_entries + entry[ending])
            waiting += len(ending)
            if waiting > _MAX_PAIRS:
                pairs, waiting = [_distinct(pairs)], 0
            inner = np.flatnonzero(self._inner[node])
            # the token after a caption's last one is unknown: no walk leaves its caption
            position, node = position[inner] + 1, node[inner]
            follows = np.flatnonzero(self._continues[number[position]])
            position, node = position[follows], node[follows]
            key = node.astype(np.uint64) << np.uint64(32) | number[position].astype(np.uint64)
            child = self._edges.find(key)
            found = np.flatnonzero(child)
            position, node = position[found], child[found]
        return _distinct(pairs)


def _distinct(pairs: list[np.ndarray]) -> np.ndarray:
    if not pairs:
        return np.empty(0, np.int64)
    ordered = np.sort(np.concatenate(pairs))
    return ordered[np.diff(ordered, prepend=-1) != 0]
