"""What a pickle of a stranger can do to who imports it: be read, or be refused. Nothing of it runs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import pickle
import random
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from everstep.errors import Damaged, NotFound, Unsupported
from everstep.integrations import importing, pickles
from integrations.checkpoints import (
    chain,
    dcp_item_with,
    dcp_with,
    hf_with,
    save_dcp,
    save_hf,
    with_old_pickle,
    with_pickle,
)

PLACES: list[Callable[[bytes, Path], Path]] = [with_pickle, with_old_pickle, dcp_with, dcp_item_with, hf_with]


class Calls:
    """Pickled, it asks for a call of `what`."""

    def __init__(self, what: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (what, arguments, state) if state is not None else (what, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(marker: Path) -> dict[str, Any]:
    """Objects whose pickles would make a file."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "open": Calls(open, str(marker), "w"),
        "partial": Calls(functools.partial(os.system, f"touch {marker}")),
        "nested": {"model": [{"weight": (1, Calls(os.system, f"touch {marker}"))}]},
        "key": {Calls(os.system, f"touch {marker}"): 1},
        "setstate": Calls(functools.partial, print, state=(os.system, (f"touch {marker}",), {}, {})),
        "attrgetter": Calls(operator.attrgetter("system"), os),
        "import": Calls(importlib.import_module, "this"),
        "getattr": Calls(getattr, Calls(importlib.import_module, "os"), "system"),
        "torch.load": Calls(torch.load, str(marker)),
        "torch.save": Calls(torch.save, {}, str(marker)),
    }


@pytest.mark.parametrize("place", PLACES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_that_a_pickle_asks_for_is_run(
    tmp_path: Path, place: Callable[[bytes, Path], Path], protocol: int
) -> None:
    marker = tmp_path / "it-ran"
    for number, (name, evil) in enumerate(touch(marker).items()):
        try:
            data = pickle.dumps(evil, protocol)
        except (pickle.PicklingError, TypeError, AttributeError):
            continue
        path = place(data, tmp_path / f"{number}")
        with pytest.raises(Unsupported, match="not run") as refused:
            importing.read(path)
        assert "nothing was imported" in str(refused.value), name
        assert not marker.exists(), name
    assert number > 10


def test_the_exploits_are_real(tmp_path: Path) -> None:
    """Those that touch a file do it where a pickle is believed."""
    marker = tmp_path / "it-ran"
    for name in ("os.system", "eval", "exec", "open", "nested", "torch.save"):
        pickle.loads(pickle.dumps(touch(marker)[name]))
        assert marker.exists(), name
        marker.unlink()


def named(*lines: str) -> bytes:
    return b"\x80\x02" + b"".join(f"c{line}\n".encode() for line in lines) + b"."


@pytest.mark.parametrize(
    "name",
    [
        "posix\nsystem", "nt\nsystem", "builtins\neval", "__builtin__\neval", "builtins\neval.__call__",
        "torch.hub\nload", "torch\nload", "torch.storage\n_load_from_bytes",
        "torch._utils\n_import_dotted_name",
        "numpy.f2py.crackfortran\nmyeval", "numpy.testing._private.utils\nrunstring", "numpy\nload",
        "torch.distributed.rpc.internal\n_run_function", "somewhere\nthing.of.it", "collections\nnamedtuple",
        "operator\nmethodcaller", "types\nFunctionType", "types\nCodeType", "marshal\nloads", "pickle\nloads",
        "ctypes\nCDLL", "commands\ngetoutput", "urllib2\nurlopen", "copy_reg\nadd_extension",
        "torch.jit\nload", "functools\nreduce", "copyreg\nadd_extension",
    ],
)  # fmt: skip
def test_what_anybody_has_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    path = with_pickle(named(name), tmp_path / "evil.pt")
    with pytest.raises(Unsupported) as refused:
        importing.read(path)
    assert name.replace("\n", ".") in str(refused.value)


def test_an_instance_of_a_class_is_not_made(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    text = f"touch {marker}".encode()
    call = b"csubprocess\nPopen\n(X" + struct.pack("<I", len(text)) + text + b"t"
    for end in (b"\x81.", b"\x81}b.", b"}\x92.", b"R."):
        with pytest.raises(Unsupported, match=r"subprocess\.Popen"):
            importing.read(with_pickle(b"\x80\x04" + call + end, tmp_path / "evil.pt"))
    assert not marker.exists()


class Elsewhere:
    """A class of nobody else's."""

    def __init__(self) -> None:
        self.rate = 0.1


def test_a_class_of_another_package_matters_only_where_it_is_wanted(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(3)}, "args": Elsewhere()}, tmp_path / "file.pt")
    c = chain(tmp_path / "c")
    with pytest.raises(Unsupported, match=r"args is a .*Elsewhere.*--as NAME=KEY"):
        c.import_(tmp_path / "file.pt")
    assert c.head() is None
    done = c.import_(tmp_path / "file.pt", {"model": "model"})
    assert done.objects == ("model",)
    assert "left out: args" in done.remarks


