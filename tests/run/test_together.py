"""Ranks that reach each other through a real TCPStore; here each is a thread."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from everstep.errors import Damaged, EverstepError, Mismatch, NotFound, Unavailable
from everstep.run.ranks import link as links
from everstep.run.ranks.agreement import Agreement, Due
from everstep.run.ranks.link import Job, job_of_many
from everstep.run.ranks.messages import Became, Propose, Wish
from everstep.run.ranks.together import LAST, Alone, Patience, Together

pytestmark = pytest.mark.slow

PATIENCE = Patience(wait_s=60, hold_s=60)
SHORT = Patience(wait_s=0.3, hold_s=0.1)

TCPStore: Any = torch._C._distributed_c10d.TCPStore


@pytest.fixture
def store() -> Any:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)


def _end_all(ranks: Iterable[Together]) -> None:
    """Rank 0 ends all, so it must not be waited for by the others."""
    for one in ranks:
        one.end()


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


class Ranks:
    """All ranks of a job: does the same with each, at the same time."""

    def __init__(self, store: Any, ranks: int, patience: Patience = PATIENCE, *, meet: bool = True) -> None:
        links.OPENED.clear()
        self.each = []
        for rank in range(ranks):
            links.OPENED.clear()  # As in processes of their own.
            self.each.append(Together(Job(rank, ranks, store.clone), "runs/gpt@main", patience))
        if meet:
            self.results(Together.meet)

    def all(self, action: Callable[[Together], Any]) -> list[Future[Any]]:
        with ThreadPoolExecutor(len(self.each)) as pool:
            return [pool.submit(action, one) for one in self.each]

    def results(self, action: Callable[[Together], Any]) -> list[Any]:
        return [one.result() for one in self.all(action)]

    def errors(self, action: Callable[[Together], Any]) -> list[BaseException | None]:
        return [one.exception() for one in self.all(action)]


@pytest.fixture
def three(store: Any) -> Iterator[Ranks]:
    ranks = Ranks(store, 3)
    yield ranks
    _end_all(ranks.each)


def test_each_gives_something_and_all_get_all(three: Ranks) -> None:
    for _ in range(2):
        given = three.results(lambda one: one.link.share("names", bytes([one.rank])))
        assert given == [[b"\0", b"\1", b"\2"]] * 3
    assert three.results(lambda one: one.link.share("other", b"")) == [[b"", b"", b""]] * 3


def test_who_trains_does_not_wait_for_long(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.run.ranks.together.END_S", 0.1)
    ranks = Ranks(store, 2)
    with pytest.raises(Unavailable, match="rank 0 of 2 did not answer for 0 s"):
        ranks.each[1].share("the first step/groups", b"")


def test_rank_0_leads(three: Ranks) -> None:
    assert three.results(lambda one: one.led(lambda: f"by {one.rank}".encode())) == [b"by 0"] * 3


def test_an_error_of_rank_0_is_raised_on_all(three: Ranks) -> None:
    def fail() -> bytes:
        raise Mismatch("the disk is round", kept="nothing was touched", next="another")

    own, *others = three.errors(lambda one: one.led(fail))
    assert isinstance(own, Mismatch)
    assert str(own) == "the disk is round; nothing was touched. Next: another"
    assert [str(one) for one in others] == [f"rank 0: {own}"] * 2
    assert all(isinstance(one, Mismatch) for one in others)


def test_what_one_cannot_do_none_has_done(three: Ranks) -> None:
    def do(one: Together) -> int:
        if one.rank == 1:
            raise KeyError("weight")
        return one.rank

    errors = three.errors(lambda one: one.all_of("the state", lambda: do(one)))
    assert isinstance(errors[1], KeyError)
    assert isinstance(errors[0], Unavailable)
    assert str(errors[0]) == str(errors[2]) == "rank 1: KeyError: 'weight'."
    assert three.results(lambda one: one.all_of("the state", lambda: one.rank)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kinds", "raised"),
    [
        ((Damaged, None, NotFound), (Damaged, Damaged, Damaged)),
        ((Damaged, Mismatch, NotFound), (Mismatch, Mismatch, Mismatch)),
        ((None, None, NotFound), (NotFound, NotFound, NotFound)),
    ],
)
def test_all_ranks_raise_the_same_kind(
    three: Ranks, kinds: tuple[type[EverstepError] | None, ...], raised: tuple[type[EverstepError], ...]
) -> None:
    """Else one of them would look for another snapshot while another gives up."""

    def do(one: Together) -> None:
        kind = kinds[one.rank]
        if kind is not None:
            raise kind("no")

    errors = three.errors(lambda one: one.all_of("the state", lambda: do(one)))
    assert tuple(type(one) for one in errors) == raised


def test_a_rank_that_does_not_come_is_named(store: Any) -> None:
    ranks = Ranks(store, 3, SHORT, meet=False)
    with pytest.raises(Unavailable, match="ranks 0, 2 of 3 did not answer"):
        ranks.each[1].meet()
    with pytest.raises(Unavailable, match="rank 2 of 3 did not answer"):
        ranks.each[0].meet()
    met = Ranks(store, 3, SHORT)
    with pytest.raises(Unavailable, match="ranks 0, 2 of 3 did not answer"):
        met.each[1].link.share("the state", b"")
    with pytest.raises(Unavailable, match="rank 0 of 3 did not answer"):
        met.each[2].led(lambda: b"")


@pytest.mark.parametrize("late", [0, 1, 2])
def test_what_ranks_of_an_earlier_start_said_is_not_heard(store: Any, late: int) -> None:
    """torchrun keeps its store when it starts ranks again; some of them are there before others."""
    for start in range(3):
        ranks = Ranks(store, 3, meet=False)
        first = ranks.each[late - 1], ranks.each[late - 2]
        with ThreadPoolExecutor(3) as pool:
            meeting = [pool.submit(one.meet) for one in first]
            until(lambda: store.num_keys() > 0, "nobody is there")
            meeting.append(pool.submit(ranks.each[late].meet))
            assert [one.result() for one in meeting] == [None] * 3
        told = ranks.results(lambda one, start=start: one.led(lambda: b"%d" % start))
        assert told == [b"%d" % start] * 3
        mine = ranks.results(lambda one, start=start: one.link.share("names", bytes([start, one.rank])))
        assert mine == [[bytes([start, rank]) for rank in range(3)]] * 3
        ranks.results(
            lambda one: one.start(0, lambda: True, lambda: True, lambda became: None, lambda text: None)
        )
        if start < 2:
            ranks.each[0].ask(Wish("take", at=1))  # Its answer stays in the store.
        dues = [one.passed(step) for step in range(1, 30) for one in ranks.each]
        if start == 2:
            assert dues == [None] * len(dues)
        _end_all(ranks.each)


def test_two_runs_of_a_job_do_not_hear_each_other(store: Any) -> None:
    first, second = Ranks(store, 2, meet=False), []
    for rank in range(2):
        links.OPENED.clear()
        links.OPENED["runs/gpt@main"] = 1
        second.append(Together(Job(rank, 2, store.clone), "runs/gpt@main", SHORT))
    first.results(Together.meet)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Together.meet, second))
    first.each[0].link.tell(b"x")
    with pytest.raises(Unavailable):
        second[1].link.told()


class Trainer:
    """Steps at a pace of its own, and takes what is due."""

    def __init__(self, together: Together, steps: int, seed: int, step: threading.Barrier | None) -> None:
        self.together = together
        self._step = step
        self.taken: list[tuple[int, int]] = []
        self.told: list[Became] = []
        self.warned: list[str] = []
        self.news: list[Any] = []
        self._steps = steps
        self._random = random.Random(seed * 100 + together.rank)
        self.last: Due | None = None

    def run(self) -> None:
        one = self.together
        one.start(0, lambda: True, lambda: True, self.told.append, self.warned.append)
        for step in range(1, self._steps + 1):
            if self._random.random() < 0.02:
                one.ask(Wish("take", at=step + 1, wait=True))
            if one.leads and step % 50 == 1:
                one.ask(Wish("50 steps", at=step + 40))
            time.sleep(self._random.random() * 0.002)
            if self._step is not None:
                self._step.wait(60)
            due = one.passed(step)
            if due is not None:
                self.taken.append((due.number, step))
                if one.leads:
                    one.became(Became(due.number, "a" * 64))
            self.news += one.news()
        self.last = one.last(self._steps, False)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("lockstep", [True, False])
def test_ranks_at_paces_of_their_own_take_the_same_steps(store: Any, seed: int, lockstep: bool) -> None:
    """In a training each step holds them together; they do not rely on it."""
    ranks = Ranks(store, 4)
    barrier = threading.Barrier(4) if lockstep else None
    trainers = [Trainer(one, 300, seed, barrier) for one in ranks.each]
    ranks.results(lambda one: trainers[one.rank].run())
    first = trainers[0]
    assert first.taken
    assert all(one.taken == first.taken for one in trainers)
    assert [one.last for one in trainers] == [None] * 4, "nobody wanted a last one"
    assert [(one.warned, one.news) for one in trainers] == [([], [])] * 4
    _end_all(ranks.each)


def test_what_is_proposed_while_a_rank_begins_is_heard(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank may wish for a snapshot before this one goes on from its first moment of listening."""
    proposed = threading.Event()
    starting = threading.Thread.start

    class Listening(threading.Thread):
        def start(self) -> None:
            starting(self)
            if self.name == "everstep-hear":
                assert proposed.wait(60)

    real = Agreement.proposed

    def hear(self: Agreement, propose: Propose) -> None:
        real(self, propose)
        if self.rank == 1:
            proposed.set()

    monkeypatch.setattr(Agreement, "proposed", hear)
    ranks = Ranks(store, 2)
    first, second = ranks.each

    def begin(one: Together) -> None:
        one.start(0, lambda: True, lambda: True, lambda became: None, lambda text: None)

    begin(first)
    first.ask(Wish("10m"))
    monkeypatch.setattr(threading, "Thread", Listening)
    begin(second)
    hub = first._talk._hub  # type: ignore[union-attr]
    until(lambda: hub.number == 2, "agreed upon")
    step = first.ahead
    dues = [[due for at in range(1, step + 1) if (due := one.passed(at)) is not None] for one in ranks.each]
    assert [len(one) for one in dues] == [1, 1]
    _end_all(ranks.each)


