"""The random number generators of the process, and those a user hands over by name.

Every state is a plain value, a tensor or an array: nothing here is ever pickled. Nothing here blocks.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import msgspec
import numpy as np
import torch
from blake3 import blake3
from numpy.random.mtrand import get_bit_generator

from everstep.errors import Mismatch, Unsupported
from everstep.format.manifest import RUN

_WORDS_OF_PYTHON = 4
_NUMPY_BYTES = 625 * 4


def capture(*, devices: bool = True) -> dict[str, object]:
    """The states of the global RNGs, without consuming anything.

    Returns:
        "python": `random.getstate()` with its words as an array (uint32 [625]); "numpy": the legacy global
        state as a dict (`keys`: uint32 [624]); "torch": uint8 CPU tensor; with `devices`, where the
        accelerator is in use, "cuda": one uint8 CPU tensor per device, and "mps": one such tensor.

    Raises:
        Unsupported: numpy's global generator was exchanged for another than MT19937.
    """
    name, keys, pos, has_gauss, cached = _numpy_state()
    state: dict[str, object] = {
        "python": _packed_python(random.getstate()),
        "numpy": {"name": name, "keys": keys, "pos": pos, "has_gauss": has_gauss, "cached_gaussian": cached},
        "torch": torch.get_rng_state(),
    }
    if devices and _cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if devices and torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore(state: Mapping[str, Any]) -> list[str]:
    """Put the states of `capture` back; an RNG that `state` does not name stays as it is.

    Returns:
        Why the result is only approximate, one reason each; empty: exact.
    """
    if "python" in state:
        random.setstate(_python_state(state["python"]))
    if "numpy" in state:
        legacy = state["numpy"]
        parts = (legacy[key] for key in ("name", "keys", "pos", "has_gauss", "cached_gaussian"))
        np.random.set_state(cast(Any, tuple(parts)))
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    return _restore_cuda(state.get("cuda", ())) + _restore_mps(state.get("mps"))


def derived(state: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """States for a rank that has none of its own, out of those of another rank: independent of these, and
    the same whenever they are made of the same. Each generator is seeded with a digest of its state there
    and the rank. Those of an MPS device, which cannot be made, are left out.
    """
    made: dict[str, Any] = {}
    if "python" in state:
        made["python"] = _packed_python(random.Random(_seed(state["python"], rank)).getstate())
    if "numpy" in state:
        fresh = np.random.RandomState(_words(state["numpy"], rank)).get_state(legacy=True)
        assert isinstance(fresh, tuple)
        made["numpy"] = dict(zip(("name", "keys", "pos", "has_gauss", "cached_gaussian"), fresh, strict=True))
    if "torch" in state:
        made["torch"] = torch.Generator().manual_seed(_seed(state["torch"], rank)).get_state()
    if "cuda" in state:
        # A counter that starts at zero, behind its seed.
        made["cuda"] = [
            torch.frombuffer(bytearray(struct.pack("<Qq", _seed(one, rank), 0)), dtype=torch.uint8)
            for one in state["cuda"]
        ]
    return made


def described(objects: Mapping[str, object]) -> bytes:
    """What ranks compare to find out whose generators are alike: the global ones, and those among the
    objects. Some hundred bytes."""
    # By the names of their leaves: an object may have that of a kind.
    states = {
        **{f"{RUN}/{kind}": state for kind, state in capture().items()},
        **{name: generator_state(one) for name, one in objects.items() if is_generator(one)},
    }
    return msgspec.json.encode({name: _seed(state, 0) for name, state in states.items()})


def alike(described: Sequence[bytes], rank: int) -> dict[str, int]:
    """By name the lowest rank whose generator is in the same state as this rank's.

    Args:
        described: what each rank has, in order.
    """
    each = [msgspec.json.decode(one, type=dict[str, int]) for one in described]
    return {
        name: next(number for number, other in enumerate(each) if other.get(name) == state)
        for name, state in each[rank].items()
    }


def reseed(obj: object, state: Any, rank: int) -> None:
    """Seed a generator object as `derived` does, out of a state of `generator_state` of another rank's."""
    seed = _seed(state, rank)
    if isinstance(obj, torch.Generator):
        obj.manual_seed(seed)
    elif isinstance(obj, random.Random):
        obj.seed(seed)
    elif isinstance(obj, np.random.Generator):
        obj.bit_generator.state = type(obj.bit_generator)(seed).state
    elif isinstance(obj, np.random.RandomState):
        obj.seed(_words(state, rank))


def _seed(state: Any, rank: int) -> int:
    """63 bits that tell states and ranks apart."""
    digest = blake3(b"everstep rank\n" + struct.pack("<q", rank))
    _hash(digest, state)
    return int.from_bytes(digest.digest(8), "little") >> 1


def _words(state: Any, rank: int) -> list[int]:
    seed = _seed(state, rank)
    return [seed & 0xFFFFFFFF, seed >> 32]


def _hash(digest: blake3, state: Any) -> None:
    if isinstance(state, Mapping):
        for key, value in state.items():
            digest.update(f"{key}:".encode())
            _hash(digest, value)
    elif isinstance(state, list | tuple):
        for value in state:
            _hash(digest, value)
    elif isinstance(state, torch.Tensor | np.ndarray):
        digest.update(np.ascontiguousarray(np.asarray(state)).tobytes())
    else:
        digest.update(repr(state).encode())


