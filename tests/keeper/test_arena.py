"""Arenas: memory of this process, and memory that two processes share."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from everstep.errors import Damaged, Unavailable
from everstep.keeper import memory
from everstep.keeper.arena import Arena, allocated


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("everstep-arena")


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("make", [Arena.private, Arena.shared], ids=["private", "shared"])
@pytest.mark.parametrize("size", [1, 4096, 4097, 3_000_000])
def test_memory_in_whole_pages_that_is_zero(make: object, size: int) -> None:
    arena = make(size)  # type: ignore[operator]
    assert arena.size_bytes == len(arena.memory) == -(-size // 4096) * 4096
    assert arena.address % 4096 == 0
    assert not any(arena.memory)
    arena.memory[:3] = b"abc"
    assert bytes(arena.memory[:4]) == b"abc\0"
    arena.close()


def test_two_see_the_same() -> None:
    before = (mapped(), opened())
    first = Arena.shared(100_000)
    assert first.descriptor is not None
    second = Arena.opened(os.dup(first.descriptor))
    first.memory[50_000:50_005] = b"hello"
    assert bytes(second.memory[50_000:50_005]) == b"hello"
    assert mapped() == 2 + before[0]
    # One descriptor each, and none that a forked child would get unknown to us.
    assert opened() == 2 + before[1]
    first.close()
    assert bytes(second.memory[50_000:50_005]) == b"hello"
    second.close()
    assert (mapped(), opened()) == before


def test_the_first_bytes_are_the_same_object() -> None:
    arena = Arena.private(10_000)
    first = arena.first(5000)
    assert arena.first(5000) is first
    assert len(first) == 5000
    assert arena.first(arena.size_bytes) == arena.memory
    arena.close()


def test_what_is_still_viewed_goes_with_its_last_view() -> None:
    before = mapped()
    arena = Arena.shared(10_000)
    view = arena.memory[100:200]
    view[:] = bytes(range(100))
    arena.close()
    assert arena.descriptor is None
    assert bytes(view) == bytes(range(100))
    assert mapped() == before + 1
    del view, arena
    assert mapped() == before


def test_nobody_can_cut_it() -> None:
    arena = Arena.shared(10_000)
    assert arena.descriptor is not None
    with pytest.raises(PermissionError):
        os.ftruncate(arena.descriptor, 4096)
    arena.close()


def test_what_could_be_cut_is_not_taken(tmp_path: Path) -> None:
    before = opened()
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 8192)
    with pytest.raises(Damaged, match="of other memory"):
        Arena.opened(loose)
    odd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
    os.ftruncate(odd, 5000)
    fcntl.fcntl(odd, 1033, 2)
    with pytest.raises(Damaged, match="5000 bytes"):
        Arena.opened(odd)
    with pytest.raises(Damaged, match="something else"):
        Arena.opened(os.open(tmp_path, os.O_RDONLY))
    assert opened() == before


def test_more_than_there_is_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("this would take all memory of the machine")

    monkeypatch.setattr(os, "memfd_create", never)
    monkeypatch.setattr(memory, "available_bytes", lambda: 8192)
    with pytest.raises(Unavailable, match="12,288 bytes"):
        allocated(8193)


def test_a_system_that_has_none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = opened()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Unavailable, match="Cannot allocate memory"):
        Arena.shared(10_000)
    assert opened() == before


def test_a_forked_child_has_none_of_it() -> None:
    arena = Arena.shared(10_000)
    pid = os.fork()
    if not pid:
        # Its own memory at that place would be torn out by an unmapping.
        arena.disown()
        clean = mapped() == 0 and arena.descriptor is None
        os._exit(0 if clean else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert arena.descriptor is not None
    arena.close()


def test_memory_figures() -> None:
    assert 1 << 20 < memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory.forget_peak()
    before = memory.peak_private_bytes()
    taken = bytearray(50_000_000)
    assert memory.peak_private_bytes() - before > 40_000_000
    shared = Arena.shared(50_000_000)
    assert memory.peak_private_bytes() - before < 80_000_000
    shared.close()
    del taken
    memory.forget_peak()
    assert memory.peak_private_bytes() - before < 40_000_000


GROUP = {"inactive_file": 100, "active_file": 200, "anon": 5, "inactive_anon": 7}


def test_the_page_cache_of_a_control_group_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4900\n")
    (tmp_path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in GROUP.items()))
    monkeypatch.setattr(memory, "_GROUPS", ((str(tmp_path), "memory.max", "memory.current"),))
    assert memory.available_bytes() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 1 << 20
