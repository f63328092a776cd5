"""Exact resume: a training that is cut anywhere ends with the bits of the same training left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everstep.chain.history import Chain
from everstep.events import Parted, Repeated, Resumed
from training import Noisy, Training, end_of, in_a_process

pytestmark = pytest.mark.slow

UNTIL = 17

VARIANTS = {
    "plain": {},
    "amp": {"amp": True},
    "accumulating": {"accumulate": 3},
    "workers": pytest.param({"workers": 2}, marks=pytest.mark.process),
    "everything": pytest.param({"workers": 2, "accumulate": 2, "amp": True}, marks=pytest.mark.process),
}


@pytest.mark.parametrize("variant", list(VARIANTS.values()), ids=list(VARIANTS))
def test_cut_twice_in_the_middle_of_epochs(tmp_path: Path, variant: dict[str, object]) -> None:
    undisturbed = Training(**variant)
    undisturbed.train(tmp_path / "a", UNTIL).close()

    Training(**variant).train(tmp_path / "b", 4).close()
    second = Training(**variant)
    torch.manual_seed(999)  # What the process was before must not matter.
    second.train(tmp_path / "b", 13).close()
    third = Training(**variant)
    third.train(tmp_path / "b", UNTIL).close()

    assert end_of(tmp_path / "b") == end_of(tmp_path / "a")
    assert third.history == undisturbed.history
    for tensor, other in zip(third.bits().values(), undisturbed.bits().values(), strict=True):
        assert torch.equal(tensor, other)
    resumed = [event for event in third.events if isinstance(event, Resumed)]
    assert [event.label for event in resumed] == ["exact"]


@pytest.mark.slow
def test_every_cut_of_two_epochs(tmp_path: Path) -> None:
    """Ten batches an epoch: cuts in the middle, after the last batch, and at the start of the next."""
    Training().train(tmp_path / "whole", 20).close()
    expected = end_of(tmp_path / "whole")
    for cut in range(1, 20):
        Training().train(tmp_path / str(cut), cut).close()
        Training().train(tmp_path / str(cut), 20).close()
        assert end_of(tmp_path / str(cut)) == expected, f"cut after step {cut}"


def _snapshot_at_9_and_train_to_11(repo: Path) -> None:
    training = Training()
    run = training.train(repo, 9, every=None)
    assert run.take().durable()
    while run.step < 11:
        training.epoch_of(run, 11)


@pytest.mark.process
def test_what_a_dead_process_trained_is_repeated_and_proven(tmp_path: Path) -> None:
    Training().train(tmp_path / "a", UNTIL).close()
    assert in_a_process(lambda: _snapshot_at_9_and_train_to_11(tmp_path / "b")) == 0

    second = Training()
    second.train(tmp_path / "b", UNTIL).close()

    assert Repeated(10, 11) in second.events
    assert str(Repeated(10, 11)) == "steps 10-11 repeated bit for bit"
    assert end_of(tmp_path / "b") == end_of(tmp_path / "a")


@pytest.mark.process
def test_steps_that_come_out_otherwise_are_told(tmp_path: Path) -> None:
    assert in_a_process(lambda: _snapshot_at_9_and_train_to_11(tmp_path / "b")) == 0
    second = Training()
    run = second.open(tmp_path / "b")
    with torch.no_grad():
        second.model[0].weight.mul_(1.5)
    second.epoch_of(run, 13)
    run.close()
    parted = [event for event in second.events if isinstance(event, Parted)]
    assert [event.step for event in parted] == [10]
    assert "loss" in str(parted[0])


def test_going_back_to_an_older_step_is_compared_with_the_log(tmp_path: Path) -> None:
    Training().train(tmp_path / "a", 12).close()
    before = end_of(tmp_path / "a")
    again = Training()
    again.train(tmp_path / "a", 12, resume="step:6").close()
    assert Repeated(7, 12) in again.events
    assert end_of(tmp_path / "a") == before
    assert [one.step for one in Chain(tmp_path / "a").snapshots()] == [12, 9, 12, 9, 6, 3]


def test_accumulated_gradients_are_state(tmp_path: Path) -> None:
    """A tick for every batch, an optimizer step for every third: snapshots fall between the two."""

    def train(repo: Path, until: int) -> Training:
        training = Training()
        run = training.open(repo, every="1 steps")
        while run.step < until:
            for batch in run.steps(until=until):
                loss = training.backward(batch)
                if (run.step + 1) % 3 == 0:
                    training.update(loss, run.step + 1)
                run.log(loss=loss)
        run.close()
        return training

    train(tmp_path / "whole", 13)
    for cut in (4, 5, 6):
        train(tmp_path / str(cut), cut)
        resumed = train(tmp_path / str(cut), 13)
        assert end_of(tmp_path / str(cut)) == end_of(tmp_path / "whole"), f"cut after batch {cut}"
        assert resumed.losses


def test_gradients_are_not_stored_where_they_are_done_with(tmp_path: Path) -> None:
    run = Training().train(tmp_path, 4, every=None)
    run.take().durable()
    assert not [leaf for leaf in run.chain.manifest(run.chain.head()).by_name if "gradients" in leaf]
    run.close()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_the_run_does_not_change_the_training(tmp_path: Path, workers: int) -> None:
    """The same script without Everstep has the same losses, bit for bit."""

    class Plain(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if workers == 0:
                return super().__getitem__(index)
            return torch.full((6,), index / 40), torch.tensor(float(index % 3))

    def build() -> Training:
        training = Training()
        training.loader = torch.utils.data.DataLoader(Plain(), 4, shuffle=True, num_workers=workers)
        return training

    plain = build()
    step = 0
    for _ in range(2):
        for batch in plain.loader:
            step += 1
            plain.update(plain.backward(batch), step)
    kept = build()
    kept.train(tmp_path, 20, every="2 steps").close()
    assert kept.losses == plain.losses


def test_a_snapshot_before_the_first_step_after_a_resume(tmp_path: Path) -> None:
    """The generators that wait for the first batch are the ones that count, not what was drawn since."""
    Training().train(tmp_path / "a", UNTIL).close()
    Training().train(tmp_path / "b", 5).close()
    run = Training().open(tmp_path / "b")
    torch.rand(100)
    assert run.take().durable()
    run.close()
    Training().train(tmp_path / "b", UNTIL).close()
    assert end_of(tmp_path / "b") == end_of(tmp_path / "a")
