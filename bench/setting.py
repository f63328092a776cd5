"""What all scenarios are told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """Attributes:
    directory: an empty one, on the disk that is measured.
    size: "full", or "small" for a look at whether everything works.
    repetitions: how often each thing is measured, alternating with what it is compared with.
    tokens: how many a step of a language model trains on: a step is to take longer than a copy of its state.
    """

    directory: Path
    size: str = "full"
    repetitions: int = 5
    tokens: int = 64

    @property
    def is_full(self) -> bool:
        return self.size == "full"

    def place(self, name: str) -> Path:
        """A new directory inside the setting's."""
        path = self.directory / name
        path.mkdir()
        return path


def tell(line: str) -> None:
    """Progress, for whoever waits."""
    print(line, file=sys.stderr, flush=True)
