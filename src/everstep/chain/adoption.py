"""Opening a run that has replicas: whose writer one becomes everywhere, and what its own store lacks.

The order is that of any takeover: first the lease, in the chain's own store and in each replica that answers,
under one number above all that there were; only then it is looked at what is there. So who wrote before, on
whatever host, finds out before its next head record, and nothing of his is overlooked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from everstep.chain.doomed import note_pruned
from everstep.chain.fence import fence_former, put_fence
from everstep.chain.history import Chain, refuse_foreign
from everstep.chain.lease import Lease, newest
from everstep.chain.mirror import hold, numbers, of_one_line, refuse_another, same_object
from everstep.chain.names import is_object
from everstep.chain.sending import Sending, fetched
from everstep.errors import (
    Conflict,
    Damaged,
    EverstepError,
    Fenced,
    Mismatch,
    NotFound,
    Unavailable,
)
from everstep.events import BroughtBack, Sink, Skipped, Warned
from everstep.format import keys, record
from everstep.format.record import HeadRecord
from everstep.store.base import Store
from everstep.store.replicated import ReplicatedStore

LOOK_S = 15.0
"""A replica that has not answered by then counts as away: the run begins without it."""

RELEASE_S = 5.0

SEGMENTS = 64
LEASES = 1000
"""So many of the newest are brought back."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asked(Generic[Answer]):
    """What a store answered; one of `answer` and `error` is None."""

    store: Store
    answer: Answer | None
    error: EverstepError | None


def ask_all(
    stores: Sequence[Store], question: Callable[[Store], Answer], within_s: float = LOOK_S
) -> list[Asked[Answer]]:
    """Ask all stores at once; who does not answer in time is `Unavailable`, and goes on trying unheard."""
    found: dict[int, Asked[Answer]] = {}
    died: list[BaseException] = []
    changed = threading.Condition()

    def ask(number: int, store: Store) -> None:
        asked: Asked[Answer]
        try:
            asked = Asked(store, question(store), None)
        except EverstepError as error:
            asked = Asked(store, None, error)
        except Exception as error:
            asked = Asked(store, None, Unavailable(f"{store.url} failed ({type(error).__name__}: {error})"))
        except BaseException as error:
            died.append(error)
            asked = Asked(store, None, Unavailable(f"{store.url} failed"))
        with changed:
            found[number] = asked
            changed.notify_all()

    for number, store in enumerate(stores):
        threading.Thread(target=ask, args=(number, store), name="everstep-replica", daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(found) == len(stores), within_s)
        late = Unavailable(f"no answer within {within_s:.0f} s")
        answers = [found.get(number, Asked(store, None, late)) for number, store in enumerate(stores)]
    if died:
        raise died[0]
    return answers


