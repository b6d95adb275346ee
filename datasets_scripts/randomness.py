"""Randomness that depends on names and numbers alone, never on what was drawn before.

An example is drawn from a state that is a hash of (task, config, split, seed) and of its index. So any example can be
made again alone, shards can be made in any order, and neighbouring seeds or indices share nothing. The numbers come
from splitmix64 (Steele et al., 2014, "Fast splittable pseudorandom number generators").
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

_HERE = Path(__file__).resolve().parent

SPLITS = ("train", "validation", "test", "extrapolation")

# The hundredths of all instances that belong to a split. `extrapolation` differs by size, and takes them all.
_HUNDREDTHS = {"train": (0, 90), "validation": (90, 95), "test": (95, 100), "extrapolation": (0, 100)}

# So many draws of one example that all fall into other splits mean that this split has none.
MAX_ATTEMPTS = 100_000

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def _open_cache() -> str:
    """A folder for machine code made from the source of this package as it is now; "" where none can be written."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        for path in sorted(_HERE.glob("[!.]*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        folder = _HERE / "__pycache__" / f"compiled-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


_CACHE = _open_cache()


class _Kept:
    """numba's cache of one function, without the errors: what cannot be read or kept is compiled again."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """What was compiled for this signature; None if nothing, or nothing whole, is there."""
        try:
            return self._cache.load_overload(signature, target)
        except Exception:  # cut short, say, by a power cut: a pickle may end in any of them
            self._forget()
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps it, unless the disk is full."""
        try:
            self._cache.save_overload(signature, compiled)
        except OSError:
            self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            self._cache.flush()


def compiled(function: Callable[..., Any]) -> Any:
    """`function` as machine code, made when it is first called and kept on disk for the processes that follow.

    numba compares only the file of a kept function, and would not see that one which it calls has changed in another:
    the data would be those of the old one. Hence a folder whose name tells the source of the whole package, and
    functions of other packages are not kept.
    """
    made: Any = numba.njit(nogil=True)(function)
    if not _CACHE or Path(function.__code__.co_filename).resolve().parent != _HERE:
        return made
    settings: Any = numba.config
    configured = settings.CACHE_DIR
    settings.CACHE_DIR = _CACHE  # read as numba chooses where to keep
    try:
        made.enable_caching()
    finally:
        settings.CACHE_DIR = configured
    if not Path(made._cache.cache_path).is_relative_to(_CACHE):  # it chose another place, as this one cannot be written
        return numba.njit(nogil=True)(function)
    made._cache = _Kept(made._cache)
    return made


def stream_key(*parts: Any) -> np.uint64:
    """A 64-bit hash of names and numbers, the same on every machine."""
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def hundredths(split: str) -> tuple[int, int]:
    """(first, one past the last) of the hundredths of instances that belong to `split`."""
    return _HUNDREDTHS[split]


@compiled
def mix(bits: np.uint64) -> np.uint64:
    """A bijection of 64 bits in which each bit of the result depends on all bits."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


@compiled
def open_state(state: np.ndarray, key: np.uint64, index: int, attempt: int) -> None:
    """Sets `state` (1,), uint64, to where draw number `attempt` of example `index` begins."""
    state[0] = mix(mix(key ^ mix(np.uint64(index) + _GOLDEN)) + np.uint64(attempt))


@compiled
def next_bits(state: np.ndarray) -> np.uint64:
    """The next 64 random bits; moves `state` (1,)."""
    state[0] += _GOLDEN
    return mix(state[0])


@compiled
def below(state: np.ndarray, bound: int) -> int:
    """A whole number in 0..bound-1, uniform up to bound / 2^32."""
    return int(((next_bits(state) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@compiled
def choose(state: np.ndarray, cumulative: np.ndarray) -> int:
    """An index i with probability proportional to cumulative[i] - cumulative[i-1]; `cumulative` (n,) ends in 1."""
    uniform = np.float64(next_bits(state) >> np.uint64(11)) * 2.0**-53
    return min(int(np.searchsorted(cumulative, uniform, side="right")), len(cumulative) - 1)


@compiled
def shuffle(state: np.ndarray, values: np.ndarray) -> None:
    """Puts the rows of `values` (n, k) into a uniformly random order, in place (Fisher and Yates)."""
    for last in range(len(values) - 1, 0, -1):
        other = below(state, last + 1)
        # Number by number: the assignment of a slice takes seconds to compile.
        for column in range(values.shape[1]):
            values[last, column], values[other, column] = values[other, column], values[last, column]


@compiled
def extend_hash(code: np.uint64, value: int) -> np.uint64:
    """The hash of a sequence, longer by `value`."""
    return mix((code + _GOLDEN) ^ mix(np.uint64(value)))


@compiled
def hundredth_of(instance: np.uint64) -> int:
    """The hundredth 0..99 that an instance belongs to, from the hash of its canonical form."""
    return int(instance % np.uint64(100))
