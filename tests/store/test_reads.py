"""Reading files: the same bytes out of the page cache, past it, and by the way back where neither can be."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep.store import reads
from everstep.store.reads import read
from examples import examples

SIZE = 10 * 1024 * 1024 + 4321


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def drop(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return open_(path, flags, *mode)  # type: ignore[arg-type]

    open_ = os.open
    monkeypatch.setattr(os, "open", refused)


@pytest.mark.parametrize("way", ["cached", "cold", "no direct", "half cached"])
@pytest.mark.parametrize("start", [0, 1, 4096, 5000, SIZE - 2_000_000, SIZE - 10, SIZE, SIZE + 9])
def test_all_ways_read_the_same(file: Path, monkeypatch: pytest.MonkeyPatch, way: str, start: int) -> None:
    whole = file.read_bytes()
    if way != "cached":
        drop(file)
    if way == "half cached":
        with open(file, "rb") as opened:
            os.pread(opened.fileno(), 1_000_000, max(start - 100, 0))
    if way == "no direct":
        refuse_direct(monkeypatch)
    sizes = [7, 0, 3_000_000, 4096, 1, 5_000_000]
    buffers = [memoryview(bytearray(size)) for size in sizes]
    count = read(file, start, buffers)
    expected = whole[start : start + sum(sizes)]
    assert count == len(expected)
    assert b"".join(buffers)[:count] == expected


def test_a_cold_file_is_read_past_the_page_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(file)
    read(file, 0, [memoryview(bytearray(SIZE))])
    with open(file, "rb") as opened:
        try:
            cached = os.preadv(opened.fileno(), [bytearray(1)], SIZE // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            cached = 0
    if not cached:
        return
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    pytest.fail("the file went through the page cache")


def test_more_buffers_than_a_call_takes(file: Path) -> None:
    buffers = [memoryview(bytearray(1000)) for _ in range(3000)]
    assert read(file, 12, buffers) == 3_000_000
    assert b"".join(buffers) == file.read_bytes()[12:3_000_012]


def test_nothing_to_read(file: Path) -> None:
    assert read(file, 0, []) == 0
    with pytest.raises(IsADirectoryError):
        read(file.parent, 0, [])
    with pytest.raises(FileNotFoundError):
        read(file.parent / "none", 0, [])


def test_another_error_is_not_swallowed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "the disk is gone")

    drop(file)
    monkeypatch.setattr(reads, "_past_cache", fails)
    monkeypatch.setattr(reads, "_cached", lambda *_: 0)
    with pytest.raises(OSError, match="the disk is gone"):
        read(file, 0, [memoryview(bytearray(SIZE))])


# -- straight into memory that lies as O_DIRECT asks -------------------------------------------------------


def pages(size: int) -> memoryview:
    """Page-aligned memory."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def counting_bounces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each detour took."""
    detours: list[int] = []
    bounced = reads._bounced

    def counted(*arguments: Any) -> int:
        detours.append(bounced(*arguments))
        return detours[-1]

    monkeypatch.setattr(reads, "_bounced", counted)
    return detours


def has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("start", "shift", "size", "detours"),
    [
        (0, 0, 4_194_304, []),
        (8192, 4096, 4_194_304, []),
        (0, 0, 4_194_304 + 100, [100]),
        (0, 64, 4_194_304, [4_194_304]),
        (512, 512, 3_000_000, [3_000_000]),
    ],
)
def test_memory_on_page_boundaries_needs_no_detour(
    file: Path, monkeypatch: pytest.MonkeyPatch, start: int, shift: int, size: int, detours: list[int]
) -> None:
    if not has_direct(file):
        pytest.skip("this file system has no O_DIRECT")
    drop(file)
    monkeypatch.setattr(reads, "_cached", lambda *_: 0)
    seen = counting_bounces(monkeypatch)
    buffer = pages(8 << 20)[shift : shift + size]
    assert read(file, start, [buffer]) == size
    assert buffer == file.read_bytes()[start : start + size]
    assert seen == detours


def test_neighbours_that_lie_as_the_disk_asks_are_read_with_one_call(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_direct(file):
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(reads, "_cached", lambda *_: 0)
    calls: list[list[int]] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], at: int, *flags: int) -> int:
        calls.append([len(buffer) for buffer in buffers])
        return preadv(descriptor, buffers, at, *flags)

    monkeypatch.setattr(os, "preadv", noted)
    sizes = [1 << 20, 0, 2 << 20, 65536, (1 << 20) + 100, 3000]
    buffers = [pages(size + 1)[:size] for size in sizes]
    assert read(file, 4096, buffers) == sum(sizes)
    assert b"".join(buffers) == file.read_bytes()[4096 : 4096 + sum(sizes)]
    assert calls[0] == [1 << 20, 2 << 20, 65536, 1 << 20]
    assert len(calls) == 2, "one more for what is left, by a detour"


@settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_mixture_of_memory(file: Path, data: st.DataObject) -> None:
    """Buffers that can be read straight into, ones that cannot, and empty ones; up to and over the end."""
    start = data.draw(
        st.one_of(st.integers(0, SIZE + 9), st.integers(0, SIZE // 4096).map(lambda n: n * 4096))
    )
    shapes = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 0, 64, 512, 4095]),
                st.one_of(
                    st.integers(0, 5000),
                    st.integers(1, 500).map(lambda n: n * 4096),
                    st.integers(60_000, 5_000_000),
                ),
            ),
            max_size=6,
        )
    )
    buffers = [pages(shift + size + 1)[shift : shift + size] for shift, size in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "_DIRECT_FROM_BYTES", 0)
        patch.setattr(reads, "_cached", lambda *_: 0)
        count = read(file, start, buffers)
    expected = file.read_bytes()[start : start + sum(size for _, size in shapes)]
    assert count == len(expected)
    assert b"".join(buffers)[:count] == expected


def test_bounce_buffers_are_used_again_and_few_are_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct(file):
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(reads, "_BOUNCES", [])
    monkeypatch.setattr(reads, "_cached", lambda *_: 0)
    inside = threading.Barrier(10)
    bounced = reads._bounced

    def together(*arguments: Any) -> int:
        inside.wait(60)
        return bounced(*arguments)

    monkeypatch.setattr(reads, "_bounced", together)
    buffers = [memoryview(bytearray(2_000_000)) for _ in range(10)]
    readers = [threading.Thread(target=read, args=(file, 0, [buffer])) for buffer in buffers]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [buffer == file.read_bytes()[:2_000_000] for buffer in buffers] == [True] * 10
    assert len(reads._BOUNCES) == reads._KEPT_BOUNCES == 8
    monkeypatch.setattr(reads, "_bounced", bounced)
    kept = list(map(id, reads._BOUNCES))
    read(file, 0, [buffers[0]])
    assert list(map(id, reads._BOUNCES)) == kept