class Replicas:
    """The replicas of a run, as it opens.

    Args:
        stores: where they are, or are to be.
        emit: is told what happens.
        within_s: how long to wait for one that does not answer.

    Attributes:
        near: those that answered, and have the chain.
    """

    def __init__(self, stores: Sequence[Store], emit: Sink, within_s: float = LOOK_S) -> None:
        self.stores = tuple(stores)
        self.near: list[Store] = []
        self._emit = emit
        self._within_s = within_s
        self._away: dict[Store, EverstepError] = {}

    def chain_record(self) -> bytes | None:
        """What the replicas say of the chain, for one whose own store has none; None where they are empty.

        Raises:
            Mismatch: they are of several chains.
            Unavailable: none has it, and one does not answer: a run is not begun anew that may be there.
        """
        found: bytes | None = None
        for asked in ask_all(self.stores, _chain_record, self._within_s):
            if asked.error is not None:
                self._note_away(asked.store, asked.error)
            elif asked.answer is not None:
                if found is not None and found != asked.answer:
                    raise Mismatch(
                        f"the replicas are of different chains ({asked.store.url} and one before it)",
                        kept="nothing was touched",
                        next="name the replicas of one chain",
                    )
                found = asked.answer
        if found is None and self._away:
            store, error = next(iter(self._away.items()))
            raise Unavailable(
                f"there is no chain here, and the replica {store.url}, which may have the run, does not "
                f"answer ({error.problem})",
                kept="nothing was touched",
                next="the same again when it is back; without the replica, to begin anew",
            )
        return found

    def take(self, chain: Chain, branch: str) -> Lease:
        """Become the writer of the branch, here and in all replicas that answer.

        Raises:
            Conflict: a living process of this machine is the writer.
            Mismatch: a replica is another chain, or something else is there.
        """
        while True:
            self._look(chain)
            taken = ask_all(self.near, lambda store: newest(store, branch), self._within_s)
            lease = Lease.take(chain.store, branch, max((one.answer or 0 for one in taken), default=0))
            held = ask_all(self.near, partial(self._held, chain, branch, lease), self._within_s)
            lost = [one.error for one in held if isinstance(one.error, Fenced | Conflict)]
            self._near_are(held)
            if not lost:
                return lease
            lease.release()
            self.let_go(chain, branch, lease, ())
            if isinstance(lost[0], Conflict):
                raise lost[0]
            # Somebody else has taken it at the same moment: then that one is to be followed.

    @staticmethod
    def _held(chain: Chain, branch: str, lease: Lease, store: Store) -> bool:
        """Take the lease in a replica. Whether its last writer wrote by way of another first store."""
        before = newest(store, branch)
        foreign = bool(before) and not same_object(
            chain.store, store, keys.numbered(keys.lease(branch), before)
        )
        hold(chain.store, store, branch, lease.number)
        return foreign

    def _look(self, chain: Chain) -> None:
        def is_there(store: Store) -> bool:
            try:
                refuse_another(chain, Chain(store))
            except NotFound:
                refuse_foreign(store)
                return False
            return True

        self._near_are(ask_all(self.stores, is_there, self._within_s), only=True)

    def _near_are(self, answers: Sequence[Asked[bool]], only: bool = False) -> None:
        self.near = []
        for asked in answers:
            if asked.error is None:
                if asked.answer or not only:
                    self.near.append(asked.store)
            elif isinstance(asked.error, Mismatch):
                raise asked.error
            else:
                self._note_away(asked.store, asked.error)
        self._foreign = {one.store for one in answers if one.answer} if not only else set()

    def _note_away(self, store: Store, error: EverstepError) -> None:
        if store not in self._away and not isinstance(error, Fenced | Conflict):
            self._emit(
                Warned(
                    f"the replica {store.url} does not answer ({error.problem}); it gets what it lacks later"
                )
            )
        self._away.setdefault(store, error)

    def let_go(self, chain: Chain, branch: str, lease: Lease, unsent: Collection[str]) -> None:
        """The lease was released: say so in the replicas that have all there is. Where that fails, the next
        writer takes it over as it would a dead one's."""
        key = keys.numbered(keys.lease(branch), lease.number + 1)

        def release(store: Store) -> None:
            mine = keys.numbered(keys.lease(branch), lease.number)
            if newest(store, branch) == lease.number and same_object(chain.store, store, mine):
                store.put(key, [bytes(fetched(chain.store, key))])

        near = [one for one in self.stores if one.url not in unsent and one not in self._away]
        ask_all(near, release, RELEASE_S)

    # -- what the first store lacks -----------------------------------------------------------------------

    def adopt(self, chain: Chain, branch: str, lease: Lease, wanted: bool = True) -> None:
        """Bring the branch's newest snapshot back from a replica where the chain's own store is behind it;
        durable on return. Blocks while it is got, verified and stored: then it is restored from there, and
        nothing is got twice.

        Args:
            wanted: whether the run may go on from what is there.

        Raises:
            Mismatch: a replica is ahead, and nothing is wanted of it.
            Conflict: the two have gone on differently; nothing was touched.
            Fenced: the lease was lost meanwhile.
            Damaged: replicas have snapshots, and none of them is whole.
        """
        here = numbers(chain.store).get(branch, set())
        found: list[tuple[int, Store, set[int]]] = []
        for asked in ask_all(self.near, lambda store: numbers(store).get(branch, set()), self._within_s):
            if asked.error is not None:
                self._note_away(asked.store, asked.error)
            elif asked.answer:
                found.append((max(asked.answer), asked.store, asked.answer))
                self._refuse_parted(chain.store, asked.store, branch, here, asked.answer)
        ahead = [one for one in found if one[0] > max(here, default=0)]
        if not ahead:
            return
        ahead.sort(key=lambda one: -one[0])
        _, best, have = ahead[0]
        if not wanted:
            raise Mismatch(
                f"{best.url} has snapshots on branch {branch!r}, and resume='never' forbids to go on",
                kept="nothing was touched",
                next="resume='auto', or another path",
            )
        for _, other, theirs in found:
            self._refuse_parted(best, other, branch, have, theirs)
        self._bring_back(chain, branch, lease, best, [one for _, one, _ in ahead])

    @staticmethod
    def _refuse_parted(one: Store, other: Store, branch: str, of_one: set[int], of_other: set[int]) -> None:
        if of_one_line(one, other, branch, of_one, of_other):
            return
        raise Conflict(
            f"branch {branch!r} has gone on differently in {one.url} and in {other.url}: each has snapshots "
            "that the other lacks",
            kept="both are as they were",
            next=f"everstep -r {one.url} copy {branch}@head {other.url} --as {branch}-here, then move "
            f"{one.url} away; or leave the replica out",
        )

    def _bring_back(
        self, chain: Chain, branch: str, lease: Lease, best: Store, holders: Sequence[Store]
    ) -> None:
        there = Chain(best)
        theirs = Lease(best, lease.number, branch)
        if best in self._foreign:
            fence_former(there, theirs)
        note_pruned(chain.store)
        self._bring_leases(chain.store, best, branch, lease.number)
        source = ReplicatedStore(best, [one for one in holders if one is not best])
        sending = Sending(source, chain.store)
        head = self._newest_whole(there, branch, sending)
        if head is not None:
            if any(point.number > head.number for point in there.points(branch)):
                # What is newer there is damaged: the line goes on above it, here and there.
                put_fence(there, theirs)
            self._bring_segments(chain.store, best, branch)
            lease.check()
            if self._copy_head(best, chain.store, head.key):
                sent = sending.sent.size_bytes
                self._emit(BroughtBack(chain.url, best.url, head.snapshot, head.step, sent))
        for number in sorted(numbers(best).get(branch, set())):
            if number > (head.number if head is not None else 0):
                key = keys.numbered(keys.head(branch), number)
                if record.unseal(fetched(best, key), HeadRecord, key).fence is True:
                    self._copy_head(best, chain.store, key)

    def _newest_whole(self, there: Chain, branch: str, sending: Sending) -> HeadRecord | None:
        """Bring all of the newest snapshot that is whole; None where there is none at all."""
        skipped: list[EverstepError] = []
        for point in there.points(branch):
            try:
                if point.damage is not None:
                    raise point.damage
                assert point.head is not None
                sending.snapshot(point.head.snapshot)
                return point.head
            except (Damaged, NotFound) as error:
                skipped.append(error)
                self._emit(Skipped(there.url, point.name(), error.problem))
        if skipped:
            raise Damaged(
                f"none of the {len(skipped)} snapshots of branch {branch!r} in {there.url} is whole",
                kept="nothing was deleted",
                next=f"everstep -r {there.url} verify",
            )
        return None

    @staticmethod
    def _copy_head(source: Store, target: Store, key: str) -> bool:
        """False: it is there."""
        if target.put(key, [bytes(fetched(source, key))]):
            return True
        if not same_object(source, target, key):
            raise Conflict(f"somebody else has put {key} of {target.url}", kept="nothing else was touched")
        return False

    @staticmethod
    def _bring_leases(first: Store, replica: Store, branch: str, below: int) -> None:
        """They say who wrote what, in both."""
        found = [entry.key for entry in replica.list(keys.lease(branch)) if is_object(entry.key)]
        for key in found[:LEASES]:
            if (keys.number_of(key) or 0) < below:
                try:
                    first.put(key, [bytes(fetched(replica, key))])
                except (Damaged, NotFound):
                    continue

    @staticmethod
    def _bring_segments(first: Store, replica: Store, branch: str) -> None:
        """So that steps which are trained again can be compared."""
        found = [entry.key for entry in replica.list(keys.steplog(branch)) if is_object(entry.key)]
        for key in found[-SEGMENTS:]:
            try:
                first.put(key, [fetched(replica, key)])
            except (Damaged, NotFound):
                continue


def _chain_record(store: Store) -> bytes | None:
    try:
        return bytes(fetched(store, keys.CHAIN))
    except NotFound:
        return None
