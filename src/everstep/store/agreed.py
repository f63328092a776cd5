"""One object under one key, kept as a copy by every member of a parity set: who puts it first, when several
race and some members are away.

A copy is created exclusively by each member, and nobody ever replaces one. So each member holds the copy of
one putter at most, and what k of the k+m members hold is decided for ever: there is no second set of k,
since k > m. *An object is there when k members hold the same copy; with fewer it is not.*

Putters go through the members in their order, and stop at the first that holds another's copy: where all see
the same members, the first of these decides, and who comes second leaves nothing anywhere. Who has stopped
waits for the other to come to k; takes its own copies back only when another is decided; and completes what
a killed putter has left. Where putters have seen different members, it can happen that none can come to k any
more. Then nothing is decided, which is said; the number is passed over for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from everstep.errors import Conflict, Damaged, EverstepError, Mismatch, NotFound, Unavailable, Unsupported
from everstep.store.base import Store
from everstep.store.patience import Clock, Patience, tries
from everstep.store.shards import Shape, out_of_copy

AWAY = (Unavailable, Mismatch)
"""What a member says that cannot be asked; a bucket that is not there is a Mismatch."""

LOOKS = 8
"""So often a putter that was second looks, without seeing anything move, before it completes the other's."""

ON_ITS_WAY = Patience(deadline_s=2.0, first_wait_s=0.005, longest_wait_s=0.25)
"""So long a reader that cannot tell waits for a putter."""

WAITING = Patience(deadline_s=30.0, first_wait_s=0.002, longest_wait_s=0.25)


@dataclass
class Tally:
    """What the members hold under a key. `copies` are whole, by their bytes, with the members' numbers;
    `away` and `damaged` by number, with what was said."""

    copies: dict[bytes, list[int]] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    away: dict[int, EverstepError] = field(default_factory=dict)
    damaged: dict[int, EverstepError] = field(default_factory=dict)

    def decided(self, k: int) -> bytes | None:
        return next((copy for copy, numbers in self.copies.items() if len(numbers) >= k), None)

    @property
    def most(self) -> int:
        """How many hold the copy that most of them hold."""
        return max(map(len, self.copies.values()), default=0)

    def promising(self, k: int) -> bytes | None:
        """The copy that is to be completed, where one can be: the one that most hold, of equals the one that
        the first member of all holds."""
        able = [
            (-len(numbers), numbers[0], copy)
            for copy, numbers in self.copies.items()
            if len(numbers) + len(self.absent) >= k
        ]
        return min(able)[2] if able else None


