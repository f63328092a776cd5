from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from making import (
    GRID_BYTES,
    Content,
    compressible,
    content,
    restored,
    started,
    whole,
    written,
    xor_chain,
)

from everstep.chain import prune, reader
from everstep.chain.encoding import Always
from everstep.chain.history import Chain, now
from everstep.chain.reader import Reader
from everstep.chain.retention import Keep
from everstep.chain.steplog import JOURNAL, StepLog
from everstep.chain.verify import Finding, Report, verify
from everstep.chain.writer import Facts
from everstep.errors import Damaged, EverstepError, NotFound, Unsupported
from everstep.format import keys, pack, record
from everstep.format import manifest as manifests
from everstep.format.chunk import Encoding, digest
from everstep.format.layout import lay_out
from everstep.format.manifest import Manifest, StoredLeaf, StoredRegion, StoredSlice
from everstep.format.record import HeadRecord, StepRecord, TagRecord
from everstep.store.base import is_key
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore

pytestmark = pytest.mark.slow

FLIPS = 1000
MEMORY = Path("/dev/shm")
"""A directory in memory, where there is such."""

READ = (keys.CHAIN, keys.PACKS, keys.MANIFESTS, keys.SNAPSHOTS, keys.HEADS)
"""What a restore reads."""


def four() -> list[Content]:
    rng = random.Random(3)
    first = content(1)
    second = first.changed(rng, "dense", "count")
    third = compressible(2)
    third.leaves["frozen"] = first.leaves["frozen"]
    return [first, second, third, second.changed(rng, "moment", "small")]


CONTENTS = four()


def make(root: Path) -> Chain:
    """Four snapshots, one of them encoded, a tag, a segment of the step log, and a journal left behind."""
    writer = started(str(root))
    chain = writer.chain
    log = StepLog(chain, "main", writer.lease.number)
    for step, one in enumerate(CONTENTS, start=1):
        writer.encodings = Always(Encoding.SHUFFLE_ZSTD if step == 3 else Encoding.RAW)
        writer.write(one.captured(), Facts(step=step, metrics={"loss": 0.25}, note="by hand"))
    for step in (1, 2, 3, 4):
        log.append(StepRecord(step=step, epoch=0, metrics={"loss": (0.1).hex()}, rng="00" * 8))
        if step == 2:
            journal = log.cut()
            assert journal is not None
            log.seal(journal)
    tagged = next(iter(chain.snapshots()))
    tag = TagRecord(tagged.id, "00" * 8, now(), "best", number=1)
    assert chain.store.put(tag.key, [record.seal(tag)])
    writer.lease.release()
    return chain


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as directory:
        place = Path(directory) / "chain"
        make(place)
        yield place


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """To start others takes longer than what they would read."""
    monkeypatch.setattr(reader, "THREADS", 1)


@pytest.fixture
def chain(root: Path) -> Chain:
    return Chain(str(root))


