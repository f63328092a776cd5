"""From where a run goes on, what is refused, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import everstep
from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.errors import Conflict, Damaged, Mismatch, NotFound, Unsupported
from everstep.events import Resumed, Skipped, Skipping, Started
from everstep.format import keys, record
from everstep.format.record import ChainRecord
from everstep.store.memory import MemoryStore
from training import Training, end_of, flip, in_a_process

pytestmark = pytest.mark.slow


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- which snapshot ----------------------------------------------------------------------------------------


def test_auto_starts_where_there_is_nothing(tmp_path: Path) -> None:
    training = Training()
    run = training.open(tmp_path / "new")
    assert run.resumed is None
    assert run.step == run.epoch == 0
    assert any(isinstance(event, Started) for event in training.events)
    run.close()


def test_must_insists(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not an Everstep chain"):
        Training().open(tmp_path / "new", resume="must")
    assert not (tmp_path / "new").exists()
    Training().open(tmp_path / "new").close()
    with pytest.raises(NotFound, match="has no snapshot to resume from"):
        Training().open(tmp_path / "new", resume="must")


def test_never_refuses_what_is_there(tmp_path: Path) -> None:
    Training().train(tmp_path, 4, resume="never").close()
    before = files(tmp_path)
    with pytest.raises(Mismatch, match="resume='never' forbids"):
        Training().open(tmp_path, resume="never")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("ref", "step"), [("head", 9), ("latest", 9), ("step:3", 3), ("head~1", 6), ("main~2", 3)]
)
def test_references(tmp_path: Path, ref: str, step: int) -> None:
    run = Training().train(tmp_path, 1, every=None)
    for _ in range(3):
        run.close()
        training = Training()
        run = training.open(tmp_path, every=None)
        training.epoch_of(run, (run.step // 3 + 1) * 3)
    run.close()
    again = Training().open(tmp_path, resume=ref)
    assert again.step == step
    again.close()


def test_a_prefix_of_an_id(tmp_path: Path) -> None:
    Training().train(tmp_path, 4, every=None).close()
    id = Chain(tmp_path).find("head").id
    again = Training().open(tmp_path, resume=id[:6])
    assert again.resumed is not None
    assert again.resumed.snapshot == id
    again.close()


def test_an_unknown_reference_says_what_there_is(tmp_path: Path) -> None:
    Training().train(tmp_path, 4, every=None).close()
    with pytest.raises(NotFound, match="nearest are at 4"):
        Training().open(tmp_path, resume="step:5")
    Training().open(tmp_path).close()  # The refusal has let go of the chain.


# -- damage ------------------------------------------------------------------------------------------------


def three_snapshots(root: Path) -> list[str]:
    """Snapshots at steps 3, 6 and 9, the newest first."""
    for until in (3, 6, 9):
        Training().train(root, until, every=None).close()
    return [one.id for one in Chain(root).snapshots()]


def pack_of(root: Path, id: str) -> Path:
    chain = Chain(root)
    newest = chain.manifest(chain.snapshot(id)).packs
    return root / keys.pack(next(iter(newest)))


def test_a_damaged_newest_snapshot_is_skipped_and_taken_again(tmp_path: Path) -> None:
    """The same steps make the same packs: the retaken snapshot must not lean on the damaged one."""
    Training().train(tmp_path / "whole", 9, every=None).close()
    ids = three_snapshots(tmp_path / "b")
    flip(pack_of(tmp_path / "b", ids[0]), 5000)

    training = Training()
    run = training.open(tmp_path / "b", every=None)
    assert run.step == 6
    skipped = [event for event in training.events if isinstance(event, Skipped)]
    assert [event.snapshot for event in skipped] == [f"{ids[0][:8]} (step 9)"]
    assert "is not the one that was written" in skipped[0].why
    assert "nothing was deleted" in str(skipped[0])
    training.epoch_of(run, 9)
    run.close()

    assert end_of(tmp_path / "b") == end_of(tmp_path / "whole")
    report = verify(Chain(tmp_path / "b"))
    newest = Chain(tmp_path / "b").find("head").id
    assert newest not in {id for finding in report.findings for id in finding.snapshots}
    assert Training().open(tmp_path / "b").step == 9


@pytest.mark.parametrize("what", ["head", "snapshot", "manifest", "pack"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_any_damage_to_the_newest_leads_to_the_one_before(tmp_path: Path, what: str, how: str) -> None:
    ids = three_snapshots(tmp_path)
    chain = Chain(tmp_path)
    path = {
        "head": tmp_path / next(chain.store.list(keys.head("main"))).key,
        "snapshot": tmp_path / keys.snapshot(ids[0]),
        "manifest": tmp_path / keys.manifest(chain.snapshot(ids[0]).record.manifests[0]),
        "pack": pack_of(tmp_path, ids[0]),
    }[what]
    if how == "flipped":
        flip(path, path.stat().st_size // 3)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    training = Training()
    run = training.open(tmp_path)
    assert run.step == 6
    assert run.resumed is not None
    assert run.resumed.snapshot == ids[1]
    run.close()


@pytest.mark.parametrize(("one", "other", "step", "skips"), [(3, 2, 3, 2), (3, 1, 6, 1), (2, 1, 9, 0)])
def test_head_records_that_changed_places_are_skipped(
    tmp_path: Path, one: int, other: int, step: int, skips: int
) -> None:
    """Each is whole, and a restore that took it would go on from another step than the newest."""
    three_snapshots(tmp_path)
    paths = [tmp_path / keys.numbered(keys.head("main"), number) for number in (one, other)]
    first, second = [path.read_bytes() for path in paths]
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    training = Training()
    run = training.train(tmp_path, 12)
    (resumed,) = [event for event in training.events if isinstance(event, Resumed)]
    assert resumed.step == step
    skipped = [event for event in training.events if isinstance(event, Skipped)]
    assert [event.why for event in skipped] == ["a head record is the record of another place"] * skips
    run.close()
    again = Training().open(tmp_path, resume="must")
    assert again.step == 12
    again.close()


def test_a_run_never_starts_over_by_itself(tmp_path: Path) -> None:
    for id in three_snapshots(tmp_path):
        flip(tmp_path / keys.snapshot(id), 10)
    with pytest.raises(Damaged, match="none of the 3 snapshots") as caught:
        Training().open(tmp_path)
    assert caught.value.next.endswith("verify")


def test_damage_that_does_not_matter_is_told(tmp_path: Path) -> None:
    ids = three_snapshots(tmp_path)
    path = pack_of(tmp_path, ids[0])
    flip(path, path.stat().st_size - 70)  # In the zeros before the trailer.
    training = Training()
    run = training.open(tmp_path)
    assert run.step == 9
    assert run.resumed is not None
    assert run.resumed.exact
    assert any("damage that does not matter here" in remark for remark in run.resumed.remarks)
    run.close()


# -- refused, with nothing touched -------------------------------------------------------------------------


def refused(repo: Any, training: Training, **settings: Any) -> Mismatch:
    before = training.bits()
    with pytest.raises(Mismatch) as caught:
        training.open(repo, **settings)
    assert "nothing was touched" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), training.bits().values(), strict=True))
    return caught.value


@pytest.fixture(name="trained")
def _trained(tmp_path: Path) -> Path:
    Training().train(tmp_path / "run", 4, every=None).close()
    return tmp_path / "run"


def test_another_shape(trained: Path) -> None:
    other = Training()
    other.model[4] = nn.Linear(24, 2)
    error = refused(trained, other)
    assert "model/4.weight has shape [2, 24], in the snapshot [1, 24]" in str(error)


def test_another_dtype(trained: Path) -> None:
    other = Training()
    other.model[4].to(torch.float64)
    assert "model/4.weight has dtype float64, in the snapshot float32" in str(refused(trained, other))


def test_a_missing_leaf(trained: Path) -> None:
    other = Training()
    other.model.add_module("5", nn.Linear(1, 1))
    assert "the snapshot has no leaf model/5.weight" in str(refused(trained, other))


def test_a_surplus_leaf(trained: Path) -> None:
    other = Training()
    del other.model[4]
    error = refused(trained, other)
    assert "the snapshot holds model/4.weight, model/4.bias, which the model has not" in str(error)


def test_a_missing_and_a_surplus_object(trained: Path) -> None:
    other = Training()
    before = other.bits()
    with pytest.raises(Mismatch, match="the snapshot holds scheduler, ema, history, which is not given"):
        everstep.open(trained, model=other.model, optimizer=other.optimizer)
    with pytest.raises(Mismatch, match="the snapshot has no extra"):
        everstep.open(trained, **other.objects(), extra={"a": 1})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), other.bits().values(), strict=True))


def test_not_strict_restores_what_there_is_and_says_so(trained: Path) -> None:
    other = Training()
    other.model.add_module("5", nn.Linear(1, 1))
    run = other.open(trained, strict=False)
    assert run.step == 4
    assert run.resumed is not None
    assert not run.resumed.exact
    assert "model/5.weight" in run.resumed.label
    run.close()


def test_other_groups_and_another_order_of_parameters(trained: Path) -> None:
    other = Training()
    other.optimizer = torch.optim.AdamW([{"params": [p]} for p in other.model.parameters()])
    assert "groups of [1, 1, 1" in str(refused(trained, other))
    other = Training()
    other.optimizer = torch.optim.AdamW(list(other.model.parameters())[::-1])
    assert "parameter 0 of optimizer is model.4.bias, in the snapshot it is model.0.weight" in str(
        refused(trained, other)
    )


def test_another_scheduler(trained: Path) -> None:
    other = Training()
    other.scheduler = torch.optim.lr_scheduler.StepLR(other.optimizer, 10)
    assert "scheduler is a StepLR" in str(refused(trained, other))


@pytest.mark.parametrize("value", [lambda: 1, object(), torch.eye(2).to_sparse(), Path("x")])
def test_what_cannot_be_stored_is_named_at_open(tmp_path: Path, value: object) -> None:
    with pytest.raises(Unsupported, match="extra/inner"):
        everstep.open(tmp_path / "new", extra={"inner": value})
    assert not (tmp_path / "new").exists()


def test_a_path_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    assert "it holds cat.jpg" in str(refused(tmp_path / "photos", Training()))
    assert list((tmp_path / "photos").iterdir()) == [tmp_path / "photos" / "cat.jpg"]
    (tmp_path / "file").write_text("x")
    assert "is a file" in str(refused(tmp_path / "file", Training()))


def test_a_newer_format(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put(keys.CHAIN, [record.seal(ChainRecord(chain="00" * 16, created_at="", format=4))])
    with pytest.raises(Unsupported, match="format 4"):
        Training().open(store)


@pytest.mark.parametrize(
    "setting",
    [{"every": "sometimes"}, {"keep": "first 3"}, {"branch": "a/b"}, {"repo": ""}, {"every": "0 steps"}],
)
def test_settings_that_are_not_understood(tmp_path: Path, setting: dict[str, Any]) -> None:
    refused(setting.pop("repo", tmp_path / "new"), Training(), **setting)
    assert not (tmp_path / "new").exists()


def test_names_of_our_own(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="'run' is a name of Everstep's own"):
        everstep.open(tmp_path / "new", run={})


def test_many_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Mismatch, match="one of 4 processes of a job, and they cannot reach each other yet"):
        everstep.open(tmp_path / "new", model=torch.nn.Linear(1, 1))
    assert not (tmp_path / "new").exists()


def test_a_second_writer(tmp_path: Path) -> None:
    run = Training().open(tmp_path)
    with pytest.raises(Conflict, match="is being written by this process"):
        Training().open(tmp_path)
    run.close()
    Training().open(tmp_path).close()


@pytest.mark.process
def test_a_second_process(tmp_path: Path) -> None:
    run = Training().open(tmp_path)

    def second() -> None:
        with pytest.raises(Conflict, match=r"is being written by process \d+ on this machine"):
            Training().open(tmp_path)

    assert in_a_process(second) == 0
    run.close()


# -- labels ------------------------------------------------------------------------------------------------


def test_another_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstep.run import environment

    facts = environment.here()
    monkeypatch.setattr(environment, "here", lambda: {**facts, "torch": "2.6.0"})
    Training().train(tmp_path, 4, every=None).close()
    monkeypatch.undo()
    training = Training()
    training.open(tmp_path).close()
    label = next(event.label for event in training.events if isinstance(event, Resumed))
    assert label == f"approximate: torch 2.6.0 -> {torch.__version__}"


def test_no_loader(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with everstep.open(tmp_path, model=model, every=None) as run:
        run.tick()
    again = everstep.open(tmp_path, model=model)
    assert again.resumed is not None
    assert again.resumed.exact
    assert "no loader was given" in str(again.resumed)
    again.close()


def test_the_loader_may_come_with_the_loop(tmp_path: Path) -> None:
    def train(until: int) -> list[float]:
        training = Training()
        run = everstep.open(tmp_path, **training.objects(), every=None)
        assert run.take(note="the position still waits for its loader").durable()
        for batch in run.steps(training.loader, until=until):
            training.update(training.backward(batch), run.step)
        run.close()
        return training.history

    first = train(4)
    whole = Training()
    whole.train(MemoryStore(), 8, every=None).close()
    assert train(8) == whole.history
    assert first == whole.history[:4]


def test_the_record_of_a_snapshot(tmp_path: Path) -> None:
    run = Training().train(tmp_path, 4, every=None)
    run.take(note="before the cliff").durable()
    one = Chain(tmp_path).find("head").record
    assert (one.step, one.epoch, one.note, one.trigger) == (4, 0, "before the cliff", "take")
    assert one.environment["torch"] == str(torch.__version__)
    assert one.costs["stall"] > 0
    assert json.loads(record.encode(one))["metrics"]["loss"] == one.metrics["loss"]
    run.close()


def test_a_loader_that_never_comes_leaves_no_position_behind(tmp_path: Path) -> None:
    Training().train(tmp_path, 4, every=None).close()
    training = Training()
    run = everstep.open(tmp_path, **training.objects(), every=None)
    torch.rand(7)
    run.tick()
    run.close()
    tree = run.chain.manifest(run.chain.find("head")).tree
    assert tree["run"]["data"] is None
    generators = torch.get_rng_state()
    torch.manual_seed(0)
    everstep.open(tmp_path, **Training().objects()).close()
    assert torch.equal(torch.get_rng_state(), generators)


def test_batches_that_are_loaded_again_are_told(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(1000))

    def train(until: int) -> Training:
        training = Training()
        training.loader = torch.utils.data.DataLoader(Endless())
        run = training.open(tmp_path, every=None)
        seen = [int(batch) for batch in run.steps(until=until)]
        assert seen == list(range(until - len(seen), until))
        run.close()
        return training

    train(4)
    told = [str(event) for event in train(7).events if isinstance(event, Skipping)]
    assert told[-1] == "loads 4 batches again to get back into the epoch: 4 done"
