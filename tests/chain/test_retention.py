from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.chain.retention import Best, Every, Keep, Last, Listed, Rule, Spans, staying
from everstep.errors import Mismatch
from examples import examples

NOON = datetime(2024, 5, 6, 12, 0, tzinfo=timezone.utc)  # A Monday.
NOW = NOON.timestamp()


def listed(
    number: int, step: int = 0, hours: float = 0.0, parents: tuple[str, ...] = (), **metrics: object
) -> Listed:
    """Snapshot `number`, taken so many hours after noon of a Monday."""
    taken = NOON + timedelta(hours=hours)
    return Listed(
        f"{number:064x}",
        step,
        taken.isoformat(),
        taken.timestamp(),
        metrics,
        parents,  # type: ignore[arg-type]
    )


def kept(line: list[Listed], keep: str, **more: object) -> list[int]:
    """The numbers of what stays of one branch, in the order of the line."""
    arguments = {"tags": {}, "now": NOW, **more}
    found = staying({"main": line}, Keep.parse(keep), **arguments)  # type: ignore[arg-type]
    return [int(one.id, 16) for one in line if one.id in found]


def line_of(count: int, hours: float = 1.0, steps: int = 10) -> list[Listed]:
    """Newest first; the oldest is number 0, at noon and step 0."""
    return [listed(number, number * steps, number * hours) for number in reversed(range(count))]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("last 3", (Last(3),)),
        ("  last   3 ", (Last(3),)),
        ("last 3, hourly 24", (Last(3), Spans("hourly", 24))),
        ("daily 7,weekly 4", (Spans("daily", 7), Spans("weekly", 4))),
        ("every 1000 steps", (Every(1000),)),
        ("every 1 step", (Every(1),)),
        ("best val_loss 2", (Best("val_loss", False, 2),)),
        ("best val/loss.x", (Best("val/loss.x", False, 1),)),
        ("best acc:max 1", (Best("acc", True, 1),)),
        ("best loss:min 3", (Best("loss", False, 3),)),
        ("tags", ()),
        ("last 1, tags", (Last(1),)),
    ],
)
def test_what_to_keep(text: str, rules: tuple[Rule, ...]) -> None:
    keep = Keep.parse(text)
    assert (keep.rules, keep.everything) == (rules, False)
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize("text", ["all", " all ", "all, tags"])
def test_all(text: str) -> None:
    assert Keep.parse(text) == Keep(everything=True)
    assert kept(line_of(5), text) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "text",
    [
        "", "last", "last 0", "last -1", "3", "last 3 days", "none", "LAST 3", "last 03", "last 3,", ",",
        "hourly", "hourly 0", "monthly 3", "every 10", "every 0 steps", "every 10 minutes", "best",
        "best :max", "best a b", "best a 0", "best a:avg 1", "last 3; daily 2", "all, last 3",
        "tag", "best a,b 1",
        "last 1e3",
    ],
)  # fmt: skip
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(Mismatch, match="is not understood") as caught:
        Keep.parse(text)
    assert caught.value.next
    assert "nothing was touched" in str(caught.value)


def test_the_part_that_is_not_understood_is_named() -> None:
    with pytest.raises(Mismatch, match=r"\('dayly 7'\)"):
        Keep.parse("last 3, dayly 7")


def test_last() -> None:
    assert kept(line_of(5), "last 2") == [4, 3]
    assert kept(line_of(2), "last 9") == [1, 0]


def test_hours_that_have_none_do_not_count() -> None:
    line = [listed(n, hours=h) for n, h in [(5, 30.9), (4, 30.1), (3, 5.5), (2, 5.2), (1, 1.0), (0, 0.0)]]
    assert kept(line, "hourly 1") == [5]
    assert kept(line, "hourly 2") == [5, 3]
    assert kept(line, "hourly 3") == [5, 3, 1]
    assert kept(line, "hourly 24") == [5, 3, 1, 0]


def test_days_and_weeks_of_utc() -> None:
    line = [listed(n, hours=h) for n, h in [(4, 24 * 8), (3, 24 * 7), (2, 12.5), (1, 11.9), (0, 0)]]
    assert kept(line, "daily 3") == [4, 3, 2]
    assert kept(line, "daily 9") == [4, 3, 2, 1]
    assert kept(line, "weekly 9") == [4, 2]
    elsewhere = Listed("f" * 64, 0, "2024-05-07T02:58:00+03:00")  # Two minutes before midnight.
    assert kept([*line, elsewhere], "daily 9") == [4, 3, 2, int("f" * 64, 16)]


def test_what_has_no_time_stays_where_time_decides() -> None:
    line = [listed(2, hours=2), Listed(f"{1:064x}", 1, "yesterday"), listed(0)]
    assert kept(line, "hourly 1") == [2, 1]
    assert kept(line, "last 1") == [2]


def test_the_first_at_or_after_each_multiple() -> None:
    line = [
        listed(n, step)
        for n, step in [(6, 2900), (5, 2100), (4, 2010), (3, 1000), (2, 1000), (1, 999), (0, 0)]
    ]
    assert kept(line, "every 1000 steps") == [6, 4, 3]


def test_the_best_by_a_metric() -> None:
    values: list[object] = [3.0, "nan", 1.0, 2.0, 1.0, "-inf", "inf", "junk"]
    line = [listed(100), *(listed(n, loss=value) for n, value in enumerate(values)), listed(50, other=0.0)]
    assert kept(line, "best loss 1") == [100, 5]
    assert kept(line, "best loss 2") == [100, 2, 5]
    assert kept(line, "best loss:max 2") == [100, 0, 6]
    assert kept(line, "best missing 2") == [100]


