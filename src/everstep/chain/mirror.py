"""A replica: a store that is made to hold what another holds of the same chain, under the same keys.

At every moment it is a chain of its own, that may be behind: what lists a snapshot is put when all of the
snapshot is there, and head records of a branch in the order of their numbers. So everything that reads a
chain reads a replica, and whoever finds its source gone goes on in it.

Which writer's records go there is settled as in any chain: by the lease. The source's own record of it is put
in the replica too, under the same number; who finds a later one there has been replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from everstep.chain import names, prune, versions
from everstep.chain.census import Census
from everstep.chain.doomed import Doomed, note_pruned
from everstep.chain.history import MAIN, Chain
from everstep.chain.lease import Lease, lives_here, newest
from everstep.chain.names import exists, is_object
from everstep.chain.replicas import note_source
from everstep.chain.retention import Keep, Line, Listed
from everstep.chain.sending import Sending, fetched
from everstep.errors import Conflict, Damaged, Fenced, Mismatch, NotFound, Unavailable
from everstep.format import keys, record
from everstep.format.record import DROP, HeadRecord, LeaseRecord, TagRecord
from everstep.store.base import Store


@dataclass(frozen=True)
class Standing:
    """How a replica stands to its source, as of the last look. `number`, `snapshot` and `step` are those of
    the newest head record of the branch in the replica (0, "" and 0 where it has none yet), `behind` how many
    head records of the branch it lacks, `remarks` what could not be sent and why, a sentence each."""

    number: int
    snapshot: str
    step: int
    behind: int
    remarks: tuple[str, ...] = ()


class Mirror:
    """Brings one replica up to its source, in passes; what it has learned of the replica it keeps for the
    next.

    Args:
        source: the chain.
        target: where its replica is, or is to be.
        branch: the one whose writer this follows; its records are sent first.
        lease: the number of that writer's lease; None: no writer, for a replica that nobody else may be
            writing to: it is looked at once whether one does.
        before_pack: called before each pack; may wait, or raise to end the pass.
        on_sent: called with the bytes of each object that was put.
        on_advance: called when a head record was put.
    """

    def __init__(
        self,
        source: Chain,
        target: Store,
        branch: str = MAIN,
        lease: int | None = None,
        *,
        before_pack: Callable[[], None] = lambda: None,
        on_sent: Callable[[int], None] = lambda size_bytes: None,
        on_advance: Callable[[Standing], None] = lambda standing: None,
    ) -> None:
        self.source = source
        self.target = target
        self.branch = branch
        self.lease = lease
        self.sending = Sending(source.store, target, before_pack, on_sent)
        self._on_advance = on_advance
        self._chain: Chain | None = None
        self._there: dict[str, set[int]] | None = None
        """By branch, the numbers of the replica's head records; None as long as nobody has looked."""
        self._doomed = Doomed(target)
        self._read = Census(source)
        self._census: Census | None = None
        self._skipped: dict[str, str] = {}
        """By key, what could not be sent and why; it is not tried again."""
        self._fences: dict[str, HeadRecord | None] = {}
        """By key, the fence of a branch that was taken away, or None for any other head record."""
        self._newest = (0, "", 0)
        self._parted: set[str] = set()
        """Branches that the two continue differently."""

    def forget(self) -> None:
        """After an error: look at the replica anew."""
        self._there = None

    # -- one pass -----------------------------------------------------------------------------------------

    def bring_up(self) -> Standing:
        """Send what the replica lacks. May be interrupted at any point, and done again.

        Raises:
            Mismatch: something else is at the replica's place, or another chain; nothing was touched.
            Fenced: another writer has taken the branch over through this replica.
            Conflict: a living process of this machine writes there.
            Unavailable: one of the two does not answer.
            Unsupported: a newer version wrote something here, or the store cannot keep a chain.
        """
        self._refuse_lost_source()
        chain = self._chain = self._opened()
        if self.lease is not None:
            hold(self.source.store, chain.store, self.branch, self.lease)
        if self._there is None:
            note_source(chain, self.source)
            self._there = numbers(chain.store)
            self._learn_packs(self._there)
            self._parted.clear()
        if names.newest(self.source.store, keys.PRUNES):
            note_pruned(chain.store)
        listed = numbers(self.source.store)
        for branch in sorted(listed, key=lambda one: (one != self.branch, one)):
            self._branch(chain, branch, listed[branch])
        self._tags(chain)
        self._segments(chain)
        return self._standing(chain, numbers(self.source.store).get(self.branch, set()))

    def _opened(self) -> Chain:
        """The replica, made where there is none; also where somebody took it away: then nothing that was
        known of it is true any more."""
        try:
            chain = Chain(self.target)
        except NotFound:
            self.forget()
            self.sending.packs.clear()
            self._census, self._newest = None, (0, "", 0)
            chain = Chain.create_as(self.target, bytes(fetched(self.source.store, keys.CHAIN)))
        refuse_another(self.source, chain)
        return chain

    def _refuse_lost_source(self) -> None:
        """Raises Unavailable where the source is not the chain any more that it was."""
        try:
            about = Chain(self.source.store).about
        except NotFound as error:
            raise Unavailable(f"{self.source.url} is gone", kept="its replicas are as they were") from error
        if about.chain != self.source.about.chain:
            raise Unavailable(
                f"{self.source.url} is another chain by now", kept="its replicas are as they were"
            )

    def _have(self, branch: str) -> set[int]:
        """The numbers that the replica has, to be added to."""
        assert self._there is not None
        return self._there.setdefault(branch, set())

    def _learn_packs(self, there: dict[str, set[int]]) -> None:
        """The replica has the packs of what it lists, but for those that were repacked there; of what the
        source lists too they are known without reading anything of it."""
        packs = {name_of(key) for key in objects(self.target, keys.PACKS)}
        for branch, have in there.items():
            for number in sorted(have, reverse=True)[:_LEARNED]:
                try:
                    key = keys.numbered(keys.head(branch), number)
                    head = record.unseal(fetched(self.source.store, key), HeadRecord, key)
                    if head.fence is not True:
                        for manifest in self._read.manifests(head.snapshot):
                            self.sending.packs |= packs & set(self._read.packs(manifest))
                except (Damaged, NotFound):
                    continue

    # -- heads --------------------------------------------------------------------------------------------

    def _branch(self, chain: Chain, branch: str, listed: set[int]) -> None:
        have = self._have(branch)
        if branch in self._parted or self._has_parted(chain, branch, listed, have):
            return
        if branch != self.branch or self.lease is None:
            taken = newest(chain.store, branch)
            if taken > newest(self.source.store, branch):
                self._parted.add(branch)
                self._skip(keys.head(branch), f"writer {taken} has taken branch {branch!r} over there")
                return
        for number in sorted(listed - have):
            key = keys.numbered(keys.head(branch), number)
            if key not in self._skipped and self._advance(chain, branch, number, key):
                have.add(number)
                if branch == self.branch:
                    self._on_advance(self._standing(chain, listed))
        self._drop_dropped(chain, branch, listed)

    def _has_parted(self, chain: Chain, branch: str, listed: set[int], have: set[int]) -> bool:
        """Whether the replica has a head record that did not come from here."""
        # What is only to be filled up may be ahead of what it is filled up from.
        ahead = self.lease is not None and max(have, default=0) > max(listed, default=0)
        if not ahead and of_one_line(self.source.store, chain.store, branch, listed, have):
            return False
        self._parted.add(branch)
        self._skip(
            keys.head(branch),
            f"{chain.url} has head records of branch {branch!r} that {self.source.url} lacks: somebody has "
            f"written there, and the branch is not sent; both are intact. Next: everstep -r {chain.url} log "
            f"--branch {branch}",
        )
        return True

    def _advance(self, chain: Chain, branch: str, number: int, key: str) -> bool:
        """Send one head record, after all that it needs. False: it was pruned meanwhile, or cannot be
        sent."""
        try:
            data = fetched(self.source.store, key)
            head = record.unseal(data, HeadRecord, key)
            needed = set() if head.fence is True else self.sending.snapshot(head.snapshot)
        except (NotFound, Damaged) as error:
            if not exists(self.source.store, key):
                note_pruned(chain.store)
                return False
            if error.key in self.sending.refused:
                raise
            self._skip(key, f"{key} was not sent: {error.problem}")
            note_pruned(chain.store)
            return False
        self._refuse_doomed(chain, needed)
        self._check_lease(chain)
        self._put_numbered(chain, key, bytes(data))
        self._refuse_doomed(chain, needed, named_by=key)
        if branch == self.branch and head.fence is not True and number > self._newest[0]:
            self._newest = (number, head.snapshot, head.step)
        return True

    def _refuse_doomed(self, chain: Chain, needed: set[str], named_by: str = "") -> None:
        """Somebody may be pruning the replica: what is listed must not be about to go. Looked at before that,
        and once more afterwards, for it may have been there before: then the record is taken back."""
        news = self._doomed.look()
        gone = {key for key in needed if name_of(key) in self._doomed.names}
        if news:
            gone |= {key for key in needed if not exists(chain.store, key)}
        if gone:
            if named_by:
                chain.store.delete(named_by)
            self.sending.packs -= {name_of(key) for key in gone}
            raise Unavailable(
                f"{chain.url} is being pruned of what a snapshot needs", kept="it is sent when that is over"
            )

    def _check_lease(self, chain: Chain) -> None:
        if self.lease is not None:
            Lease(chain.store, self.lease, self.branch).check()

    def _put_numbered(self, chain: Chain, key: str, data: bytes) -> None:
        """Put a record that is raced for. Raises Conflict where another is there."""
        if chain.store.put(key, [data]):
            self.sending.count(len(data))
        elif not same_object(self.source.store, chain.store, key):
            self.forget()
            raise Conflict(
                f"somebody else has put {key} of {chain.url}", kept="neither chain lost anything", key=key
            )

    def _skip(self, key: str, why: str) -> None:
        self._skipped[key] = why

    def _drop_dropped(self, chain: Chain, branch: str, listed: set[int]) -> None:
        """What a branch was before it was taken away goes, as its fence says, which is there by now."""
        have = self._have(branch)
        left = have - listed
        for number in sorted(listed & have, reverse=True):
            if not left or number < min(left):
                return
            fence = self._fence_of_drop(keys.numbered(keys.head(branch), number))
            if fence is not None:
                prefix = keys.head(branch)
                spared = {keys.numbered(prefix, one) for one in listed}
                spared |= objects(self.source.store, keys.steplog(branch))
                versions.delete_branch(chain, fence, spared=spared)
                have -= {one for one in left if one < number}
                return

    def _fence_of_drop(self, key: str) -> HeadRecord | None:
        if key not in self._fences:
            self._fences[key] = None
            try:
                head = record.unseal(fetched(self.source.store, key), HeadRecord, key)
            except (NotFound, Damaged):
                return None
            if head.fence is True and head.moved is not None and head.moved.what == DROP:
                self._fences[key] = head
        return self._fences[key]

    # -- tags and the step log ----------------------------------------------------------------------------

    def _tags(self, chain: Chain) -> None:
        wanted, have = objects(self.source.store, keys.TAGS), objects(chain.store, keys.TAGS)
        last = self.source.tag_keys().values()
        for key in sorted(wanted - have, reverse=True):
            if key in self._skipped:
                continue
            try:
                data = bytes(fetched(self.source.store, key))
                tag = record.unseal(data, TagRecord, key)
                # An older record names nothing any more.
                needed = self.sending.snapshot(tag.snapshot) if tag.snapshot and key in last else set()
                self._refuse_doomed(chain, needed)
            except (NotFound, Damaged) as error:
                if error.key in self.sending.refused:
                    raise
                if exists(self.source.store, key):
                    self._skip(key, f"tag {key.split('/')[1]} was not sent: {error.problem}")
                continue
            self._check_lease(chain)
            if chain.store.put(key, [data]):
                self.sending.count(len(data))
                self._refuse_doomed(chain, needed, named_by=key)
            elif not same_object(self.source.store, chain.store, key):
                name = key.split("/")[1]
                self._skip(key, f"{chain.url} has a tag {name!r} of its own, which was left as it is")

    def _segments(self, chain: Chain) -> None:
        """Missing ones do no harm, so neither do damaged ones."""
        for key in sorted(objects(self.source.store, keys.STEPLOG) - objects(chain.store, keys.STEPLOG)):
            try:
                data = fetched(self.source.store, key)
            except (NotFound, Damaged):
                continue
            if chain.store.put(key, [data]):
                self.sending.count(len(data))

    # -- what does not stay -------------------------------------------------------------------------------

    def prune(self, keep: Keep) -> None:
        """After a pass: drop of the branch what the policy does not keep, by the replica's own listing, and
        what its source does not list either. Raises as `chain.prune.execute`."""
        chain = self._chain
        if chain is None or self.lease is None or keep.everything or self.branch in self._parted:
            return
        listed = {head.snapshot for head in self.source.heads(self.branch)}
        mine = Lease(chain.store, self.lease, self.branch)
        self._census = self._census or Census(chain)
        policy = Keep((*keep.rules, _Listed(frozenset(listed))))
        plan = prune.plan(chain, policy, branches=[self.branch], mine=mine, census=self._census)
        if plan is not None:
            self.sending.packs -= plan.packs
            self._doomed.know(prune.execute(chain, plan).records)
            self._there = numbers(chain.store)

    def let_go(self) -> None:
        """Nothing more is sent under this lease: release it in the replica, as its source says."""
        if self.lease is None or self._chain is None:
            return
        key = keys.numbered(keys.lease(self.branch), self.lease + 1)
        try:
            data = bytes(fetched(self.source.store, key))
        except (NotFound, Damaged):
            return
        if record.unseal(data, LeaseRecord, key).pid == 0:
            self._chain.store.put(key, [data])

    def _standing(self, chain: Chain, listed: set[int]) -> Standing:
        if not self._newest[0]:
            head = next(chain.heads(self.branch), None)
            self._newest = (head.number, head.snapshot, head.step) if head is not None else (0, "", 0)
        missing = listed - self._have(self.branch)
        prefix = keys.head(self.branch)
        behind = sum(keys.numbered(prefix, number) not in self._skipped for number in missing)
        return Standing(*self._newest, behind, tuple(self._skipped.values()))


