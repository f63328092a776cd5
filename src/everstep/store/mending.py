"""Finding what is not whole of an object in a parity set, and making it whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from everstep.store.agreed import AWAY, Agreed, Tally
from everstep.store.base import Buffer, Store, checked, is_named_by_digest
from everstep.store.replacing import replace
from everstep.store.sharded import PREFIX, Found, Sharded, can_have_shards
from everstep.store.shards import Shape, Whole, cut


class Mending:
    """As `Redundant` says, for the members of a set.

    Args:
        beside: calls a function with each of some numbers, all at the same time.
    """

    def __init__(
        self,
        shape: Shape,
        members: Sequence[Store],
        agreed: Agreed,
        sharded: Sharded,
        beside: Callable[[Sequence[int], Callable[[int], None]], None],
    ) -> None:
        self._shape = shape
        self._members = members
        self._agreed = agreed
        self._sharded = sharded
        self._beside = beside

    def away(self) -> list[str]:
        found = []
        for member in self._members:
            try:
                next(iter(member.list(limit=1)), None)
            except AWAY as error:
                found.append(f"{member.url} is away ({error.problem})")
        return found

    def flaws(self, key: str) -> list[str]:
        shards, copies = self._parts(key)
        if copies is not None:
            wrong = self._wrong_copies(copies, self._decided(key, copies))
        else:
            assert shards is not None
            wrong = self._wrong_shards(key, shards)
        return [self._said(number, why) for number, why in sorted(wrong.items())]

    def _said(self, number: int, why: str) -> str:
        return f"its part with {self._members[number].url} {why}"

    def mend(self, key: str, whole: Callable[[], Buffer]) -> list[str]:
        """`whole` gives the object's bytes. Raises Damaged."""
        shards, copies = self._parts(key)
        if copies is not None:
            decided = self._decided(key, copies)
            wrong = self._wrong_copies(copies, decided)
            parts: Mapping[int, tuple[str, Sequence[Buffer]]] = {number: (key, [decided]) for number in wrong}
        else:
            assert shards is not None
            wrong = self._wrong_shards(key, shards)
            parts = self._fresh(key, shards, wrong, whole) if wrong else {}
        mended = []
        for number, (name, data) in sorted(parts.items()):
            try:
                replace(self._members[number], name, data)
                mended.append(f"its part with {self._members[number].url}, which {wrong[number]}")
            except AWAY:
                continue  # `flaws` goes on telling.
        self._sharded.forget(key)
        return mended

    def _fresh(
        self, key: str, found: Found, wrong: Mapping[int, str], whole: Callable[[], Buffer]
    ) -> dict[int, tuple[str, Sequence[Buffer]]]:
        """By member, the shard that it is to have: the one of its own number, or, if members have changed
        places, one that nobody has."""
        good = {index for index, (number, _) in found.shards.items() if number not in wrong}
        missing = [index for index in range(self._shape.members) if index not in good]
        cut_anew = cut(key, self._shape, Whole([whole()]))
        parts: dict[int, tuple[str, Sequence[Buffer]]] = {}
        for number in sorted(wrong, key=lambda number: number not in missing):
            index = number if number in missing else missing[0]
            missing.remove(index)
            parts[number] = (PREFIX + key, cut_anew[index])
        return parts

    def _parts(self, key: str) -> tuple[Found | None, Tally | None]:
        """The shards, or the copies, whichever it is kept as, all looked for anew. Raises what it means that
        there are too few."""
        tally = self._agreed.look(key)
        if not is_named_by_digest(checked(key)) or not can_have_shards(key):
            return None, tally
        self._sharded.forget(key)
        shards = self._sharded.all(key)
        if len(shards.shards) < self._shape.k and tally.copies:
            return None, tally
        self._sharded.refuse_few(key, shards)
        return shards, None

    def _decided(self, key: str, tally: Tally) -> bytes:
        decided = tally.decided(self._shape.k)
        if decided is None:
            raise self._agreed.refusal(key, tally)
        return decided

    def _wrong_copies(self, tally: Tally, decided: bytes) -> dict[int, str]:
        wrong = dict.fromkeys(tally.absent, "is missing")
        wrong |= {number: f"is damaged ({error.problem})" for number, error in tally.damaged.items()}
        wrong |= {
            number: "is another's, who was second"
            for copy, numbers in tally.copies.items()
            for number in numbers
            if copy != decided
        }
        return wrong

    def _wrong_shards(self, key: str, found: Found) -> dict[int, str]:
        wrong = dict.fromkeys(found.absent, "is missing")
        wrong |= {number: f"is damaged ({error.problem})" for number, error in found.damaged.items()}
        whole: dict[int, bool] = {}

        def check(index: int) -> None:
            whole[index] = self._sharded.is_whole(key, index, found)

        self._beside(list(found.shards), check)
        for index in [index for index, good in whole.items() if not good]:
            wrong[found.shards[index][0]] = "is damaged (it is not as it was written)"
        return wrong
