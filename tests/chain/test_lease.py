from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from everstep.chain import lease
from everstep.chain.lease import Lease
from everstep.errors import Conflict, Fenced, Unsupported
from everstep.format import keys, record
from everstep.store.memory import MemoryStore


def held_by(store: MemoryStore, **changes: object) -> None:
    """The newest lease is this process's own but for `changes`."""
    mine = lease._owner(os.getpid(), lease.newest(store) + 1, "main")
    other = msgspec.structs.replace(mine, **changes)
    assert store.put(mine.key, [record.seal(other)])


def test_numbers_grow_and_a_release_lets_the_next_in() -> None:
    store = MemoryStore()
    first = Lease.take(store)
    first.check()
    first.release()
    second = Lease.take(store)
    assert (first.number, second.number) == (1, 3)
    second.check()


def test_this_process_is_asked_to_close() -> None:
    store = MemoryStore()
    Lease.take(store)
    with pytest.raises(Conflict, match="is being written by this process") as caught:
        Lease.take(store)
    assert caught.value.next == "run.close()"
    assert lease.newest(store) == 1


@pytest.mark.process
def test_a_living_process_is_respected_and_a_dead_one_is_not() -> None:
    store = MemoryStore()
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        started = lease._started(child.pid)
        assert started
        held_by(store, pid=child.pid, started=started)
        with pytest.raises(Conflict, match=f"process {child.pid} on this machine") as caught:
            Lease.take(store)
        assert caught.value.next.startswith(f"kill {child.pid}")
        child.kill()
        # Dead, and nobody has collected it yet.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert lease._started(child.pid) is None
        assert Lease.take(store).number == 2
    finally:
        child.kill()
        child.communicate()


def test_a_recycled_number_is_not_the_writer() -> None:
    store = MemoryStore()
    started = lease._started(os.getpid())
    assert started
    held_by(store, started=started - 1)
    assert Lease.take(store).number == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "another." + socket.gethostname()},
        {"boot": "00000000-0000-0000-0000-000000000000"},
        {"pid": 0},
        {"pid": 2**22 + 12345},
    ],
)
def test_writers_that_cannot_be_alive_here_are_taken_over(changes: dict[str, object]) -> None:
    store = MemoryStore()
    held_by(store, **changes)
    assert Lease.take(store).number == 2


def test_a_damaged_lease_stops_nobody_and_a_newer_versions_does() -> None:
    store = MemoryStore()
    store.put(keys.numbered(keys.lease("main"), 1), [b"rot"])
    mine = Lease.take(store)
    assert mine.number == 2
    mine.release()
    held_by(store, format=99, pid=0)
    with pytest.raises(Unsupported):
        Lease.take(store)


def test_an_older_lease_in_the_place_of_the_newest_is_not_asked() -> None:
    """It is of a living process that gave its right back: nobody is kept out by it."""
    store = MemoryStore()
    Lease.take(store).release()
    old, newest = (keys.numbered(keys.lease("main"), number) for number in (1, 2))
    store.delete(newest)
    store.put(newest, [store.get(old)])
    assert Lease.take(store).number == 3


def test_who_lost_the_lease_is_told_and_his_release_changes_nothing() -> None:
    store = MemoryStore()
    held_by(store, pid=0)
    first = Lease(store, 1)
    second = Lease.take(store)
    with pytest.raises(Fenced, match="writer 2 has taken") as caught:
        first.check()
    assert caught.value.kept
    assert caught.value.next
    first.release()
    second.check()
    assert lease.newest(store) == 2


def test_who_released_it_may_not_write_any_more() -> None:
    store = MemoryStore()
    mine = Lease.take(store)
    mine.release()
    with pytest.raises(Fenced):
        mine.check()
    mine.release()
    assert lease.newest(store) == 2


