from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from by_hand import Boxed, load, mesh, numbered, save
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import everstep
from everstep import dcp
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.errors import Conflict, Mismatch, Unsupported
from everstep.format import keys, record
from everstep.format.record import LeaseRecord
from everstep.integrations.dcp import saving
from everstep.store.memory import MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

State = dict[str, Any]


def some_state() -> State:
    """Of what states consist of."""
    return {
        "model": {
            "weight": numbered((5, 3)),
            "half": numbered((4,), torch.bfloat16),
            "turned": numbered((6, 2)).t(),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.zeros(0, 4),
            "conjugate": torch.complex(numbered((3,)), numbered((3,))).conj(),
            "mask": torch.tensor([True, False]),
        },
        "list": [numbered((2,)), {"deep": numbered((2,), first=9)}, "text"],
        "step": 7,
        "rate": 0.1,
        "names": ["a", "b"],
        "pair": (1, numbered((3,), torch.int64)),
        "array": np.arange(6, dtype="<i2").reshape(2, 3),
        "nothing": None,
        "file": file(),
        "dtype": torch.float16,
        "order": OrderedDict(x=1, y=2),
    }


def file() -> io.BytesIO:
    """Some keep a file in memory in their state."""
    made = io.BytesIO(b"some bytes")
    made.seek(4)
    return made


