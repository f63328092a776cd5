"""A snapshot's state to look into: nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch

from everstep.errors import NotFound
from everstep.format.manifest import OBJECTS, RUN, Manifest
from everstep.state import leaves
from everstep.state.leaves import Fill, same_bytes, stored_leaf
from everstep.state.numbering import by_order, is_by_name
from everstep.state.objects import named
from everstep.state.restore import restore_part
from everstep.state.tree import Leaves, Tensorlike, leaf_names, unflatten

META = torch.device("meta")


class NoLeaf(NotFound, KeyError):
    """There is no leaf of this name: as a mapping says it, too."""


class LazyState(Mapping[str, Tensorlike]):
    """The leaves of a snapshot by name; each is read, and verified, whenever it is asked for, and not kept.

    Args:
        manifest: the snapshot's; of several ranks the joined one: leaves are whole whatever rank has stored
            what.
        fill: reads its bytes, verified.
        device: where tensors are to be; on `meta` nothing is read. numpy arrays stay on the host.
    """

    def __init__(self, manifest: Manifest, fill: Fill, device: torch.device) -> None:
        self._manifest = manifest
        self._fill = fill
        self._device = device
        tree = manifest.tree
        self._saved: dict[str, Any] = tree[OBJECTS]
        self._run: dict[str, Any] = tree[RUN]

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.by_name)

    def __len__(self) -> int:
        return len(self._manifest.leaves)

    def __contains__(self, name: object) -> bool:
        return name in self._manifest.by_name

    def __getitem__(self, name: str) -> Tensorlike:
        """One leaf, read and verified. Blocks. Raises NotFound (a KeyError too), Damaged."""
        if name not in self:
            near = get_close_matches(name, self, 3) or list(self)[:3]
            raise NoLeaf(
                f"the snapshot has no leaf {name!r}; it has {', '.join(near) or 'none at all'}",
                next="everstep show REF --leaves",
            )
        return self._read([name])[name]

    @property
    def objects(self) -> tuple[str, ...]:
        """The names of the objects it holds, as they were handed over."""
        return tuple(self._saved)

    @property
    def progress(self) -> dict[str, Any]:
        """Where the run was: `step`, `epoch` and the like."""
        saved = self._run["progress"]
        progress: dict[str, Any] = unflatten(saved, self._read(leaf_names(saved)).__getitem__)
        return progress

    def read(self, pattern: str = "*") -> dict[str, Tensorlike]:
        """All leaves whose names fit a pattern (`model/*`), by name, in one go; tied ones are one tensor.

        Blocks. Raises NotFound where none fits, Damaged.
        """
        names = [name for name in self if fnmatchcase(name, pattern)]
        if not names:
            raise NotFound(
                f"the snapshot has no leaf that fits {pattern!r}; it has leaves of {self._shown()}",
                next="everstep show REF --leaves",
            )
        return self._read(names)

    def state(self, name: str) -> Any:
        """The state of one object as it was: what a module's, optimizer's or scheduler's `load_state_dict`
        takes, or a plain value. Only that object's bytes are read; tied weights are one tensor. Where ranks
        had different values, those of the lowest rank. An optimizer's parameters have numbers; those of
        several ranks in the order of the groups, and one that is not in the lowest rank's groups keeps its
        name.

        Blocks. Raises NotFound where there is no such object, Damaged.
        """
        if name not in self._saved:
            raise NotFound(f"the snapshot has no object {name!r}; it has {self._shown()}")
        saved = self._saved[name]
        if is_by_name(saved):
            saved = by_order(saved)
        read = self._read(leaf_names(saved))
        return unflatten(saved, read.__getitem__)

    def into(self, *, only: str = "*", strict: bool = True, **objects: object) -> list[str]:
        """Read straight into live objects, in place; whatever is not handed over is neither read nor touched.

        Blocks until all is there, on devices too.

        Args:
            only: a pattern of leaf names (`model/encoder.*`); the rest stays as it is. Of anything else than
                a module either all leaves or none are to fit it.
            strict: refuse what is missing or surplus under the pattern; otherwise leave it as it is.
            **objects: by the names under which they were handed over to `everstep.open`.

        Returns:
            What was left as it is because it does not fit, a sentence each; empty where `strict`.

        Raises:
            NotFound: nothing fits the pattern.
            Mismatch: something does not fit; the message names it, and nothing was touched.
            Damaged: bytes could not be verified; the objects may be partly overwritten.
        """
        return restore_part(self._manifest, self._fill, named(objects), only=only, strict=strict)

    def _read(self, names: Iterable[str]) -> Leaves:
        stored = {name: stored_leaf(self._manifest, name) for name in names}
        firsts: dict[tuple[object, ...], str] = {}
        first_of = {name: firsts.setdefault(same_bytes(leaf), name) for name, leaf in stored.items()}
        wanted = {name: stored[name] for name in firsts.values()}
        made = leaves.new(wanted, dict.fromkeys(wanted, self._device))
        there = {
            name: one for name, one in made.items() if not isinstance(one, torch.Tensor) or one.device != META
        }
        leaves.read(self._manifest, self._fill, there)
        return {name: made[first] for name, first in first_of.items()}

    def _shown(self) -> str:
        return ", ".join(self._saved) or "nothing"
