"""How many examples a property test tries: all of them, or a tenth in `make check`, which is to be quick."""

from __future__ import annotations

import os

QUICK = os.environ.get("QUICK") == "1"


def examples(count: int) -> int:
    return max(count // 10, 5) if QUICK else count