def files_of(root: Path) -> dict[str, bytes]:
    """The bytes of every object, by key."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def kind_of(key: str) -> str:
    return key.partition("/")[0]


@contextmanager
def changed(root: Path, changes: dict[str, bytes | None]) -> Iterator[None]:
    """Other bytes in some files (None: no file), and back again."""
    before = {key: (root / key).read_bytes() for key in changes}
    try:
        for key, data in changes.items():
            if data is None:
                (root / key).unlink()
            else:
                (root / key).write_bytes(data)
        yield
    finally:
        for key, data in before.items():
            (root / key).write_bytes(data)


def restore_all(root: Path) -> tuple[list[EverstepError], list[str], list[int]]:
    """Every snapshot that the head records name, as a resume reads them.

    Returns:
        The errors, the remarks, and the steps that came back, each of them bit-identical.
    """
    errors: list[EverstepError] = []
    remarks: list[str] = []
    steps: list[int] = []
    try:
        points = list(Chain(str(root)).points())
    except (Damaged, NotFound, Unsupported) as error:
        return [error], remarks, steps
    for point in points:
        if point.damage is not None:
            errors.append(point.damage)
            continue
        assert point.snapshot is not None
        try:
            got, said = restored(Chain(str(root)), point.snapshot)
        except (Damaged, Unsupported) as error:
            errors.append(error)
            continue
        assert got == CONTENTS[point.snapshot.step - 1], "wrong bytes came back, and nobody said so"
        remarks += said
        steps.append(point.snapshot.step)
    return errors, remarks, steps


def assert_named(report: Report, key: str) -> Finding:
    (finding,) = [one for one in report.findings if one.key == key]
    assert finding.problem
    assert finding.next
    return finding


def test_nothing_is_found_where_nothing_is_wrong(root: Path, chain: Chain) -> None:
    report = verify(chain)
    assert (report.findings, report.foreign) == ([], [])
    assert (report.snapshots, report.whole) == (4, 4)
    assert restore_all(root) == ([], [], [4, 3, 2, 1])
    data = files_of(root)
    assert report.bytes == sum(map(len, data.values()))
    assert report.objects == len(data)
    assert {kind_of(key) for key in data} == {
        "everstep.json", "packs", "manifests", "snapshots", "heads", "tags", "leases", "steplog", JOURNAL
    }  # fmt: skip
    encodings = {
        place.encoding for snapshot in chain.snapshots() for place in chain.manifest(snapshot).places
    }
    assert encodings == {Encoding.RAW, Encoding.SHUFFLE_ZSTD}


def encoded_in(chain: Chain) -> dict[str, list[range]]:
    """Where in packs encoded chunks lie: a few bits of their stored bytes mean nothing to a restore."""
    found: dict[str, list[range]] = {}
    for snapshot in chain.snapshots():
        for place in chain.manifest(snapshot).places:
            if place.encoding != Encoding.RAW:
                stored = range(place.offset, place.offset + place.stored_bytes)
                found.setdefault(keys.pack(place.pack), []).append(stored)
    return found


@pytest.mark.slow
def test_every_flipped_bit_is_found(root: Path, chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    data = files_of(root)
    encoded = encoded_in(chain)
    rng = random.Random(11)
    everywhere = rng.choices(list(data), [len(one) for one in data.values()], k=FLIPS)
    # Few bytes lie outside the packs, so as many flips again are made in all kinds of objects alike.
    small = [key for key in data if not key.startswith(keys.PACKS)]
    classes: Counter[tuple[str, str]] = Counter()
    for key in [*everywhere, *rng.choices(small, k=FLIPS // 4)]:
        bit = rng.randrange(8 * len(data[key]))
        damaged = bytearray(data[key])
        damaged[bit // 8] ^= 1 << bit % 8
        with changed(root, {key: bytes(damaged)}):
            findings = verify(chain).findings
            assert key in {one.key for one in findings}, f"bit {bit} of {key} was not found"
            assert all(one.next for one in findings)
            errors, remarks, steps = restore_all(root)
        seen = "refused" if errors else "remarked" if remarks else "not read"
        classes[kind_of(key), seen] += 1
        if not any(bit // 8 in one for one in encoded.get(key, ())):
            assert (seen == "not read") is not key.startswith(READ), f"bit {bit} of {key} was {seen}"
        if seen != "refused":
            assert steps == [4, 3, 2, 1]
    with capsys.disabled():
        print(f" {sum(classes.values())} flips: ", end="")
        print(", ".join(f"{kind} {seen} {n}" for (kind, seen), n in sorted(classes.items())), end=" ")
    assert {kind for kind, _ in classes} == {kind_of(key) for key in data}
    assert verify(chain).findings == []


@pytest.mark.slow
def test_every_flipped_bit_is_found_where_chunks_were_relocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "GRACE_S", -10.0)
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as directory:
        root = Path(directory) / "chain"
        chain = make(root)
        keep, repack = Keep.parse("last 3"), prune.Repack(0.0, 1)
        assert sum(done.copied_bytes for done in prune.prune(chain, keep, repack=repack))
        data = files_of(root)
        assert {kind_of(key) for key in data} >= {"relocations", "prunes"}
        assert restore_all(root) == ([], [], [4, 3, 2])
        rng = random.Random(12)
        (relocation,) = [key for key in data if key.startswith(keys.RELOCATIONS)]
        everywhere = rng.choices(list(data), [len(one) for one in data.values()], k=FLIPS // 10)
        for key in [*everywhere, *data, *[relocation] * 40]:
            bit = rng.randrange(8 * len(data[key]))
            damaged = bytearray(data[key])
            damaged[bit // 8] ^= 1 << bit % 8
            with changed(root, {key: bytes(damaged)}):
                report = verify(chain)
                errors, _, steps = restore_all(root)
            assert key in {one.key for one in report.findings}, f"bit {bit} of {key} was not found"
            named = {id for one in report.findings for id in one.snapshots}
            lost = {snapshot.id for snapshot in chain.snapshots() if snapshot.step not in steps}
            assert lost <= named, f"bit {bit} of {key}"
            if key == relocation:
                assert errors
                assert_named(report, key)
        assert verify(chain).findings == []


def test_a_flip_in_a_chunk_names_the_snapshots_that_need_it(root: Path, chain: Chain) -> None:
    first = chain.find("step:1")
    shared = set(chain.manifest(first).packs) & set(chain.manifest(chain.find("step:4")).packs)
    (key,) = [keys.pack(name) for name in shared if _needs(chain, chain.find("step:3"), keys.pack(name))]
    data = bytearray(files_of(root)[key])
    data[100] ^= 1
    with changed(root, {key: bytes(data)}):
        finding = assert_named(verify(chain), key)
    assert set(finding.snapshots) == {snapshot.id for snapshot in chain.snapshots()}
    other = next(keys.pack(name) for name in shared if keys.pack(name) != key)
    data = bytearray(files_of(root)[other])
    data[100] ^= 1
    with changed(root, {other: bytes(data)}):
        finding = assert_named(verify(chain), other)
    assert set(finding.snapshots) == {s.id for s in chain.snapshots() if _needs(chain, s, other)}
    assert chain.find("step:3").id not in finding.snapshots


def _needs(chain: Chain, snapshot: Any, key: str) -> bool:
    return any(keys.pack(place.pack) == key for place in chain.manifest(snapshot).places)


def one_chunk(encoding: Encoding) -> tuple[Chain, Manifest, bytes]:
    """A snapshot of one leaf in one chunk that is stored so; its manifest, and the leaf's bytes."""
    if encoding is Encoding.XOR_SHUFFLE_ZSTD:
        return xor_chain(1, floats=32)
    writer = started(MemoryStore(), encoding=encoding)
    one = compressible(1, lay_out([whole("one", "float32", (64,))]))
    (snapshot,) = written(writer, [one])
    return writer.chain, writer.chain.manifest(snapshot), one.leaves["one"]


