"""Everstep keeps the state of a PyTorch run safe and movable.

    run = everstep.open("runs/gpt", model=model, optimizer=optimizer, data=loader)
    for batch in run.steps(loader):
        run.log(loss=train_step(batch))

Importing this imports no torch: reading a chain needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from everstep.chain.history import MAIN, Snapshot
from everstep.errors import (
    Conflict,
    Damaged,
    EverstepError,
    Fenced,
    Mismatch,
    NotFound,
    Unavailable,
    Unsupported,
)
from everstep.library import Chain
from everstep.store.base import Store
from everstep.version import __version__ as __version__

if TYPE_CHECKING:
    import torch

    from everstep import dcp as dcp
    from everstep.run.loading import Loaded
    from everstep.run.session import Run

__all__ = [
    "Chain",
    "Conflict",
    "Damaged",
    "EverstepError",
    "Fenced",
    "Mismatch",
    "NotFound",
    "Snapshot",
    "Unavailable",
    "Unsupported",
    "load",
    "open",
]


def open(
    repo: str | PathLike[str] | Store = "",
    *,
    data: Iterable[Any] | None = None,
    config: Mapping[str, Any] | None = None,
    every: str | Sequence[str] | None = "10m",
    keep: str = "last 3",
    resume: str = "auto",
    branch: str = "main",
    strict: bool = True,
    overlap: bool = True,
    max_arena_bytes: int | str | None = None,
    start: str = "",
    unsafe_single_writer: bool = False,
    replicas: Sequence[str | PathLike[str] | Store] | str = (),
    scrub: str | None = None,
    approximate_data: bool = False,
    **objects: object,
) -> Run:
    """Open a run: the first time it starts, every other time it goes on where it stopped, exactly.

    Call it when all objects are built, right before the loop. They are restored in place. Blocks while the
    state is read. Each argument can be set by a variable instead, which wins: `EVERSTEP_REPO`,
    `EVERSTEP_EVERY`, and so on. With `EVERSTEP_DISABLE=1` the run that comes back does nothing.

    Args:
        repo: the directory of the chain, created where there is none, or its URL, such as
            `s3://bucket/runs/gpt` or `hdfs://host:8020/runs/gpt`; or a store.
        data: the loader whose position inside the epoch is kept: a `DataLoader`, anything with
            `state_dict`, or any iterable.
        config: plain values of your own, such as the parsed arguments. They are kept with each snapshot;
            what differs from them at a resume is told, and `everstep diff` shows it. Nothing is restored
            from them.
        every: when to take snapshots: `"100 steps"`, `"10m"`, several with commas between them, or None.
        keep: which snapshots of the branch stay: `"last 3"`, `"all"`, or several rules: `"last 3, hourly 24,
            daily 7, weekly 4, every 1000 steps, best val_loss 2, best acc:max 1"`.
        resume: `"auto"` goes on from the newest good snapshot or starts from nothing, `"must"` insists on a
            snapshot, `"never"` on none; else a reference: `head`, `step:500`, an id's beginning, `head~2`.
        branch: the branch to go on from and to write to; `resume` speaks of it.
        strict: refuse a state that lacks something or has something left over, instead of saying so.
        overlap: copy what only the optimizers change while the next forward and backward run, instead of
            making the loop wait for it. Nothing but the optimizers handed over may write to the parameters
            between the end of a step and the next optimizer's step; a snapshot that saw it is thrown away,
            and the run goes on without overlap.
        max_arena_bytes: what the two copies of the state in shared memory may take together, such as
            `"20GB"`; a larger state streams through them while the loop waits. Three quarters of the
            memory that is free after the first step, unless given.
        start: where the branch begins if it is not there yet: a snapshot of this chain (`"step:500"` of
            branch main, `"try@head"`, a tag), whose chunks are shared, or of another, as `"PATH@REF"`. Once
            the branch is there, the same command goes on with it.
        unsafe_single_writer: use an object store that overwrites although it was asked not to, cannot be
            asked, or lets two create one object. Two writers at a time then destroy each other's snapshots,
            so there must never be two.
        replicas: where copies of the chain are kept, directories or URLs: `["s3://bucket/runs/gpt"]`. Each
            follows by itself, without holding anything up, and is a whole chain at every moment. Where `repo`
            is lost or behind, the run goes on from the newest snapshot of them all.
        scrub: read the chain again at this rate, such as `"20MB/s"`, while there is nothing to be stored, and
            tell what is damaged; a day after each pass comes the next. Nothing is repaired by it.
        approximate_data: of several ranks, on another number of them than before: where it cannot be known
            which samples of the epoch were trained, go on after as many batches on each rank; some samples
            may come twice then and others not at all, which the resume says. Otherwise it is refused.
        **objects: everything the next step depends on, by name: modules, optimizers, schedulers, scalers,
            anything with `state_dict` and `load_state_dict`, random generators, dicts, lists and plain values
            (found again in `run.values`). The global random generators are kept without being named.

    Raises:
        Mismatch: the state does not fit the objects, or `repo` is something else than a chain: nothing was
            touched.
        NotFound: there is no such snapshot.
        Conflict: another process is writing to this chain; or it has gone on differently in a replica.
        Damaged: there are snapshots and none can be verified.
        Unsupported: an object cannot be stored (the message names it), a newer version wrote the chain, or
            the store cannot keep one.
        Unavailable: the store does not answer; or `repo` is empty and a replica, which may have the run, does
            not answer.
    """
    from everstep.run import settings

    if settings.disabled():
        from everstep.run.disabled import DisabledRun

        return DisabledRun(objects, data)  # type: ignore[return-value]
    from everstep.run import many, session

    chosen = settings.Settings(
        _plain(repo),
        every,
        keep,
        resume,
        branch,
        strict,
        overlap,
        max_arena_bytes,
        start,
        unsafe_single_writer,
        replicas if isinstance(replicas, str) else [_plain(one) for one in replicas],
        scrub,
        approximate_data,
    ).overridden()
    return (many.open_with_others(chosen) or session.Run)(chosen, objects, data, config=config, chains=Chain)


def __getattr__(name: str) -> Any:
    """`everstep.dcp`, which imports torch.distributed, is there when it is asked for."""
    if name == "dcp":
        return import_module("everstep.dcp")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plain(place: str | PathLike[str] | Store) -> str | Store:
    return fspath(place) if isinstance(place, PathLike) else place


def load(
    repo: str | PathLike[str] | Store,
    ref: str = "",
    *,
    branch: str = MAIN,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Look into a snapshot, for inference or analysis: its leaves by name, read when they are asked for.

        model.load_state_dict(everstep.load("runs/gpt").state("model"))
        everstep.load("runs/gpt@step:500").into(model=model)

    Blocks while a record and a manifest are read, a few megabytes at most for most models. Needs no right to
    write: the run may go on meanwhile.

    Args:
        repo: the directory of the chain or its URL, with `@REF` after it or not; or a store.
        ref: which snapshot, where `repo` does not say: `head` unless given, `step:500`, a branch, a tag, an
            id's beginning, `head~2`.
        branch: the branch that `head` and `step:` speak of.
        device: where tensors are to be; `"meta"` gives their shapes and dtypes, and reads nothing. `into`
            reads to where the live tensors are.

    Raises:
        NotFound: there is no such chain or snapshot.
        Damaged: the snapshot's record or manifest is not the one that was written. What is read later raises
            it then.
        Unsupported: a newer version wrote it.
    """
    from everstep.run.loading import load

    return load(repo, ref, branch, device)
