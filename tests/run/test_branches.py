"""Branches of a run: where they begin, what they share, how they go back, and who is told."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import everstep
from everstep.chain import versions
from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.errors import Conflict, Damaged, Mismatch, NotFound
from everstep.events import Parted, Repeated, Resumed, RolledBack, Started
from everstep.format import keys
from everstep.run import resume
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.store.memory import MemoryStore
from training import Training, end_of, flip, in_a_process

pytestmark = pytest.mark.slow

UNTIL = 17


def head(repo: Any, branch: str = "main") -> Any:
    found = Chain(repo).head(branch)
    assert found is not None
    return found


def resumed(training: Training) -> Resumed:
    (event,) = [event for event in training.events if isinstance(event, Resumed)]
    return event


def rollbacks(training: Training) -> list[RolledBack]:
    return [event for event in training.events if isinstance(event, RolledBack)]


def steps_of(repo: Any, branch: str = "main") -> list[int]:
    return [one.step for one in Chain(repo).snapshots(branch)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The state and the loss at the end of a run that nobody touched."""
    root = tmp_path_factory.mktemp("unbroken")
    Training().train(root, UNTIL).close()
    return end_of(root)


# -- a branch that begins at a snapshot --------------------------------------------------------------------


def test_of_the_same_chain_bit_for_bit_as_an_unbroken_run(tmp_path: Path, unbroken: tuple[str, Any]) -> None:
    Training().train(tmp_path, 12).close()
    training = Training()
    torch.manual_seed(999)
    run = training.train(tmp_path, UNTIL, branch="try", start="step:6")
    assert run.resumed is not None
    assert (run.resumed.step, run.resumed.exact) == (6, True)
    run.close()
    assert "begins branch try at step:6" in resumed(training).remarks
    assert resumed(training).began
    tried = head(tmp_path, "try")
    assert (tried.record.state, tried.record.metrics["loss"]) == unbroken
    assert head(tmp_path).step == 12
    # The branch's first record names main's snapshot, and what follows has it for a parent.
    chain = Chain(tmp_path)
    assert steps_of(tmp_path, "try") == [17, 15, 12, 9, 6]
    assert chain.find("try@head~4") == chain.find("step:6")
    assert tried.record.origin is None
    assert verify(chain).findings == []


def test_the_same_command_goes_on_with_the_branch(tmp_path: Path, unbroken: tuple[str, Any]) -> None:
    Training().train(tmp_path, 12).close()
    settings = {"branch": "try", "start": "main@step:6"}
    Training().train(tmp_path, 10, **settings).close()
    training = Training()
    training.train(tmp_path, UNTIL, **settings).close()
    assert resumed(training).step == 10
    assert not resumed(training).began
    assert "goes on with branch try, which is there already: it does not start at main@step:6" in str(
        resumed(training)
    )
    tried = head(tmp_path, "try")
    assert (tried.record.state, tried.record.metrics["loss"]) == unbroken


def test_of_another_chain_bit_for_bit(tmp_path: Path, unbroken: tuple[str, Any]) -> None:
    Training().train(tmp_path / "a", 12).close()
    old = Chain(tmp_path / "a").find("step:6")
    before = {entry.key for entry in Chain(tmp_path / "a").store.list()}
    start = f"{tmp_path / 'a'}@step:6"
    training = Training()
    run = training.train(tmp_path / "b", UNTIL, start=start)
    run.close()
    assert resumed(training).exact
    assert resumed(training).step == 6
    assert f"begins branch main at {start} of {tmp_path / 'a'}" in resumed(training).remarks
    assert end_of(tmp_path / "b") == unbroken
    chain = Chain(tmp_path / "b")
    first = chain.find("step:9")
    origin = first.record.origin
    assert origin is not None
    assert (origin.chain, origin.url) == (Chain(tmp_path / "a").about.chain, str(tmp_path / "a"))
    assert (origin.snapshot, origin.step) == (old.id, 6)
    assert first.record.parents == ()
    assert [one.record.origin is None for one in chain.snapshots()] == [True, True, True, False]
    assert {entry.key for entry in Chain(tmp_path / "a").store.list()} == before
    assert verify(chain).findings == []
    # And once more the same command, now with a branch that is there.
    again = Training()
    again.open(tmp_path / "b", start=start).close()
    assert resumed(again).step == UNTIL


