"""Several requests to a store at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()


def in_parallel(
    items: Sequence[Item], threads: int, worker: Callable[[], Callable[[Item], Result]]
) -> list[Result]:
    """Do all items, a few at once, one of them in this thread; the results come in no order. The first error
    is raised when no thread is at work any more.

    Args:
        worker: asked by each thread for what does an item, which may hold what threads must not share.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    waiting = iter(items)
    lock = threading.Lock()

    def run() -> None:
        work = worker()
        while not errors:
            with lock:
                item = next(waiting, _END)
            if item is _END:
                return
            try:
                results.append(work(item))  # type: ignore[arg-type]
            except BaseException as error:
                errors.append(error)

    # Plain threads: an executor takes no work any more when the interpreter is about to end.
    workers = [
        threading.Thread(target=run, name="everstep-read", daemon=True)
        for _ in range(min(threads, len(items)) - 1)
    ]
    for one in workers:
        one.start()
    run()
    for one in workers:
        one.join()
    if errors:
        raise errors[0]
    return results
