"""From other people's checkpoints into a chain: what was found becomes a snapshot like any other.

Its bytes stream through one piece of memory, whatever the size of the state: `WAVE_BYTES`, and what the
writer has under way. Needs no torch.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.chain.export import WINDOW_BYTES, OnProgress
from everstep.chain.history import MAIN, Chain, Snapshot
from everstep.chain.lease import Lease, refuse_unreleased
from everstep.chain.reader import Reader, Target
from everstep.chain.writer import Captured, Facts, Wave, Writer
from everstep.errors import Conflict, Damaged, Mismatch, NotFound, Unavailable
from everstep.format import keys, values
from everstep.format.layout import Layout, Slice, lay_out
from everstep.format.manifest import FILES, MAX_NAME_CHARACTERS, OBJECTS, RUN, Manifest
from everstep.format.naming import join
from everstep.format.values import MAX_NODES, Leaf
from everstep.integrations import dcp_reading, hf_reading, safetensors_reading, torch_reading
from everstep.integrations.checkpoint import Alien, Checkpoint, Tensor, is_module_state, plain_keys, refused
from everstep.integrations.filling import Files

WAVE_BYTES = 128 * 1024 * 1024
"""So much of a state is in memory at a time."""

_AMPLIFIED = 4
"""Views of one storage that overlap become leaves of their own: so many times the files' bytes, and
`_SLACK_BYTES`, are all that is believed."""
_SLACK_BYTES = 64 * 1024 * 1024

_MAX_STEP = 1 << 53

_STEPS = ("global_step", "step", "iteration", "iter", "iter_num")
_NAMED_STEP = re.compile(
    r"(?:^|[-_.])(?:checkpoint|step|global_step|iter|iteration|ckpt)[-_=]?(\d{1,15})(?:$|[-_.])"
)


@dataclass(frozen=True)
class Imported:
    """What an import made. `remarks` are sentences about what came out otherwise than it was."""

    snapshot: Snapshot
    kind: str
    objects: tuple[str, ...]
    tensors: int
    aliases: int
    size_bytes: int
    remarks: tuple[str, ...]


def read(path: Path) -> Checkpoint:
    """What is at a path, whichever kind it is. Where there are checksums, all is read to check them.

    Raises:
        NotFound: there is nothing, or nothing that is known here.
        Unsupported: it holds what no state is made of; nothing of it was run.
        Damaged: it is not whole.
        Unavailable: it cannot be read.
    """
    try:
        return _read(path)
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be read ({os.strerror(error.errno) if error.errno else error})",
            kept="nothing was imported",
            next=f"ls -l {path}",
        ) from error


def _read(path: Path) -> Checkpoint:
    if path.is_dir():
        return _of_directory(path)
    if not path.exists():
        raise NotFound(f"there is no {path}", kept="nothing was imported", next=f"ls {path.parent}")
    if not path.is_file():
        raise _unknown(path)
    if path.name.endswith(safetensors_reading.INDEX) or safetensors_reading.is_safetensors(path):
        return safetensors_reading.read(path)
    if torch_reading.is_torch(path):
        return torch_reading.read(path)
    raise _unknown(path)


def _of_directory(path: Path) -> Checkpoint:
    if (path / dcp_reading.METADATA).is_file():
        return dcp_reading.read(path)
    if any(path.glob("__*.metadata")):
        raise refused(
            str(path), "was written by DCP without collectives, each rank by itself, which is not read"
        )
    if hf_reading.is_hf(path):
        return hf_reading.read(path)
    indexes = sorted(path.glob(f"*{safetensors_reading.INDEX}"))
    single = sorted(path.glob("*.safetensors"))
    if len(indexes) == 1 or (not indexes and len(single) == 1):
        return safetensors_reading.read((indexes or single)[0])
    raise _unknown(path)


def _unknown(path: Path) -> NotFound:
    return NotFound(
        f"{path} is neither a directory of DCP, nor a file of torch.save, nor safetensors, nor a folder of "
        "Hugging Face",
        kept="nothing was imported",
        next="name the file or directory itself that holds the state",
    )


def import_(
    chain: Chain,
    path: Path,
    *,
    objects: Mapping[str, str] | None = None,
    step: int | None = None,
    branch: str = MAIN,
    note: str = "",
    on_progress: OnProgress = lambda done, total: None,
) -> Imported:
    """Make a snapshot of what is at `path`, as the head of a branch. Blocks; durable on return.

    Chunks that the branch's head has are not stored again; it is read for that. Memory stays at `WAVE_BYTES`
    and what the writer takes, however large the state is; what lies in the files in another order than a
    tensor's own is mapped while it is copied.

    Args:
        objects: what to take, by the name it is to have: a key, or keys with dots between them, in what was
            found; "" for all of it. Unless given, everything: under its own keys; what is the state of one
            module or optimizer itself becomes `model` or `optimizer`.
        step: which one it is of, where the files do not say, or say otherwise.
        note: kept with the snapshot.

    Raises:
        NotFound: there is nothing at `path`, or nothing under a key.
        Unsupported: it holds what no state is made of; nothing of it was run.
        Damaged: it is not whole.
        Mismatch: the branch is at a later step.
        Conflict: somebody is writing to the branch.
    """
    return take(
        chain, path, read(path), objects=objects, step=step, branch=branch, note=note, on_progress=on_progress
    )


def take(
    chain: Chain,
    path: Path,
    found: Checkpoint,
    *,
    objects: Mapping[str, str] | None = None,
    step: int | None = None,
    branch: str = MAIN,
    note: str = "",
    on_progress: OnProgress = lambda done, total: None,
) -> Imported:
    """`import_`, of what `read` has found at `path`."""
    keys.checked(branch, "branch")
    state = _State(found, path)
    tree = state.take(dict(objects or {}))
    at = state.step() if step is None else step
    _head_before(chain, branch, at)
    encoded = values.encode({OBJECTS: tree, RUN: state.run_part(at)})
    layout = lay_out(state.slices())  # All leaves are known now, those of generators too.
    facts = Facts(
        step=at,
        epoch=found.epoch,
        trigger="import",
        note=note or f"imported from {path.resolve().name}",
        metrics=found.metrics,
        approximate=state.approximate(),
    )
    with Files() as files:
        stream = _Stream(layout, state.leaves, files, chain.about.grid_bytes, on_progress)
        snapshot = _write(chain, branch, Captured(layout, encoded, stream), facts)
    ties = sum(one.alias is not None for one in layout.slices)
    size_bytes = sum(one.size_bytes for one in layout.slices if one.alias is None)
    remarks = tuple(dict.fromkeys([*found.remarks, *state.remarks]))
    return Imported(snapshot, found.kind, tuple(tree), len(layout.slices) - ties, ties, size_bytes, remarks)


def _head_before(chain: Chain, branch: str, step: int) -> Snapshot | None:
    """The head that a snapshot of this step would follow. Raises Mismatch where it is of a later one."""
    head = chain.head(branch)
    there = head.step if head is not None else 0
    if not there <= step <= _MAX_STEP:
        raise Mismatch(
            f"branch {branch} of {chain.url} is at step {there}, and this is of step {step}",
            kept="nothing was imported",
            next="--branch NAME, for a branch of its own, or --step N",
        )
    return head


def _write(chain: Chain, branch: str, captured: Captured, facts: Facts) -> Snapshot:
    try:
        refuse_unreleased(chain.store, branch)
    except Conflict as error:
        raise Conflict(
            error.problem, kept="nothing was imported", next="--branch NAME, for a branch of its own"
        ) from error
    lease = Lease.take(chain.store, branch)
    try:
        head = _head_before(chain, branch, facts.step)  # Nobody else moves it now.
        writer = Writer(chain, lease, branch, head.id if head else "")
        shared = _known_good(chain, head) if head is not None else None
        if shared is not None:
            writer.build_on(shared)
        return writer.write(captured, facts)
    finally:
        lease.release()


def _known_good(chain: Chain, head: Snapshot) -> Manifest | None:
    """The manifest of a snapshot, if its chunks may be shared. They are read for that: one that has rotted
    would make a damaged snapshot of a whole file."""
    if len(head.record.manifests) != 1:
        return None
    try:
        manifest = chain.manifest(head)
        reader = Reader(chain.store)
        window = memoryview(mmap.mmap(-1, WINDOW_BYTES))
        for number, region in enumerate(manifest.regions):
            for start in range(0, region.size_bytes, WINDOW_BYTES):
                size = min(region.size_bytes - start, WINDOW_BYTES)
                reader.fill(manifest, [Target(number, start, window[:size])])
    except (Damaged, NotFound):
        return None
    return None if reader.got_round else manifest


# -- what is taken ------------------------------------------------------------------------------------------


class _State:
    """What is taken of a checkpoint, as leaves and values."""

    def __init__(self, found: Checkpoint, path: Path) -> None:
        self.found = found
        self.path = path
        self.leaves: dict[str, Tensor] = {}
        self.remarks: list[str] = []
        self._values = 0

    def take(self, wanted: dict[str, str]) -> dict[str, Any]:
        """The values tree of the objects; their leaves are known then."""
        tree = self.found.tree
        if wanted:
            parts = {name: _under(tree, key, self.path) for name, key in wanted.items()}
            if isinstance(tree, dict) and all("." not in key and key in tree for key in wanted.values()):
                left = [str(key) for key in tree if key not in wanted.values()]
                self.remarks += [f"left out: {', '.join(left)}"] if left else []
        elif _is_optimizer_state(tree):
            parts = {"optimizer": tree}
        elif isinstance(tree, dict) and tree and not is_module_state(tree):
            parts = tree
        else:
            parts = {"model": tree}
        for name in parts:
            if type(name) is not str or not name or name.partition("/")[0] == RUN or name.startswith("~"):
                raise Mismatch(
                    f"an object cannot be called {str(name)[:40]!r}",
                    kept="nothing was imported",
                    next="--as NAME=KEY, to give it another name",
                )
        return {name: self._flat(name, self._normal(name, part)) for name, part in parts.items()}

    def step(self) -> int:
        """The step that the checkpoint says it is of, or its name; else 0."""
        tree = self.found.tree
        keyed = [tree.get(key) for key in _STEPS] if isinstance(tree, dict) else []
        for one in (self.found.step, *keyed):
            if type(one) is int and 0 <= one <= _MAX_STEP:
                return one
        named = _NAMED_STEP.search(self.path.resolve().stem)
        if named:
            return int(named[1])
        self.remarks.append("nothing says which step it is of: 0 is taken (--step N)")
        return 0

    def run_part(self, step: int) -> dict[str, Any]:
        found = self.found
        return {
            "progress": {"step": step, "epoch": found.epoch},
            "rng": self._flat(f"{RUN}/rng", found.generators),
            "data": None,
            "parameters": {},
            "gradients": {},
            **({FILES: found.files} if found.files else {}),
        }

    def approximate(self) -> tuple[str, ...]:
        lacks = "the loader's position" if self.found.generators else "generators and the loader's position"
        return (f"it was imported, and {lacks} did not come along",)

    def slices(self) -> list[Slice]:
        """The leaves' slices; tensors that are the same memory are one. Raises Damaged where they are more
        than the files can hold."""
        firsts: dict[Tensor, str] = {}
        made = []
        for name, tensor in self.leaves.items():
            first = firsts.setdefault(tensor, name) if tensor.size_bytes else name
            alias = None if first == name else first
            zeros = (0,) * len(tensor.shape)
            made.append(Slice(name, tensor.dtype, tensor.shape, zeros, tensor.shape, alias=alias))
        total = sum(one.size_bytes for one in made if one.alias is None)
        if total > _AMPLIFIED * self.found.size_bytes + _SLACK_BYTES:
            raise Damaged(
                f"{self.path} claims {total:,} bytes of tensors, and has {self.found.size_bytes:,} bytes",
                kept="nothing was imported",
            )
        return made

    # -- as a run has it ----------------------------------------------------------------------------------

    def _normal(self, name: str, part: Any) -> Any:
        """The state of one object as a run captures it."""
        if is_module_state(part):
            renamed = plain_keys(list(part))
            if any(key != new for key, new in renamed.items()):
                self.remarks.append(f"the names in {name} are without module. and _orig_mod.")
                return {renamed[key]: one for key, one in part.items()}
        if _is_optimizer_state(part):
            return _optimizer(part)
        return part

    def _flat(self, path: str, value: Any) -> Any:
        """The values tree of a value, as `state.tree.flatten` makes it."""
        self._values += 1
        if self._values > MAX_NODES:
            raise refused(str(self.path), f"holds more than {MAX_NODES:,} values")
        kind = type(value)
        if kind is Tensor:
            if path in self.leaves or len(path) > MAX_NAME_CHARACTERS:
                raise refused(f"{self.path}: {path[:200]}", "is twice there, or its name is too long")
            self.leaves[path] = value
            return Leaf(path)
        if kind is Alien:
            raise refused(
                f"{self.path}: {path}",
                f"is a {value.name}, of which no state is made",
                "--as NAME=KEY, to take only what is wanted",
            )
        if kind in (dict, OrderedDict, Counter, defaultdict):
            made = {self._key(path, key): self._flat(join(path, key), one) for key, one in value.items()}
            if isinstance(value, defaultdict):
                return defaultdict(value.default_factory, made)
            return type(value)(made)
        if kind in (list, tuple, set, frozenset):
            return kind(self._flat(join(path, n), one) for n, one in enumerate(value))
        if kind is deque:
            return deque((self._flat(join(path, n), one) for n, one in enumerate(value)), value.maxlen)
        return value

    def _key(self, path: str, key: Any) -> Any:
        if type(key) in (Tensor, Alien):
            raise refused(f"{self.path}: {path}", "has a key that is no plain value")
        return key


def _is_optimizer_state(value: Any) -> bool:
    return type(value) is dict and type(value.get("param_groups")) is list


def _optimizer(state: dict[Any, Any]) -> dict[Any, Any]:
    """An optimizer's state, as it has it itself: DCP leaves out what is empty, and makes texts of numbers."""
    by_number = all(
        type(one) is int
        for group in state["param_groups"]
        if type(group) is dict
        for one in group.get("params") or ()
    )
    held = state.get("state", {})
    if by_number and type(held) is dict:
        held = {int(key) if type(key) is str and key.isdecimal() else key: one for key, one in held.items()}
    return {"state": held, **{key: one for key, one in state.items() if key != "state"}}


