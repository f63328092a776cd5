"""Where keepers are found, and who may be one."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from everstep.chain.history import Chain
from everstep.errors import Unsupported
from everstep.keeper import places
from everstep.keeper.places import Lock, Place, living_places, runtime_directory, sweep
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.testing.crash import RecordingFiles


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "tmp"
    directory.mkdir(mode=0o700)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "session"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    return directory


def test_a_directory_of_the_user_s_own(temporary: Path) -> None:
    directory = runtime_directory()
    assert directory == temporary / f"everstep-{os.geteuid()}"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert runtime_directory() == directory


def test_the_session_s_directory_is_preferred(session: Path) -> None:
    assert runtime_directory() == session / "everstep"


def test_a_session_directory_that_is_another_s_is_not_used(session: Path, temporary: Path) -> None:
    session.chmod(0o755)
    assert runtime_directory().parent == temporary


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o777])
def test_a_directory_that_others_can_look_into_is_refused(temporary: Path, mode: int) -> None:
    runtime_directory().chmod(mode)
    with pytest.raises(Unsupported, match="not a directory of this user alone"):
        runtime_directory()


def test_a_link_is_refused(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (temporary / f"everstep-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unsupported):
        runtime_directory()


def test_a_directory_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = runtime_directory()
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    monkeypatch.setattr(places, "_candidates", lambda: [directory])
    with pytest.raises(Unsupported):
        runtime_directory()


def test_each_chain_has_a_place(tmp_path: Path) -> None:
    first, second = (Chain.create(tmp_path / name) for name in "ab")
    again = Chain(os.path.relpath(tmp_path / "a"))
    (place,) = places.places(first)
    assert places.places(again) == [place] != places.places(second)
    assert len(place.path.name) == places.NAME_DIGITS


def test_a_copy_of_a_chain_is_another_chain(tmp_path: Path) -> None:
    import shutil

    Chain.create(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert places.places(Chain(tmp_path / "a")) != places.places(Chain(tmp_path / "b"))


def test_a_keeper_of_another_environment_is_looked_for_too(session: Path, tmp_path: Path) -> None:
    chain = Chain.create(tmp_path / "chain")
    (place,) = places.places(chain)
    (session.parent / "tmp" / f"everstep-{os.geteuid()}").mkdir(mode=0o700)
    first, second = places.places(chain)
    assert first == place
    assert second.path.name == place.path.name
    assert second.path.parent.parent == session.parent / "tmp"


def test_stores_that_no_other_process_can_open(tmp_path: Path) -> None:
    odd = LocalStore(tmp_path / "chain", RecordingFiles(tmp_path))
    for chain in (Chain.create(MemoryStore()), Chain.create(odd)):
        with pytest.raises(Unsupported, match="store of this process"):
            places.places(chain)


# -- the lock ----------------------------------------------------------------------------------------------


def place_in(directory: Path, name: str = "0123456789abcdef") -> Place:
    return Place(directory / name)


def test_one_keeper_at_a_place() -> None:
    place = place_in(runtime_directory())
    assert not place.is_taken()
    lock = Lock.take(place)
    assert lock is not None
    assert place.is_taken()
    assert Lock.take(place) is None
    lock.release()
    assert not place.path.exists()
    assert not place.is_taken()
    again = Lock.take(place)
    assert again is not None
    again.release()


def test_a_lock_that_is_taken_away_before_it_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, then unlinked by one who leaves, then locked: that would be a lock on nothing."""
    place = place_in(runtime_directory())
    first = Lock.take(place)
    assert first is not None
    real, releases = fcntl.flock, [first]

    def flock(descriptor: int, operation: int) -> None:
        while releases:
            releases.pop().release()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = Lock.take(place)
    assert second is not None
    monkeypatch.undo()
    assert place.is_taken()
    assert Lock.take(place) is None
    second.release()


def test_what_somebody_else_has_put_there_stays() -> None:
    place = place_in(runtime_directory())
    lock = Lock.take(place)
    assert lock is not None
    (place.path / "notes").write_text("mine")
    lock.release()
    assert [one.name for one in place.path.iterdir()] == ["notes"]


def test_what_the_dead_left_is_swept() -> None:
    directory = runtime_directory()
    living, dead, empty = (place_in(directory, digit * 16) for digit in "abc")
    lock = Lock.take(living)
    assert lock is not None
    dead.path.mkdir()
    for path in (dead.lock_file, dead.log_file):
        path.write_text("")
    dead.listen().close()
    empty.path.mkdir()
    (directory / "not-a-keeper-s").mkdir()
    assert [place.path.name[0] for place in living_places()] == ["a", "b", "c"]
    sweep(directory)
    assert sorted(one.name for one in directory.iterdir()) == ["a" * 16, "not-a-keeper-s"]
    lock.release()


def test_a_connection_however_long_the_path() -> None:
    deep = runtime_directory() / ("d" * 120)
    deep.mkdir(mode=0o700)
    place = place_in(deep)
    place.path.mkdir(mode=0o700)
    assert place.connect() is None
    listener = place.listen()
    assert stat.S_IMODE(place.socket_file.stat().st_mode) == 0o600
    sock = place.connect()
    assert sock is not None
    sock.close()
    listener.close()
    assert place.connect() is None
    place.listen().close()  # What is left of a dead one is in nobody's way.
