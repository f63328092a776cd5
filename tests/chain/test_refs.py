"""References: what a text says, and which snapshot it means."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import content, started

from everstep.chain import refs, versions
from everstep.chain.history import Chain
from everstep.chain.refs import Advance, Best, Head, Name, Ref, Step, Tag
from everstep.chain.writer import Facts, Writer
from everstep.errors import Damaged, Mismatch, NotFound
from everstep.format import keys
from everstep.store.base import Buffer, Entry
from everstep.store.memory import MemoryStore
from examples import examples


class Counting(MemoryStore):
    """Counts what it is asked."""

    asked = 0

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        self.asked += 1
        return super().get(key, start, size_bytes)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        self.asked += 1
        return super().list(prefix, limit)


METRICS = {
    10: {"loss": 3.0, "acc": 0.25},
    20: {"loss": "nan", "acc": 0.5},
    30: {"loss": 1.0, "acc": 0.75, "val:loss": 2.0},
    40: {"loss": "-inf", "acc": "nan"},
    50: {"loss": "inf", "acc": 0.75},
    60: {"acc": 0.125, "never": "nan"},
}


def taken(writer: Writer, steps: Sequence[int], seed: int = 1) -> None:
    small = content(seed)
    for step in steps:
        small = small.changed(random.Random(step), "count")
        writer.write(small.captured(), Facts(step=step, metrics=dict(METRICS.get(step, {}))))


@pytest.fixture
def chain() -> Chain:
    """Steps 10 to 60 on main, 25 and 26 on `try` from 20, tags `good` (30) and `cafe` (10)."""
    writer = started(Counting())
    taken(writer, range(10, 70, 10))
    other = Writer(writer.chain, writer.lease, branch="try", parent=writer.chain.find("step:20").id)
    taken(other, [25, 26])
    versions.tag(writer.chain, "good", "step:30")
    versions.tag(writer.chain, "cafe", "step:10")
    return writer.chain


# -- what a text says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("head", Ref(Head("main"))),
        ("latest~", Ref(Head("main"), 1)),
        ("head~0", Ref(Head("main"), 0)),
        ("head~2~~", Ref(Head("main"), 4)),
        ("@{3}", Ref(Advance("main", 3))),
        ("try@{0}~2", Ref(Advance("try", 0), 2)),
        ("step:500", Ref(Step("main", 500))),
        ("try@step:500~", Ref(Step("try", 500), 1)),
        ("best:val_loss", Ref(Best("main", "val_loss", False))),
        ("best:acc:max", Ref(Best("main", "acc", True))),
        ("best:acc:min", Ref(Best("main", "acc", False))),
        ("best:val:loss", Ref(Best("main", "val:loss", False))),
        ("best:val/loss:max~3", Ref(Best("main", "val/loss", True), 3)),
        ("try@best:a b", Ref(Best("try", "a b", False))),
        ("tag:v1.0", Ref(Tag("v1.0"))),
        ("v1.0", Ref(Name("v1.0"))),
        ("try@head", Ref(Head("try"))),
        ("try@other", Ref(Name("try@other"))),
        ("@head", Ref(Name("@head"))),
        ("best:", Ref(Name("best:"))),
        ("tag:", Ref(Name("tag:"))),
        ("~1", Ref(Name("~1"))),
        ("", Ref(Name(""))),
    ],
)
def test_what_a_reference_says(text: str, said: Ref) -> None:
    assert refs.parse(text, "main") == said


@given(st.text(alphabet="ab1~@{}:/.stephdmxinlog", max_size=24) | st.text(max_size=12))
@settings(derandomize=True, deadline=None, max_examples=examples(400))
def test_any_text_says_something_and_parents_add_up(text: str) -> None:
    said = refs.parse(text, "main")
    assert said.back >= 0
    if text:
        assert refs.parse(text + "~2~", "main") == Ref(said.base, said.back + 3)


@pytest.mark.parametrize(
    ("text", "place", "ref"),
    [
        ("runs/gpt@try@step:5", "runs/gpt", "try@step:5"),
        ("runs/gpt@main@{1}", "runs/gpt", "main@{1}"),
        ("runs/gpt@best:val/loss", "runs/gpt", "best:val/loss"),
        ("runs/gpt@try@best:val/loss:max", "runs/gpt", "try@best:val/loss:max"),
        ("s3://me@host/bucket/gpt@{2}", "s3://me@host/bucket/gpt", "{2}"),
        ("gpt@head", "gpt", "head"),
    ],
)
def test_places_and_references_of_other_branches(text: str, place: str, ref: str) -> None:
    assert refs.split(text) == (place, ref)


# -- which snapshot it means -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "step"),
    [
        ("head", 60), ("latest", 60), ("main", 60), ("try", 26), ("main@head", 60), ("try@latest", 26),
        ("try@step:25", 25), ("try@head~", 25), ("try@head~2", 20), ("try@head~3", 10), ("try~2", 20),
        ("@{0}", 60), ("@{5}", 10), ("main@{1}", 50), ("try@{1}", 25), ("main@{1}~2", 30),
        ("good", 30), ("tag:good", 30), ("tag:good~2", 10), ("cafe", 10),
        ("best:loss", 40), ("best:loss:min", 40), ("best:loss:max", 50), ("best:acc:max", 50),
        ("best:acc", 60), ("best:val:loss", 30), ("best:acc:max~", 40), ("main@best:loss", 40),
    ],
)  # fmt: skip
def test_references(chain: Chain, ref: str, step: int) -> None:
    assert chain.find(ref).step == step


def test_of_equal_ones_the_newest_is_best(chain: Chain) -> None:
    assert METRICS[30]["acc"] == METRICS[50]["acc"] == 0.75
    assert chain.find("best:acc:max").step == 50


def test_the_branch_that_is_meant(chain: Chain) -> None:
    assert chain.find("head", "try").step == 26
    assert chain.find("@{1}", "try").step == 25
    assert chain.find("main@step:10", "try").step == 10
    with pytest.raises(NotFound, match="branch 'try' of memory://memory has the metric 'loss'"):
        chain.find("best:loss", "try")


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("best:speed", "has the metric 'speed'; they have acc, loss, never, val:loss"),
        ("best:never", "the metric 'never' is nan in all snapshots of branch 'main'"),
        ("@{6}", "knows of 6 advances of branch 'main'"),
        ("none@{0}", "knows of 0 advances of branch 'none'"),
        ("none@head", "no snapshot on branch 'none' yet; it has main at step 60, try at step 26, tag cafe"),
        ("none@step:10", "no snapshot at step 10"),
        ("tag:none", "has no tag 'none'; it has main at step 60"),
        ("tag:main", "has no tag 'main'"),
        ("main@good", "has no snapshot 'main@good'"),
        ("try@head~9", "its parent is not kept"),
    ],
)
def test_what_is_not_there(chain: Chain, ref: str, said: str) -> None:
    with pytest.raises(NotFound) as caught:
        chain.find(ref)
    assert said in str(caught.value)
    assert caught.value.next.startswith(f"everstep -r {chain.url} ")


def test_a_name_of_a_branch_and_a_tag_lists_both(chain: Chain) -> None:
    """They cannot be made one after the other; at the same moment they can."""
    record = versions._tag_record("try", 1, chain.find("good").id)
    assert versions._created(chain, record)
    tagged, head = chain.find("step:30"), chain.find("try@head")
    with pytest.raises(Mismatch) as caught:
        chain.find("try")
    assert f"a branch, whose head is {head.short}, and a tag of {tagged.short}" in str(caught.value)
    assert caught.value.next == "try@head, or tag:try"
    assert chain.find("tag:try") == tagged
    assert chain.find("try@{0}") == head


def test_a_name_goes_before_the_beginning_of_an_id(chain: Chain) -> None:
    chain.store.put(keys.snapshot("cafe" + "0" * 60), [b"x"])
    assert chain.find("cafe").step == 10
    versions.untag(chain, "cafe")
    with pytest.raises(Damaged):
        chain.find("cafe")


def test_a_tag_of_what_is_gone_says_so(chain: Chain) -> None:
    chain.store.delete(keys.snapshot(chain.find("good").id))
    for ref in ("good", "tag:good~1"):
        with pytest.raises(NotFound, match=r"tag 'good' names snapshot \w+, which is not there") as caught:
            chain.find(ref)
        assert caught.value.next.endswith("tag -d good")


def test_damaged_heads_are_passed_over_where_they_are_not_meant(chain: Chain) -> None:
    key = keys.numbered(keys.head("main"), 5)
    chain.store.delete(key)
    chain.store.put(key, [b"rot"])
    assert chain.find("step:40").step == 40
    assert chain.find("best:acc:max").step == 30
    with pytest.raises(Damaged):
        chain.find("@{1}")
    assert chain.find("@{2}").step == 40


@pytest.mark.parametrize(
    ("ref", "most"),
    [("head", 3), ("main", 7), ("good", 5), ("tag:good", 3), ("step:60", 3), ("step:10", 8), ("@{5}", 3)],
)
def test_few_reads(chain: Chain, ref: str, most: int) -> None:
    """However many snapshots there are, but for those that have to be looked through."""
    store = chain.store
    assert isinstance(store, Counting)
    before = store.asked
    chain.find(ref)
    assert store.asked - before <= most


@given(st.text(max_size=12) | st.from_regex(r"\A[a-z:@{}~0-9]{1,16}\Z"))
@settings(derandomize=True, deadline=None, max_examples=examples(200))
def test_any_text_is_a_snapshot_or_one_of_our_errors(text: str) -> None:
    writer = started(MemoryStore())
    taken(writer, [1, 2])
    with suppress(NotFound, Mismatch):
        assert writer.chain.find(text).step in (1, 2)