# -- memory and time ----------------------------------------------------------------------------------------


def many_colliding() -> bytes:
    keys = b"".join(
        b"\x8a\x10" + ((2**61 - 1) * n).to_bytes(16, "little", signed=True) + b"N" for n in range(50_000)
    )
    return b"\x80\x02}(" + keys + b"u."


def doubling() -> bytes:
    """A list of two of the same list, a hundred times."""
    return b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(90)) + b"."


HUGE = struct.pack("<Q", 1 << 60)
BOMBS = {
    "text": b"\x80\x04\x8d" + HUGE + b".",
    "bytes": b"\x80\x04\x8e" + HUGE + b".",
    "bytearray": b"\x80\x05\x96" + HUGE + b".",
    "integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "deep": b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "doubling": doubling(),
    "colliding": many_colliding(),
    "no end": b"\x80\x02" + b"]" * 1000,
    "no mark": b"\x80\x02t.",
    "no stack": b"\x80\x02.",
    "protocol 0": b"cposix\nsystem\n(S'true'\ntR.",
    "instance of protocol 0": b"\x80\x02(S'true'\niposix\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "unhashable": b"\x80\x02}]Ns.",
    "a call of no name": b"\x80\x02)(tR.",
    "state of a list": b"\x80\x02]}b.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_no_more_than_they_are_large(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MAX_NODES", 100_000)
    begun = time.process_time()
    path = with_pickle(BOMBS[name], tmp_path / "bomb.pt")
    c = chain(tmp_path / "c")
    if name == "memo":
        assert c.import_(path).tensors == 0  # An index is only a key of a dict.
        return
    with pytest.raises((Damaged, Unsupported)):
        c.import_(path)
    assert time.process_time() - begun < 30
    assert c.head() is None


def test_a_pickle_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OBJECTS", 1000)
    with pytest.raises(Unsupported, match="1,000 objects"):
        pickles.read(pickle.dumps([[] for _ in range(1000)]), "it", lambda module, name: False)


def test_plain_values_are_those_that_pickle_makes() -> None:
    rng = random.Random(5)

    def value(depth: int = 0) -> Any:
        kinds = [None, True, False, rng.getrandbits(rng.choice([3, 15, 31, 63, 200])), -rng.getrandbits(40)]
        kinds += [rng.random(), "text ä" * rng.randrange(60), b"by\xfftes" * rng.randrange(70)]
        if depth < 4:
            items = [value(depth + 1) for _ in range(rng.randrange(5))]
            kinds += [items, tuple(items), {f"k{n}": one for n, one in enumerate(items)}, {1, 2, "three"}]
            kinds += [frozenset({4}), [items, items]]
        return rng.choice(kinds)

    for _ in range(300):
        made = [value(), value()]
        for protocol in (2, 3, 4, 5):
            data = pickle.dumps(made, protocol)
            if protocol < 4 and any(b in repr(made) for b in ("{1", "frozenset", "b'")):
                continue  # Those are calls then.
            assert pickles.read(data + b"rest", "it", lambda module, name: False) == (made, len(data))


# -- bytes that were changed --------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 9)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 5))
    return bytes(changed)


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy", "dcp", "safetensors", "index", "trainer"])
def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    state = {"model": {"a.weight": torch.ones(3, 2).t(), "b": torch.zeros(2)}, "step": 3, "n": (1.5, "x")}
    place = path = tmp_path / "file"
    if kind in ("zip", "pickle"):
        torch.save(state, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "dcp":
        save_dcp(path, state)
        place = path / ".metadata"
    elif kind == "safetensors":
        save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, path)
    else:
        save_hf(path, sharded=True)
        place = path / ("model.safetensors.index.json" if kind == "index" else "trainer_state.json")
    whole = place.read_bytes()
    inner = zipfile.ZipFile(path).read("file/data.pkl") if kind == "pickle" else b""
    read = 0
    for _ in range(400):
        if kind == "pickle":
            with_pickle(mutated(inner, rng), path)
        else:
            place.write_bytes(mutated(whole, rng))
        with contextlib.suppress(Damaged, Unsupported, NotFound):  # As what it is not known any more.
            importing.read(path)
            read += 1
    assert read < 400
