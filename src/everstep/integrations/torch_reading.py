"""What `torch.save` wrote: zip archives of a pickle and storages, and the older files of several pickles and
the storages after them. Needs no torch; nothing of the pickles is run.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from everstep.errors import Damaged, Unavailable
from everstep.format.layout import item_bytes
from everstep.integrations import pickles
from everstep.integrations.checkpoint import Checkpoint, refused
from everstep.integrations.pickles import MAX_PICKLE_BYTES
from everstep.integrations.torch_state import Meaning, Storage, allows, storage_dtype

ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C
"""Files of torch before 1.6 begin with a pickle of this number."""

_PIECE_BYTES = 1024 * 1024
_LOCAL_BYTES = 30


@dataclass(frozen=True)
class _Record:
    """A record of an archive: its bytes lie as they are from `offset` of the file on."""

    offset: int
    size_bytes: int
    crc: int


def read(path: Path) -> Checkpoint:
    """What is in a file that `torch.save` wrote. Reads its pickle and checks the checksums of its records.

    Raises:
        Unsupported: it holds what no state is made of, or was written on another kind of machine.
        Damaged: it is not whole.
    """
    with opened(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if file.read(len(ZIP)) == ZIP:
            tree, remarks = archived(file, path, 0, size_bytes, path.name)
        else:
            tree, remarks = _legacy(file, path, size_bytes)
    return Checkpoint("torch", tree, size_bytes, remarks=remarks)


def is_torch(path: Path) -> bool:
    """Whether a file begins as those do that `torch.save` writes, or any pickle."""
    with opened(path) as file:
        begin = file.read(4)
    return begin == ZIP or begin[:1] == b"\x80"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read. Raises Damaged where it is missing, Unavailable where it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        kind = Damaged if isinstance(error, FileNotFoundError) else Unavailable
        raise kind(
            f"{path} cannot be read ({os.strerror(error.errno) if error.errno else error})",
            kept="nothing was imported",
            next=f"ls -l {path}",
        ) from error


# -- archives -----------------------------------------------------------------------------------------------


def archived(
    file: BinaryIO, path: Path, offset: int, size_bytes: int, what: str, check: bool = True
) -> tuple[Any, list[str]]:
    """What is in the archive that is so many bytes of a file from `offset` on; and remarks.

    Args:
        what: names it in errors.
        check: hold all records against their checksums, for which they are read.
    """
    records = _records(file, offset, size_bytes, what)
    pickle = next((name for name in records if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if pickle is None:
        raise refused(what, "is a zip archive, but none that torch.save writes")
    root = pickle.removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order is not None and _bytes(file, order) != b"little":
        raise refused(what, "was written on a big-endian machine")
    if check:
        for name, record in records.items():
            _check_sum(file, record, f"{what}: {name}")
    if records[pickle].size_bytes > MAX_PICKLE_BYTES:
        raise refused(what, f"has a pickle of more than {MAX_PICKLE_BYTES:,} bytes")

    def storage(pid: Any) -> tuple[Storage, str | None]:
        kind, of, key, _, count = pid
        record = records.get(f"{root}data/{key}") if kind == "storage" and type(key) is str else None
        if record is None:
            raise ValueError(f"its storage {str(key)[:40]} is missing")
        dtype = storage_dtype(of)
        needed = count * (item_bytes(dtype) if dtype else 1)
        if type(count) is not int or not 0 <= needed <= record.size_bytes:
            raise ValueError(f"its storage {key} is shorter than it is said to be")
        return Storage(path, record.offset, needed), dtype

    value, _ = pickles.read(_bytes(file, records[pickle]), what, allows)
    meaning = Meaning(what, storage)
    return meaning.of(value), meaning.remarks


def _records(file: BinaryIO, offset: int, size_bytes: int, what: str) -> dict[str, _Record]:
    try:
        with zipfile.ZipFile(_Part(file, offset, size_bytes)) as archive:
            found = archive.infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
        OSError,
    ) as error:
        raise Damaged(f"{what} is no whole archive: {error}", kept="nothing was imported") from error
    records = {}
    for one in found:
        if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1 or one.file_size != one.compress_size:
            raise refused(
                f"{what}: {one.filename}", "is compressed or encrypted, as torch.save never does it"
            )
        if not 0 <= one.header_offset <= size_bytes - _LOCAL_BYTES:
            raise Damaged(f"{what}: {one.filename} lies outside the file", kept="nothing was imported")
        head = _get(file, offset + one.header_offset, _LOCAL_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", head[26:30]) if head.startswith(ZIP) else (0, -1)
        begin = one.header_offset + _LOCAL_BYTES + name_bytes + extra_bytes
        if extra_bytes < 0 or begin + one.file_size > size_bytes:
            raise Damaged(f"{what}: {one.filename} lies outside the file", kept="nothing was imported")
        records[one.filename] = _Record(offset + begin, one.file_size, one.CRC)
    return records


def _check_sum(file: BinaryIO, record: _Record, what: str) -> None:
    if not record.crc:
        return  # Written without, as torch does where it is told so.
    at, crc = 0, 0
    while at < record.size_bytes:
        piece = _get(file, record.offset + at, min(_PIECE_BYTES, record.size_bytes - at))
        crc = zlib.crc32(piece, crc)
        at += len(piece)
    if crc != record.crc:
        raise Damaged(
            f"{what} does not match its checksum",
            kept="nothing was imported",
            next="another copy of the file",
        )


def _bytes(file: BinaryIO, record: _Record) -> bytes:
    return _get(file, record.offset, record.size_bytes)


def _get(file: BinaryIO, offset: int, size_bytes: int) -> bytes:
    data = os.pread(file.fileno(), size_bytes, offset)
    while 0 < len(data) < size_bytes:
        more = os.pread(file.fileno(), size_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    if len(data) != size_bytes:
        raise Damaged(f"a file ends before byte {offset + size_bytes}", kept="nothing was imported")
    return data


class _Part:
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size_bytes: int) -> None:
        self._file = file
        self._offset = offset
        self._size_bytes = size_bytes
        self._at = 0

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size_bytes}[whence]
        if base + to < 0:
            raise OSError(22, "before the beginning")
        self._at = base + to
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(self._size_bytes - self._at, 0)
        size = left if size < 0 else min(size, left)
        data = os.pread(self._file.fileno(), size, self._offset + self._at) if size else b""
        self._at += len(data)
        return data


# -- files of torch before 1.6 ------------------------------------------------------------------------------


def _legacy(file: BinaryIO, path: Path, size_bytes: int) -> tuple[Any, list[str]]:
    """Pickles of a magic number, a version, the machine, the object and the storages' keys; then, of each
    storage, the number of its elements and these."""
    what = path.name
    # Not closed here: what an error holds may still look into it.
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    parts, at = _in_a_row(memoryview(memory), what)
    version, machine, value, storage_keys = parts
    if version != 1001 or type(machine) is not dict or type(storage_keys) is not list:
        raise refused(what, "is no file that torch.save writes")
    if machine.get("little_endian") is not True:
        raise refused(what, "was written on a big-endian machine")
    try:
        items = _items_of(value)
    except (TypeError, ValueError) as error:
        raise Damaged(f"{what} has storages that cannot be: {error}", kept="nothing was imported") from error
    places: dict[object, Storage] = {}
    for key in storage_keys:
        if type(key) is not str or key not in items:
            raise Damaged(f"{what} has a storage that nothing is in", kept="nothing was imported")
        (count,) = struct.unpack("<q", _get(file, at, 8))
        storage_bytes = count * items[key]
        if count < 0 or at + 8 + storage_bytes > size_bytes:
            raise Damaged(f"{what} ends within storage {key[:40]}", kept="nothing was imported")
        places[key] = Storage(path, at + 8, storage_bytes)
        at += 8 + storage_bytes

    def storage(pid: Any) -> tuple[Storage, str | None]:
        kind, of, key, _, _, seen = pid
        if kind != "storage" or key not in places or seen is not None:
            raise ValueError(f"its storage {str(key)[:40]} is missing, or seen otherwise than it was written")
        return places[key], storage_dtype(of)

    meaning = Meaning(what, storage)
    return meaning.of(value), meaning.remarks


def _in_a_row(data: memoryview, what: str) -> tuple[list[Any], int]:
    """The four pickles that follow that of the magic number, and where they end."""
    parts: list[Any] = []
    at = 0
    for _ in range(5):
        value, size = pickles.read(data[at:], what, allows)
        if not parts and value != _MAGIC:
            raise refused(
                what,
                "is a pickle, but no file that torch.save writes",
                "save it anew with torch.save, if you trust where it is from",
            )
        parts.append(value)
        at += size
    return parts[1:], at


def _items_of(value: Any) -> dict[object, int]:
    """The size of an element of each storage that is taken from outside of a pickle, by its key."""
    found: dict[object, int] = {}
    seen: set[int] = set()
    left = [value]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        kind = type(one)
        if kind in (dict, list, tuple, set, frozenset, pickles.Made):
            seen.add(id(one))
        if kind is dict:
            left += one.values()
        elif kind in (list, tuple, set, frozenset):
            left += one
        elif kind is pickles.Made and one.name == pickles.PERSISTENT:
            if type(one.args) is not tuple or len(one.args) != 6:
                raise Damaged("a storage is named otherwise than torch does it", kept="nothing was imported")
            dtype = storage_dtype(one.args[1])
            found[one.args[2]] = item_bytes(dtype) if dtype else 1
        elif kind is pickles.Made:
            left += [one.args, one.state, one.items, one.pairs]
    return found