def test_the_last_take_is_one_that_all_have(three: Ranks) -> None:
    three.results(
        lambda one: one.start(7, lambda: True, lambda: one.rank < 2, lambda became: None, lambda text: None)
    )
    due = Due(LAST, Wish("close", wait=True), anew=True)
    assert three.results(lambda one: one.last(7, one.rank == 1)) == [due] * 3
    assert three.results(lambda one: one.last(7 + one.rank, True)) == [None] * 3, "not at the same step"


def test_what_became_of_a_take_is_told_to_all(three: Ranks) -> None:
    heard: list[tuple[int, Became]] = []
    done = threading.Semaphore(0)

    def hear(rank: int, became: Became) -> None:
        heard.append((rank, became))
        done.release()

    three.results(
        lambda one: one.start(
            0, lambda: True, lambda: True, lambda became: hear(one.rank, became), lambda text: None
        )
    )
    three.each[0].became(Became(1, "b" * 64, b"{}"))
    for _ in range(3):
        assert done.acquire(timeout=60)
    assert sorted(rank for rank, _ in heard) == [0, 1, 2]
    assert {became for _, became in heard} == {Became(1, "b" * 64, b"{}")}


def test_a_rank_that_died_while_it_spoke_holds_nobody_up(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "STUCK_S", 0.05)
    ranks = Ranks(store, 2, Patience(wait_s=60, hold_s=0.2))
    ranks.results(
        lambda one: one.start(0, lambda: True, lambda: True, lambda became: None, lambda text: None)
    )
    hub = ranks.each[0]._talk._hub  # type: ignore[union-attr]
    assert hub is not None
    ranks.each[0].ask(Wish("10m"))
    until(lambda: hub.number == 2, "agreed upon by two living ranks")
    store.add("everstep/runs/gpt@main#1/h/1/n", 1)  # And never a word.
    for one in ranks.each:
        one.passed(1)
        one.passed(2)
    ranks.each[0].ask(Wish("10m"))
    until(lambda: hub.number == 3, "heard all the same")
    _end_all(ranks.each)