_LEARNED = 64
"""So many of a branch's newest snapshots are looked at for packs that a replica has."""


@dataclass(frozen=True)
class _Listed:
    """What the source lists stays, whatever the policy makes of the replica's own line."""

    ids: frozenset[str] = field(repr=False)

    def __str__(self) -> str:
        return "listed by what it is a replica of"

    def picks(self, line: Line) -> Iterator[Listed]:
        return (one for one in line if one.id in self.ids)


# -- leases ------------------------------------------------------------------------------------------------


def hold(source: Store, target: Store, branch: str, number: int) -> None:
    """Have the lease `number`, which the source's record names, in the target too: the same record, under the
    same number. Durable on return; nothing is put where it is there.

    Raises:
        Fenced: a later writer is there, or another under the same number.
        Conflict: a living process of this machine is the writer there, and not of this source.
        Unavailable: one of the stores does not answer, or the source's record cannot be had.
    """
    key = keys.numbered(keys.lease(branch), number)
    try:
        mine = bytes(fetched(source, key))
    except (NotFound, Damaged) as error:
        raise Unavailable(f"lease {number} of {source.url} cannot be read", key=key) from error
    while (there := newest(target, branch)) < number:
        if there and not same_object(source, target, keys.numbered(keys.lease(branch), there)):
            _refuse_living(target, branch, there)
        target.put(key, [mine])
    if there > number and not _is_release(source, target, branch, number + 1, there):
        raise _fenced(target, branch, there, number)
    if not same_object(source, target, key):
        raise _fenced(target, branch, number, number)


