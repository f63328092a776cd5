"""The position inside the epoch of a data loader.

`track(loader)` gives an iterable to loop over in the place of the loader: the same batches in the same
order, the same draws from the global RNGs. On top of that it knows its position, as plain values, and can
take up a position in another process.

The order of an epoch grows from a few states as of the epoch's start (RNGs, counters of the sampler).
To resume is to put these back, to make the iterator anew and to skip what was delivered: index batches of
a sampler where there is one, which loads nothing, and batches only where there is no other way.

Of many ranks each has its own loader, and its own position. On another number of ranks the rest of the
epoch is dealt anew, where it is known how it was dealt (`dealing`).

Below this: `track`, what all kinds of loaders have in common; `order`, what the order of an epoch grows from
and how it is repeated; `workers`, the random numbers drawn to fetch a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from everstep.errors import Mismatch
from everstep.state import rng
from everstep.state.dealing import dealt
from everstep.state.order import Order, Origin, Start, State, misfit, ordered, samplers, skip
from everstep.state.track import Track
from everstep.state.workers import timing_reasons, worker_reasons

__all__ = ["MapTrack", "ReplayTrack", "StatefulTrack", "Track", "track"]


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


def _iterator(loader: Iterable[Any]) -> Iterator[Any]:
    return iter(loader)  # with a type, which `iter` of Any has not


def _from(items: Sequence[Any], index: int) -> Iterator[Any]:
    while index < len(items):  # asked each time: what is appended meanwhile is seen, as in a plain loop
        yield items[index]
        index += 1