def test_what_came_from_another_chain_is_stored_before_a_run_ends(tmp_path: Path) -> None:
    Training().train(tmp_path / "a", 6).close()
    Training().open(tmp_path / "b", start=str(tmp_path / "a")).close()
    assert head(tmp_path / "b").step == 6
    assert head(tmp_path / "b").record.state == head(tmp_path / "a").record.state
    assert head(tmp_path / "b").record.origin.step == 6


@pytest.mark.process
@pytest.mark.usefixtures("runtime")
def test_the_keeper_process_records_where_it_came_from(tmp_path: Path) -> None:
    Training().train(tmp_path / "a", 6).close()
    Training().train(tmp_path / "b", 10, start=f"{tmp_path / 'a'}@head").close()
    found = [one.record.origin for one in Chain(tmp_path / "b").snapshots()]
    assert [one.step if one else None for one in found] == [None, 6]


def test_a_copy_of_the_chain_is_the_chain(tmp_path: Path) -> None:
    Training().train(tmp_path, 6).close()
    Training().open(tmp_path, branch="try", start=f"{tmp_path}@step:3").close()
    (point,) = Chain(tmp_path).points("try")
    assert point.snapshot is not None
    assert point.snapshot == Chain(tmp_path).find("step:3")


def test_a_sweep_copies_no_chunk(tmp_path: Path) -> None:
    Training().train(tmp_path, 6).close()
    packs = [entry.key for entry in Chain(tmp_path).store.list(keys.PACKS)]
    for rate in ("1e-4", "3e-4", "1e-3"):
        run = Training().open(tmp_path, branch=f"lr-{rate}", start="main", every=None)
        assert run.step == 6
        run.close()
    assert [entry.key for entry in Chain(tmp_path).store.list(keys.PACKS)] == packs
    assert Chain(tmp_path).branches() == ["lr-1e-3", "lr-1e-4", "lr-3e-4", "main"]


def test_the_environment_says_where_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training().train(tmp_path, 6).close()
    monkeypatch.setenv("EVERSTEP_START", "best:loss:max")
    monkeypatch.setenv("EVERSTEP_BRANCH", "try")
    run = Training().open(tmp_path)
    worst = max(Chain(tmp_path).snapshots(), key=lambda one: one.record.metrics["loss"])
    assert run.resumed is not None
    assert run.resumed.snapshot == worst.id
    run.close()


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"branch": "try", "start": "step:5"}, NotFound, "no snapshot at step 5"),
        ({"branch": "try", "start": "none@step:3"}, NotFound, "none is not an Everstep chain"),
        ({"branch": "try", "start": "nothing"}, NotFound, "has no snapshot 'nothing'"),
        ({"branch": "try", "start": "step:3", "resume": "head"}, Mismatch, "both name a snapshot"),
        ({"start": "step:3", "resume": "never"}, Mismatch, "resume='never' forbids"),
        ({"branch": "good", "start": "step:3"}, Mismatch, "'good' is a tag"),
        ({"branch": "try", "resume": "step:3"}, NotFound, "no snapshot at step 3"),
    ],
)
def test_what_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], kind: type, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Training().train(tmp_path / "a", 4).close()
    versions.tag(Chain(tmp_path / "a"), "good", "head")
    before = {key: data for key, data in files(tmp_path).items() if "/leases/" not in key}
    with pytest.raises(kind, match=said) as caught:
        Training().open(tmp_path / "a", **settings)
    assert caught.value.next
    assert {key: data for key, data in files(tmp_path).items() if "/leases/" not in key} == before
    Training().open(tmp_path / "a").close()  # The refusal has let go of the chain.


