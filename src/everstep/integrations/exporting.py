"""A snapshot as files of other programs, whichever: one entrance for library and command line."""

from __future__ import annotations

from pathlib import Path

from everstep.chain.export import Exported, OnProgress
from everstep.chain.history import Chain, Snapshot
from everstep.errors import Mismatch
from everstep.integrations import casting, dcp_writing, hf_writing, safetensors_file, torch_file

FORMATS = ("dcp", "hf", "safetensors", "torch")


def export(
    chain: Chain,
    snapshot: Snapshot,
    path: Path,
    format: str,
    *,
    only: str = "",
    overwrite: bool = False,
    dtype: str = "",
    config: Path | None = None,
    max_shard_bytes: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Exported:
    """Write a snapshot to `path` in one of `FORMATS`: it appears whole and durable, or not at all. Blocks.

    Args:
        only: only this object, without its name in front.
        overwrite: replace a file; a folder is never replaced.
        dtype: what floating-point tensors become (`bf16`, `fp16`, `fp32`); hf and safetensors.
        config: a `config.json`, or a folder that has one and the tokenizer's files; hf.
        max_shard_bytes: of one file of weights; hf.

    Raises:
        Mismatch: there is no such format, or it does not take that; or `path` is taken.
        NotFound, Unsupported, Damaged: as the writers of the formats say.
    """
    if format not in FORMATS:
        raise Mismatch(
            f"{format!r} is none of {', '.join(FORMATS)}", kept="nothing was written", next="--format hf"
        )
    if (dtype and format not in ("hf", "safetensors")) or (
        (config is not None or max_shard_bytes is not None) and format != "hf"
    ):
        raise Mismatch(
            f"{format} takes no {'dtype' if dtype else 'config and no size of shards'}",
            kept="nothing was written",
            next="--format hf",
        )
    to = casting.target(dtype) if dtype else ""
    if format == "hf":
        return hf_writing.write(
            chain, snapshot, path, only=only, overwrite=overwrite, dtype=to, config=config,
            max_shard_bytes=max_shard_bytes or hf_writing.SHARD_BYTES, on_progress=on_progress,
        )  # fmt: skip
    if format == "safetensors":
        return safetensors_file.write(
            chain, snapshot, path, only=only, overwrite=overwrite, dtype=to, on_progress=on_progress
        )
    write = {"dcp": dcp_writing.write, "torch": torch_file.write}[format]
    return write(chain, snapshot, path, only=only, overwrite=overwrite, on_progress=on_progress)
