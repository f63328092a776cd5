"""The position inside the epoch of a data loader.

`track(loader)` gives an iterable to loop over in the place of the loader: the same batches in the same
order, the same draws from the global RNGs. On top of that it knows its position, as plain values, and can
take up a position in another process.

The order of an epoch grows from a few states as of the epoch's start (RNGs, counters of the sampler).
To resume is to put these back, to make the iterator anew and to skip what was delivered: index batches of
a sampler where there is one, which loads nothing, and batches only where there is no other way.

Of many ranks each has its own loader, and its own position. On another number of ranks the rest of the
epoch is dealt anew, where it is known how it was dealt (`dealing`).

Below this: `order`, what the order of an epoch grows from and how it is repeated; `workers`, the random
numbers drawn to fetch a sample.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from everstep.errors import Mismatch
from everstep.state import rng
from everstep.state.dealing import Deal, dealt
from everstep.state.order import Order, Origin, Start, State, misfit, ordered, samplers, skip
from everstep.state.workers import (
    fetched_from,
    generator_states,
    put_generators,
    timing_reasons,
    worker_reasons,
)


def track(loader: Iterable[Any]) -> Track:
    """The loader with a position: loop over the result in its place.

    Args:
        loader: a `DataLoader`, an iterable with `state_dict`/`load_state_dict`, or any other iterable.

    Raises:
        Mismatch: `loader` cannot be iterated.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise Mismatch(
            f"An object of type {type(loader).__name__} cannot be iterated",
            next="hand over a DataLoader or another iterable of batches.",
        )
    if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
        return StatefulTrack(loader)
    if isinstance(loader, DataLoader) and _goes_by_index(loader):
        return MapTrack(loader)
    return ReplayTrack(loader)


def _goes_by_index(loader: DataLoader[Any]) -> bool:
    # A subclass with an iteration of its own may never look at the sampler it is given.
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)


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


class MapTrack(Track):
    """A `DataLoader` over a map-style dataset: exact, and resumed without loading a batch.

    The loader itself stays as it is: a shallow copy of it is iterated, whose sampler is watched. With
    workers, the random numbers of a sample are a function of the epoch's seed and the sample's place in
    the epoch, since the state of a worker's RNGs cannot be told from outside.
    """

    kind = "map"
    loader: DataLoader[Any]

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader, Origin({"loader": loader, **samplers(loader)}))
        self._order: Order | None = None
        self._view: DataLoader[Any] | None = None
        # Persistent workers outlive the epoch; the user may have started some already.
        self._started = loader._iterator is not None

    def _begin(self) -> Iterator[Any]:
        view, order = self._watched()
        order.instead = None
        if self._started and view.persistent_workers and view._iterator is None:
            # Where workers persist, only the first epoch of their life draws a base seed. When that one
            # was in another process, they are started aside, so that the draws come out the same.
            with rng.aside(), self._origin.kept(), order.silent():
                iter(view)
        self._started = True
        return iter(view)

    def _resume(self, position: State) -> Iterator[Any]:
        view, order = self._watched()
        if self._deal is not None and self._deal.before:
            order.instead = self._deal.batches(self.loader)
        with order.repeating(Start(**position["start"]), self.delivered):
            live = iter(view)
            # Workers have the first index batches pulled at once. Without them it is done here, before
            # the RNGs are put back.
            order.pulls.catch_up()
        if order.pulls.mark(self.delivered) != position["mark"]:
            self._note(f"the sampler {order.name} did not repeat the order of the epoch")
        if order.pulls.asked == position["asked"]:
            # As far as then: what the generators are off by was drawn by others. With more or fewer workers
            # the sampler is elsewhere, and its order comes first.
            self._origin.put(position["carried"])
        self._started = True
        return live

    def _watched(self) -> tuple[DataLoader[Any], Order]:
        """The copy to iterate, and its sampler. With persistent workers always the same; else new each epoch,
        as the user may have changed the loader in between."""
        if self._order is None or self._view is None or self._view._iterator is None:
            self._order = Order(self.loader, self._origin, self._notes)
            self._view = ordered(self.loader, self._order)
        self._order.epoch = self.epoch
        return self._view, self._order

    def _let_go(self) -> None:
        super()._let_go()
        self._order = self._view = None

    def _fetch(self, live: Iterator[Any]) -> Any:
        try:
            return next(live)
        except StopIteration:
            raise
        except BaseException:
            # The sampler has moved on without a delivery: the next `iter` takes the position up anew.
            self.close()
            raise

    def _position(self) -> State:
        return {
            **self._place(),
            "workers": self.loader.num_workers,
            "started": self._started,
        }

    def _place(self) -> State:
        """The start of the epoch under way, and how far the sampler is."""
        if self._live is None or self._order is None:
            return {"start": None, "mark": b"", "asked": 0}
        pulls = self._order.pulls
        return {"start": vars(pulls.start).copy(), "mark": pulls.mark(self.delivered), "asked": pulls.asked}

    def _afresh(self, state: Mapping[str, Any], seeded: Callable[[int], int] | None = None) -> State:
        afresh: State = {"asked": 0, "mark": b"", "workers": self.loader.num_workers}
        if seeded is not None:
            # Not the random numbers that samples of this epoch have had already.
            afresh["start"] = {**state["start"], "seed": seeded(state["start"]["seed"])}
        return afresh

    def _accept(self, position: State) -> None:
        super()._accept(position)
        self._started = position["started"]
        if position["begun"] and position["workers"] != self.loader.num_workers:
            self._note(
                f"the snapshot was taken with {position['workers']} loader workers, "
                f"there are {self.loader.num_workers} now"
            )

    def _fixed_reasons(self) -> list[str]:
        return worker_reasons(self.loader)


