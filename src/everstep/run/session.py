"""The one object that a training loop holds."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

from everstep.chain import versions
from everstep.chain.adoption import Replicas
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease, Leases, refuse_living
from everstep.chain.replicas import address_of, remember
from everstep.chain.steplog import StepLog
from everstep.chain.writer import Facts
from everstep.errors import EverstepError, Mismatch, NotFound
from everstep.events import (
    Failed,
    Opened,
    Resumed,
    RolledBack,
    Signalled,
    Sink,
    Skipping,
    Started,
    Warned,
    default_sink,
)
from everstep.format.record import Number, Origin, StepRecord, number
from everstep.keeper.base import Held, Keeper, Outcome, Pending, Standings, Terms
from everstep.run import environment, keepers, resume, starting, triggers
from everstep.run.given import drift_since, drifted, given, overruled, plain_config
from everstep.run.metrics import Reading
from everstep.run.ranks.lent import LentLease, NoLog
from everstep.run.ranks.opening import described, opened_as, packed_origin, unpacked_origin
from everstep.run.ranks.together import Alone, Ranks
from everstep.run.repeat import Repeat
from everstep.run.settings import Settings
from everstep.run.signals import EXIT_STATUS, Signals
from everstep.run.starting import Return, Start
from everstep.run.taking import Agree, Occasion, Taking
from everstep.state import rng
from everstep.state.collecting import Collected, Collector
from everstep.state.data import Track, track
from everstep.state.objects import modules, named, optimizers, summed_anew
from everstep.state.restore import is_plain
from everstep.state.workers import let_workers_end_with_the_process, need_no_worker
from everstep.state.world import World
from everstep.store.base import Redundant, Store, Sweeping
from everstep.store.replicated import ReplicatedStore
from everstep.store.urls import open_store

Clock = Callable[[], float]


class Run:
    """A training run whose state is kept. Made by `everstep.open`; not for use from several threads.

    A *step boundary* is where a `tick` ends: what a snapshot holds is the state there.

    Attributes:
        chain: the chain the run writes to, to read from.
        resumed: what the run goes on from, or None when it started from nothing.
        values: the plain values that were handed over by name; change them here, they are in each snapshot.
    """

    def __init__(
        self,
        settings: Settings,
        objects: Mapping[str, object],
        loader: Iterable[Any] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        sink: Sink | None = None,
        clock: Clock = time.monotonic,
        chains: type[Chain] = Chain,
        ranks: Ranks | None = None,
        world: World | None = None,
    ) -> None:
        """Open the chain (as one of `chains`), become its writer, and bring the objects back to where the run
        stopped.

        Blocks while the state is read. See `everstep.open` for the errors.
        """
        self._settings = settings
        self._store = open_store(settings.repo, unsafe_single_writer=settings.unsafe_single_writer)
        self._emit = sink or default_sink()
        self._ranks: Ranks = ranks or Alone()
        self._replicas = Replicas(self._replica_stores() if self._ranks.leads else [], self._emit)
        self._clock = clock
        self._objects = named(objects)
        self._optimizers = optimizers(self._objects)
        self._given_objects = objects
        self._track = None if loader is None else track(loader)
        self._triggers = triggers.parse(settings.every)
        self._steps = 0
        self._epochs = 0
        self.resumed: Resumed | None = None
        self.values = {name: value for name, value in self._objects.items() if is_plain(value)}
        self._waiting_position: tuple[Any, dict[str, Any], int] | None = None
        self._waiting_generators: dict[str, Any] | None = None
        self._readings: dict[str, Reading] = {}
        self._unfinished: deque[tuple[StepRecord, dict[str, Reading]]] = deque()
        self._last_metrics: dict[str, float] = {}
        self._asked: list[tuple[Pending, str]] = []
        self._world = world or World.alone()
        self._collector = Collector(self._world)
        self._prepared = False
        self._hooks: list[RemovableHandle] = []
        self._stepping = False
        self._stepped: set[str] = set()
        self._accumulating: frozenset[str] = frozenset()
        self._closed = False
        self._origin: Origin | None = None
        """What the branch began with, until a snapshot says so."""
        self._rolled_back: RolledBack | None = None
        self._rollbacks = 0
        self._listeners: list[Callable[[RolledBack], object]] = []
        self._config = plain_config(config)
        # Unstorable objects are refused now, not at the first snapshot ten minutes into the run.
        self._collect()
        self._given = given(self._objects, self._track)
        environment.here()  # What takes its time to look up is looked up here, not at the first snapshot.
        self.chain, start = self._open_on_all(chains)
        self._connect(start)
        self._emit(Opened(self.chain.url, self._captured(), settings.every_text, settings.keep))
        if isinstance(self.chain.store, Redundant):
            for sentence in self.chain.store.away():
                mend = f"everstep -r {self.chain.url} repair, when it is back"
                self._emit(Warned(f"{sentence}: what is stored now lacks its part there. Next: {mend}"))

    # -- opening ------------------------------------------------------------------------------------------

    def _replica_stores(self) -> list[Store]:
        insisted = self._settings.unsafe_single_writer
        stores = [open_store(one, unsafe_single_writer=insisted) for one in self._settings.replica_list]
        places = [address_of(one) or id(one) for one in (self._store, *stores)]
        twice = next(
            (one.url for one, place in zip(stores, places[1:], strict=True) if places.count(place) > 1), ""
        )
        if twice:
            raise Mismatch(
                f"{twice} is named twice: a chain is no replica of itself",
                kept="nothing was touched",
                next="another place for the replica",
            )
        return stores

    def _connect(self, start: Start | Return | None) -> None:
        """Become the writer, and bring the objects to where the run goes on."""
        # Before anything is asked of a keeper, which may be at work for a living process.
        settings = self._settings
        branch = settings.branch
        self._ranks.led(self._refuse_living)
        replicas = self._replicas.stores
        names = [store.url for store in replicas]
        self._standings = Standings(self.chain.url, names, self._emit, self._taken_over)
        self._keeper: Keeper = keepers.find(
            self.chain,
            branch,
            settings.keeper,
            self._outcome,
            self._warn,
            replicas,
            self._standings.told,
            self._ranks.rank,
            self._ranks.ranks,
        )
        try:
            held = self._ranks.all_of("what keepers hold", self._keeper.held)
            self._lease: Lease | LentLease = LentLease(0)
            try:
                number = self._ranks.led(self._take_lease)
                if not self._ranks.leads:
                    self._lease = LentLease(int(number))
                self._begin(held, start)
            except BaseException:
                self._lease.release()
                self._let_go_of_replicas(())
                raise
        except BaseException:
            self._keeper.close()
            raise

    def _refuse_living(self) -> bytes:
        refuse_living(self.chain.store, self._settings.branch)
        return b""

    def _take_lease(self) -> bytes:
        """Become the one who writes the branch."""
        branch = self._settings.branch
        self._lease = lease = self._replicas.take(self.chain, branch)
        remember(self.chain, self._replicas.stores)
        self._replicas.adopt(self.chain, branch, lease, self._settings.resume != "never")
        return str(lease.number).encode()

    def _open_on_all(self, chains: type[Chain]) -> tuple[Chain, Start | None]:
        """As rank 0 opens it."""
        opened: list[tuple[Chain, Start | None]] = []

        def lead() -> bytes:
            opened.append(self._open_chain(chains))
            return described(*opened[0])

        told = self._ranks.led(lead)
        return opened[0] if opened else opened_as(told, chains(self._store))

    def _open_chain(self, chains: type[Chain]) -> tuple[Chain, Start | None]:
        """The chain, and where its branch begins if that is not there yet and is to begin at a snapshot."""
        settings = self._settings
        try:
            chain = chains(self._store)
        except NotFound as error:
            wanted = settings.resume not in ("auto", "never") and not settings.start
            about = self._replicas.chain_record()
            if about is None and wanted:
                next = "resume='auto' to start from nothing, or the path of the chain"
                raise NotFound(error.problem, kept="nothing was touched", next=next, key=error.key) from error
            if about is None:
                start = starting.find(settings, None)
                return chains.create(self._store), start
            chain = chains.create_as(self._store, about)
        resume.refuse_unwanted(chain, settings.resume, settings.branch)
        return chain, starting.find(settings, chain)

    def _begin(self, held: list[Held], start: Start | Return | None) -> None:
        settings, branch = self._settings, self._settings.branch
        if self._ranks.leads:
            self._sweep()
        self._log: StepLog | NoLog = (
            StepLog(self.chain, branch, self._lease.number) if self._ranks.leads else NoLog()
        )
        self._log.adopt()
        self._taking = Taking(
            self._keeper,
            self._emit,
            settings.arena_limit_bytes,
            self.chain.about.grid_bytes,
            settings.paranoid,
            self._standings,
        )
        back = self._brought_back(held, start)
        self._repeat = Repeat({})
        if back is not None:
            self._take_up(back, self._remarks(start), isinstance(start, Start))
        else:
            why = "the chain is empty" if settings.resume == "auto" else f"resume={settings.resume!r}"
            self._emit(Started(self.chain.url, why))
        parent = "" if back is None or self._origin is not None else back.snapshot.id
        fresh = back is not None and back.got_round
        rate = settings.scrub_bytes_per_s
        terms = Terms(branch, self._lease.number, parent, settings.keep, fresh, scrub_bytes_per_s=rate)
        self._keeper.begin(self._terms_of_rank(terms))
        for name, optimizer in self._optimizers.items():
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._taking.fence()))
            self._hooks.append(
                optimizer.register_step_post_hook(lambda *_, name=name: self._stepped.add(name))
            )
        self._signals = Signals(self._signalled)
        self._signals.install()
        self._prepared = False
        for trigger in self._triggers:
            trigger.taken(self._steps, self._clock())
        atexit.register(self._at_exit)
        self._owner = os.getpid()

    def _terms_of_rank(self, terms: Terms) -> Terms:
        return terms

    def _brought_back(self, held: list[Held], start: Start | Return | None) -> resume.Resumption | None:
        """Restore the objects. What the chain is to say of it, it says only when they came back."""
        branch = self._settings.branch
        if start is not None:
            back = self._ranks.all_of("the state", partial(self._restored, held, start.chain, start.snapshot))
            begun = self._ranks.led(lambda: packed_origin(start.begin(self.chain, self._own_lease, branch)))
            self._origin = unpacked_origin(begun)
            return back
        found = self._resumption(partial(self._restored, held))
        told = None if found is None else versions.rolled_back(self.chain, branch)
        if found is not None and told is not None:
            step = found.snapshot.step
            self._rolled_back = replace(told, snapshot=found.snapshot.id, to_step=step)
        return found

    def _restored(self, held: list[Held], chain: Chain, snapshot: Snapshot) -> resume.Resumption:
        """The objects as one snapshot has them."""
        own = chain.store is self.chain.store
        reading = self._keeper.reading(chain.store) if own else chain.store
        return resume.restored(
            chain, snapshot, self._objects, self._settings.strict, held, self._world, reading
        )

    def _resumption(self, restored: resume.Restore) -> resume.Resumption | None:
        """The objects as the snapshot has them that the branch goes on from."""
        settings = self._settings
        return resume.bring_back(self._readable(), settings.resume, settings.branch, restored, self._emit)

    @property
    def _own_lease(self) -> Lease:
        assert isinstance(self._lease, Lease)
        return self._lease

    def _readable(self) -> Chain:
        """The chain, with what its own store lacks, or has damaged, out of the replicas."""
        near = self._replicas.near
        return type(self.chain)(ReplicatedStore(self.chain.store, near)) if near else self.chain

    def _remarks(self, start: Start | Return | None) -> list[str]:
        """What is worth saying about where the run goes on."""
        branch, asked = self._settings.branch, self._settings.start
        if isinstance(start, Start):
            of = f" of {self._origin.url}" if self._origin is not None else ""
            return [f"begins branch {branch} at {start.ref}{of}"]
        if asked and start is None:
            return [f"goes on with branch {branch}, which is there already: it does not start at {asked}"]
        return []

    def _take_up(self, back: resume.Resumption, remarks: list[str], began: bool) -> None:
        """Go on from a state that came back."""
        snapshot, restored = back.snapshot, back.restored
        ranks = len(snapshot.record.manifests)
        self._steps = self._taking.taken_step = int(restored.progress["step"])
        self._epochs = int(restored.progress["epoch"])
        self.values.update(restored.values)
        self._objects.update(restored.values)
        reasons = [*snapshot.record.approximate, *restored.approximate]
        before, now = snapshot.record.environment, {**environment.here(), **self._given}
        reasons += environment.breaks_exactness(before, now)
        if ranks == self._world.ranks > 2:
            reasons += [
                f"DDP sums the gradients of {name} in another order in the first step after a start "
                "(not with find_unused_parameters=True)"
                for name in summed_anew(self._given_objects)
            ]
        self._given = overruled(self._objects, before, self._given)
        reasons += rng.restore(restored.rng)
        remarks += ["out of the keeper's memory"] if back.from_arena else []
        remarks += [f"damage that does not matter here: {remark}" for remark in back.remarks]
        if restored.position is not None and self._track is not None:
            self._load_position(self._track, restored.position, restored.rng, ranks)
            reasons += self._track.reasons()
        elif restored.position is not None:
            self._waiting_position = (restored.position, restored.rng, ranks)
            self._waiting_generators = restored.rng
            remarks.append("the loader's position waits for run.steps(loader)")
        elif self._track is not None:
            reasons.append("the snapshot has no position of a loader")
        else:
            remarks.append("no loader was given, its position is yours to keep")
        # Other numbers of ranks have other batches.
        self._repeat = Repeat(self._log.after(self._steps) if ranks == self._world.ranks else {})
        self.resumed = Resumed(
            self.chain.url,
            snapshot.id,
            self._steps,
            self._epochs,
            tuple(dict.fromkeys(reasons)),
            tuple(remarks),
            began,
        )
        if self._origin is not None:
            self._taking.taken_step = None  # This chain does not have it yet.
        self._emit(self.resumed)
        for event in drifted(
            self.chain.url, drift_since(before, back.manifest, now, self._config), self._objects
        ):
            self._emit(event)
        if self._rolled_back is not None:
            self._emit(self._rolled_back)

    def _load_position(self, track: Track, position: Any, generators: dict[str, Any], ranks: int) -> None:
        """The position now, the generators once more right before the first batch is fetched: what the user
        does in between draws from them, and so does the making of an iterator. A snapshot that is taken
        before that holds the generators that wait. `ranks` is how many there were."""

        def put_back() -> None:
            rng.restore(generators)
            self._waiting_generators = None
            track.on_ready = None

        track.load(position, ranks, self._world.ranks, approximate=self._settings.approximate_data)
        track.on_skip = self._tell_skipping
        self._waiting_generators = generators
        track.on_ready = put_back

    def _tell_skipping(self, done: int, total: int) -> None:
        """A long skip that says nothing looks like a hang."""
        if done in (1, total) or done % max(total // 10, 1) == 0:
            self._emit(Skipping(done, total))

    def _captured(self) -> tuple[str, ...]:
        plain = [name if name not in modules(self._objects) else f"{name} (module)" for name in self._objects]
        generators = "rng (python, numpy, torch" + (", cuda)" if torch.cuda.is_available() else ")")
        return (*plain, generators, *(["data"] if self._track is not None else []))

    # -- the loop -----------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Finished steps, over all epochs."""
        return self._steps

    @property
    def epoch(self) -> int:
        """Finished epochs of the loader. Without a loader it is yours to set."""
        return self._epochs if self._track is None else self._track.epoch

    @epoch.setter
    def epoch(self, finished: int) -> None:
        if self._track is not None:
            raise Mismatch("the epoch is counted by the loader", kept="nothing was touched")
        self._epochs = finished

    @property
    def data(self) -> Track:
        """The loader, to iterate over the rest of its epoch without ticking: for loops that call `tick`
        themselves, such as one that accumulates gradients over several batches a step."""
        return self._tracked(None)

    def steps(
        self, loader: Iterable[Any] | None = None, *, until: int | None = None
    ) -> Generator[Any, None, None]:
        """The rest of one epoch's batches; each is a step, which ends when the next is asked for.

        Args:
            loader: the one given as `data`, or the first to be seen where none was given.
            until: leave off when so many steps are finished, over all epochs.

        A loop that is left by `break` leaves its last step unfinished: it will be trained again after a
        resume. Blocks, and raises, as the loader and `tick` do.
        """
        batches = self._tracked(loader)
        if until is not None and self._steps >= until:
            return
        while True:
            rollbacks = self._rollbacks
            for batch in self._fetched(iter(batches)):
                self._stepping = True
                try:
                    yield batch
                finally:
                    self._stepping = False
                if self._rollbacks != rollbacks:
                    break  # The step under way is none any more: on with the batches from there.
                self.tick()
                if until is not None and self._steps >= until:
                    return
            else:
                return

    def _fetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception:
                if self._signals.received is None:
                    raise
                # The loader's workers died of the signal that asks the run to stop, between two steps.
                self._stop(self._signals.received)
            yield batch

    def _tracked(self, loader: Iterable[Any] | None) -> Track:
        if self._track is None:
            if loader is None:
                raise Mismatch(
                    "no loader was given", kept="the run goes on", next="everstep.open(..., data=loader)"
                )
            self._track = track(loader)
            self._track.epoch = self._epochs
            if self._waiting_position is not None:
                self._load_position(self._track, *self._waiting_position)
                self._waiting_position = None
        elif loader is not None and loader is not self._track.loader and loader is not self._track:
            raise Mismatch(
                "run.steps() was given another loader than the one whose position is kept",
                kept="the run goes on",
                next="everstep.open(..., data=loader)",
            )
        return self._track

    def log(self, **metrics: Any) -> None:
        """Metrics of the step under way: numbers or tensors of one element, which are not waited for."""
        for name, value in metrics.items():
            self._readings[name] = Reading(name, value)

    def tick(self, **metrics: Any) -> None:
        """End a step: record what it was, and take a snapshot when a trigger fires.

        Blocks while a snapshot is captured (not while it is stored), and longer only when a signal asked the
        run to stop.

        Args:
            metrics: see `log`.

        Raises:
            EverstepError: an earlier snapshot failed in the background. Snapshots before it are intact, and
                the run may go on: the next trigger tries again. That a store over a network does not answer
                is no reason to stop: the newest state waits in memory until it does.
            SystemExit: a signal came; the last snapshot is durable. The status is 143.
        """
        self._check_open()
        if self._stepping:
            raise Mismatch(
                "run.steps() ends each step by itself",
                kept="the run goes on",
                next="run.log(loss=loss) in such a loop, or iterate over run.data and tick yourself",
            )
        self.log(**metrics)
        self._steps += 1
        self._signals.look_after_workers()
        if self._track is not None:
            self._track.settle()
        else:
            # A step without the loader that was waited for: its position is another's business now.
            self._waiting_position = self._waiting_generators = None
        self._accumulating = frozenset(self._optimizers.keys() - self._stepped)
        self._stepped.clear()
        self._record()
        self._act()
        self._taking.raise_background()

    def _record(self) -> None:
        readings, self._readings = self._readings, {}
        record = StepRecord(
            step=self._steps,
            epoch=self.epoch,
            delivered=0 if self._track is None else self._track.delivered,
            lr=tuple(self._learning_rates()),
            rng=rng.fingerprint().hex(),
        )
        self._unfinished.append((record, readings))
        self._finish_records(wait=False)

    def _finish_records(self, wait: bool) -> None:
        """Write the records whose metrics have arrived, in order."""
        while self._unfinished:
            record, readings = self._unfinished[0]
            if not wait and not all(reading.ready() for reading in readings.values()):
                return
            self._unfinished.popleft()
            self._last_metrics = {name: reading.value() for name, reading in readings.items()}
            bits = {name: value.hex() for name, value in self._last_metrics.items()}
            finished = StepRecord(record.step, record.epoch, record.delivered, bits, record.lr, record.rng)
            self._log.append(finished)
            for event in self._repeat.compare(finished):
                self._emit(event)

    def _learning_rates(self) -> Iterable[str]:
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                rate = group.get("lr", 0.0)
                # A rate on an accelerator is not worth waiting for it.
                if not isinstance(rate, torch.Tensor) or rate.device.type == "cpu":
                    yield float(rate).hex()

    def _act(self) -> None:
        asked, self._asked = self._asked, []
        for pending, note in asked:
            self._take("take", note, pending, overlap=True)
        if self._signals.received is not None:
            self._stop(self._signals.received)
        now = self._clock()
        due = [str(trigger) for trigger in self._triggers if trigger.due(self._steps, now)]
        if self._taking.again:
            due.append("again")
        if due and not asked:
            self._take(due[0], overlap=True)
        self._prepare()

    def _prepare(self) -> None:
        """Have memory made once it is known how much."""
        if not self._prepared and self._has_optimizer_state:
            # Only now have the optimizers their state, and is it known how much memory that takes. After a
            # resume it was known before; but to take it then would slow down what the run begins with.
            self._taking.prepare(self._collect())
            self._prepared = True

    @property
    def _has_optimizer_state(self) -> bool:
        """Whether an optimizer has taken the step that is over, or there is none to take one."""
        return len(self._accumulating) < max(1, len(self._optimizers))

    def _signalled(self, name: str) -> None:
        """The loader's workers may have got the signal too, and be dead."""
        if self._track is not None:
            need_no_worker(self._track.batches)
        self._emit(Signalled(name))

    def _stop(self, signal: str) -> NoReturn:
        """Take a last snapshot and leave the process, with a status that asks to be started again."""
        let_workers_end_with_the_process()
        try:
            if self._taking.taken_step != self._steps:
                self._take(signal, pending=Pending())
            self.close()
        except EverstepError as error:
            self._emit(Failed(self._steps, str(error)))
        raise SystemExit(EXIT_STATUS)

    # -- snapshots ----------------------------------------------------------------------------------------

    def take(self, note: str = "") -> Pending:
        """Take a snapshot now; between two ticks, when the step under way ends.

        Blocks while the state is copied, and before that until an earlier snapshot has left room for it.

        Args:
            note: a text that is kept with it.

        Raises:
            Unsupported: something cannot be stored; the message names it.
        """
        self._check_open()
        self._taking.raise_background()
        pending = Pending()
        if self._inside_a_step():
            self._asked.append((pending, note))
        else:
            self._take("take", note, pending)
        return pending

    def _take(
        self,
        trigger: str,
        note: str = "",
        pending: Pending | None = None,
        overlap: bool = False,
        number: int = 0,
    ) -> bool:
        """Take a snapshot now; who holds a `pending` waits for room, a trigger does not, and there may be
        none: then this is false. `number` is that of a take that ranks agree on."""
        taken = self._taking.take(self._occasion(trigger, note, pending, overlap, number))
        if taken:
            for one in self._triggers:
                one.taken(self._steps, self._clock())
        return taken

    def _occasion(
        self, trigger: str, note: str, pending: Pending | None, overlap: bool, number: int
    ) -> Occasion:
        begun = time.monotonic()
        self._finish_records(wait=False)
        facts = Facts(
            step=self._steps,
            epoch=self.epoch,
            trigger=trigger,
            note=note,
            approximate=tuple(self._reasons()),
            environment={**environment.here(), **self._given},
            begun=begun,
            origin=self._origin,
        )
        overlap = overlap and self._settings.overlap
        return Occasion(
            facts,
            self._collect,
            self._log.cut_in_time,
            self._metrics(),
            pending,
            overlap,
            number,
            self._agree_of(number),
        )

    def _agree_of(self, number: int) -> Agree:
        """See `Occasion.agree`."""
        return lambda sample, then: then("")

    def _metrics(self) -> Callable[[], dict[str, Number]]:
        """Those of the newest step, which an accelerator may still be at work on."""
        readings, finished = (self._unfinished[-1][1] if self._unfinished else {}), self._last_metrics
        values = {name: reading.value for name, reading in readings.items()}
        if not readings:
            values = {name: partial(float, value) for name, value in finished.items()}
        return lambda: {name: number(value()) for name, value in values.items()}

    def _collect(self, anew: str = "") -> Collected:
        self._objects.update(self.values)
        return self._collector.collect(
            self._objects,
            position=self._position(),
            progress={"step": self._steps, "epoch": self.epoch},
            gradients=self._accumulating,
            generators=self._waiting_generators,
            config=self._config,
            anew=anew,
        )

    def _position(self) -> object:
        """The loader's, or the one that still waits for its loader."""
        if self._track is not None:
            return self._track.state()
        return None if self._waiting_position is None else self._waiting_position[0]

    def _reasons(self) -> list[str]:
        return [] if self._track is None else self._track.reasons()

    # -- going back ---------------------------------------------------------------------------------------

    def rollback(self, ref: str = "head") -> RolledBack:
        """Go back to an earlier snapshot of the chain, in place, and train on from there: as if the run had
        been killed, the branch rolled back, and the run started again. A step under way is dropped, and its
        gradients; `run.steps` goes on with the batch that followed the snapshot, a loop over `run.data` ends.

        Blocks until all snapshots taken are durable, and while the state is read: as long as closing and
        opening the run does. The branch's head is moved; nothing is lost (`everstep reflog`).

        Args:
            ref: the snapshot; `head` drops the steps since the newest, `head~` those since the one before.

        Raises:
            NotFound: there is no such snapshot; nothing was touched.
            EverstepError: the state could not be brought back. The run is closed, the head is where it was,
                and the objects may be partly overwritten.
        """
        self._check_open()
        self._taking.wait()
        self._taking.raise_background(unstored=True)
        branch, step, received = self._settings.branch, self._steps, self._signals.received
        back = Return(self.chain, self.chain.find(ref, branch), ref)
        self._end(last=False, replica_wait_s=0.0)
        self._forget_step()
        self._connect(back)
        self._closed = False
        self._signals.received = self._signals.received or received
        self._rollbacks += 1
        self._rolled_back = RolledBack(self.chain.url, branch, back.snapshot.id, step, self._steps)
        self._emit(self._rolled_back)
        for listener in self._listeners:
            listener(self._rolled_back)
        return self._rolled_back

    def _forget_step(self) -> None:
        """What a step under way has left behind must not get into the steps after a rollback."""
        self._hooks.clear()
        self._asked.clear()
        self._readings.clear()
        self._last_metrics = {}
        self._stepping = False
        self._stepped.clear()
        self._accumulating = frozenset()
        self._rolled_back = None
        for module in modules(self._objects).values():
            module.zero_grad(set_to_none=True)
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def on_rollback(self, listener: Callable[[RolledBack], object]) -> None:
        """Have `listener` called when steps that were trained are none any more, for loggers that must forget
        them: now, if the branch was rolled back since its newest snapshot was taken; and by each `rollback`,
        when the state is back. It is told the step that was reached, `from_step`, and the one that the run
        goes on from, `to_step`.
        """
        self._listeners.append(listener)
        if self._rolled_back is not None:
            listener(self._rolled_back)

    # In the keeper's thread:

    def _outcome(self, outcome: Outcome) -> None:
        if outcome.snapshot is not None:
            self._origin = None
        self._taking.outcome(outcome)

    def _warn(self, text: str) -> None:
        self._emit(Warned(text))

    # In a thread that follows:

    def _taken_over(self, error: EverstepError) -> None:
        """By way of a replica: the run stops at the next tick, as it does where its own store says so."""
        self._emit(Warned(str(error)))
        self._taking.errors.append((Pending(), error))

    # -- ending -------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all snapshots taken are durable in the chain's own store; False when `timeout` seconds
        were not enough. Replicas are not waited for: `take().durable("all")` does.

        Raises:
            EverstepError: one has failed; those before it are intact.
        """
        done = self._taking.wait(timeout)
        self._taking.raise_background(unstored=True)
        return done

    def close(self) -> None:
        """Take a last snapshot if steps were finished since the last, wait until all are durable, and let go
        of the chain. Does nothing the second time.

        Replicas are waited for a minute at most (`EVERSTEP_REPLICA_WAIT`), and not if they are away; what
        they lack then is told. A keeper process goes on sending it; else the next run does.

        Raises:
            EverstepError: a snapshot has failed; those before it are intact.
        """
        if self._closed:
            return
        self._taking.wait()
        self._end(last=not self._inside_a_step() and self._taking.taken_step != self._steps)

    def _inside_a_step(self) -> bool:
        return self._stepping or (self._track is not None and self._track.open)

    def _end(self, last: bool, replica_wait_s: float | None = None) -> None:
        wait_s = self._settings.replica_wait if replica_wait_s is None else replica_wait_s
        try:
            if last and self._steps:
                self._take_last()
        finally:
            self._closed = True
            for pending, _ in self._asked:
                pending.finish(None, Mismatch("the run was closed in the middle of the step"))
            self._finish_records(wait=True)
            for event in self._repeat.end(self._steps):
                self._emit(event)
            unsealed = self._taking.close(wait_s)
            self._quietly(partial(self._log.seal, unsealed + self._log.cut()))
            if self._ranks.leads:
                self._quietly(self._sweep)
            self._detach()
            self._quietly(self._lease.release)
            self._quietly(self._let_go_of_replicas)
        self._taking.raise_background(unstored=True)

    def _detach(self) -> None:
        """Nothing of this process calls the run any more."""
        self._signals.remove()
        for hook in self._hooks:
            hook.remove()
        if self._track is not None:
            self._track.on_ready = self._track.on_skip = None
            self._track.close()
        atexit.unregister(self._at_exit)

    def _take_last(self) -> None:
        self._take("close", pending=Pending())

    def _let_go_of_replicas(self, unsent: Collection[str] | None = None) -> None:
        unsent = self._standings.unsent() if unsent is None else unsent
        if isinstance(self._lease, Lease):
            self._replicas.let_go(self.chain, self._settings.branch, self._lease, unsent)

    def _sweep(self) -> None:
        """What killed writers left half-written goes, unless another branch has a writer: it may be its."""
        store = self.chain.store
        others = (one for one in Leases(store).holding({}) if one.branch != self._settings.branch)
        if isinstance(store, Sweeping) and all(one.dead for one in others):
            store.sweep()

    def _quietly(self, action: Callable[[], None]) -> None:
        """What is left undone here is made up for by the next writer."""
        try:
            action()
        except EverstepError as error:
            self._emit(Warned(str(error)))

    def _at_exit(self) -> None:
        """The program ended without `close`: do it now, but never save what an exception has left behind."""
        if self._closed or os.getpid() != self._owner:
            return
        crashed = getattr(sys, "last_value", None) is not None
        try:
            if crashed:
                self._fail()
            else:
                self.close()
        except EverstepError as error:
            self._emit(Failed(self._steps, str(error)))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        if error is None:
            self.close()
            return
        try:
            self._fail()
        except EverstepError as failed:
            self._emit(Failed(self._steps, str(failed)))

    def _fail(self) -> None:
        """End because of an error. The state may be that of half a step: what was taken before counts."""
        self._end(last=False)

    def _check_open(self) -> None:
        if self._closed:
            raise Mismatch("this run is closed", kept="all its snapshots are", next="everstep.open(...)")

    def __repr__(self) -> str:
        return f"<everstep.Run {self.chain.url} step {self._steps} epoch {self.epoch}>"