def emptied(state: Any) -> Any:
    """The same with other contents."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state.resolve_conj(), memory_format=torch.preserve_format)
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    if isinstance(state, list) and any(isinstance(one, torch.Tensor | dict) for one in state):
        return [emptied(one) for one in state]
    return None


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one.resolve_conj(), other.resolve_conj()), path
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, path
        assert np.array_equal(one, other), path
    elif isinstance(one, io.BytesIO):
        assert (one.getvalue(), one.tell()) == (other.getvalue(), other.tell()), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key, value in one.items():
            assert_same(value, other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert type(one) is type(other), path
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{number}")
    else:
        assert one == other, path


@pytest.mark.parametrize("save_planner", [DefaultSavePlanner, dcp.SavePlanner])
@pytest.mark.parametrize("load_planner", [DefaultLoadPlanner, dcp.LoadPlanner])
def test_a_state_comes_back(
    tmp_path: Path, save_planner: type[SavePlanner], load_planner: type[LoadPlanner]
) -> None:
    state = some_state()
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"), planner=save_planner())
    there = emptied(state)
    tensor = there["model"]["weight"]
    torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"), planner=load_planner())
    assert_same(state, there)
    assert there["model"]["weight"] is tensor


def test_nothing_is_pickled_at_rest(tmp_path: Path) -> None:
    torch_dcp.save(some_state(), storage_writer=dcp.Writer(tmp_path / "c"))
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"PK\x03\x04" not in data, path
            assert b"torch._utils" not in data, path
            assert not zipfile.is_zipfile(path), path


@pytest.mark.parametrize("flatten", [True, False])
def test_planners_that_do_not_flatten(tmp_path: Path, flatten: bool) -> None:
    """Then a dict is one value, the tensors in it included."""
    state = some_state()
    torch_dcp.save(
        state,
        storage_writer=dcp.Writer(tmp_path / "c"),
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )
    there = dict.fromkeys(state)
    planner = dcp.LoadPlanner(flatten_state_dict=flatten, flatten_sharded_tensors=False)
    torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"), planner=planner)
    assert_same(state, there)


def test_a_state_that_is_not_known_beforehand(tmp_path: Path) -> None:
    state = {"model": {"a.b": numbered((3,)), "c": [numbered((2,)), 5]}, "n": 1}
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"))
    assert_same(state, _load_state_dict_from_keys(storage_reader=dcp.Reader(tmp_path / "c")))
    some = _load_state_dict_from_keys({"model.a.b"}, storage_reader=dcp.Reader(tmp_path / "c"))
    assert_same({"model": {"a.b": numbered((3,))}}, some)


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    class Own:
        pass

    torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(tmp_path / "c", step=1))
    with pytest.raises(CheckpointException, match=r"a/b\.c is a .*Own and cannot be stored"):
        torch_dcp.save({"a": {"b.c": Own()}}, storage_writer=dcp.Writer(tmp_path / "c", step=2))
    assert [one.step for one in Chain(tmp_path / "c").snapshots()] == [1]


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(3).to_sparse(), "model/w is a tensor of layout torch.sparse_coo"),
        (torch.ones(3, device="meta"), "model/w is a tensor without data yet"),
        (
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "model/w: the dtype 'qint8' cannot be",
        ),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_tensors_that_cannot_be_stored_are_named(tmp_path: Path, tensor: torch.Tensor, what: str) -> None:
    with pytest.raises(CheckpointException, match=what):
        torch_dcp.save({"model": {"w": tensor}}, storage_writer=dcp.Writer(tmp_path / "c"))


def test_what_makes_no_record_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="step=-1"):
        dcp.Writer(tmp_path / "c", step=-1)
    with pytest.raises(Mismatch, match="metric 'loss' is a str"):
        dcp.Writer(tmp_path / "c", metrics={"loss": "low"})
    writer = dcp.Writer(tmp_path / "c", metrics={"loss": torch.tensor(0.5), "seen": 10**17 + 1})
    torch_dcp.save({"n": 1}, storage_writer=writer)
    assert writer.snapshot is not None
    assert writer.snapshot.record.metrics == {"loss": 0.5, "seen": 10**17 + 1}


# -- the same snapshots ------------------------------------------------------------------------------------


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + steps))
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_open_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c", step=3, metrics={"loss": 0.5}))
    other, its_optimizer = trained(1)
    with everstep.open(
        tmp_path / "c", every=None, resume="best:loss", model=other, optimizer=its_optimizer
    ) as run:
        assert run.step == 3
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert_same(optimizer.state_dict(), its_optimizer.state_dict())


def test_what_a_run_took_is_loaded(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    with everstep.open(tmp_path / "c", every=None, model=model, optimizer=optimizer, seen={"n": 4}) as run:
        run.take(note="x")
    other, its_optimizer = trained(1)
    there = {"model": other.state_dict(), "optimizer": its_optimizer.state_dict(), "seen": {"n": 0}}
    torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"), planner=dcp.LoadPlanner())
    assert_same(dict(model.state_dict()), dict(there["model"]))
    assert_same(optimizer.state_dict(), there["optimizer"])
    assert there["seen"] == {"n": 4}


def test_a_snapshot_is_like_any_other(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c", step=5, note="here"))
    loaded = everstep.load(tmp_path / "c")
    assert loaded.progress == {"step": 5, "epoch": 0}
    assert torch.equal(loaded["model/0.weight"], model.state_dict()["0.weight"])  # type: ignore[arg-type]
    moment = state["optim"]["state"]["2.weight"]["exp_avg"]
    assert torch.equal(loaded["optim/state/2.weight/exp_avg"], moment)  # type: ignore[arg-type]
    optimizer.load_state_dict(loaded.state("optim"))
    head = Chain(tmp_path / "c").head()
    assert head is not None
    assert (head.record.trigger, head.record.note) == ("dcp", "here")
    assert "random generators" in head.record.approximate[0]
    assert not verify(Chain(tmp_path / "c")).findings


# -- several ranks -----------------------------------------------------------------------------------------


def boxed(whole: torch.Tensor, cuts: list[list[int]], ranks: int) -> list[Boxed]:
    return [Boxed.of(whole, boxes) for boxes in mesh(whole.shape, cuts, ranks)]


@pytest.mark.parametrize("planner", [DefaultSavePlanner, dcp.SavePlanner])
def test_several_ranks_save_one_snapshot(tmp_path: Path, planner: type[SavePlanner]) -> None:
    whole = numbered((10, 6))
    parts = boxed(whole, [[3, 7], [4]], 3)
    states: list[State] = [
        {"w": part, "same": numbered((5,)), f"own{rank}": numbered((2,), first=rank), "n": 3, "r": rank}
        for rank, part in enumerate(parts)
    ]
    save(states, [dcp.Writer(tmp_path / "c", step=4) for _ in states], planner)
    snapshot = Chain(tmp_path / "c").head()
    assert snapshot is not None
    assert len(snapshot.record.manifests) == 3
    there: State = {"w": torch.zeros(10, 6), "same": torch.zeros(5), "own2": torch.zeros(2), "n": 0, "r": -1}
    load([there], [dcp.Reader(tmp_path / "c")])
    assert torch.equal(there["w"], whole)
    assert torch.equal(there["same"], numbered((5,)))
    assert torch.equal(there["own2"], numbered((2,), first=2))
    assert (there["n"], there["r"]) == (3, 0)
    assert torch.equal(everstep.load(tmp_path / "c")["w"], whole)  # type: ignore[arg-type]
    assert not verify(Chain(tmp_path / "c")).findings


@pytest.mark.parametrize("planner", [DefaultSavePlanner, dcp.SavePlanner])
def test_values_that_differ_between_ranks_are_the_lowest_ones(
    tmp_path: Path, planner: type[SavePlanner]
) -> None:
    """Also the arrays in them, whoever is planned to write them."""
    states: list[State] = [
        {"x": torch.zeros(9), "v": (np.arange(3), 1), "w": None},
        {"v": None, "w": (np.arange(4),), "only": [np.arange(5)]},
        {"v": (np.arange(7),), "w": (np.arange(8), 2), "only": [np.arange(9)]},
    ]
    save(states, [dcp.Writer(tmp_path / "c") for _ in states], planner)
    there: State = {"x": torch.ones(9), "v": None, "w": 1, "only": []}
    load([there], [dcp.Reader(tmp_path / "c")])
    assert_same({**states[0], "only": [np.arange(5)]}, there)
    assert not verify(Chain(tmp_path / "c")).findings


def test_what_all_ranks_hold_is_written_once_and_by_all(tmp_path: Path) -> None:
    large = torch.rand(3001, 700)
    states = [{"large": large, "small": numbered((9,)), "n": 1} for _ in range(4)]
    save(states, [dcp.Writer(tmp_path / "c") for _ in states], dcp.SavePlanner)
    chain = Chain(tmp_path / "c")
    head = chain.head()
    assert head is not None
    sizes = [sum(region.size_bytes for region in part.regions) for part in chain.manifests(head)]
    assert sum(sizes) <= large.nbytes + 4 * 64
    assert max(sizes) <= large.nbytes / 4 * 1.01
    there = {"large": torch.zeros_like(large), "small": torch.zeros(9)}
    load([there, there], [dcp.Reader(tmp_path / "c")] * 2)
    assert torch.equal(there["large"], large)


def test_what_has_only_the_name_in_common_is_the_lowest_ranks(tmp_path: Path) -> None:
    states = [{"x": torch.rand(900 + rank, 700)} for rank in range(2)]
    save(states, [dcp.Writer(tmp_path / "c") for _ in states], dcp.SavePlanner)
    there = {"x": torch.zeros(900, 700)}
    load([there], [dcp.Reader(tmp_path / "c")])
    assert torch.equal(there["x"], states[0]["x"])


def test_the_lowest_rank_alone_where_that_is_asked_for(tmp_path: Path) -> None:
    states = [{"large": torch.rand(2000, 700)} for _ in range(2)]
    save(
        states,
        [dcp.Writer(tmp_path / "c") for _ in states],
        lambda: dcp.SavePlanner(dedup_save_to_lowest_rank=True),
    )
    chain = Chain(tmp_path / "c")
    head = chain.head()
    assert head is not None
    assert [len(part.leaves) for part in chain.manifests(head)] == [1, 0]


def test_chunks_are_shared_with_the_save_before(tmp_path: Path) -> None:
    states = [{"a": torch.rand(900, 700), "b": torch.rand(900, 700)} for _ in range(2)]
    for state in states[1:]:
        state.update(states[0])
    new: list[int] = []
    for step in range(3):
        states[0]["b"][0, 0] = step
        save(states, [dcp.Writer(tmp_path / "c", step=step) for _ in states], dcp.SavePlanner)
        head = Chain(tmp_path / "c").head()
        assert head is not None
        new.append(head.record.new_bytes)
    nbytes = states[0]["a"].nbytes
    assert new[0] >= 2 * nbytes
    assert new[1] == new[2] <= nbytes


def test_a_process_that_has_loaded_shares_what_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": torch.rand(900, 700), "b": torch.rand(900, 700)}
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"))
    new = []
    for read in ({}, {"a"}, {"a", "b"}):
        monkeypatch.setattr(saving, "_savings", {})
        monkeypatch.setattr(saving.verified, "_read", {})
        there = {name: torch.zeros(900, 700) for name in read}
        if there:
            torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"))
        torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"))
        head = Chain(tmp_path / "c").head()
        assert head is not None
        new.append(head.record.new_bytes)
    nbytes = state["a"].nbytes
    assert new == [2 * nbytes, nbytes, 0]


def test_a_chain_that_was_made_anew_in_the_same_place(tmp_path: Path) -> None:
    """Nothing of the one before is taken for being there, nor is its lease."""
    state = {"a": torch.rand(900, 700)}
    for _ in range(3):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"))
        there = {"a": torch.zeros(900, 700)}
        torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"))
        assert torch.equal(there["a"], state["a"])


def test_one_snapshot_is_loaded_by_all_ranks(tmp_path: Path) -> None:
    """A job that saves meanwhile does not make the ranks of another load two."""
    torch_dcp.save({"x": numbered((4,))}, storage_writer=dcp.Writer(tmp_path / "c"))

    class Late(dcp.Reader):
        def read_metadata(self, *args: Any, **ignored: Any) -> Any:
            torch_dcp.save({"x": new}, storage_writer=dcp.Writer(tmp_path / "c"))
            return super().read_metadata()

    new = numbered((4,), first=50)
    states = [{"x": torch.zeros(4)} for _ in range(2)]
    load(states, [dcp.Reader(tmp_path / "c"), Late(tmp_path / "c")])
    assert all(torch.equal(state["x"], numbered((4,))) for state in states)

    new = numbered((5,))
    states = [{"x": torch.zeros(4)}, {"x": torch.zeros(5)}]
    with pytest.raises(Conflict, match="became another snapshot while the ranks looked"):
        load(states, [dcp.Reader(tmp_path / "c"), Late(tmp_path / "c")])


# -- who may save ------------------------------------------------------------------------------------------


def test_without_collectives_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(Unsupported, match="use_collectives=False"):
        dcp.Writer(tmp_path / "c").set_up_storage_writer(True, rank=0, use_collectives=False)
    assert not (tmp_path / "c").exists()


def test_a_run_that_writes_here_is_not_disturbed(tmp_path: Path) -> None:
    Chain.create(tmp_path / "c")
    lease = Lease.take(Chain(tmp_path / "c").store)
    with pytest.raises(CheckpointException, match="is being written by this process"):
        torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(tmp_path / "c"))
    lease.release()
    torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(tmp_path / "c"))


def holder(chain: Chain, **other: object) -> None:
    """Somebody else takes the branch, and gives it back."""
    lease = Lease.take(chain.store)
    key = keys.numbered(keys.lease("main"), lease.number)
    held = record.unseal(chain.store.get(key), LeaseRecord, key)
    chain.store.delete(key)
    fields = {name: getattr(held, name) for name in held.__struct_fields__} | other
    chain.store.put(key, [record.seal(LeaseRecord(**fields))])
    lease.release()


def test_a_job_that_was_replaced_does_not_go_on(tmp_path: Path) -> None:
    torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(tmp_path / "c", step=1))
    chain = Chain(tmp_path / "c")
    holder(chain)  # Of this process: as the one that does the asynchronous saves.
    torch_dcp.save({"n": 2}, storage_writer=dcp.Writer(tmp_path / "c", step=2))
    holder(chain, host="elsewhere", pid=4711)
    with pytest.raises(CheckpointException, match="written by process 4711 on elsewhere"):
        torch_dcp.save({"n": 3}, storage_writer=dcp.Writer(tmp_path / "c", step=3))
    assert [one.step for one in chain.snapshots()] == [2, 1]


def test_what_is_not_to_stay_goes(tmp_path: Path) -> None:
    for step in range(4):
        torch_dcp.save({"n": step}, storage_writer=dcp.Writer(tmp_path / "c", step=step, keep="last 2"))
    chain = Chain(tmp_path / "c")
    assert [one.step for one in chain.snapshots()] == [3, 2]
    with pytest.raises(Mismatch):
        dcp.Writer(tmp_path / "c", keep="whatever")


def test_steps_and_references(tmp_path: Path) -> None:
    writer = dcp.Writer(tmp_path / "c")
    for step in (None, "step:10", "20", None):
        torch_dcp.save({"n": step}, storage_writer=writer, checkpoint_id=step)
    chain = Chain(tmp_path / "c")
    assert [one.step for one in chain.snapshots()] == [20, 20, 10, 0]
    with pytest.raises(Mismatch, match="names no step"):
        torch_dcp.save({"n": 1}, storage_writer=writer, checkpoint_id="runs/other")
    there = {"n": 0}
    reader = dcp.Reader(tmp_path / "c", ref="latest")
    torch_dcp.load(there, storage_reader=reader, checkpoint_id="step:10")
    assert there == {"n": "step:10"}
    assert reader.snapshot is not None
    assert reader.snapshot.step == 10
    with pytest.raises(CheckpointException, match="no snapshot at step 11"):
        torch_dcp.load(there, storage_reader=reader, checkpoint_id="step:11")


def test_a_branch_of_its_own(tmp_path: Path) -> None:
    torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(tmp_path / "c"))
    Chain(tmp_path / "c").branches()
    everstep.Chain(tmp_path / "c").branch("try")
    torch_dcp.save({"n": 2}, storage_writer=dcp.Writer(tmp_path / "c", branch="try"))
    there = {"n": 0}
    for branch, n in (("try", 2), ("main", 1)):
        torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c", branch=branch))
        assert there == {"n": n}


def test_a_writer_travels_but_a_store_does_not(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(dcp.Writer(tmp_path / "c", step=3, keep="last 1")))
    torch_dcp.save({"n": 1}, storage_writer=writer)
    assert Chain(tmp_path / "c").find("step:3")
    store = MemoryStore()
    torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(store))
    with pytest.raises(Unsupported, match="cannot be handed to another process"):
        pickle.dumps(dcp.Writer(store))


# -- damage ------------------------------------------------------------------------------------------------


def test_damage_is_found(tmp_path: Path) -> None:
    torch_dcp.save({"x": torch.rand(2000)}, storage_writer=dcp.Writer(tmp_path / "c"))
    (pack,) = [path for path in (tmp_path / "c/packs").rglob("*") if path.is_file()]
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CheckpointException, match="is not the one that was written"):
        torch_dcp.load({"x": torch.zeros(2000)}, storage_reader=dcp.Reader(tmp_path / "c"))
    with pytest.raises(CheckpointException, match="is not an Everstep chain"):
        torch_dcp.load({"x": torch.zeros(2000)}, storage_reader=dcp.Reader(tmp_path / "d"))


# -- other planners ----------------------------------------------------------------------------------------


def test_a_planner_that_makes_something_else_of_values(tmp_path: Path) -> None:
    class Doubling(DefaultSavePlanner):
        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            return super().transform_object(write_item, object * 2)

    state = {"x": numbered((3,)), "n": 4, "l": [1]}
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"), planner=Doubling())
    there = {"x": torch.zeros(3), "n": 0, "l": []}
    torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"))
    assert_same({"x": numbered((3,)) * 2, "n": 8, "l": [1, 1]}, there)


def test_a_planner_that_makes_bytes_of_its_own(tmp_path: Path) -> None:
    class Own(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            if write_item.type == WriteItemType.BYTE_IO:
                return io.BytesIO(pickle.dumps(1))
            return super().resolve_data(write_item)

    with pytest.raises(CheckpointException, match=r"n cannot be stored: what .*Own makes of it"):
        torch_dcp.save({"n": 1}, storage_writer=dcp.Writer(tmp_path / "c"), planner=Own())


def test_a_planner_whose_plan_and_data_differ(tmp_path: Path) -> None:
    class Narrowing(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            data = super().resolve_data(write_item)
            return data.to(self.to) if isinstance(data, torch.Tensor) else data

        to = torch.float64

    planner = Narrowing()
    state = {"x": numbered((3,))}
    with pytest.raises(CheckpointException, match="would lose bits"):
        torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"), planner=planner)
    planner.to = torch.bfloat16  # As the plan's float32 they lose nothing more.
    torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c"), planner=planner)
    there = {"x": torch.zeros(3)}
    torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c"))
    assert torch.equal(there["x"], numbered((3,)))


def test_cached_plans(tmp_path: Path) -> None:
    class Cached(dcp.SavePlanner):
        pass

    state = {"x": numbered((3,)), "n": 1}
    for step in range(3):
        state["n"] = step
        planner = Cached(enable_plan_caching=True)
        torch_dcp.save(state, storage_writer=dcp.Writer(tmp_path / "c", step=step), planner=planner)
    for step in range(3):
        there = {"x": torch.zeros(3), "n": 9}
        torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c", f"step:{step}"))
        assert_same({"x": numbered((3,)), "n": step}, there)


def test_our_planner_with_torchs_files(tmp_path: Path) -> None:
    large = torch.rand(3001, 700)
    states = [{"large": large, "n": 5} for _ in range(2)]
    planners = [dcp.SavePlanner() for _ in states]
    writers = [torch_dcp.FileSystemWriter(tmp_path / "d") for _ in states]
    save(states, writers, lambda: planners.pop())  # type: ignore[arg-type]
    there = {"large": torch.zeros_like(large), "n": 0}
    torch_dcp.load(there, storage_reader=torch_dcp.FileSystemReader(tmp_path / "d"))
    assert torch.equal(there["large"], large)


def test_importing_everstep_imports_no_torch() -> None:
    code = (
        "import sys, everstep; assert 'torch' not in sys.modules; "
        "everstep.dcp.Writer; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