def test_one_timer_looks_after_all_that_rank_0_says(store: Any) -> None:
    def timers() -> int:
        return sum(thread.name == "everstep-late" for thread in threading.enumerate())

    before = timers()
    ranks = Ranks(store, 2)
    heard: list[Became] = []
    ranks.results(lambda one: one.start(0, lambda: True, lambda: True, heard.append, lambda text: None))
    for number in range(50):
        ranks.each[0].became(Became(number, "a" * 64))
    until(lambda: len(heard) == 100, "both have heard all")
    assert timers() <= before + 1
    _end_all(ranks.each)


def test_alone_nothing_is_waited_for() -> None:
    alone = Alone()
    assert alone.led(lambda: b"x") == b"x"
    assert alone.all_of("the state", lambda: 3) == 3


def test_a_process_that_is_alone_has_no_job() -> None:
    assert job_of_many({}) is None
    assert job_of_many({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_ranks_that_cannot_reach_each_other_are_refused() -> None:
    with pytest.raises(Mismatch, match="init_process_group"):
        job_of_many({"WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "host", "MASTER_PORT": "1"})


def test_the_agents_store_is_used_where_there_is_no_process_group(store: Any) -> None:
    job = job_of_many(
        {
            "WORLD_SIZE": "8",
            "RANK": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "2",
        }
    )
    assert job is not None
    assert (job.rank, job.ranks) == (3, 8)
    job.connect().set("here", b"x")
    assert store.get("everstep/here") == b"x"


def _sample(number: int, one: Together) -> list[bytes]:
    return one.samples(number, bytes([one.rank]))


def test_what_ranks_captured_is_gathered_by_rank_0(three: Ranks) -> None:
    three.results(
        lambda one: one.start(0, lambda: True, lambda: True, lambda became: None, lambda text: None)
    )
    for number in (1, 2):
        given = three.results(partial(_sample, number))
        assert given == [[b"\0", b"\1", b"\2"], [b"\1"], [b"\2"]]


def test_a_rank_that_says_nothing_is_not_waited_for_too_long(store: Any) -> None:
    ranks = Ranks(store, 2, SHORT)
    ranks.results(
        lambda one: one.start(0, lambda: True, lambda: True, lambda became: None, lambda text: None)
    )
    with pytest.raises(Unavailable, match="not all ranks said"):
        Together.samples(ranks.each[0], 1, b"")
    _end_all(ranks.each)