@pytest.mark.parametrize("encoding", [one for one in Encoding if one is not Encoding.RAW])
def test_every_flipped_bit_of_an_encoded_chunk_is_found(encoding: Encoding) -> None:
    """Those too that change nothing: a zstd frame has bits that mean nothing."""
    chain, manifest, data = one_chunk(encoding)
    number = manifest.regions[0].chunks[0]
    chunk, place = manifest.chunks[number], manifest.places[number]
    assert (place.encoding, place.offset) == (encoding, 0)
    key = keys.pack(place.pack)
    good = bytes(chain.store.get(key))
    harmless = 0
    for bit in range(8 * place.stored_bytes):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        chain.store.delete(key)
        chain.store.put(key, [bytes(bad)])
        (finding,) = verify(chain).findings
        assert finding.key == key
        assert f"chunk {chunk.digest[:12]} is not" in finding.problem
        try:
            back = Reader(chain.store).chunk(manifest, chunk.digest)
        except (Damaged, Unsupported):
            assert finding.snapshots
            continue
        assert back == data
        assert finding.snapshots == ()
        harmless += 1
    assert 0 < harmless < 32


# -- more than a bit -----------------------------------------------------------------------------------


def assert_found(root: Path, chain: Chain, changes: dict[str, bytes | None], key: str) -> Finding:
    """Verify finds it, and says of each snapshot rightly whether it can be restored."""
    with changed(root, changes):
        report = verify(chain)
        errors, _, steps = restore_all(root)
    finding = assert_named(report, key)
    assert all(one.next for one in report.findings)
    named = {id for one in report.findings for id in one.snapshots}
    by_step = {snapshot.step: snapshot.id for snapshot in chain.snapshots()}
    assert {by_step[step] for step in set(by_step) - set(steps)} <= named
    assert not errors or key.startswith(READ)
    return finding


