"""An iterable with a position: what all kinds of loaders have in common (`data` has the kinds)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch.utils.data import BatchSampler, DataLoader

from everstep.errors import Mismatch
from everstep.state import rng
from everstep.state.dealing import Deal
from everstep.state.order import Origin, State, misfit
from everstep.state.workers import fetched_from, generator_states, put_generators


class Track(ABC):
    """An iterable with a position. `iter` yields the rest of the epoch under way, or else a new epoch.

    Leaving a loop early keeps the position, and the iterator with its workers: the next loop goes on.
    Fetching blocks as long as the loader does.

    Attributes:
        epoch: finished epochs.
        delivered: batches handed to the loop in this epoch, since it was dealt to as many ranks as there are.
        open: True from the hand-over of a batch until `settle`.
        on_ready: called once after `load`, when the position has been taken up. In the midst of an epoch
            that is right before the first fetch; between epochs, before the iterator is made, since
            making it draws from the RNGs.
        on_skip: called with (done, total) batches while a resume has to load batches to drop them.
    """

    kind: ClassVar[str]

    def __init__(self, loader: Iterable[Any], origin: Origin) -> None:
        self.loader: Any = loader
        self.epoch = 0
        self.delivered = 0
        self.open = False
        self.on_ready: Callable[[], None] | None = None
        self.on_skip: Callable[[int, int], None] | None = None
        self._origin = origin
        self._live: Iterator[Any] | None = None
        self._loaded: State | None = None
        self._announced = True
        self._notes: dict[str, None] = {}
        self._sizes: State = {}
        self._deal: Deal | None = None
        """How the epoch under way is dealt, if that is known."""

    def __iter__(self) -> Generator[Any, None, None]:
        # Not a generator itself: `iter(loader)` draws a seed at once, and so must this.
        if self._live is None:
            self._live = self._start()
        return self._rest(self._live)

    def __len__(self) -> int:
        return len(self.loader)

    def sizes(self) -> State:
        """How large the loader is: batches, and of a `DataLoader` also samples and batch size; None: not
        known. Draws from no generator."""
        with rng.aside():
            return _sizes(self.loader)

    def settle(self) -> None:
        """All batches delivered so far are done."""
        self.open = False

    def state(self) -> dict[str, object]:
        """The position as of now, in plain values, tensors and arrays. Call it at a step boundary."""
        if self._loaded is not None:
            return dict(self._loaded)
        return {
            "kind": self.kind,
            "epoch": self.epoch,
            "delivered": self.delivered,
            "begun": self._live is not None,
            "sizes": self._sizes if self._live is not None else {},
            "deal": self._deal.saved() if self._live is not None and self._deal is not None else None,
            "notes": list(self._notes),
            "carried": self._carried(),
            "fetching": generator_states(fetched_from(self.loader)),
            **self._position(),
        }

    def load(
        self, state: Mapping[str, Any], before: int = 1, now: int = 1, *, approximate: bool = False
    ) -> None:
        """Set the position that the next `iter` takes up.

        On another number of ranks what is left of the epoch is dealt to them anew: each of its samples
        once, but for those that the sampler deals twice to make it go round. That is for a `DataLoader` (or
        torchdata's `StatefulDataLoader`) over a map-style dataset without a state of its own, with a
        `DistributedSampler` and torch's own batches: then and, unless there is one rank, now. Between
        epochs any loader will do.

        Args:
            state: of this rank; on another number of ranks that of any.
            before, now: how many ranks there were, and are.
            approximate: where it is not known how an epoch was dealt, go on after as many batches on each
                rank, by which some samples may come twice and others not at all, and say so in `reasons`.

        Raises:
            Mismatch: the state is of another kind of loader, or the batches so far cannot be mapped to
                those of this one. Nothing was touched.
        """
        moved = before != now
        deal = Deal.read(state.get("deal")) if state["begun"] else None
        here = Deal.of(self.loader)
        if here is None and moved and now == 1:
            here = _alone(deal, self.loader)
        if deal is not None and here is not None and (deal.rank, deal.ranks) != (here.rank, here.ranks):
            state = self._dealt_anew(state, deal.anew(state["delivered"], here))
        elif moved and (deal is None or here is None):
            state = self._as_far(state, before, now, approximate)
        else:
            self._check(state)
        self._set(state)

    def _dealt_anew(self, state: Mapping[str, Any], deal: Deal) -> State:
        """A position at the beginning of what is left of an epoch."""
        samples = _length(self.loader.dataset)
        if state.get("kind") != self.kind or samples != deal.samples:
            raise misfit(
                f"with a loader of kind {state.get('kind')!r} over {deal.samples} samples",
                f"is of kind {self.kind!r} over {samples}",
            )
        afresh = self._afresh(state, seeded=deal.seeded)
        return {**state, "deal": deal.saved(), "delivered": 0, "sizes": {}, **afresh}

    def _afresh(self, state: Mapping[str, Any], seeded: Callable[[int], int] | None = None) -> State:
        """What else is another in a position from which other ranks go on; `seeded` makes this rank's own
        of a seed of another's."""
        return {}

    def _as_far(self, state: Mapping[str, Any], before: int, now: int, approximate: bool) -> State:
        """A position in data of which nobody knows how it was dealt."""
        if not state["begun"]:
            state = {**state, **self._afresh(state)}
            self._check(state)
            return dict(state)
        if not approximate:
            name = type(self.loader).__name__
            raise Mismatch(
                f"The snapshot was taken by {before} ranks in the midst of an epoch, there are {now} now; "
                f"it is not known how this {name} deals its samples to ranks (it is of a DataLoader with a "
                "DistributedSampler)",
                kept="nothing was changed",
                next="approximate_data=True to go on after as many batches on each rank",
            )
        sizes = {name: size for name, size in state["sizes"].items() if name == "samples"}
        done = state["delivered"]
        note = f"the data goes on after {done} batches on each of {now} ranks, which {before} ranks had"
        state = {**state, "sizes": sizes, "notes": [*state["notes"], note]}
        self._check(state)
        return state

    def _set(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.delivered = state["epoch"], state["delivered"]
        self.open = False
        self._let_go()
        self._notes.clear()
        self._notes.update(dict.fromkeys(state["notes"]))
        self._loaded = dict(state)
        self._announced = False
        self._accept(self._loaded)

    def close(self) -> None:
        """Let the iterator go, and the workers with it; the position stays. Blocks until they have ended.

        Workers that are left to Python's garbage collector may end late, with errors of a queue's thread.
        """
        if self._live is not None:
            self._loaded = self.state()
        self._let_go()

    def reasons(self) -> list[str]:
        """Why a resume from `state()` would only be approximate; empty: it is exact."""
        return [*self._notes, *self._fixed_reasons()]

    @abstractmethod
    def _begin(self) -> Iterator[Any]:
        """Make the iterator of a new epoch."""

    @abstractmethod
    def _resume(self, position: State) -> Iterator[Any]:
        """Make the iterator of the epoch that `position` is in the midst of, `delivered` batches on."""

    @abstractmethod
    def _position(self) -> State:
        """What `_begin` or `_resume` needs, beyond what all kinds have."""

    def _prepare(self, position: State) -> None:  # noqa: B027 - not every kind has something to do
        """Put the rest of a position between epochs, right before `_begin`."""

    def _accept(self, position: State) -> None:
        """Put what must be in place before the user's code prepares the next `iter`."""
        if not position["begun"]:
            self._origin.put(position["carried"])
            put_generators(fetched_from(self.loader), position["fetching"])

    def _carried(self) -> State:
        """What is in the position of the origin as of now.

        Within an epoch its start is what counts; but others may draw from the generators as well.
        """
        return self._origin.carried() if self._live is None else {"generators": self._origin.generators()}

    def _fetch(self, live: Iterator[Any]) -> Any:
        return next(live)

    def _fixed_reasons(self) -> list[str]:
        return []

    def _start(self) -> Iterator[Any]:
        with rng.aside():
            self._sizes = _sizes(self.loader)
            loaded = self._loaded if self._loaded is not None and self._loaded["begun"] else {}
            self._deal = Deal.read(loaded.get("deal")) or Deal.of(self.loader)
            live = self._taken_up()
        if live is None:
            self._announce()
            live = self._begin()
        self._loaded = None
        return live

    def _taken_up(self) -> Iterator[Any] | None:
        """The iterator of a loaded position; None: it is between epochs, or none was loaded."""
        if self._loaded is None:
            return None
        if self._loaded["begun"]:
            live = self._resume(self._loaded)
            put_generators(fetched_from(self.loader), self._loaded["fetching"])
            return live
        self._prepare(self._loaded)
        return None

    @property
    def batches(self) -> Iterator[Any] | None:
        """The loader's own iterator of the epoch under way."""
        return self._live

    def _rest(self, live: Iterator[Any]) -> Generator[Any, None, None]:
        while self._live is live:  # else `load` has put another position in the place of this one
            self._announce()
            try:
                batch = self._fetch(live)
            except StopIteration:
                self._finish()
                return
            self.delivered += 1
            self.open = True
            yield batch

    def _let_go(self) -> None:
        self._live = None

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            if self.on_ready is not None:
                self.on_ready()

    def _finish(self) -> None:
        self.epoch += 1
        self.delivered = 0
        self._live = None
        self._notes.clear()

    def _note(self, reason: str) -> None:
        self._notes[reason] = None

    def _check(self, state: Mapping[str, Any]) -> None:
        if state.get("kind") != self.kind:
            raise misfit(f"with a loader of kind {state.get('kind')!r}", f"is of kind {self.kind!r}")
        if not state["begun"]:
            return  # no batches to map: the next epoch may well be of another size
        with rng.aside():
            here = _sizes(self.loader)
        for name, size in state["sizes"].items():
            if here.get(name) not in (size, None) and size is not None:
                raise misfit(f"with {name} {size}", f"has {name} {here[name]}")


def _alone(deal: Deal | None, loader: Any) -> Deal | None:
    """How one rank's loader, which needs no sampler that deals, gets all that is left."""
    known = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if deal is None or not known or _length(loader.dataset) != deal.samples:
        return None
    return replace(deal, rank=0, ranks=1, batch=loader.batch_size or deal.batch)


def _sizes(loader: Any) -> State:
    """What must be the same for the batches so far to be those of this loader; None: not known."""
    if not isinstance(loader, DataLoader):
        return {"batches": _length(loader)}
    return {
        "samples": _length(loader.dataset),
        "batch_size": loader.batch_size or getattr(loader.batch_sampler, "batch_size", None),
        "batches": _length(copy.copy(loader)),  # `len` leaves a trace on a loader of an IterableDataset
    }


def _length(obj: Any) -> int | None:
    try:
        return len(obj)
    except (TypeError, NotImplementedError, AttributeError):
        return None
