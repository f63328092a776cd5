"""What has to be reached, as data: each bar with where its figure is found in the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bench.systems import OURS, TORCH_SAVE

Results = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """Attributes:
    name: what is measured, with its unit.
    at: whether the figure has to be at most or at least the bound.
    path: the keys that lead to the figure; where they end at a summary, its median counts.
    scale: what the figure is multiplied with to have the unit of the bound.
    """

    name: str
    at: Literal["<=", ">="]
    bound: float
    path: tuple[str, ...]
    scale: float = 1.0

    def figure(self, results: Results) -> float | None:
        """The median; None where it was not measured."""
        found = self._found(results)
        value = found.get("median") if isinstance(found, dict) else found
        return None if value is None else float(value) * self.scale

    def spread(self, results: Results) -> tuple[float, float] | None:
        """The lowest and the highest of the repetitions, where there are some."""
        found = self._found(results)
        if not isinstance(found, dict) or "min" not in found:
            return None
        return found["min"] * self.scale, found["max"] * self.scale

    def reason(self, results: Results) -> str:
        """Why there is no figure, as far as somebody said so."""
        found: Any = results
        for key in self.path:
            if isinstance(found, dict) and isinstance(found.get("not measured"), str):
                return str(found["not measured"])
            found = found.get(key) if isinstance(found, dict) else None
        return "not measured"

    def is_met(self, figure: float) -> bool:
        return figure <= self.bound if self.at == "<=" else figure >= self.bound

    def _found(self, results: Results) -> Any:
        found: Any = results
        for key in self.path:
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return found


GPT2 = ("overlap", "gpt2")
TO_DCP = (*GPT2, "ours / DCP best")

BARS = (
    Bar("blocked at 1.5 GB, ms", "<=", 10, (*GPT2, "systems", OURS, "busy", "blocked_s"), 1e3),
    Bar("blocked at 1.5 GB, of that at 0.5 GB", "<=", 1.5, ("overlap", "blocked, gpt2 / third_gpt2")),
    Bar("blocked, of torch.save", "<=", 0.01, (*GPT2, "ratios", TORCH_SAVE, "blocked_s")),
    Bar("blocked, of DCP best", "<=", 1 / 3, (*TO_DCP, "blocked_s")),
    Bar("step-seconds lost, of DCP best", "<=", 0.5, (*TO_DCP, "lost_s")),
    Bar("CPU-seconds per GB, trainer busy, of DCP best", "<=", 0.6, (*TO_DCP, "cpu_s")),
    Bar("CPU-seconds per GB, trainer idle, of DCP best", "<=", 0.6, (*TO_DCP, "idle cpu_s")),
    Bar("CPU-seconds per GB, trainer busy, of the floors", "<=", 1.5, (*GPT2, "cpu busy / floors")),
    Bar("CPU-seconds per GB, trainer idle, of the floors", "<=", 1.5, (*GPT2, "cpu idle / floors")),
    Bar("time to durable, trainer busy, of DCP best", "<=", 0.5, (*TO_DCP, "durable_s")),
    Bar("time to durable, trainer idle, of DCP best", "<=", 0.5, (*TO_DCP, "idle durable_s")),
    Bar("persist rate, trainer idle, of direct write", ">=", 0.8, (*GPT2, "persist / direct write")),
    Bar(
        "restore cold, of torch.load(mmap) + load_state_dict",
        "<=",
        0.8,
        ("restore", "ours / torch.load", "cold, ready"),
    ),
    Bar("restore cold, of direct read", ">=", 0.8, ("restore", "read floor / cold, as it returns")),
    Bar("restore warm, of torch.load", "<=", 1.3, ("restore", "ours / torch.load", "warm, ready")),
    Bar(
        "restore from the arena, of torch.load warm",
        "<=",
        0.7,
        ("restore", "arena", "ours / torch.load, warm, ready"),
    ),
    Bar(
        "stored for an identical state, % of full",
        "<=",
        0.1,
        ("storage", "identical", "systems", OURS, "further / full"),
        100,
    ),
    Bar(
        "stored for LoRA, of the trained part's state",
        "<=",
        1.15,
        ("storage", "LoRA", "systems", OURS, "further / trained"),
    ),
    Bar(
        "stored for embeddings with 1 % of rows touched, % of full",
        "<=",
        4,
        ("storage", "embeddings", "systems", OURS, "further / full"),
        100,
    ),
    Bar(
        "stored for dense AdamW on a slow store, of raw",
        "<=",
        0.85,
        ("storage", "dense, slow store", "systems", OURS, "further / full"),
    ),
    Bar(
        "throughput with a snapshot at every step, a spare core",
        ">=",
        0.97,
        ("every_step", "a spare core", "throughput with / without"),
    ),
    Bar("packs to Ceph, of bare obstore", ">=", 0.8, ("objects", "ours / obstore", "put")),
    Bar("packs from Ceph, of bare obstore", ">=", 0.8, ("objects", "ours / obstore", "get")),
    Bar("packs to Ceph, CPU-seconds per GiB", "<=", 1.2, ("objects", "cpu_s_per_GiB", f"{OURS} put")),
    Bar("packs to HDFS, of bare hdfs-native", ">=", 0.8, ("hdfs", "ours / hdfs-native", "put")),
    Bar("packs from HDFS, of bare hdfs-native", ">=", 0.8, ("hdfs", "ours / hdfs-native", "get")),
    Bar("peak memory beyond two slots, MB", "<=", 256, (*GPT2, "memory beyond two slots"), 1e-6),
    Bar("peak memory of a 6 GB state with max_arena_bytes=1GB, GB", "<=", 24, ("waves", "peak_bytes"), 1e-9),
)