def test_a_new_chain_cannot_start_from_itself(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is none yet"):
        Training().open(tmp_path / "new", start="step:3")
    with pytest.raises(NotFound, match="is not an Everstep chain"):
        Training().open(tmp_path / "new", start=f"{tmp_path / 'old'}@head")
    assert not (tmp_path / "new").exists()


def test_a_reference_that_a_new_branch_lacks_names_start(tmp_path: Path) -> None:
    Training().train(tmp_path, 4).close()
    with pytest.raises(NotFound) as caught:
        Training().open(tmp_path, branch="try", resume="step:3")
    assert caught.value.next.startswith("everstep.open(..., branch='try', start='step:3')")


def test_must_is_met_by_a_start(tmp_path: Path) -> None:
    Training().train(tmp_path, 4).close()
    run = Training().open(tmp_path, branch="try", start="head", resume="must")
    assert run.step == 4
    run.close()


def test_a_state_that_does_not_fit_begins_no_branch(tmp_path: Path) -> None:
    Training().train(tmp_path, 4).close()
    with pytest.raises(Mismatch):
        Run(Settings(tmp_path, branch="try", start="head"), {"model": nn.Linear(2, 2)})
    assert Chain(tmp_path).branches() == ["main"]


def test_a_damaged_start_is_no_other_snapshot(tmp_path: Path) -> None:
    Training().train(tmp_path, 4, every=None).close()
    chain = Chain(tmp_path)
    (pack,) = chain.manifest(chain.find("head")).packs
    flip(tmp_path / keys.pack(pack), 5000)
    with pytest.raises(Damaged):
        Training().open(tmp_path, branch="try", start="head")
    assert chain.branches() == ["main"]


def test_a_branch_that_somebody_begins_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Training().train(tmp_path / "a", 4).close()
    for start, kind in (("head", Mismatch), (f"{tmp_path / 'b'}@head", Conflict)):
        Training().train(tmp_path / "b", 3).close() if kind is Conflict else None
        restored = resume.restored
        name = f"try-{kind.__name__}"

        def meanwhile(*arguments: Any, name: str = name, restored: Any = restored) -> Any:
            versions.branch(Chain(tmp_path / "a"), name, "step:3")
            return restored(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(resume, "restored", meanwhile)
            with pytest.raises(kind):
                Training().open(tmp_path / "a", branch=name, start=start)
        assert steps_of(tmp_path / "a", name) == [3]


# -- a branch that was rolled back -------------------------------------------------------------------------


def test_a_run_goes_on_from_where_its_branch_was_rolled_back_to(
    tmp_path: Path, unbroken: tuple[str, Any]
) -> None:
    Training().train(tmp_path, 12).close()
    versions.rollback(Chain(tmp_path), "main", "step:6")
    training = Training()
    run = training.open(tmp_path)
    told: list[RolledBack] = []
    run.on_rollback(told.append)
    assert run.step == 6
    assert [(one.from_step, one.to_step) for one in told] == [(12, 6)]
    assert rollbacks(training) == told
    while run.step < UNTIL:
        training.epoch_of(run, UNTIL)
    run.close()
    assert end_of(tmp_path) == unbroken
    # Nothing is compared with what was rolled back, and the next resume has nothing to tell.
    assert not [event for event in training.events if isinstance(event, Parted | Repeated)]
    again = Training()
    again.open(tmp_path).close()
    assert rollbacks(again) == []
    assert resumed(again).step == UNTIL
    assert verify(Chain(tmp_path)).findings == []


def test_a_rollback_is_told_until_a_snapshot_was_taken(tmp_path: Path) -> None:
    Training().train(tmp_path, 12).close()
    versions.rollback(Chain(tmp_path), "main", "step:6")
    for _ in range(2):
        training = Training()
        training.open(tmp_path).close()
        assert [(one.from_step, one.to_step) for one in rollbacks(training)] == [(12, 6)]
    versions.rollback(Chain(tmp_path), "main", "main@{1}")
    training = Training()
    training.open(tmp_path).close()
    assert rollbacks(training) == []
    assert resumed(training).step == 12


def test_damage_after_a_rollback_leads_further_back_and_never_forward(tmp_path: Path) -> None:
    for until in (3, 6, 9):
        Training().train(tmp_path, until, every=None).close()
    chain = Chain(tmp_path)
    six = chain.find("step:6")
    versions.rollback(chain, "main", "step:6")
    (pack, *_) = set(chain.manifest(six).packs) - set(chain.manifest(chain.find("step:3")).packs)
    flip(tmp_path / keys.pack(pack), 5000)
    training = Training()
    training.open(tmp_path, every=None).close()
    assert resumed(training).step == 3
    assert [(one.from_step, one.to_step) for one in rollbacks(training)] == [(9, 3)]


@pytest.mark.process
def test_a_killed_run_is_rolled_back_and_its_journal_is_not_compared_with(tmp_path: Path) -> None:
    def killed() -> None:
        training = Training()
        run = training.train(tmp_path, 9, every=None)
        assert run.take().durable()
        while run.step < 11:
            training.epoch_of(run, 11)

    Training().train(tmp_path, 6).close()
    assert in_a_process(killed) == 0
    versions.rollback(Chain(tmp_path), "main", "step:6")
    training = Training()
    training.optimizer.param_groups[0]["lr"] = 0.5
    run = training.open(tmp_path)
    training.optimizer.param_groups[0]["lr"] = 0.5
    training.epoch_of(run, 10)
    run.close()
    assert not [event for event in training.events if isinstance(event, Parted | Repeated)]


# -- a run that goes back by itself ------------------------------------------------------------------------


def test_a_live_rollback_ends_with_the_bits_of_an_unbroken_run(
    tmp_path: Path, unbroken: tuple[str, Any]
) -> None:
    training = Training()
    run = training.train(tmp_path, 14)
    told: list[RolledBack] = []
    run.on_rollback(told.append)
    assert told == []
    done = run.rollback("step:6")
    assert told == [done]
    assert (done.from_step, done.to_step, run.step) == (14, 6, 6)
    assert head(tmp_path).step == 6
    torch.manual_seed(3)
    while run.step < UNTIL:
        training.epoch_of(run, UNTIL)
    run.close()
    assert end_of(tmp_path) == unbroken
    assert not [event for event in training.events if isinstance(event, Parted | Repeated)]
    chain = Chain(tmp_path)
    assert [point.head.step for point in chain.line() if point.head] == [17, 15, 12, 9, 6, 3]
    assert chain.find("step:9").record.parents == (chain.find("step:6").id,)
    assert verify(chain).findings == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_a_rollback_in_the_middle_of_a_step_goes_on_in_the_same_loop(tmp_path: Path, workers: int) -> None:
    whole = Training(workers)
    whole.train(tmp_path / "whole", UNTIL).close()
    training = Training(workers)
    run = training.open(tmp_path / "a")
    seen: list[int] = []
    while run.step < UNTIL:
        for batch in run.steps(training.loader, until=UNTIL):
            run.wait()
            seen.append(run.step)
            loss = training.backward(batch)
            if len(seen) in (8, 14):
                # Its gradients are there, and must not get into the next step.
                run.rollback("head~" if len(seen) == 8 else "head")
                continue
            training.update(loss, run.step + 1)
            run.log(loss=loss)
    run.close()
    assert end_of(tmp_path / "a") == end_of(tmp_path / "whole")
    assert seen == [*range(8), *range(3, 9), *range(6, 17)]
    for tensor, other in zip(training.bits().values(), whole.bits().values(), strict=True):
        assert torch.equal(tensor, other)


def test_a_rollback_across_an_epoch(tmp_path: Path, unbroken: tuple[str, Any]) -> None:
    training = Training()
    run = training.train(tmp_path, 13)
    assert run.epoch == 1
    run.rollback("step:9")
    assert (run.step, run.epoch) == (9, 0)
    while run.step < UNTIL:
        training.epoch_of(run, UNTIL)
    assert run.epoch == 1
    run.close()
    assert end_of(tmp_path) == unbroken


def test_a_loop_over_the_data_ends_with_a_rollback(tmp_path: Path) -> None:
    whole = Training(accumulate=3)
    whole.train(tmp_path / "whole", 9).close()
    training = Training(accumulate=3)
    run = training.train(tmp_path / "a", 8)
    for number, batch in enumerate(run.data):
        training.backward(batch)
        if number == 1:
            run.rollback("head")
    assert number == 1
    while run.step < 9:
        training.epoch_of(run, 9)
    run.close()
    assert end_of(tmp_path / "a") == end_of(tmp_path / "whole")


def test_a_rollback_to_the_head_is_no_proof_of_anything(tmp_path: Path) -> None:
    """The steps since then are trained anew, otherwise, on purpose."""
    training = Training()
    run = training.train(tmp_path, 8)
    run.rollback()
    assert run.step == 6
    training.optimizer.param_groups[0]["lr"] = 0.5
    training.epoch_of(run, 8)
    run.close()
    assert not [event for event in training.events if isinstance(event, Parted | Repeated)]
    assert [point.head.moved is not None for point in Chain(tmp_path).points() if point.head] == [
        False, True, False, False,
    ]  # fmt: skip


def test_a_rollback_to_what_is_not_there_touches_nothing(tmp_path: Path) -> None:
    training = Training()
    run = training.train(tmp_path, 5)
    before = training.bits()
    for ref in ("step:4", "head~9", "nothing"):
        with pytest.raises(NotFound):
            run.rollback(ref)
    assert run.step == 5
    assert all(torch.equal(before[name], one) for name, one in training.bits().items())
    training.epoch_of(run, 7)
    run.close()
    assert head(tmp_path).step == 7
    with pytest.raises(Mismatch, match="this run is closed"):
        run.rollback()


def test_a_rollback_that_fails_closes_the_run_and_leaves_the_head(tmp_path: Path) -> None:
    training = Training()
    run = training.train(tmp_path, 7, every="3 steps")
    chain = Chain(tmp_path)
    for pack in chain.manifest(chain.find("step:3")).packs:
        flip(tmp_path / keys.pack(pack), 5000)
    with pytest.raises(Damaged):
        run.rollback("step:3")
    assert head(tmp_path).step == 6
    with pytest.raises(Mismatch, match="closed"):
        run.tick()
    again = Training()
    again.open(tmp_path).close()  # The lease was let go of.


def test_no_gradient_of_a_step_that_was_dropped_is_left(tmp_path: Path) -> None:
    """Of a module that no optimizer handed over trains, and of a tensor that is in no module."""
    alone, loose = nn.Linear(2, 1), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([loose], lr=0.1)
    run = everstep.open(tmp_path, alone=alone, loose=loose, optimizer=optimizer, every=None)
    alone(loose).sum().backward()
    optimizer.step()
    run.tick()
    run.take().durable()
    (alone(loose).sum() * math.nan).backward()
    run.rollback()
    run.close()
    assert [one.grad for one in (*alone.parameters(), loose)] == [None, None, None]


def test_plain_values_and_gradients_after_a_rollback(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = everstep.open(tmp_path, model=model, optimizer=optimizer, best=1.0, every=None, keep="all")
    run.tick()
    run.take().durable()
    kept = copy.deepcopy(model.state_dict())
    run.values["best"] = 0.5
    model(torch.full((1, 2), float("nan"))).sum().backward()
    optimizer.step()
    run.tick()
    run.rollback()
    assert run.values == {"best": 1.0}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(kept[name], one) for name, one in model.state_dict().items())
    run.chain.tag("good")  # type: ignore[attr-defined]
    run.close()
    assert everstep.Chain(tmp_path).find("good").step == 1


@pytest.mark.process
@pytest.mark.usefixtures("runtime")
def test_a_rollback_with_a_keeper_process(tmp_path: Path) -> None:
    Training().train(tmp_path / "whole", 10).close()
    training = Training()
    run = training.train(tmp_path / "a", 8)
    run.rollback("step:3")
    while run.step < 10:
        training.epoch_of(run, 10)
    run.close()
    assert end_of(tmp_path / "a") == end_of(tmp_path / "whole")


def test_in_a_store_of_this_process() -> None:
    store = MemoryStore()
    training = Training()
    run = training.train(store, 7)
    run.rollback("@{1}")
    assert run.step == 3
    run.close()
    assert head(store).step == 3


def test_a_run_that_does_nothing_has_nothing_to_go_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_DISABLE", "1")
    run = everstep.open("nowhere", start="step:3", branch="try")
    run.on_rollback(print)
    with pytest.raises(Mismatch, match="EVERSTEP_DISABLE"):
        run.rollback()


def test_a_fresh_branch_without_a_start_starts(tmp_path: Path) -> None:
    Training().train(tmp_path, 4).close()
    training = Training()
    training.train(tmp_path, 3, branch="other").close()
    assert any(isinstance(event, Started) for event in training.events)
    assert steps_of(tmp_path, "other") == [3]
