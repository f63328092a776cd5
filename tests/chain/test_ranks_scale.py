"""The commit of thousands of ranks, simulated (`bench/ranks.py`): what it costs, and what it survives."""

from __future__ import annotations

import pytest
from bench.ranks import PAGE, Job, Setting, sizes

from everstep.format import manifest, record

pytestmark = pytest.mark.slow

RANKS = 4096


def test_4096_ranks_and_one_in_a_hundred_dies() -> None:
    job = Job(Setting(RANKS, apart_s=0.5))
    calm = job.take(1)
    assert calm.committed
    # A rank asks for three things: its pack, its manifest, its part record.
    assert calm.of_a_rank == 3
    # Rank 0 reads each part record once, and else asks as often as there are pages to look at.
    assert calm.requests["get parts"] == RANKS
    assert calm.of_rank_0 <= RANKS + 0.1 * RANKS
    assert calm.requests["delete parts"] == -(-RANKS // PAGE)
    assert sum(calm.requests.values()) <= 4.1 * RANKS
    assert calm.late_s < 0.06 * calm.last_part_s
    assert job.head().step == 1  # type: ignore[union-attr]

    job.setting.dying = 0.01
    lost = job.take(2)
    assert (lost.committed, lost.dead) == (False, 41)
    assert "41 had not stored their part" in lost.why
    assert job.head().step == 1, "the old one"  # type: ignore[union-attr]

    job.setting.dying = 0.0
    job.start()
    again = job.take(3)
    assert again.committed
    assert (again.of_a_rank, again.requests["get parts"]) == (3, RANKS)
    head = job.head()
    assert head is not None
    assert (head.step, len(head.record.manifests)) == (3, RANKS)


def test_a_store_that_is_asked_too_often() -> None:
    """All ask in the same second, and the store answers a few of them."""
    job = Job(Setting(1000, apart_s=0.0, store_s=0.1, per_second=150))
    took = job.take(1)
    assert took.committed
    assert took.of_a_rank == 3
    assert took.refused > 1000
    assert job.head().step == 1  # type: ignore[union-attr]


def test_slow_ranks_are_waited_for_and_not_for_ever() -> None:
    job = Job(Setting(200, slow=0.02, slow_times=20.0))
    assert job.take(1).committed
    job.setting.deadline_s = 60.0
    late = job.take(2)
    assert not late.committed
    assert "of 200 ranks" in late.why
    assert job.head().step == 1  # type: ignore[union-attr]


def test_rank_0_dies_at_any_request() -> None:
    """The head is the old one or the new; whoever follows it goes on."""
    at, done = 0, set()
    while True:
        job = Job(Setting(8, seed=at, slow=0.0))
        assert job.take(1).committed
        took = job.take(2, dying={0: at})
        head = job.head()
        assert head is not None
        assert head.step in ((2,) if took.committed else (1, 2))
        done.add(head.step)
        if not took.dead:
            break
        job.start()
        assert job.take(3).committed
        assert job.head().step == 3  # type: ignore[union-attr]
        at += 1
    assert done == {1, 2}
    assert at > 15


def test_a_snapshot_of_as_many_ranks_as_there_can_be_fits_its_record() -> None:
    assert sizes(manifest.MAX_RANKS).record < record.MAX_RECORD_BYTES