class Agreed:
    """Copies of small objects over the members of a set.

    Args:
        each: calls a function with each of some members' numbers, several at once where that pays.
    """

    def __init__(
        self,
        url: str,
        shape: Shape,
        members: Sequence[Store],
        each: Callable[[Sequence[int], Callable[[int], None]], None],
        clock: Clock,
    ) -> None:
        self._url = url
        self._shape = shape
        self._members = members
        self._each = each
        self._clock = clock

    # -- reading ------------------------------------------------------------------------------------------

    def look(self, key: str, numbers: Sequence[int] | None = None, tally: Tally | None = None) -> Tally:
        """What the members hold, or some of them; added to `tally`."""
        tally = tally or Tally()
        found: dict[int, bytes | EverstepError] = {}

        def ask(number: int) -> None:
            try:
                data = bytes(self._members[number].get(key))
            except (NotFound, Damaged, *AWAY) as error:
                found[number] = error
                return
            try:
                out_of_copy(data, key)
                found[number] = data
            except (Damaged, Unsupported) as error:
                # A bit flipped in its version makes a copy look newer than it is; the others can tell.
                found[number] = Damaged(error.problem)

        self._each(range(self._shape.members) if numbers is None else numbers, ask)
        for number, answer in sorted(found.items()):
            if isinstance(answer, bytes):
                tally.copies.setdefault(answer, []).append(number)
            elif isinstance(answer, NotFound):
                tally.absent.append(number)
            elif isinstance(answer, Damaged):
                tally.damaged[number] = answer
            else:
                tally.away[number] = answer
        for holders in tally.copies.values():
            holders.sort()
        return tally

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises NotFound, Unavailable, Damaged."""
        k = self._shape.k
        # As many as it takes, if they are of one mind.
        tally = self.look(key, range(k))
        if tally.decided(k) is None:
            tally = self.look(key, range(k, self._shape.members), tally)
        for _ in tries(ON_ITS_WAY, self._clock):
            decided = tally.decided(k)
            if decided is not None:
                return out_of_copy(decided, key)
            if not self.may_come(tally):
                break
            tally = self.look(key)
        raise self.refusal(key, tally)

    def may_come(self, tally: Tally) -> bool:
        """Whether what a few hold may be there, as members that are away may know, or be on its way: then it
        is worth another look."""
        there = tally.most + len(tally.damaged)
        return 0 < there < self._shape.k <= there + len(tally.away) and len(tally.away) <= self._shape.m

    def refusal(self, key: str, tally: Tally) -> EverstepError:
        """What it means that no copy is decided."""
        k, members = self._shape.k, self._shape.members
        if tally.most + len(tally.away) + len(tally.damaged) < k:
            few = f"{tally.most} of {members} members hold it, and it takes {k}" if tally.most else ""
            return NotFound(f"{self._url} has no object {key}", kept=few, key=key)
        if tally.away:
            return unreachable(self._url, key, list(tally.away.values()), k, members)
        return Damaged(
            f"{key} is whole with {tally.most} of {members} members of {self._url}, and it takes {k}",
            kept="nothing was touched",
            next=f"everstep -r {self._url} repair",
            key=key,
        )

    # -- putting ------------------------------------------------------------------------------------------

    def put(self, key: str, mine: bytes) -> bool:
        """Create the object: True for exactly one of all that try. `mine` is a copy that is nobody else's.

        Raises:
            Unavailable: too many members are away, or nobody can win any more.
        """
        away: list[EverstepError] = []
        held = 0
        for member in self._members:
            try:
                created = member.put(key, [mine]) or bytes(member.get(key)) == mine
            except (Conflict, *AWAY) as error:
                # (A Conflict: something else stands in its way with this member.)
                away.append(error)
                if len(away) > self._shape.m:
                    break
                continue
            except NotFound:
                created = False  # Taken away between the two.
            if not created:
                return self._settle(key, mine)
            held += 1
        if held >= self._shape.k:
            return True
        raise unreachable(self._url, key, away, self._shape.k, self._shape.members)

    def _settle(self, key: str, mine: bytes) -> bool:
        """Another's copy was met: find out whose it is in the end, and whether that is ours."""
        k = self._shape.k
        before, same = None, 0
        for _ in tries(WAITING, self._clock):
            tally = self.look(key)
            decided = tally.decided(k)
            if decided is not None:
                if decided != mine:
                    self._take_back(key, tally.copies.get(mine, ()), decided)
                return decided == mine
            if not tally.copies and not tally.damaged and not tally.away:
                return False  # It was there, and has just been deleted.
            now = {copy: tuple(numbers) for copy, numbers in tally.copies.items()}
            before, same = now, same + 1 if now == before else 0
            if same < LOOKS:
                continue
            better = tally.promising(k)
            if better is None:
                raise self._undecided(key, tally)
            self._complete(key, better, tally.absent)
            same = 0
        raise self._undecided(key, self.look(key))

    def _complete(self, key: str, copy: bytes, absent: Sequence[int]) -> None:
        for number in absent:
            try:
                self._members[number].put(key, [copy])
            except AWAY:
                continue  # The next look finds what there is.

    def _take_back(self, key: str, numbers: Sequence[int], decided: bytes) -> None:
        """Ours can never be decided any more: the place is the other's."""
        for number in numbers:
            try:
                self._members[number].delete(key)
                self._members[number].put(key, [decided])
            except AWAY:
                continue  # It is one of fewer than k: it shows nowhere, and a repair replaces it.

    def _undecided(self, key: str, tally: Tally) -> EverstepError:
        if len(tally.away) > 0:
            away = list(tally.away.values())
            return unreachable(self._url, key, away, self._shape.k, self._shape.members)
        return Unavailable(
            f"several have begun to write {key} in {self._url} while members came and went, and none of them "
            f"can come to the {self._shape.k} that it takes",
            kept="what was committed before is intact",
            next="the same again: the next one takes the number after it",
            key=key,
        )


def unreachable(url: str, key: str, away: Sequence[EverstepError], k: int, members: int) -> EverstepError:
    """The error for a set of which too many members are away to know, or to write: their own, where each says
    that something else stands in the way."""
    if away and all(isinstance(error, Conflict) for error in away):
        return away[0]
    why = away[0].problem if away else "they do not answer"
    return Unavailable(
        f"{len(away)} of the {members} members of {url} are away ({why}), and it takes {k} for {key or 'it'}",
        kept="what was committed before is intact",
        next=f"bring one back; everstep doctor {url}",
        key=key,
    )