def _is_release(source: Store, target: Store, branch: str, number: int, there: int) -> bool:
    key = keys.numbered(keys.lease(branch), number)
    return there == number and same_object(source, target, key)


def _refuse_living(target: Store, branch: str, number: int) -> None:
    key = keys.numbered(keys.lease(branch), number)
    try:
        holder = record.unseal(target.get(key, 0, record.MAX_RECORD_BYTES + 1), LeaseRecord, key)
    except (NotFound, Damaged):
        return
    if lives_here(holder):
        raise Conflict(
            f"branch {branch!r} of {target.url} is being written by process {holder.pid} on this machine",
            kept="nothing was touched",
            next=f"kill {holder.pid}  # it takes a last snapshot",
        )


def _fenced(target: Store, branch: str, there: int, number: int) -> Fenced:
    return Fenced(
        f"writer {there} has taken branch {branch!r} over from this one, writer {number}, by way of "
        f"{target.url}",
        kept="nothing was changed there, and all that was committed is intact",
        next=f"everstep -r {target.url} log",
    )


# -- small things ------------------------------------------------------------------------------------------


def refuse_another(source: Chain, target: Chain) -> None:
    """Raises Mismatch where two are not the same chain."""
    if source.about.chain != target.about.chain:
        raise Mismatch(
            f"{target.url} is another chain than {source.url}, and cannot be a replica of it",
            kept="nothing was touched",
            next=f"another place for the replica, or everstep -r {source.url} copy --all {target.url}, to "
            "copy snapshots into that chain",
        )


