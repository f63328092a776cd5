"""The names of leaves: paths whose parts are what lies under what."""

from __future__ import annotations


def join(path: str, key: object) -> str:
    """The name of what lies under `key` at `path`. In a part, `~` is written `~0` and `/` is `~1`; an empty
    part is `~2`."""
    part = str(key)
    if "~" in part or "/" in part or not part:
        part = part.replace("~", "~0").replace("/", "~1") or "~2"
    return f"{path}/{part}" if path else part
