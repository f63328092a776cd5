"""The results as tables and plots, for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.bars import BARS, Bar, Results
from bench.measure import Summary
from bench.systems import OURS, TORCH_SAVE

TITLES = {
    "gpt2": "GPT-2 and AdamW in fp32",
    "third_gpt2": "A third of it",
    "lora": "GPT-2 with LoRA, 1 % trained",
    "many_tensors": "4,000 small tensors",
}
Row = list[str]


def load(directory: Path) -> Results:
    """The results that are there, by scenario."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def write(directory: Path) -> str:
    """Write README.md and the plots beside the results; returns the table of the bars."""
    results = load(directory)
    bars = bar_table(results)
    plots = _plots(results, directory)
    parts = ["# Measured", _origin(results), "## Bars", bars, *plots]
    if "overlap" in results:
        parts += _overlap(results["overlap"])
    for name, section in SECTIONS.items():
        if name in results:
            parts += section(results[name])
    (directory / "README.md").write_text("\n\n".join(parts) + "\n")
    return bars


def bar_table(results: Results) -> str:
    rows = [_bar_row(bar, results) for bar in BARS]
    return table(["bar", "bound", "measured", "min – max", "met"], rows)


def _bar_row(bar: Bar, results: Results) -> Row:
    figure, spread = bar.figure(results), bar.spread(results)
    bound = f"{'≤' if bar.at == '<=' else '≥'} {number(bar.bound)}"
    if figure is None:
        return [bar.name, bound, bar.reason(results), "", "—"]
    shown = "" if spread is None else f"{number(spread[0])} – {number(spread[1])}"
    return [bar.name, bound, number(figure), shown, "yes" if bar.is_met(figure) else "**no**"]