def same_object(one: Store, other: Store, key: str) -> bool:
    """Whether both have a record of these bytes; one that is missing is not the same."""
    try:
        data = [bytes(store.get(key, 0, record.MAX_RECORD_BYTES + 1)) for store in (one, other)]
    except NotFound:
        return False
    return data[0] == data[1]


def name_of(key: str) -> str:
    """The last part of a key: what names an object that is named by its digest."""
    return key.rpartition("/")[2]


def of_one_line(source: Store, target: Store, branch: str, listed: set[int], have: set[int]) -> bool:
    """Whether the newest head record that both have is the same. Where they have none in common, whether the
    writer of the older one's newest held the same lease in both: a lease is put in a replica as its source
    has it, so that one who wrote elsewhere is told by it."""
    if not listed or not have:
        return True
    both = max(listed & have, default=0)
    if both:
        return same_object(source, target, keys.numbered(keys.head(branch), both))
    older, newest_of_it = min((max(listed), 0), (max(have), 1))[::-1]
    store = (source, target)[older]
    key = keys.numbered(keys.head(branch), newest_of_it)
    try:
        head = record.unseal(store.get(key, 0, record.MAX_RECORD_BYTES + 1), HeadRecord, key)
    except (NotFound, Damaged):
        return False
    return not head.writer or same_object(source, target, keys.numbered(keys.lease(branch), head.writer))


def numbers(store: Store) -> dict[str, set[int]]:
    """By branch, the numbers of its head records, fences too."""
    found: dict[str, set[int]] = {}
    for key in objects(store, keys.HEADS):
        found.setdefault(key.split("/")[1], set()).add(keys.number_of(key) or 0)
    return found


def objects(store: Store, prefix: str) -> set[str]:
    """The keys of the chain's objects under a prefix."""
    return {entry.key for entry in store.list(prefix) if is_object(entry.key)}