class StatefulTrack(Track):
    """An iterable that knows its own position (`state_dict`, `load_state_dict`)."""

    kind = "stateful"

    def __init__(self, loader: Any) -> None:
        self._torch = isinstance(loader, DataLoader)
        # torchdata's loader puts its samplers back, but neither their generators nor their counters to
        # where they were. The state of any other loader is that loader's own affair.
        parts = {"loader": loader, **samplers(loader)} if self._torch else {}
        super().__init__(loader, Origin(parts, with_states=False))
        self._dealt: DataLoader[Any] | None = None

    def _begin(self) -> Iterator[Any]:
        return _iterator(self.loader)

    def _prepare(self, position: State) -> None:
        if position["loader"] is None:
            return
        with self._origin.kept():
            self.loader.load_state_dict(position["loader"])
            if self._torch:
                # torchdata makes the finished iterator of the old epoch first, then the new one. Asking
                # for the state makes the former now, so that `iter` makes, and draws for, the latter only.
                self.loader.state_dict()

    def _resume(self, position: State) -> Iterator[Any]:
        self._origin.put(position["carried"])
        if self._is_dealt_anew():
            assert self._deal is not None
            batches = list(self._deal.batches(self.loader))[self.delivered :]
            self._dealt = dealt(self.loader, batches)
            return _iterator(self._dealt)
        self.loader.load_state_dict(position["loader"])
        live = _iterator(self.loader)
        # Making the iterator went over the order from its start; the generators belong where they were.
        self._origin.put({"generators": position["carried"]["generators"]})
        return live

    def _carried(self) -> State:
        return (
            self._origin.carried()
        )  # also in an epoch: the loader has a record of its start, not this track

    def _is_dealt_anew(self) -> bool:
        """Whether the epoch under way is what was left of one: then the loader itself knows nothing of it."""
        return self._deal is not None and self._deal.before > 0

    def _finish(self) -> None:
        super()._finish()
        self._deal = self._dealt = None

    def _afresh(self, state: Mapping[str, Any], seeded: Callable[[int], int] | None = None) -> State:
        return {"loader": None, "workers": self._workers()}

    def _position(self) -> State:
        if self._live is not None and self._is_dealt_anew():
            return {"loader": None, "workers": self._workers()}
        # Before its first epoch, torchdata's loader would make an iterator, and draw, to have a state.
        unused = self._torch and self.loader._iterator is None
        return {"loader": None if unused else self.loader.state_dict(), "workers": self._workers()}

    def _workers(self) -> int:
        return self.loader.num_workers if self._torch else 0

    def _check(self, state: Mapping[str, Any]) -> None:
        super()._check(state)
        if state["loader"] is not None and state["workers"] != self._workers():
            raise misfit(f"with {state['workers']} workers", f"has {self._workers()} workers")

    def _fixed_reasons(self) -> list[str]:
        if not self._workers():
            return []
        name = type(self.loader).__name__
        lost = f"random numbers drawn inside the workers of {name} start anew (the order does not)"
        return [lost, *worker_reasons(self.loader)]


