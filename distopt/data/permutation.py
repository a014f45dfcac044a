"""A pseudo-random permutation without memory, in which any entry can be computed by itself."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


class Permutation:
    """A keyed permutation of 0, 1, ..., count - 1: a Feistel network with cycle walking.

    A network permutes 2^(2k) >= count numbers: in each round the halves (l, r) of k bits become
    (r, l xor f(key, r)) with a hash f. A number that leaves the range is permuted again until it is back in it, less
    than four times on average.

    Args:
        count: The number of entries, 1 to 2^62.
        key: Numbers that determine the permutation.

    Reference: M. Luby, C. Rackoff: How to construct pseudorandom permutations. SIAM J. Comput., 1988. J. Black,
    P. Rogaway: Ciphers with arbitrary finite domains. CT-RSA, 2002.
    """

    def __init__(self, count: int, *key: int) -> None:
        self.count = count
        self._half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Return the entries at some indices, int64."""
        found = self._network(indices.astype(np.uint64))
        while (outside := found >= np.uint64(self.count)).any():
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_hash(right ^ key) & self._mask)
        return left << self._half | right


def _hash(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, a permutation of 64-bit numbers of which all bits depend on all."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ numbers >> np.uint64(shift)) * np.uint64(factor)
    return numbers ^ numbers >> np.uint64(31)
