"""Ranks agree on the step that is taken, whatever the order in which they are and hear what."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Damaged
from everstep.run.ranks import messages
from everstep.run.ranks.agreement import Agreement, Due
from everstep.run.ranks.hub import Hub, named
from everstep.run.ranks.messages import (
    Ask,
    Became,
    Decide,
    End,
    Late,
    Lost,
    Message,
    Promise,
    Propose,
    Request,
    Wish,
)

TIME = Wish("10m")


class Rank:
    def __init__(self, number: int, post: Callable[[Request], None]) -> None:
        self.room = True
        self.steps = 0
        self.agreement = Agreement(number, 0, post, lambda: self.room, clock=lambda: float(self.steps))
        self.holds = False
        self.taken: list[tuple[int, int]] = []
        self.missed: list[int] = []
        self.declined: list[int] = []
        self.inbox: deque[Message] = deque()

    def step(self) -> None:
        """Finish one more, if it may."""
        if self.holds:
            return
        self.steps += 1
        self.holds = self.agreement.arrives(self.steps)
        if not self.holds:
            self.leave()

    def leave(self) -> None:
        self.holds = False
        due = self.agreement.leaves(self.steps)
        if due is not None:
            self.taken.append((due.number, self.steps))
        self.read_news()

    def read_news(self) -> None:
        for one in self.agreement.news():
            (self.missed if one.missed else self.declined).append(one.number)

    def hear(self) -> None:
        if not self.inbox:
            return
        message = self.inbox.popleft()
        if isinstance(message, Propose):
            self.agreement.proposed(message)
        elif isinstance(message, Decide):
            self.agreement.decided(message)
            if self.holds and self.agreement._promised is None:
                self.leave()


class Job:
    """Ranks and a hub whose words take their time."""

    def __init__(self, ranks: int, lockstep: bool = True) -> None:
        self.posted: deque[Request] = deque()
        self.ranks = [Rank(number, self.posted.append) for number in range(ranks)]
        self.hub = Hub(ranks)
        self.lockstep = lockstep

    def step(self, rank: Rank) -> None:
        if not self.lockstep or rank.steps <= min(one.steps for one in self.ranks):
            rank.step()

    def serve(self) -> None:
        if self.posted:
            self.tell(self.hub.hear(self.posted.popleft()))

    def tell(self, said: list[Message]) -> None:
        for rank in self.ranks:
            rank.inbox.extend(said)

    def do(self, what: str, which: int) -> bool:
        """One of the events that both properties know; whether it was a wish."""
        rank = self.ranks[which % len(self.ranks)]
        if what == "step":
            self.step(rank)
        elif what == "serve":
            self.serve()
        elif what == "hear":
            rank.hear()
        elif what == "ask":
            rank.agreement.ask(TIME)
        return what == "ask"

    def settle(self) -> None:
        """All goes on until nothing more is under way."""
        while self.posted or any(rank.inbox for rank in self.ranks):
            self.serve()
            for rank in self.ranks:
                rank.hear()
        while any(rank.agreement._dues for rank in self.ranks):
            for rank in self.ranks:
                self.step(rank)
        for rank in self.ranks:
            rank.read_news()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "serve", "hear", "ask", "give up", "late"]), st.integers(0, 4)
    ),
    max_size=200,
)


@given(st.integers(1, 5), EVENTS, st.booleans())
def test_all_ranks_take_the_same_steps_in_any_order_of_events(
    ranks: int, events: list[tuple[str, int]], lockstep: bool
) -> None:
    job = Job(ranks, lockstep)
    asked = sum([job.do(what, which) for what, which in events])
    job.settle()
    first = job.ranks[0]
    assert all(rank.taken == first.taken for rank in job.ranks)
    assert all(not rank.missed and not rank.holds for rank in job.ranks)
    assert bool(first.taken) == bool(asked)
    assert len(first.taken) <= asked


@given(st.integers(1, 5), EVENTS)
def test_who_gives_up_waiting_misses_and_never_takes_another_step(
    ranks: int, events: list[tuple[str, int]]
) -> None:
    job = Job(ranks, lockstep=False)
    for what, which in events:
        job.do(what, which)
        rank = job.ranks[which % ranks]
        if what == "give up" and rank.holds:
            rank.leave()
        elif what == "late" and job.hub.gathers:
            job.tell(job.hub.hear(Late(job.hub.number)))
    job.settle()
    steps: dict[int, set[int]] = {}
    for rank in job.ranks:
        for number, step in rank.taken:
            steps.setdefault(number, set()).add(step)
    assert all(len(found) == 1 for found in steps.values()), "one step for each take"
    for number in steps:
        for rank in job.ranks:
            took = number in dict(rank.taken)
            assert took != (number in rank.missed), "taken, or known to be missed"


def test_a_step_that_is_wished_for_is_had_exactly() -> None:
    job = Job(3)
    job.ranks[0].agreement.ask(Wish("100 steps", at=100))
    job.settle()
    assert [rank.taken for rank in job.ranks] == [[(1, 100)]] * 3


def test_a_wish_for_a_step_that_is_to_be_taken_anyway_adds_nothing() -> None:
    job = Job(2)
    for rank in job.ranks:
        rank.agreement.ask(Wish("take", at=5, wait=True))
    job.settle()
    assert [rank.taken for rank in job.ranks] == [[(1, 5)]] * 2


def test_a_rank_without_room_declines_for_all_unless_somebody_waits() -> None:
    job = Job(3)
    job.ranks[1].room = False
    job.ranks[0].agreement.ask(TIME)
    job.settle()
    assert [(rank.taken, rank.declined) for rank in job.ranks] == [([], [1])] * 3
    job.ranks[2].agreement.ask(Wish("take", wait=True))
    job.settle()
    assert all([number for number, _ in rank.taken] == [2] for rank in job.ranks)


def test_who_stops_stops_all_and_nothing_is_taken_after_that() -> None:
    job = Job(2)
    job.ranks[0].agreement.ask(TIME)
    job.serve()
    job.ranks[1].agreement.ask(Wish("SIGTERM", stop=True))
    while job.posted:
        job.serve()
        for rank in job.ranks:
            rank.hear()
    job.ranks[0].agreement.ask(Wish("10m"))
    job.settle()
    dues = [rank.taken for rank in job.ranks]
    assert dues[0] == dues[1]
    assert len(dues[0]) == 1


def test_a_silent_rank_costs_that_snapshot_and_no_other() -> None:
    hub = Hub(3)
    assert hub.hear(Ask(0, 7, TIME)) == [Propose(1)]
    assert hub.hear(Promise(0, 1, 8, True)) == []
    assert hub.hear(Promise(2, 1, 9, True)) == []
    assert hub.hear(Late(1)) == [Decide(1, 0, TIME, "rank 1 did not answer in time")]
    assert hub.hear(Promise(1, 1, 9, True)) == [], "too late"
    assert hub.hear(Late(1)) == []
    assert hub.hear(Ask(0, 9, TIME)) == [Propose(2)]
    hub.hear(Promise(0, 2, 11, True))
    hub.hear(Promise(1, 2, 12, True))
    assert hub.hear(Promise(2, 2, 10, True)) == [Decide(2, 12, TIME)]


def test_many_silent_ranks_are_named_in_short() -> None:
    assert named([3]) == "rank 3"
    assert named(range(12)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


def test_it_waits_at_the_promised_step_until_it_is_decided() -> None:
    posted: list[Any] = []
    one = Agreement(0, 0, posted.append, lambda: True, hold_s=60)
    one.proposed(Propose(1))
    assert posted == [Promise(0, 1, 1, True)]
    decided = threading.Timer(0.01, lambda: one.decided(Decide(1, 1, TIME)))
    decided.start()
    assert one.passed(1) == Due(1, TIME)
    decided.join()


def test_it_waits_no_longer_than_it_may() -> None:
    one = Agreement(0, 0, lambda request: None, lambda: True, hold_s=0.001)
    one.proposed(Propose(1))
    assert one.passed(1) is None
    one.decided(Decide(1, 1, TIME))
    (missed,) = one.news()
    assert missed.missed
    assert missed.number == 1


def test_a_step_with_nothing_due_waits_for_nothing() -> None:
    one = Agreement(0, 0, lambda request: None, lambda: True, hold_s=60)
    assert one.passed(1) is None
    assert one.held_s == 0


REQUESTS: list[Request] = [
    Ask(3, 7, TIME),
    Promise(1, 2, 3, False),
    Late(4),
    Became(5, "a" * 64, b"{}"),
    Lost(),
    End(),
]


@pytest.mark.parametrize("one", REQUESTS, ids=lambda one: type(one).__name__)
def test_requests_come_as_they_went(one: Request) -> None:
    assert messages.request(messages.encode(one)) == one


@given(st.binary(max_size=200))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    for read in (messages.request, messages.message):
        with contextlib.suppress(Damaged):
            read(data)


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(Damaged, match="bytes"):
        messages.message(bytes(messages.MAX_MESSAGE_BYTES + 1))