class ReplayTrack(Track):
    """Any other iterable: iterated again from the start of the epoch, dropping what was delivered.

    A list or tuple is entered at its index. A resume of anything else blocks while batches are loaded.
    """

    kind = "replay"

    def __init__(self, loader: Iterable[Any]) -> None:
        self._indexed = isinstance(loader, (list, tuple))
        parts: dict[str, object] = {} if self._indexed else {"loader": loader}
        if isinstance(loader, DataLoader):
            parts["dataset"] = loader.dataset
        # Here the origin is that of the samples too, and so are the generators of their transforms.
        super().__init__(loader, Origin(parts, nested=True))
        self._before: State = {}
        self._last = b""
        self._outside = False

    def _begin(self) -> Iterator[Any]:
        self._before = self._origin.everything() if not self._indexed else {}
        live = _iterator(self.loader)
        self._outside = False
        self._last = self._fingerprint()
        return live

    def _resume(self, position: State) -> Iterator[Any]:
        self._before = position["before"]
        self._outside, self._last = position["outside"], position["last"]
        if self._indexed:
            return _from(self.loader, self.delivered)
        self._origin.put(self._before)
        live = _iterator(self.loader)
        skip(partial(next, live), self.delivered, "ends after", self.on_skip)
        self._origin.put(position["carried"])
        return live

    def _fetch(self, live: Iterator[Any]) -> Any:
        """Fetch, and find out whether replaying the fetches alone would give the same.

        It would not once a fetch draws from the global RNG after others have drawn in between.
        """
        before = self._fingerprint()
        self._outside = self._outside or before != self._last
        batch = next(live)
        self._last = self._fingerprint()
        if self._outside and self._last != before:
            name = type(self.loader).__name__
            self._note(f"fetching from the {name} draws from the global RNG, in between the training's draws")
        return batch

    def _fingerprint(self) -> bytes:
        return b"" if self._indexed else rng.fingerprint(devices=False)

    def _position(self) -> State:
        return {
            "before": self._before if self._live is not None else None,
            "last": self._last,
            "outside": self._outside,
        }

    def _fixed_reasons(self) -> list[str]:
        if not isinstance(self.loader, DataLoader):
            return []
        reasons = timing_reasons(self.loader)
        if self.loader.persistent_workers and self.epoch:
            reasons.append("persistent workers carry their random numbers from one epoch into the next")
        return reasons


def _alone(deal: Deal | None, loader: Any) -> Deal | None:
    """How one rank's loader, which needs no sampler that deals, gets all that is left."""
    known = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if deal is None or not known or _length(loader.dataset) != deal.samples:
        return None
    return replace(deal, rank=0, ranks=1, batch=loader.batch_size or deal.batch)


def _iterator(loader: Iterable[Any]) -> Iterator[Any]:
    return iter(loader)  # with a type, which `iter` of Any has not


def _from(items: Sequence[Any], index: int) -> Iterator[Any]:
    while index < len(items):  # asked each time: what is appended meanwhile is seen, as in a plain loop
        yield items[index]
        index += 1


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