def test_what_stays_whatever_the_policy() -> None:
    line = line_of(6)
    tag = {"good": line[3].id, "elsewhere": "e" * 64}
    found = staying({"main": line}, Keep.parse("last 1"), tags=tag, now=NOW + 5 * 3600, window_s=3600.5)
    assert {int(id, 16): why for id, why in found.items()} == {
        5: ("head of main", "younger than 1.00014 h", "last 1"),
        4: ("younger than 1.00014 h",),
        2: ("tag good",),
        int("e" * 64, 16): ("tag elsewhere",),
    }


def test_branch_points_stay_as_long_as_what_follows_on_them() -> None:
    main = line_of(6)
    parent = main[3].id
    child, later = listed(11, 30, parents=(parent,)), listed(12, 40, parents=(f"{11:064x}",))
    lines = {"main": main, "try": [later, child]}
    found = staying(lines, Keep.parse("last 2"), tags={}, now=NOW)
    assert found[parent] == ("start of try",)
    assert staying(lines, Keep.parse("last 1"), tags={}, now=NOW).keys() == {main[0].id, later.id}
    # A branch that was made without a snapshot of its own lists the very same one.
    named = {"main": main, "try": [main[2]]}
    assert staying(named, Keep.parse("last 1"), tags={}, now=NOW)[main[2].id][0] == "head of try"
    grown = {"main": main, "try": [listed(20, 99), main[2]]}
    assert "start of try" in staying(grown, Keep.parse("last 1"), tags={}, now=NOW)[main[2].id]


def test_other_branches_are_left_alone() -> None:
    lines = {"main": line_of(4), "try": [listed(11), listed(10)]}
    found = staying(lines, Keep.parse("last 1"), tags={}, now=NOW, branches=["try"])
    assert len(found) == 4 + 1
    assert found[lines["main"][2].id] == ("on branch main",)


# -- properties ------------------------------------------------------------------------------------------

RULES = st.one_of(
    st.builds(Last, st.integers(1, 4)),
    st.builds(Spans, st.sampled_from(["hourly", "daily", "weekly"]), st.integers(1, 4)),
    st.builds(Every, st.integers(1, 50)),
    st.builds(Best, st.sampled_from(["loss", "acc"]), st.booleans(), st.integers(1, 3)),
)
POLICIES = st.builds(lambda rules: Keep(tuple(rules)), st.lists(RULES, max_size=4))
TIMES = st.one_of(
    st.datetimes(datetime(2024, 1, 1), datetime(2024, 2, 20)).map(datetime.isoformat),
    st.datetimes(timezones=st.sampled_from([timezone.utc, timezone(timedelta(hours=5, minutes=30))])).map(
        datetime.isoformat
    ),
    st.sampled_from(["", "now", "2024-13-01"]),
)
VALUES = st.one_of(st.floats(allow_nan=False), st.sampled_from(["nan", "inf", "-inf", "?"]))


@st.composite
def chains(draw: st.DrawFn) -> tuple[dict[str, list[Listed]], dict[str, str]]:
    """Branches that share snapshots and follow on those of others, and tags."""
    ids = [f"{number:064x}" for number in range(draw(st.integers(1, 12)))]
    every = [
        Listed(
            id,
            draw(st.integers(0, 200)),
            draw(TIMES),
            draw(st.floats(NOW - 10_000, NOW)),
            draw(st.dictionaries(st.sampled_from(["loss", "acc"]), VALUES)),
            tuple(draw(st.lists(st.sampled_from(ids), max_size=1))),
        )
        for id in ids
    ]
    lines = {
        branch: draw(st.lists(st.sampled_from(every), min_size=1, unique_by=lambda one: one.id))
        for branch in draw(st.sets(st.sampled_from(["main", "try", "other"]), min_size=1))
    }
    tags = draw(st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(ids)))
    return lines, tags


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(chain=chains(), keep=POLICIES, window_s=st.sampled_from([0.0, 3600.0]))
def test_pruning_twice_changes_nothing_and_what_must_stay_does(
    chain: tuple[dict[str, list[Listed]], dict[str, str]], keep: Keep, window_s: float
) -> None:
    lines, tags = chain
    found = staying(lines, keep, tags=tags, now=NOW, window_s=window_s)
    assert all(found.values())
    for branch, line in lines.items():
        assert f"head of {branch}" in found[line[0].id]
        young = {one.id for one in line if window_s and NOW - one.listed_at < window_s}
        assert young <= found.keys()
        for rule in keep.rules:
            for one in rule.picks(line):
                assert str(rule) in found[one.id]
    assert set(tags.values()) <= found.keys()
    left = {branch: [one for one in line if one.id in found] for branch, line in lines.items()}
    assert staying(left, keep, tags=tags, now=NOW, window_s=window_s) == found


@settings(max_examples=examples(200), deadline=None, derandomize=True)
@given(chain=chains(), keep=POLICIES)
def test_more_rules_never_keep_less(
    chain: tuple[dict[str, list[Listed]], dict[str, str]], keep: Keep
) -> None:
    lines, tags = chain
    fewer = Keep(keep.rules[:-1])
    assert staying(lines, fewer, tags=tags, now=NOW).keys() <= staying(lines, keep, tags=tags, now=NOW).keys()
