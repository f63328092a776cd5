"""A run that does nothing, for `EVERSTEP_DISABLE=1`: the loop works as if Everstep were not there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from everstep.errors import Mismatch
from everstep.events import RolledBack
from everstep.keeper.base import Pending
from everstep.state import rng
from everstep.state.objects import is_container, is_stateful


class DisabledRun:
    """Has the members of `Run`; counts steps and epochs, keeps nothing, touches nothing."""

    def __init__(self, objects: Mapping[str, object], loader: Iterable[Any] | None = None) -> None:
        self._loader = loader
        self.step = 0
        self.epoch = 0
        self.resumed = None
        self.chain = None
        self.values = {
            name: value
            for name, value in objects.items()
            if not (is_stateful(value) or rng.is_generator(value) or is_container(value))
        }

    @property
    def data(self) -> Iterator[Any]:
        return self._batches(None)

    def _batches(self, loader: Iterable[Any] | None) -> Generator[Any, None, None]:
        batches = self._loader if loader is None else loader
        if batches is None:
            raise Mismatch("no loader was given", next="everstep.open(..., data=loader)")
        yield from batches
        self.epoch += 1

    def steps(
        self, loader: Iterable[Any] | None = None, *, until: int | None = None
    ) -> Generator[Any, None, None]:
        if until is not None and self.step >= until:
            return
        for batch in self._batches(loader):
            yield batch
            self.tick()
            if until is not None and self.step >= until:
                return

    def log(self, **metrics: Any) -> None:
        return None

    def tick(self, **metrics: Any) -> None:
        self.step += 1

    def take(self, note: str = "") -> Pending:
        pending = Pending()
        pending.finish(None)
        return pending

    def rollback(self, ref: str = "head") -> RolledBack:
        raise Mismatch("nothing is kept with EVERSTEP_DISABLE=1, so there is nothing to go back to")

    def on_rollback(self, listener: Callable[[RolledBack], object]) -> None:
        return None

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def close(self) -> None:
        return None

    def __enter__(self) -> DisabledRun:
        return self

    def __exit__(self, *error: object) -> None:
        return None
