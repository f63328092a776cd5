from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.errors import Mismatch, Unsupported
from everstep.state import rng
from examples import examples


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draws() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_capture_consumes_nothing_and_restore_repeats() -> None:
    seed_all(1)
    undisturbed = [draws() for _ in range(5)]

    seed_all(1)
    first = draws()  # leaves half a pair of normals in both Python's and numpy's generator
    state = rng.capture()
    rest = [draws() for _ in range(4)]
    assert [first, *rest] == undisturbed

    seed_all(99)
    assert rng.restore(state) == []
    assert [draws() for _ in range(4)] == rest


def test_capture_has_the_documented_form() -> None:
    state: dict[str, Any] = rng.capture()
    version, words, gauss = state["python"]
    assert (version, gauss) == (3, random.getstate()[2])
    assert (words.dtype, words.shape) == (np.uint32, (625,))
    assert set(state["numpy"]) == {"name", "keys", "pos", "has_gauss", "cached_gaussian"}
    assert state["numpy"]["keys"].dtype == np.uint32
    assert state["numpy"]["keys"].shape == (624,)
    assert state["torch"].dtype == torch.uint8
    assert ("cuda" in state) == torch.cuda.is_initialized()


@pytest.mark.parametrize("kind", [list, tuple])
def test_restore_takes_the_words_of_python_as_older_snapshots_have_them(kind: type[Any]) -> None:
    version, words, gauss = random.getstate()
    expected = random.random()
    rng.restore({"python": kind([version, kind(words), gauss])})
    assert random.random() == expected


def test_restore_leaves_alone_what_the_state_does_not_name() -> None:
    seed_all(3)
    expected = draws()
    seed_all(3)
    assert rng.restore({}) == []
    assert draws() == expected


def test_states_of_missing_devices_are_reasons() -> None:
    there = torch.cuda.device_count()
    states = [torch.zeros(16, dtype=torch.uint8)] * (there + 2)
    if there:
        pytest.skip("this machine has CUDA devices, whose states the zeros would replace")
    assert rng.restore({"cuda": states}) == [
        f"the snapshot has RNG states of {there + 2} CUDA devices, this process has {there}"
    ]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has MPS")
def test_the_state_of_a_missing_mps_device_is_a_reason() -> None:
    assert len(rng.restore({"mps": torch.zeros(16, dtype=torch.uint8)})) == 1


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.getrandbits(1),
        np.random.rand,
        lambda: np.random.randint(2),
        lambda: torch.rand(()),
        lambda: torch.randn(()),
        lambda: torch.randperm(3),
    ],
)
def test_a_fingerprint_moves_with_each_draw(draw: Any) -> None:
    seed_all(5)
    seen = {rng.fingerprint()}
    for _ in range(700):  # more than the 624 words of a Mersenne twister
        draw()
        seen.add(rng.fingerprint())
    assert len(seen) == 701


def test_half_a_pair_of_normals_is_in_the_fingerprint_of_python() -> None:
    seed_all(5)
    random.gauss(0, 1)
    before = rng.fingerprint()
    random.gauss(0, 1)
    assert rng.fingerprint() != before


def test_the_fingerprint_is_that_of_the_state() -> None:
    seed_all(5)
    before, state = rng.fingerprint(), rng.capture()
    assert len(before) == 8
    assert rng.fingerprint() == before
    draws()
    rng.restore(state)
    assert rng.fingerprint() == before


def test_the_words_of_numpy_lie_where_they_are_read() -> None:
    np.random.seed(4)
    np.random.rand(3)
    assert isinstance(rng._numpy_words(), memoryview)
    assert rng._numpy_words() == rng._words_by_get_state()


@pytest.mark.filterwarnings("ignore:get_state and legacy")
def test_another_global_generator_of_numpy_is_unsupported() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(Unsupported, match="not MT19937"):
            rng.capture()
        with pytest.raises(Unsupported, match="not MT19937"):
            rng.fingerprint()
    finally:
        np.random.set_bit_generator(before)


def test_what_happens_aside_leaves_no_trace() -> None:
    seed_all(6)
    expected = draws()
    seed_all(6)
    with rng.aside():
        draws()
    assert draws() == expected


GENERATORS: dict[str, Any] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "python": random.Random,
    "numpy": np.random.default_rng,
    "numpy mt": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "numpy philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "numpy sfc": lambda seed: np.random.Generator(np.random.SFC64(seed)),
    "numpy legacy": np.random.RandomState,
}


def draw_from(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    if isinstance(generator, random.Random):
        return generator.gauss(0, 1)
    return float(generator.standard_normal())


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    return value is None or type(value) in (float, str, bytes, torch.Tensor, np.ndarray)


@pytest.mark.parametrize("kind", GENERATORS)
@given(seed=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1), drawn=st.integers(0, 5))
@settings(max_examples=examples(10), deadline=None, derandomize=True, database=None)
def test_a_generator_goes_on_where_it_was(kind: str, seed: int, other: int, drawn: int) -> None:
    generator = GENERATORS[kind](seed)
    for _ in range(drawn):
        draw_from(generator)
    state = rng.generator_state(generator)
    assert is_plain(state)
    expected = [draw_from(generator) for _ in range(4)]

    resumed = GENERATORS[kind](other)
    rng.set_generator_state(resumed, state)
    assert [draw_from(resumed) for _ in range(4)] == expected


@pytest.mark.parametrize("obj", [None, 3, "rng", object(), random, random.SystemRandom(), np.random.PCG64(1)])
def test_other_objects_have_no_generator_state(obj: object) -> None:
    assert rng.generator_state(obj) is None
    assert not rng.is_generator(obj)


@pytest.mark.parametrize(
    ("kind", "other"),
    [pair for pair in itertools.permutations(GENERATORS, 2) if set(pair) != {"numpy mt", "numpy legacy"}],
)
def test_the_state_of_another_kind_is_a_mismatch(kind: str, other: str) -> None:
    generator = GENERATORS[kind](1)
    expected = draw_from(GENERATORS[kind](1))
    with pytest.raises(Mismatch, match="does not fit the generator of type"):
        rng.set_generator_state(generator, rng.generator_state(GENERATORS[other](2)))
    assert draw_from(generator) == expected