def fingerprint(*, devices: bool = True) -> bytes:
    """Eight bytes that change when one of the global RNGs is drawn from or seeded.

    Equal states have equal fingerprints in every process. Takes some 20 microseconds. One draw goes unseen:
    the second of a pair of normals of numpy's legacy generator, which was made together with the first.
    """
    _, words, gauss = random.getstate()
    # Python's generator is a Mersenne twister too: a draw moves its position, and when the position wraps,
    # every word is made anew. So position and a few words tell any two states of a run apart, and
    # packing all 625 integers would cost as much as everything else together.
    python = struct.pack(
        f"<{_WORDS_OF_PYTHON}IId", *words[:_WORDS_OF_PYTHON], words[-1], 0.0 if gauss is None else gauss
    )
    digest = blake3(python)
    digest.update(_numpy_words())
    digest.update(torch.get_rng_state().numpy().data)
    if devices and _cuda_in_use():
        for generator in torch.cuda.default_generators:
            digest.update(generator.get_state().numpy().data)
    if devices and torch.backends.mps.is_available():
        digest.update(torch.mps.get_rng_state().numpy().data)
    return digest.digest(8)


@contextmanager
def aside() -> Iterator[None]:
    """A block whose draws from the global RNGs (not the devices') leave no trace."""
    before = capture(devices=False)
    try:
        yield
    finally:
        restore(before)


def is_generator(obj: object) -> bool:
    """Whether `obj` is a generator whose state can be taken and put back."""
    known = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    return isinstance(obj, known) and not isinstance(obj, random.SystemRandom)


def generator_state(obj: object) -> object | None:
    """The state of a generator object; None when `obj` is not one that has a state.

    Known are `torch.Generator`, `random.Random`, `np.random.Generator` and `np.random.RandomState`.
    """
    if not is_generator(obj):
        return None
    if isinstance(obj, torch.Generator):
        return obj.get_state()
    if isinstance(obj, random.Random):
        return _packed_python(obj.getstate())
    if isinstance(obj, np.random.Generator):
        return cast(object, _packed(obj.bit_generator.state))
    return cast(object, _packed(cast(np.random.RandomState, obj).get_state(legacy=False)))


def set_generator_state(obj: object, state: Any) -> None:
    """Put a state of `generator_state` back into `obj`.

    Raises:
        Mismatch: `obj` is no known generator, or the state is that of another kind.
    """
    try:
        _set(obj, state)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise Mismatch(
            f"The state in the snapshot does not fit the generator of type {type(obj).__name__}: {error}",
            next="use the kind of generator that the snapshot was taken with.",
        ) from error


def _set(obj: object, state: Any) -> None:
    if isinstance(obj, torch.Generator):
        obj.set_state(state)
    elif isinstance(obj, random.Random):
        obj.setstate(_python_state(state))
    elif isinstance(obj, np.random.Generator):
        obj.bit_generator.state = _unpacked(state)
    elif isinstance(obj, np.random.RandomState):
        obj.set_state(_unpacked(state))
    else:
        raise TypeError("not a random generator")


def _numpy_state() -> tuple[str, Any, int, int, float]:
    state = np.random.get_state()
    if not isinstance(state, tuple):
        raise Unsupported(
            "The global generator of numpy was exchanged for one that is not MT19937",
            next="keep numpy's global generator, and hand your own over by name.",
        )
    return cast("tuple[str, Any, int, int, float]", state)


def _numpy_words() -> memoryview | bytes:
    """Keys and position of numpy's global generator: 2500 bytes.

    `get_state` copies key by key in Python objects (45 microseconds), so the words are read where they lie.
    """
    generator = get_bit_generator()
    words = _words_of(generator)
    return words if words is not None else _words_by_get_state()


@lru_cache(maxsize=1)
def _words_of(generator: Any) -> memoryview | None:
    """A view of the words of an MT19937; None when they do not lie as known, or it is another generator.

    The cache keeps `generator`, and with it the memory that is viewed, alive.
    """
    if type(generator) is not np.random.MT19937:
        return None
    words = memoryview((ctypes.c_uint8 * _NUMPY_BYTES).from_address(generator.ctypes.state_address)).cast("B")
    return words if words == _words_by_get_state() else None


def _words_by_get_state() -> bytes:
    _, keys, pos, *_ = _numpy_state()
    return bytes(keys.data) + struct.pack("=i", pos)


def _packed_python(state: Any) -> tuple[Any, ...]:
    """Its 625 integers take longer as values than all other values of a snapshot together."""
    version, words, gauss = state
    return version, np.array(words, dtype=np.uint32), gauss


def _python_state(state: Any) -> tuple[Any, ...]:
    """`random.setstate` insists on tuples of its own integers; older snapshots have those."""
    version, words, gauss = state
    return version, tuple(words.tolist() if isinstance(words, np.ndarray) else words), gauss


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _restore_cuda(states: Any) -> list[str]:
    there = torch.cuda.device_count() if states and torch.cuda.is_available() else 0
    for device, state in zip(range(there), states, strict=False):
        torch.cuda.set_rng_state(state, device)
    if there == len(states) or not states:
        return []
    return [f"the snapshot has RNG states of {len(states)} CUDA devices, this process has {there}"]


def _restore_mps(state: Any) -> list[str]:
    if state is None:
        return []
    if not torch.backends.mps.is_available():
        return ["the snapshot has the RNG state of an MPS device, this process has none"]
    torch.mps.set_rng_state(state)
    return []


def _packed(state: Any) -> Any:
    """The state with its 128-bit integers (of PCG64) as hexadecimal text, which every codec can hold."""
    if isinstance(state, Mapping):
        return {key: _packed(value) for key, value in state.items()}
    return hex(state) if isinstance(state, int) and state >> 63 else state


def _unpacked(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _unpacked(value) for key, value in state.items()}
    return int(state, 16) if isinstance(state, str) and state.startswith("0x") else state