def needed(data: dict[str, bytes]) -> list[str]:
    return [key for key in data if key.startswith(READ)]


@pytest.mark.slow
def test_every_cut_object_is_found(root: Path, chain: Chain) -> None:
    for key, data in files_of(root).items():
        lengths = {0, 1, 63, 64, len(data) // 2, len(data) - 4096, len(data) - 1}
        for length in sorted(lengths & set(range(len(data)))):
            if key.startswith(JOURNAL):
                continue  # That is what a kill leaves, and no damage.
            finding = assert_found(root, chain, {key: data[:length]}, key)
            if key.startswith(READ) and length < len(data) // 2:
                assert finding.snapshots


@pytest.mark.slow
def test_every_grown_object_is_found(root: Path, chain: Chain) -> None:
    for key, data in files_of(root).items():
        for more in (b"\0", b"\n", bytes(4096), data):
            if key.startswith(JOURNAL) and more == data:
                continue  # The same records once more.
            if key.startswith(JOURNAL) and b"\n" not in more:
                continue  # A torn line.
            assert_found(root, chain, {key: data + more}, key)


def test_every_missing_object_is_found(root: Path, chain: Chain) -> None:
    data = files_of(root)
    heads = [key for key in data if key.startswith(keys.HEADS)]
    for key in needed(data):
        if key in (heads[0], heads[-1]):
            continue
        finding = assert_found(root, chain, {key: None}, key)
        assert finding.problem == "it is missing"
        assert finding.snapshots
    # The newest and the oldest head record leave no trace, but what stays is whole and is what is said. (The
    # newest snapshot has a tag, by which it is found all the same.)
    for key, steps, count in ((heads[0], [3, 2, 1], 4), (heads[-1], [4, 3, 2], 3)):
        with changed(root, {key: None}):
            report = verify(chain)
            assert (report.findings, report.whole) == ([], count)
            assert restore_all(root) == ([], [], steps)


def test_a_missing_chain_record_is_refused(root: Path) -> None:
    with changed(root, {keys.CHAIN: None}):
        with pytest.raises(NotFound, match="not an Everstep chain"):
            Chain(str(root))
        with pytest.raises(EverstepError, match="not empty"):
            Chain.create(str(root))


@pytest.mark.parametrize("kind", [keys.PACKS, keys.MANIFESTS, keys.SNAPSHOTS, keys.HEADS])
def test_swapped_objects_are_found(root: Path, chain: Chain, kind: str) -> None:
    data = files_of(root)
    alike = [key for key in data if key.startswith(kind)]
    for number, one in enumerate(alike):
        for other in alike[number + 1 :]:
            with changed(root, {one: data[other], other: data[one]}):
                report = verify(chain)
                _, _, steps = restore_all(root)
            found = [finding for finding in report.findings if finding.key in (one, other)]
            assert len(found) == 2
            assert all(finding.next for finding in report.findings)
            assert any(finding.snapshots for finding in found)
            assert len(steps) < 4


def test_a_swapped_chunk_in_a_pack_with_a_footer_that_says_so(root: Path, chain: Chain) -> None:
    """A hostile store that makes packs as it likes cannot make one of another name's chunks."""
    data = files_of(root)
    manifest = chain.manifest(chain.find("step:1"))
    name = max(manifest.packs, key=lambda one: manifest.packs[one])
    key = keys.pack(name)
    good = data[key]
    trailer = pack.decode_trailer(good[-pack.TRAILER_BYTES :], len(good))
    footer = pack.decode_tail(good[trailer.footer_offset :], len(good), name)
    builder = pack.Builder()
    for number, entry in enumerate(footer.entries):
        raw = good[entry.offset : entry.offset + entry.stored_bytes]
        if number == 0:
            raw = bytes(len(raw))
        builder.add(digest(raw), len(raw), raw, len(raw), Encoding.RAW, "")
    _, parts = builder.finish()
    forged = b"".join(parts)
    assert len(forged) == len(good)
    finding = assert_found(root, chain, {key: forged}, key)
    assert chain.find("step:1").id in finding.snapshots


def test_several_damages_at_once_are_all_found(root: Path, chain: Chain) -> None:
    data = files_of(root)
    changes: dict[str, bytes | None] = {key: None for key in data if key.startswith(keys.MANIFESTS)}
    changes |= {key: b"" for key in data if key.startswith(keys.PACKS)}
    with changed(root, changes):
        report = verify(chain)
    assert set(changes) <= {one.key for one in report.findings}
    assert report.whole == 0
    assert all("no snapshot is whole" in f.next for f in report.findings if f.snapshots)


def test_foreign_files_are_told_and_are_no_damage(root: Path, chain: Chain) -> None:
    names = [".DS_Store", "heads/.nfs01", "heads/main/.DS_Store", "packs/ab/notes.txt", "snapshots/copy",
             "leases/.x", "steplog/main/x", "tags/x", "tags/a b", "relocations/1"]  # fmt: skip
    try:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        report = verify(chain)
        assert sorted(report.foreign) == sorted(name for name in names if is_key(name))
        assert report.findings == []
        assert (chain.branches(), list(chain.tags())) == (["main"], ["best"])
        assert chain.head_number() == 4
        assert restore_all(root) == ([], [], [4, 3, 2, 1])
    finally:
        for name in names:
            (root / name).unlink()
        shutil.rmtree(root / "relocations")
        if not list((root / "packs" / "ab").iterdir()):
            (root / "packs" / "ab").rmdir()


# -- a hostile store -----------------------------------------------------------------------------------


def forge(change: Callable[[Manifest], Manifest], *, checked: bool = True) -> tuple[Chain, str, str]:
    """A chain with one good snapshot, and on top one whose manifest is changed, all digests consistent.

    Returns:
        The chain, the key of the manifest and the id of the snapshot.
    """
    writer = started(MemoryStore())
    chain = writer.chain
    good = writer.write(CONTENTS[0].captured(), Facts(step=1))
    forged = change(chain.manifest(good))
    encoded = manifests.encode(forged)
    name = digest(encoded)
    chain.store.put(keys.manifest(name), [encoded])
    made = msgspec.structs.replace(
        good.record, step=2, manifests=(name,), state=forged.state, parents=(good.id,)
    )
    snapshot = record.encode(made)
    chain.store.put(keys.snapshot(digest(snapshot)), [snapshot])
    head = HeadRecord(digest(snapshot), 2, 1, "00", now(), "main", number=2)
    chain.store.put(head.key, [record.seal(head)])
    return chain, keys.manifest(name), digest(snapshot)


def with_place(number: int, **changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        places = list(manifest.places)
        places[number] = msgspec.structs.replace(places[number], **changes)
        return msgspec.structs.replace(manifest, places=tuple(places))

    return change


def with_chunk(number: int, **changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        chunks = list(manifest.chunks)
        chunks[number] = msgspec.structs.replace(chunks[number], **changes)
        return msgspec.structs.replace(manifest, chunks=tuple(chunks))

    return change


def with_leaf(**changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        leaf = msgspec.structs.replace(manifest.leaves[0], **changes)
        return msgspec.structs.replace(manifest, leaves=(leaf, *manifest.leaves[1:]))

    return change


def other(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: msgspec.structs.replace(manifest, **changes)


def xor_cycle(manifest: Manifest) -> Manifest:
    a, b = manifest.chunks[0].digest, manifest.chunks[1].digest
    manifest = with_place(0, encoding=Encoding.XOR_SHUFFLE_ZSTD, base=b)(manifest)
    return with_place(1, encoding=Encoding.XOR_SHUFFLE_ZSTD, base=a)(manifest)


def xor_of_itself(manifest: Manifest) -> Manifest:
    name = manifest.chunks[0].digest
    return with_place(0, encoding=Encoding.XOR_SHUFFLE_ZSTD, base=name)(manifest)


def xor_without_end(manifest: Manifest) -> Manifest:
    for number in range(len(manifest.chunks) - 1):
        base = manifest.chunks[number + 1].digest
        manifest = with_place(number, encoding=Encoding.XOR_SHUFFLE_ZSTD, base=base)(manifest)
    return manifest


def xor_onto_another_pack(manifest: Manifest) -> Manifest:
    """The base is good and lies elsewhere; the chunk is none."""
    chunk = manifest.chunks[0]
    base = next(
        c.digest
        for c, place in zip(manifest.chunks, manifest.places, strict=True)
        if place.pack != manifest.places[0].pack
    )
    assert chunk.digest != base
    return with_place(0, encoding=Encoding.XOR_SHUFFLE_ZSTD, base=base)(manifest)


def huge(manifest: Manifest) -> Manifest:
    """Four terabytes out of one chunk, shared by two leaves so that they must be read for a digest."""
    size = manifest.chunks[0].size_bytes
    count = (4 << 40) // size // 512
    region = StoredRegion(count * size, (0,) * count)
    half = count * size // 2
    leaves = [
        StoredLeaf(
            f"half{n}", "uint8", (half,), (StoredSlice((0,), (half,), len(manifest.regions), n * half),)
        )
        for n in range(2)
    ]
    # Many names for overlapping parts, none of them the same.
    leaves += [
        StoredLeaf(f"part{n}", "uint8", (half,), (StoredSlice((0,), (half,), len(manifest.regions), n),))
        for n in range(1, 50)
    ]
    return msgspec.structs.replace(
        manifest, regions=(*manifest.regions, region), leaves=(*manifest.leaves, *leaves)
    )


def two_places(manifest: Manifest) -> Manifest:
    """Two chunks that are said to lie in the same place."""
    offset = manifest.places[0].offset
    return with_place(1, offset=offset)(manifest)


HOSTILE: dict[str, Callable[[Manifest], Manifest]] = {
    "region of 2^62 bytes": lambda m: msgspec.structs.replace(
        m, regions=(StoredRegion(2**62, m.regions[0].chunks), *m.regions[1:])
    ),
    "region without chunks": lambda m: msgspec.structs.replace(
        m, regions=(StoredRegion(m.regions[0].size_bytes, ()), *m.regions[1:])
    ),
    "region with a chunk that is not there": lambda m: msgspec.structs.replace(
        m, regions=(StoredRegion(4096, (10**9,)), *m.regions[1:])
    ),
    "leaf of 2^62 by 2^62": with_leaf(
        shape=(2**62, 2**62), slices=(StoredSlice((0, 0), (2**62, 2**62), 0, 0),)
    ),
    "leaf beyond its region": with_leaf(slices=(StoredSlice((0, 0), (9, 1024), 0, 2**40),)),
    "leaf in region 2^62": with_leaf(slices=(StoredSlice((0, 0), (9, 1024), 2**62, 0),)),
    "leaf of another dtype": with_leaf(dtype="int32"),
    "leaf of an unknown dtype": with_leaf(dtype="float3"),
    "leaf twice": lambda m: msgspec.structs.replace(m, leaves=(*m.leaves, m.leaves[0])),
    "leaf left out": lambda m: msgspec.structs.replace(m, leaves=m.leaves[1:]),
    "place at 2^62": with_place(0, offset=2**62),
    "place in the footer": with_place(0, offset=GRID_BYTES * 5),
    "place between chunks": with_place(0, offset=512),
    "place in a pack that is not there": with_place(0, pack="00" * 32),
    "two chunks in one place": two_places,
    "stored size too large": with_place(0, stored_bytes=2**26),
    "stored size too small": with_place(0, stored_bytes=17),
    "unknown encoding": with_place(0, encoding=77),
    "zstd that is none": with_place(0, encoding=Encoding.ZSTD),
    "chunk of another size": with_chunk(0, size_bytes=GRID_BYTES // 2),
    "chunk of another digest": with_chunk(0, digest="ab" * 32),
    "xor of itself": xor_of_itself,
    "xor in a circle": xor_cycle,
    "xor without an end": xor_without_end,
    "xor without its base": with_place(0, encoding=Encoding.XOR_SHUFFLE_ZSTD, base="12" * 32),
    "xor onto another pack": xor_onto_another_pack,
    "packs of another size": lambda m: msgspec.structs.replace(
        m, packs={name: size + 4096 for name, size in m.packs.items()}
    ),
    "no packs": other(packs={}),
    "another grid": other(grid_bytes=2 * GRID_BYTES),
    "another state": other(state="cd" * 32),
    "other values": other(values=b"\0"),
    "values that are none": other(values=b"\xff\xff\xff\xff\xff"),
    "a newer format": other(format=9),
    "terabytes out of one chunk": huge,
}


TRUE_BYTES = {
    "another state",
    "other values",
    "leaf left out",
    "leaf of another dtype",
    "packs of another size",
    "terabytes out of one chunk",
}
"""Each chunk is what it is said to be: only the state digest, or a remark of the reader, tells these."""


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_found_and_takes_neither_time_nor_memory(what: str) -> None:
    chain, key, id = forge(HOSTILE[what])
    begun = time.process_time()
    report = verify(chain)
    assert time.process_time() - begun < 5
    named = {one.key: one for one in report.findings}
    assert any(id in one.snapshots for one in report.findings), report.findings
    assert all(one.next for one in report.findings)
    assert key in named or any(one.startswith(keys.PACKS) for one in named)
    # The good one is untouched, and is what is offered.
    assert any(chain.find("step:1").short in one.next for one in report.findings) or (
        any(chain.find("step:1").id in one.snapshots for one in report.findings)
    )
    if what not in TRUE_BYTES:
        with pytest.raises((Damaged, Unsupported)):
            restored(chain, chain.snapshot(id))


@pytest.mark.parametrize(
    "change",
    [
        {"manifests": ("00" * 32,)},
        {"state": "00" * 32},
        {"step": 2**62},
        {"manifests": ("00" * 32,) * 1000},
    ],
)
def test_a_hostile_snapshot_record_is_found(change: dict[str, Any]) -> None:
    writer = started(MemoryStore())
    chain = writer.chain
    good = writer.write(CONTENTS[0].captured(), Facts(step=1))
    encoded = record.encode(msgspec.structs.replace(good.record, **{"step": 2, **change}))
    chain.store.put(keys.snapshot(digest(encoded)), [encoded])
    head = HeadRecord(digest(encoded), 2, 1, "00", now(), "main", number=2)
    chain.store.put(head.key, [record.seal(head)])
    report = verify(chain)
    if change.keys() == {"step"}:
        assert report.findings == []
        return
    assert any(digest(encoded) in one.snapshots and one.next for one in report.findings)
    with pytest.raises((Damaged, Unsupported)):
        chain.manifest(chain.snapshot(digest(encoded)))


def test_objects_of_any_size_are_not_read_whole(root: Path, chain: Chain) -> None:
    """Files with holes: a hostile store claims terabytes and has none."""
    store = LocalStore(root)
    for key in (keys.CHAIN, next(k for k in files_of(root) if k.startswith(keys.HEADS)),
                next(k for k in files_of(root) if k.startswith(keys.SNAPSHOTS)),
                next(k for k in files_of(root) if k.startswith(keys.MANIFESTS)),
                next(k for k in files_of(root) if k.startswith(keys.PACKS))):  # fmt: skip
        good = (root / key).read_bytes()
        try:
            with open(root / key, "r+b") as file:
                file.truncate(1 << 42)
            assert_named(verify(chain), key)
            errors, remarks, _ = restore_all(root)
            assert errors or remarks
        finally:
            (root / key).write_bytes(good)
    assert list(store.list(keys.CHAIN))
    assert verify(chain).findings == []


def test_the_forger_forges_nothing_of_its_own() -> None:
    """What the tests above find is what they changed."""
    chain, _, id = forge(lambda manifest: manifest)
    assert verify(chain).findings == []
    assert restored(chain, chain.snapshot(id)) == (CONTENTS[0], [])
