"""Verify: every object is read again and every byte held against its digest, and every reference followed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from everstep.chain.history import SHORT, Chain, Point, Snapshot, joined
from everstep.chain.names import exists, is_object, segment_of
from everstep.chain.reader import Reader
from everstep.chain.relocations import Relocations
from everstep.chain.states import state_of
from everstep.chain.steplog import JOURNAL, MAX_JOURNAL_BYTES, read_journal
from everstep.errors import Damaged, NotFound, Unsupported
from everstep.format import keys, pack, record, values
from everstep.format import manifest as manifests
from everstep.format.chunk import Buffer, aligned, decode, digest
from everstep.format.manifest import Manifest, Place
from everstep.format.record import (
    SEALED_KINDS,
    SealedRecord,
    SnapshotRecord,
    TagRecord,
)
from everstep.store.base import Entry, Redundant


@dataclass(frozen=True)
class Finding:
    """One damage: the object, what is wrong with it, the ids of the snapshots that cannot be restored for it
    (empty: none), and what to do next."""

    key: str
    problem: str
    snapshots: tuple[str, ...]
    next: str


@dataclass
class Report:
    """What `verify` saw. `foreign` are files in the chain's place that are none of its objects; `left_bytes`
    of chunks were not looked at, because they were not asked for; `sound` are the ids of the snapshots that
    are whole, as far as was looked."""

    objects: int = 0
    bytes: int = 0
    snapshots: int = 0
    whole: int = 0
    findings: list[Finding] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    left_bytes: int = 0
    sound: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subset:
    """One of `of` parts of the data, the `number`-th, from 1 on: which chunks belong to it goes by their
    names, so all parts together are all chunks, whatever is added between two looks."""

    number: int
    of: int

    def wants(self, pack: str, chunk: str) -> bool:
        return int(chunk[:8], 16) % self.of == self.number - 1


def verify(
    chain: Chain,
    on_progress: Callable[[int, int], None] | None = None,
    wants: Callable[[str, str], bool] | None = None,
    on_found: Callable[[str, str], None] | None = None,
) -> Report:
    """Check everything in a chain; changes nothing and raises nothing for damage: it reports it.

    Two things leave no trace and so cannot be seen: that the newest or the oldest head record of a branch was
    taken away (a crash before it was written, and prune, leave the same behind; so does any but the newest,
    once a chain was pruned), and likewise a lease, a tag or the end of the step log.

    Args:
        on_progress: called with (bytes done, bytes in all) after each object.
        wants: given the name of a pack and the digest of a chunk in it, says whether its bytes are to be
            read; all are, unless given. Records, manifests and the footers of packs always are.
        on_found: called at once with the key of an object with which something is wrong, and what, once each.
            An object that is pruned meanwhile may be among them; the report leaves it out.

    Raises:
        Unavailable: the store does not answer.
    """
    return _Verifier(chain, on_progress or (lambda done, total: None), wants, on_found).run()


@dataclass(frozen=True)
class _Expected:
    """A chunk that somebody says a pack holds."""

    digest: str
    size_bytes: int
    place: Place


@dataclass(frozen=True)
class _Named:
    """A snapshot that a head or tag record names, or would if the record could be read."""

    key: str
    id: str | None
    point: Point | None = None

    @property
    def name(self) -> str:
        return self.point.name() if self.point else f"{(self.id or '')[:SHORT]} (tagged)"


class _Verifier:
    def __init__(
        self,
        chain: Chain,
        on_progress: Callable[[int, int], None],
        wants: Callable[[str, str], bool] | None,
        on_found: Callable[[str, str], None] | None,
    ) -> None:
        self.chain = chain
        self.wants = wants
        self.on_found = on_found or (lambda key, problem: None)
        self.reader = Reader(chain.store)
        self.on_progress = on_progress
        self.report = Report()
        self.problems: dict[str, str] = {}
        self.flaws: dict[str, str] = {}
        """What is not whole of objects that can be read all the same: their store has more of them."""
        self.records: dict[str, SnapshotRecord] = {}
        self.manifests: dict[str, Manifest] = {}
        self.expected: dict[str, set[_Expected]] = defaultdict(set)
        """By pack: the chunks that manifests place in it."""
        self.bad_chunks: dict[str, set[str]] = {}
        """By pack: the digests of chunks that cannot be had from it."""
        self.pack_bytes: dict[str, int] = {}
        self.points: dict[str, list[Point]] = {}
        self.tags: list[str] = []
        self.pruned = False
        self.relocations = Relocations(chain.store)
        self.there: set[str] = set()
        """The packs that are listed."""
        self.fits: dict[str, bool] = {}
        """By id, whether the manifests of a snapshot are of one snapshot."""
        self.fences: set[str] = set()
        """Head records that are there and list nothing."""

    def run(self) -> Report:
        # Heads before all else: what they name was there before them, also when a run goes on meanwhile.
        self.points = {branch: list(self.chain.points(branch)) for branch in self.chain.branches()}
        self.tags = list(self.chain.tag_keys().values())
        entries = list(self.chain.store.list())
        self.pruned = any(entry.key.startswith(keys.PRUNES) for entry in entries)
        self.fences = {entry.key for entry in entries if entry.key.startswith(keys.HEADS)}
        self.fences -= {point.key for points in self.points.values() for point in points}
        self.there = {one.key.rpartition("/")[2] for one in entries if one.key.startswith(keys.PACKS)}
        if any(entry.key.startswith(keys.RELOCATIONS) for entry in entries):
            self.relocations.look()
        total = sum(entry.size_bytes for entry in entries)
        if not any(entry.key == keys.CHAIN for entry in entries):
            self._problem(keys.CHAIN, "it is missing")
        done = 0
        # Manifests first: they say what is expected of the packs.
        for packs in (False, True):
            for entry in entries:
                if entry.key.startswith(keys.PACKS) is packs:
                    self._object(entry)
                    done += entry.size_bytes
                    self.on_progress(done, total)
        self.report.bytes = done - self.report.left_bytes
        self._follow()
        for key, manifest in self.manifests.items():
            self._check_packs(key, manifest)
        for key, manifest in self.manifests.items():
            self._derived(key, manifest)
        self._report()
        return self.report

    def _problem(self, key: str, problem: str) -> None:
        if key not in self.problems:
            self.problems[key] = problem
            self.on_found(key, problem)

    def _bad(self, name: str, chunk: str) -> None:
        self.bad_chunks.setdefault(name, set()).add(chunk)

    # -- one object ---------------------------------------------------------------------------------------

    def _object(self, entry: Entry) -> None:
        key = entry.key
        check = next((check for prefix, check in _CHECKS.items() if key.startswith(prefix)), None)
        if check is None or not (is_object(key) or key.startswith(JOURNAL + "/")):
            self.report.foreign.append(key)
            return
        self.report.objects += 1
        try:
            check(self, entry)
            self._flaws(key)
        except NotFound:
            self.report.objects -= 1  # Pruned since it was listed; if it is needed, that is found below.
        except (Damaged, Unsupported) as error:
            self._problem(key, error.problem)

    def _flaws(self, key: str) -> None:
        """What a store that keeps more of an object than it takes says of that."""
        store, name = self.chain.store, key.rpartition("/")[2]
        if isinstance(store, Redundant) and (
            self.wants is None or not _is_pack(key) or self.wants(name, name)
        ):
            flaws = store.flaws(key)
            if flaws:
                self.flaws[key] = "; ".join(flaws)
                self.on_found(key, self.flaws[key])

    def _get(self, entry: Entry, limit: int) -> Buffer:
        """An object's bytes, one more than allowed at most: a hostile store may claim any size."""
        return self.chain.store.get(entry.key, 0, limit + 1)

    def _sealed(self, entry: Entry, kind: type[SealedRecord]) -> None:
        record.unseal(self._get(entry, record.MAX_RECORD_BYTES), kind, entry.key)

    def _segment(self, entry: Entry) -> None:
        steps = record.unseal_segment(self._get(entry, record.MAX_SEGMENT_BYTES))
        named = segment_of(entry.key)
        if named is None or not steps or steps[0].step != named[1]:
            raise Damaged("it does not begin with the step that its name says")

    def _journal(self, entry: Entry) -> None:
        read_journal(self._get(entry, MAX_JOURNAL_BYTES))

    def _snapshot(self, entry: Entry) -> None:
        data = self._get(entry, record.MAX_RECORD_BYTES)
        self.records[_checked_name(entry.key, data)] = record.decode(data, SnapshotRecord)

    def _manifest(self, entry: Entry) -> None:
        data = self._get(entry, manifests.MAX_STORED_BYTES)
        _checked_name(entry.key, data)
        manifest = manifests.decode(data)
        values.decode(manifest.values)
        self._expect(entry.key, manifest)

    def _expect(self, key: str, manifest: Manifest) -> None:
        """Hold the packs against what a manifest places; what lay in those that were given up is expected
        where it was copied to, as a reader finds it."""
        table = self.relocations.table
        manifest = table.without(manifest, lambda pack: pack not in self.there, whole=False) or manifest
        self.manifests[key] = manifest
        for chunk, place in zip(manifest.chunks, manifest.places, strict=True):
            self.expected[place.pack].add(_Expected(chunk.digest, chunk.size_bytes, place))

    def _pack(self, entry: Entry) -> None:
        """The end of a pack may be damaged and its chunks good, and the other way round."""
        key, name = entry.key, entry.key.rpartition("/")[2]
        self.pack_bytes[name] = entry.size_bytes
        expected = set(self.expected[name])
        checks: dict[_Expected, bytes] = {}
        try:
            for one in self._footer(entry, name).entries:
                checks[_Expected(one.digest, one.size_bytes, _place(name, one))] = one.check
        except (Damaged, Unsupported) as error:
            self._problem(key, error.problem)
        else:
            if expected - checks.keys():
                self._problem(key, "its footer and a manifest disagree about what it holds")
        for wanted in sorted(expected | checks.keys(), key=lambda one: one.place.offset):
            if self.wants is not None and not self.wants(name, wanted.digest):
                self.report.left_bytes += wanted.place.stored_bytes
                continue
            self._chunk(key, name, wanted, checks.get(wanted))

    def _follow(self) -> None:
        """Look at the packs that came in the place of such as have been given up since they were listed."""
        vanished = self.there - self.pack_bytes.keys()
        if not vanished:
            return
        self.relocations.look()
        entries = [one for one in self.chain.store.list(keys.PACKS) if is_object(one.key)]
        self.there = {one.key.rpartition("/")[2] for one in entries}
        for key, manifest in list(self.manifests.items()):
            if not vanished.isdisjoint(manifest.packs):
                self._expect(key, manifest)
        for entry in entries:
            if entry.key.rpartition("/")[2] not in self.pack_bytes:
                self._object(entry)

    def _footer(self, entry: Entry, name: str) -> pack.Footer:
        size = entry.size_bytes
        if size < pack.TRAILER_BYTES:
            raise Damaged("a pack is too short to have a trailer")
        end = self.chain.store.get(entry.key, size - pack.TRAILER_BYTES, pack.TRAILER_BYTES)
        trailer = pack.decode_trailer(end, size)
        tail = self.chain.store.get(entry.key, trailer.footer_offset, trailer.tail_bytes)
        return pack.decode_tail(tail, size, name)

    def _chunk(self, key: str, name: str, one: _Expected, check: bytes | None) -> None:
        """`check` is what the footer says of the stored bytes; None where it does not list the chunk."""
        size = one.place.stored_bytes
        data = memoryview(self.chain.store.get(key, one.place.offset, aligned(size)))
        stored = data[:size]
        if any(data[size:]):
            self._problem(key, "it has padding that is not zero")
        # What builds on a base is held against its digest with the manifest that places the base.
        if not one.place.base and not _is_chunk(stored, one):
            self._problem(key, f"chunk {one.digest[:12]} is not the one that was written")
            self._bad(name, one.digest)
        if check is not None and check != pack.check_of(stored, one.place.encoding):
            # It may decode all the same: a zstd frame has bits that mean nothing.
            self._problem(key, f"chunk {one.digest[:12]} is not stored as it was written")

    # -- what follows from several objects ----------------------------------------------------------------

    def _check_packs(self, key: str, manifest: Manifest) -> None:
        for name, size in manifest.packs.items():
            there = self.pack_bytes.get(name)
            if there is None:
                self.bad_chunks[name] = {one.digest for one in self.expected[name]}
            elif there != size and keys.pack(name) not in self.problems:
                self._problem(key, f"it gives pack {name[:SHORT]} a size that it does not have")

    def _derived(self, key: str, manifest: Manifest) -> None:
        """Chunks that build on others, and the state digest, which no single object proves."""
        for chunk, place in zip(manifest.chunks, manifest.places, strict=True):
            wanted = self.wants is None or self.wants(place.pack, chunk.digest)
            if place.base and wanted and not self._bad_pack(chunk.digest, place, manifest):
                try:
                    self.reader.chunk(manifest, chunk.digest)
                except (Damaged, Unsupported) as error:
                    self._problem(keys.pack(place.pack), error.problem)
                    self._bad(place.pack, chunk.digest)
        if self.wants is not None or self._broken_packs(manifest):
            return
        try:
            if state_of(self.reader, [manifest]) != manifest.state:
                self._problem(key, "its state digest is not that of its leaves")
        except (Damaged, Unsupported) as error:
            self._problem(key, error.problem)

    def _bad_pack(self, chunk: str, place: Place, manifest: Manifest) -> str:
        """The pack for which a chunk cannot be had: its own, or one's that it builds on; "" for none."""
        if chunk in self.bad_chunks.get(place.pack, ()):
            return place.pack
        return self._bad_pack(place.base, manifest.place_of[place.base][1], manifest) if place.base else ""

    def _broken_packs(self, manifest: Manifest) -> set[str]:
        """The keys of packs for which a chunk of this manifest cannot be had."""
        if not self.bad_chunks:
            return set()
        pairs = zip(manifest.chunks, manifest.places, strict=True)
        found = {self._bad_pack(chunk.digest, place, manifest) for chunk, place in pairs}
        return {keys.pack(name) for name in found if name}

    # -- what it means for the snapshots ------------------------------------------------------------------

    def _report(self) -> None:
        affected: dict[str, set[str]] = defaultdict(set)
        whole: dict[str, str] = {}
        broken: set[str] = set()
        for named in list(self._named()):
            causes = self._causes(named)
            if causes and not exists(self.chain.store, named.key):
                continue  # Pruned meanwhile.
            for key in causes:
                self._problem(key, "it is missing")
                affected[key] |= {named.id} if named.id else set()
            if named.id and causes:
                broken.add(named.id)
            elif named.id:
                whole.setdefault(named.id, named.name)
        for key, ids in self._unreadable_heads().items():
            affected[key] |= ids
        whole = {id: name for id, name in whole.items() if id not in broken}
        self.report.snapshots, self.report.whole = len(whole) + len(broken), len(whole)
        self.report.sound = tuple(whole)
        newest = next(iter(whole.values()), None)
        for key in sorted(self.problems):
            lost = tuple(sorted(affected[key]))
            if not lost and self._was_pruned(key):
                continue
            finding = Finding(key, self.problems[key], lost, self._next(key, lost, newest))
            self.report.findings.append(finding)
        self._report_flaws()

    def _report_flaws(self) -> None:
        store = self.chain.store
        mend = f"it is read all the same; everstep -r {self.chain.url} repair"
        for key in sorted(self.flaws.keys() - self.problems.keys()):
            self.report.findings.append(Finding(key, self.flaws[key], (), mend))
        for sentence in store.away() if isinstance(store, Redundant) else ():
            back = f"bring it back; what it lacks then: everstep -r {self.chain.url} repair"
            self.report.findings.append(Finding("", sentence, (), back))

    def _was_pruned(self, key: str) -> bool:
        """Whether an object that no snapshot needs went away while it was looked at."""
        expected = key == keys.CHAIN or key.startswith(keys.HEADS)
        return not expected and not exists(self.chain.store, key)

    def _named(self) -> Iterator[_Named]:
        for points in self.points.values():
            self._check_order(points)
            for point in points:
                yield _Named(point.key, point.head.snapshot if point.head else None, point)
        for key in self.tags:
            try:
                tagged = record.unseal(self.chain.store.get(key), TagRecord, key).snapshot
            except (Damaged, NotFound, Unsupported):
                continue  # Reported with the object itself.
            if tagged:
                yield _Named(key, tagged)

    def _check_order(self, points: list[Point]) -> None:
        """Head records in an order that no writer makes: none follows that of a later writer, and no snapshot
        follows on one that was committed after it. (A head may be moved to any snapshot.) Where nothing was
        pruned, no number is missing.
        """
        number_of: dict[str, int] = {}
        writer = 0
        previous = points[-1].number - 1 if points else 0
        for point in reversed(points):
            for number in () if self.pruned else range(previous + 1, min(point.number, previous + 1000)):
                key = keys.numbered(point.key.rpartition("/")[0] + "/", number)
                if key not in self.fences:
                    self._problem(key, "it is missing")
            previous = point.number
            if point.head is not None:
                if point.head.moved is None:
                    number_of.setdefault(point.head.snapshot, point.number)
                if point.head.writer < writer:
                    self._problem(point.key, "it stands after the head of a later writer")
                writer = max(writer, point.head.writer)
        for point in points:
            if point.head is None or point.head.moved is not None:
                continue
            for parent in point.snapshot.record.parents if point.snapshot else ():
                if number_of.get(parent, 0) > point.number:
                    self._problem(point.key, "its snapshot follows on one that was committed after it")

    def _causes(self, named: _Named) -> set[str]:
        """The keys of the damaged objects for which a snapshot cannot be restored."""
        causes = {named.key, keys.CHAIN} & self.problems.keys()
        if named.id is None:
            return causes
        key = keys.snapshot(named.id)
        found = self.records.get(named.id)
        if found is None:
            return causes | {key}
        for name in found.manifests:
            causes |= self._causes_in(keys.manifest(name))
        return causes | self._misfit(Snapshot(named.id, found))

    def _misfit(self, snapshot: Snapshot) -> set[str]:
        """The key of a snapshot record whose manifests are there, and are not those of one snapshot."""
        if snapshot.id not in self.fits:
            self.fits[snapshot.id] = True
            names = [keys.manifest(name) for name in snapshot.record.manifests]
            if not all(name in self.manifests for name in names):
                return set()
            parts = [self.manifests[name] for name in names]
            try:
                if manifests.state_of_parts([one.state for one in parts]) != snapshot.record.state:
                    which = "manifest" if len(parts) == 1 else "manifests"
                    raise Damaged(f"it and its {which} name different states")
                joined(snapshot, parts)
            except (Damaged, Unsupported) as error:
                self.fits[snapshot.id] = False
                self._problem(keys.snapshot(snapshot.id), error.problem)
        return set() if self.fits[snapshot.id] else {keys.snapshot(snapshot.id)}

    def _causes_in(self, key: str) -> set[str]:
        manifest = self.manifests.get(key)
        if manifest is None:
            return {key}
        broken = self._broken_packs(manifest)
        if any(pack.rpartition("/")[2] not in self.there for pack in broken):
            # Perhaps one of these says where it has gone.
            broken |= self.relocations.damaged.keys()
        return ({key} & self.problems.keys()) | broken

    def _unreadable_heads(self) -> dict[str, set[str]]:
        """What damaged or missing head records named: snapshots of the branch that no other names."""
        damaged = [key for key in self.problems if key.startswith(keys.HEADS)]
        named = {point.head.snapshot for points in self.points.values() for point in points if point.head}
        return {
            key: {
                id
                for id, found in self.records.items()
                if id not in named and found.branch == key.split("/")[1]
            }
            for key in damaged
        }

    def _next(self, key: str, ids: tuple[str, ...], newest: str | None) -> str:
        here = f"everstep -r {self.chain.url}"
        if not ids:
            return f"no snapshot needs it; see what it is: {here} dump {key}; and: {here} repair"
        if newest is None:
            return f"no snapshot is whole; {here} repair --from A_COPY_OF_THE_CHAIN"
        return f"start the training again, it resumes from {newest}; to have the rest back: {here} repair"


def _is_pack(key: str) -> bool:
    return key.startswith(keys.PACKS)


def _checked_name(key: str, data: Buffer) -> str:
    name = key.rpartition("/")[2]
    if digest(data) != name:
        raise Damaged("it does not match its digest")
    return name


def _is_chunk(stored: Buffer, one: _Expected) -> bool:
    try:
        return digest(decode(stored, one.place.encoding, one.size_bytes)) == one.digest
    except (Damaged, Unsupported):
        return False


def _place(name: str, entry: pack.Entry) -> Place:
    return Place(name, entry.offset, entry.stored_bytes, entry.encoding, entry.base)


def _sealed_as(kind: type[SealedRecord]) -> Callable[[_Verifier, Entry], None]:
    return lambda verifier, entry: verifier._sealed(entry, kind)


_CHECKS: dict[str, Callable[[_Verifier, Entry], None]] = {
    **{prefix: _sealed_as(kind) for prefix, kind in SEALED_KINDS.items()},
    keys.STEPLOG: _Verifier._segment,
    JOURNAL: _Verifier._journal,
    keys.SNAPSHOTS: _Verifier._snapshot,
    keys.MANIFESTS: _Verifier._manifest,
    keys.PACKS: _Verifier._pack,
}