def table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits that count."""
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def spread(one: Summary, scale: float = 1.0) -> str:
    """Median and, in brackets, the lowest and the highest."""
    low, high = number(one["min"] * scale), number(one["max"] * scale)
    return f"{number(one['median'] * scale)} ({low} – {high})"


def _origin(results: Results) -> str:
    """On which machine, and whether all figures are of one run."""
    runs = {name: one["run"] for name, one in results.items() if "run" in one and name not in ON_CUDA}
    machine: dict[str, object] = next((one["machine"] for name, one in results.items() if name in runs), {})
    facts = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in machine.items())
    which = (
        "All figures are of one run."
        if len(set(runs.values())) < 2
        else "These figures are of several runs: " + ", ".join(f"{a}: {b}" for a, b in runs.items()) + "."
    )
    if any(one.get("size") == "small" for one in results.values()):
        which += " **At the small size, which shows that all works: the figures mean nothing.**"
    return (
        f"Written by `python -m bench`; do not edit. {facts}. {which} Figures are medians, with the lowest "
        "and the highest of the repetitions in brackets; ratios are taken within each repetition, of what "
        "ran next to each other."
    )


# -- sections ----------------------------------------------------------------------------------------------


def _floors(floors: dict[str, Any]) -> list[str]:
    rows = [
        [name.replace("_", " "), spread(one["GB_per_s"]), spread(one["cpu_s_per_GB"])]
        for name, one in floors.items()
    ]
    return ["The floors of the hardware, in the same repetitions:", table(["", "GB/s", "CPU-s per GB"], rows)]


def _overlap(overlap: dict[str, Any]) -> list[str]:
    parts = []
    for state, title in TITLES.items():
        if state in overlap:
            parts += [
                f"## {title}: {number(overlap[state]['state_bytes'] / 1e9)} GB",
                *_state(overlap[state]),
            ]
    return parts


def _state(found: dict[str, Any]) -> list[str]:
    head = [
        "",
        "blocked, ms",
        "step-seconds lost, s",
        "durable, busy, s",
        "durable, idle, s",
        "CPU-s per GB, busy",
        "CPU-s per GB, idle",
        "first save, s",
        "extra memory, GB",
    ]
    best = found.get("DCP best")
    rows = [
        [
            f"{name} (DCP best)" if name == best else name,
            spread(one["busy"]["blocked_s"], 1e3),
            spread(one["busy"]["lost_s"]),
            spread(one["busy"]["durable_s"]),
            spread(one["idle"]["durable_s"]),
            spread(one["cpu_s_per_GB"]["busy"]),
            spread(one["cpu_s_per_GB"]["idle"]),
            number(one["first"]["durable_s"]),
            number(one["extra_memory_bytes"] / 1e9),
        ]
        for name, one in found["systems"].items()
    ]
    rows += [[name, reason, *[""] * (len(head) - 2)] for name, reason in found["not measured"].items()]
    step = found["systems"][OURS]["busy"]["step_s"]
    return [
        f"Undisturbed steps of {spread(step)} s on {found['threads']} threads. *Blocked* is all time inside "
        "the save and inside the wait before the optimizer's step; *lost* is what the steps until durable "
        "took longer than undisturbed ones, blocked time included.",
        table(head, rows),
        *_floors(found["floors"]),
    ]


def _restore(found: dict[str, Any]) -> list[str]:
    rows = [[name, spread(one)] for name, one in found["times_s"].items()]
    arena = found["arena"]
    if "times_s" in arena:
        rows += [[f"{OURS}, from the arena, {name}", spread(one)] for name, one in arena["times_s"].items()]
    else:
        rows += [[f"{OURS}, from the arena", str(arena["not measured"])]]
    return [
        f"## Restore of {number(found['state_bytes'] / 1e9)} GB",
        "*Returned*: the call has returned; *ready*: every byte is there to be trained on. Everstep verifies "
        "every byte, the others none.",
        table(["", "s"], rows),
        "Two thirds of what is restored goes to memory that was never touched (the optimizer's state), which "
        "the system takes its time to hand out. The floors of reading into such memory and into the model's, "
        f"of what a cold restore took: {spread(found['read floor with new memory / cold, as it returns'])}.",
        *_floors(found["floors"]),
    ]


def _changes(found: dict[str, Any]) -> dict[str, Any]:
    """The kinds of change that were stored, among the facts of the run."""
    return {name: one for name, one in found.items() if isinstance(one, dict) and "systems" in one}


def _storage(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            change,
            system,
            number(one["state_bytes"] / 1e6),
            number(sizes["first_bytes"] / 1e6),
            spread(sizes["further_bytes"], 1e-6),
            number(sizes["further / full"]["median"] * 100),
        ]
        for change, one in _changes(found).items()
        for system, sizes in one["systems"].items()
    ]
    absent: dict[str, str] = {}
    for one in _changes(found).values():
        absent |= one["not measured"]
    rows += [["", name, why, "", "", ""] for name, why in absent.items()]
    head = ["", "", "state, MB", "first, MB", "each further, MB", "% of full"]
    return ["## Bytes stored for one more snapshot", table(head, rows)]


def _every_step(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            str(one["threads"]),
            spread(one["step_ms"]),
            spread(one["step_with_snapshots_ms"]),
            f"{number(one['snapshots_taken']['median'])} of {one['steps']}",
            spread(one["throughput with / without"]),
        ]
        for name, one in found.items()
        if isinstance(one, dict) and "threads" in one
    ]
    head = ["", "threads", "step, ms", "with snapshots, ms", "taken", "throughput, of without"]
    return ["## A small model, snapshotted at every step", table(head, rows)]


def _waves(found: dict[str, Any]) -> list[str]:
    title = "## A state larger than `max_arena_bytes`"
    if "not measured" in found:
        return [title, str(found["not measured"])]
    gigabytes = {
        name: number(found[f"{name}_bytes"] / 1e9) for name in ("state", "max_arena", "peak", "extra")
    }
    durable = ", ".join(number(one) for one in found["durable_s"])
    return [
        title,
        f"A state of {gigabytes['state']} GB with `max_arena_bytes` of {gigabytes['max_arena']} GB: at most "
        f"{gigabytes['peak']} GB in use, {gigabytes['extra']} GB more than without snapshots; durable after "
        f"{durable} s.",
    ]


def _niceness(found: dict[str, Any]) -> list[str]:
    facts = ("durable, busy, s", "durable, idle, s", "lost, s", "blocked, s")
    rows = [
        [f"{nice} (chosen)" if int(nice) == found["chosen"] else nice, *(spread(one[fact]) for fact in facts)]
        for nice, one in found["niceness"].items()
    ]
    return [
        "## The keeper's niceness",
        f"A state of {number(found['state_bytes'] / 1e9)} GB; `lost` is what the training lost until its "
        "snapshot was durable.",
        table(["niceness", *facts], rows),
    ]


def _objects(found: dict[str, Any]) -> list[str]:
    return _packs(found, "a bucket", "Ceph on the same machine.")


def _hdfs(found: dict[str, Any]) -> list[str]:
    return _packs(found, "HDFS", "a NameNode and three DataNodes on the same machine, three copies.")


def _packs(found: dict[str, Any], where: str, what: str) -> list[str]:
    if "not measured" in found:
        return []
    rows = [
        [name, spread(rate), spread(found["cpu_s_per_GiB"][name])]
        for name, rate in found["GiB_per_s"].items()
    ]
    return [
        f"## Packs to and from {where}",
        f"{found['packs']} packs of {number(found['pack_bytes'] / (1 << 20))} MiB, {what}",
        table(["", "GiB/s", "client's CPU-s per GiB"], rows),
    ]


def _on_cuda(found: dict[str, Any]) -> list[str]:
    if "device" not in found:
        return []
    cores, torch = found["machine"]["cores"], found["machine"]["torch"]
    links = ", ".join(
        f"{name} {spread(one)}{'' if name.startswith('locking') else ' GB/s'}"
        for name, one in found["links"].items()
    )
    down = ", ".join(f"{name} {number(share)}" for name, share in found["down, of the link"].items())
    held = [[name, spread(one["busy"]["held_s"], 1e3)] for name, one in found["systems"].items()]
    return [
        f"## On {found['device']}: {number(found['state_bytes'] / 1e9)} GB of GPT-2 and AdamW",
        f"Another machine: {cores} cores, torch {torch}. The link: {links}. A state leaves the device, "
        f"nothing else at work, at this share of the first: {down}.",
        table(["", "held: call, and what its step took longer, ms"], held),
        *_state(found),
    ]


ON_CUDA = ("cuda", "cuda_medium", "cuda_restore")

SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "restore": _restore,
    "storage": _storage,
    "every_step": _every_step,
    "waves": _waves,
    "niceness": _niceness,
    "objects": _objects,
    "hdfs": _hdfs,
    "cuda": _on_cuda,
    "cuda_medium": _on_cuda,
}


# -- plots -------------------------------------------------------------------------------------------------


def _plots(results: Results, directory: Path) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        return ["(No plots: matplotlib is not installed.)"]
    matplotlib.use("Agg")
    found = results.get("overlap", {}).get("gpt2")
    made = []
    if found is not None:
        made += [
            _plot_blocked(found, directory),
            _plot_timeline(found, directory),
            _plot_durable(found, directory),
        ]
    if "storage" in results:
        made.append(_plot_stored(results["storage"], directory))
    return [f"![{title}]({name})" for title, name in made]


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colors(names: list[str]) -> list[str]:
    return ["#c1440e" if name == OURS else "#8a9ba8" for name in names]


def _saved(figure: Any, directory: Path, title: str, name: str) -> tuple[str, str]:
    from matplotlib import pyplot

    figure.savefig(directory / name, dpi=130)
    pyplot.close(figure)
    return title, name


def _plot_blocked(found: dict[str, Any], directory: Path) -> tuple[str, str]:
    systems = found["systems"]
    names = sorted(systems, key=lambda one: -systems[one]["busy"]["blocked_s"]["median"])
    summaries = [systems[name]["busy"]["blocked_s"] for name in names]
    medians = [one["median"] * 1e3 for one in summaries]
    errors = [
        [(one["median"] - one["min"]) * 1e3 for one in summaries],
        [(one["max"] - one["median"]) * 1e3 for one in summaries],
    ]
    figure, axes = _axes(0.45 * len(names) + 1.2)
    axes.barh(names, medians, xerr=errors, color=_colors(names), ecolor="#444444", capsize=3)
    for position, median in enumerate(medians):
        axes.annotate(f" {number(median)} ms", (summaries[position]["max"] * 1e3, position), va="center")
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("blocked per save of 1.5 GB, ms (log; median, min – max)")
    return _saved(figure, directory, "Time the training is blocked by a save", "blocked.png")


def _plot_timeline(found: dict[str, Any], directory: Path) -> tuple[str, str]:
    """Each step of the last repetition as a block; dark what it took longer than an undisturbed one."""
    shown = [
        name
        for name in (OURS, found.get("DCP best", ""), "dcp.async_save", TORCH_SAVE)
        if name in found["systems"]
    ]
    figure, axes = _axes(0.8 * len(shown) + 1.2)
    for row, name in enumerate(reversed(shown)):
        one = found["systems"][name]
        step_s = one["busy"]["step_s"]["median"]
        for begin, end in one["timeline"]:
            axes.barh(row, min(end - begin, step_s) - 0.02, left=begin, height=0.5, color="#9ecae1")
            axes.barh(row, max(end - begin - step_s, 0), left=begin + step_s, height=0.5, color="#b2182b")
        after = [begin for begin, _ in one["timeline"] if begin >= 0]
        axes.barh(row, min(after), left=0, height=0.5, color="#b2182b")
        axes.plot(one["timeline_durable_s"], row + 0.36, marker="v", color="black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), list(reversed(shown)))
    axes.set_xlabel("s since the save began: steps (blue), what they lost (red), durable (▼)")
    return _saved(figure, directory, "Steps around a save", "timeline.png")


def _plot_durable(found: dict[str, Any], directory: Path) -> tuple[str, str]:
    systems = found["systems"]
    names = sorted(systems, key=lambda one: -systems[one]["busy"]["durable_s"]["median"])
    figure, axes = _axes(0.55 * len(names) + 1.2)
    for shift, kind, color in ((0.2, "busy", "#4575b4"), (-0.2, "idle", "#abd9e9")):
        medians = [systems[name][kind]["durable_s"]["median"] for name in names]
        positions = [position + shift for position in range(len(names))]
        axes.barh(positions, medians, height=0.38, color=color, label=f"trainer {kind}")
        for position, median in zip(positions, medians, strict=True):
            axes.annotate(f" {number(median)}", (median, position), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.legend(frameon=False, loc="upper right")
    axes.set_xlabel("s until a save of 1.5 GB is durable (median)")
    return _saved(figure, directory, "Time until a save is durable", "durable.png")


def _plot_stored(found: dict[str, Any], directory: Path) -> tuple[str, str]:
    changes = list(_changes(found))
    systems = list(dict.fromkeys(system for name in changes for system in found[name]["systems"]))
    figure, axes = _axes(4)
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        there = [n for n, name in enumerate(changes) if system in found[name]["systems"]]
        percent = [
            max(found[changes[n]]["systems"][system]["further / full"]["median"] * 100, 1e-4) for n in there
        ]
        positions = [n + (index - (len(systems) - 1) / 2) * width for n in there]
        axes.bar(positions, percent, width=width, label=system, color=None if system != OURS else "#c1440e")
        for position, value in zip(positions, percent, strict=True):
            axes.annotate(number(value), (position, value), ha="center", va="bottom", fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(changes)), changes)
    axes.set_ylabel("% of the full state (log)")
    axes.legend(frameon=False, fontsize=8, ncols=len(systems), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    return _saved(figure, directory, "Bytes stored for one more snapshot", "stored.png")
