"""Keyed shuffles of the numbers [0, n), one number at a time and without a table.

Full.      P is a 6-round Feistel network (Luby and Rackoff 1988, SIAM J. Comput. 17(2)) on b = max(2, bits of n - 1)
           bits, repeated while its output is >= n (cycle walking: Black and Rogaway 2002, CT-RSA, "Ciphers with
           arbitrary finite domains"). Round i: (L, R) -> (R, L xor F(R, key_i)), the halves of b - b//2 and b//2 bits
           changing places; F is the low bits of splitmix64's finaliser of R + key_i (Steele et al. 2014, OOPSLA).
           The keys are the 8-byte little-endian words of shake_256(name).
Windowed.  For shards that are fetched: [0, n) is k runs of r = ceil(n / k) consecutive numbers, the last perhaps
           shorter. The full runs change places by P (name "NAME:runs"); the short one stands at slot q, the word that
           follows those keys, mod the number of runs. The line of runs is cut into windows of w r numbers, and each
           is shuffled within itself by P (name "NAME:window:NUMBER"), so that a window is read from at most w + 2
           runs and then left.
Cost.      0.2-0.4 us a number (windowed: twice that) in calls of thousands.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


def shuffled(indices: np.ndarray, size: int, names: list[str], which: np.ndarray) -> np.ndarray:
    """The images of `indices` under permutations of [0, size); number i is under the one that names[which[i]] keys."""
    keys = np.stack([_words(name)[:_ROUNDS] for name in names], axis=1)
    return _permuted(indices, size, keys[:, which])


def window_shuffled(indices: np.ndarray, size: int, name: str, *, runs: int, window: int) -> np.ndarray:
    """The images of `indices` under the windowed permutation of [0, size) that `name` keys."""
    run = -(-size // runs)
    images = np.empty_like(indices)
    number = indices // (window * run)
    last = (size - 1) // (window * run)
    for inside in (number < last, number == last):
        here = np.flatnonzero(inside)
        if len(here):
            windows, which = np.unique(number[here], return_inverse=True)
            names = [f"{name}:window:{value}" for value in windows.tolist()]
            first = number[here] * window * run
            length = min(window * run, size - int(first[0]))
            images[here] = first + shuffled(indices[here] - first, length, names, which)
    return _line_of_runs(images, size, run, f"{name}:runs")


def _line_of_runs(places: np.ndarray, size: int, run: int, name: str) -> np.ndarray:
    """The number at each place when the runs of [0, size) have changed places."""
    full, short = divmod(size, run)
    slot = int(_words(name)[_ROUNDS]) % (full + 1)  # of the short run, which lies last in [0, size)
    first = slot * run if short else size
    after = places >= first + short
    in_short = (places >= first) & ~after
    place = np.where(in_short, 0, places - short * after)
    numbers = shuffled(place // run, full, [name], np.zeros(len(place), np.int64)) * run + place % run
    return np.where(in_short, full * run + places - first, numbers)


def _words(name: str) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * (_ROUNDS + 1)), dtype="<u8")


def _permuted(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The images of `indices` [n] under the permutations of [0, size) that the keys [rounds, n] name."""
    bits = max(2, (size - 1).bit_length())
    images = _feistel(indices.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(images >= size)
    while len(outside):
        images[outside] = _feistel(images[outside], bits, keys[:, outside])
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, 2**bits). An even number of rounds restores the widths of the halves."""
    right_bits, left_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = _splitmix64(right + key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _splitmix64(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