def _under(tree: Any, key: str, path: Path) -> Any:
    """What lies under a key, or under keys with dots between them."""
    found = _look(tree, key) if key else tree
    if found is None:
        there = ", ".join(map(str, list(tree)[:8])) if isinstance(tree, dict) else "no keys"
        raise NotFound(
            f"{path} has nothing under {key!r}; it has {there}",
            kept="nothing was imported",
            next="--as NAME=KEY with one of these",
        )
    return found


def _look(tree: Any, key: str) -> Any:
    if type(tree) is list:
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return None
    texts = {str(one): value for one, value in tree.items()}
    if key in texts:
        return texts[key]
    for dot in (match.start() for match in re.finditer(r"\.", key)):
        found = _look(texts[key[:dot]], key[dot + 1 :]) if key[:dot] in texts else None
        if found is not None:
            return found
    return {one[len(key) + 1 :]: value for one, value in texts.items() if one.startswith(f"{key}.")} or None


# -- bytes --------------------------------------------------------------------------------------------------


class _Stream:
    """The waves of a layout, each filled when it is asked for, all in the same memory."""

    def __init__(
        self,
        layout: Layout,
        leaves: Mapping[str, Tensor],
        files: Files,
        grid_bytes: int,
        on_progress: OnProgress,
    ) -> None:
        self._layout = layout
        self._files = files
        self._grid_bytes = grid_bytes
        self._on_progress = on_progress
        self._places = [
            (layout.regions[region].offset + offset, one.size_bytes, leaves[one.name])
            for one, (region, offset) in _distinct(layout)
        ]
        self._places.sort(key=lambda place: place[0])

    def __iter__(self) -> Iterator[Wave]:
        waves = self._layout.waves(WAVE_BYTES, self._grid_bytes)
        if not waves:
            return
        memory = memoryview(mmap.mmap(-1, max(end - begin for begin, end in waves)))
        for begin, end in waves:
            window = memory[: end - begin]
            np.frombuffer(window, np.uint8).fill(0)
            for at, size, tensor in self._places:
                low, high = max(at, begin), min(at + size, end)
                if low < high:
                    self._files.fill(window[low - begin : high - begin], tensor, low - at)
            self._on_progress(end, self._layout.arena_bytes)
            yield Wave(begin, window)


def _distinct(layout: Layout) -> Iterator[tuple[Slice, tuple[int, int]]]:
    """The slices that have bytes of their own, and their places."""
    for one, place in zip(layout.slices, layout.places, strict=True):
        if one.alias is None and one.size_bytes:
            yield one, place