def test_of_many_that_take_it_at_once_each_has_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_lives", lambda holder: False)
    store = MemoryStore()
    taken: list[Lease] = []
    threads = [threading.Thread(target=lambda: taken.append(Lease.take(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.number for one in taken) == list(range(1, 9))
    for one in taken:
        if one.number < 8:
            with pytest.raises(Fenced):
                one.check()
        else:
            one.check()


def test_where_there_is_no_proc_only_the_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "Path", lambda path: Path("/nothing/of/the/kind"))
    assert lease._boot() == ""
    assert lease._started(os.getpid()) == 0
    assert lease._started(2**22 + 12345) is None
    store = MemoryStore()
    Lease.take(store)
    with pytest.raises(Conflict):
        Lease.take(store)


# -- branches --------------------------------------------------------------------------------------------


def test_writers_of_different_branches_do_not_meet() -> None:
    store = MemoryStore()
    main, other = Lease.take(store), Lease.take(store, "lr-3e-4")
    assert (main.number, other.number) == (1, 1)
    with pytest.raises(Conflict, match=r"branch 'lr-3e-4' of .* is being written by this process \(since 2"):
        Lease.take(store, "lr-3e-4")
    other.release()
    again = Lease.take(store, "lr-3e-4")
    main.check()
    again.check()
    with pytest.raises(Fenced, match="branch 'lr-3e-4'"):
        other.check()


def of_version_0_2(store: MemoryStore, number: int, **changes: object) -> None:
    mine = lease._owner(os.getpid(), number, "")
    old = msgspec.structs.replace(mine, **changes)
    assert old.key == keys.numbered(keys.LEASES, number)
    assert store.put(old.key, [record.seal(old)])


def test_a_lease_of_all_branches_counts_for_each() -> None:
    store = MemoryStore()
    of_version_0_2(store, 7)
    for branch in ("main", "other"):
        with pytest.raises(Conflict, match="this process"):
            Lease.take(store, branch)
    of_version_0_2(store, 8, pid=0)
    assert (Lease.take(store).number, Lease.take(store, "other").number) == (9, 9)


@pytest.mark.parametrize("branch", ["main", "0", "ffff", "_"])
def test_who_had_the_lease_of_all_branches_stops(branch: str) -> None:
    """It looks in its own place only, so its successor releases it there."""
    store = MemoryStore()
    of_version_0_2(store, 7, host="elsewhere")
    mine = Lease.take(store, branch)
    assert mine.number == 9
    mine.check()
    released = keys.numbered(keys.LEASES, 8)
    assert record.unseal(store.get(released), record.LeaseRecord, released).pid == 0
    assert Lease(store, 7, branch).number < lease.newest(store, branch)


def test_one_of_all_branches_that_comes_later_fences_too() -> None:
    store = MemoryStore()
    mine = Lease.take(store)
    of_version_0_2(store, 2, host="elsewhere")
    with pytest.raises(Fenced):
        mine.check()


def test_which_writers_may_still_commit() -> None:
    store = MemoryStore()

    def holding(**floors: int) -> list[tuple[str, int, bool]]:
        return [(one.branch, one.number, one.dead) for one in lease.Leases(store).holding(floors)]

    assert holding() == []
    held_by(store, host="elsewhere")  # 1, never released
    held_by(store, pid=2**22 + 12345)  # 2, dead
    mine = Lease.take(store)  # 3
    other = Lease.take(store, "other")
    assert holding() == [("main", 3, False), ("main", 2, True), ("main", 1, False), ("other", 1, False)]
    assert holding(main=2) == [("main", 3, False), ("main", 2, True), ("other", 1, False)]
    assert holding(main=3, other=1) == [("main", 3, False), ("other", 1, False)]
    mine.release()
    other.release()
    assert holding(main=3, other=1) == []
    assert holding() == [("main", 2, True), ("main", 1, False)]
    assert lease.may_be_followed_late(store, "main", 1, 5)
    assert not lease.may_be_followed_late(store, "main", 3, 5)
    assert not lease.may_be_followed_late(store, "other", 0, 3)
    assert not lease.may_be_followed_late(store, "fresh", 0, 1)
