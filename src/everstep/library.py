"""The chain as a program has it: `everstep.Chain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.chain import history
from everstep.chain.history import MAIN, Point, Snapshot

if TYPE_CHECKING:
    import torch

    from everstep.chain.compare import Difference
    from everstep.chain.copying import Copied
    from everstep.chain.export import Exported
    from everstep.events import RolledBack
    from everstep.integrations.importing import Imported
    from everstep.run.loading import Loaded
    from everstep.store.base import Store


class Chain(history.Chain):
    """The snapshots of a run: to look through, to name, to branch from, to go back to, and to read.

    The rooms of the chain import no torch and know no other program's files. So what needs those is added
    here, above all of them, and imported when it is asked for: reading a chain works where there is no torch,
    and importing everstep takes no longer for it.

    All methods read the store each time (a chain grows while others look), may block on I/O, and raise
    `Damaged` where bytes are not the ones that were written, `Unavailable` where the store does not answer.
    """

    # -- versions -----------------------------------------------------------------------------------------

    def tag(self, name: str, ref: str = "head", *, of: str = MAIN, force: bool = False) -> Snapshot:
        """Name a snapshot, which is then never pruned. See `everstep.chain.versions.tag`."""
        from everstep.chain import versions

        return versions.tag(self, name, ref, of=of, force=force)

    def untag(self, name: str) -> None:
        """Take a tag away. See `everstep.chain.versions.untag`."""
        from everstep.chain import versions

        versions.untag(self, name)

    def branch(self, name: str, ref: str = "head", *, of: str = MAIN) -> Snapshot:
        """Begin a branch at a snapshot, without copying a chunk. See `everstep.chain.versions.branch`."""
        from everstep.chain import versions

        return versions.branch(self, name, ref, of=of)

    def drop_branch(self, name: str, *, force: bool = False) -> None:
        """Take a branch away. See `everstep.chain.versions.drop_branch`."""
        from everstep.chain import versions

        versions.drop_branch(self, name, force=force)

    def rollback(self, ref: str, branch: str = MAIN) -> RolledBack:
        """Move a branch's head back. See `everstep.chain.versions.rollback`. While a run writes it is
        refused: then it is `run.rollback` that goes back."""
        from everstep.chain import versions

        return versions.rollback(self, branch, ref)

    def reflog(self, branch: str = MAIN) -> Iterator[Point]:
        """All advances of a branch's head, the newest first. See `everstep.chain.versions.reflog`."""
        from everstep.chain import versions

        return versions.reflog(self, branch)

    def diff(self, a: str, b: str, *, branch: str = MAIN, values: bool = True) -> Difference:
        """What became of snapshot `a` in snapshot `b`. See `everstep.chain.compare.compare`.

        Args:
            a, b: references of this chain, or `PATH@REF` of another where `PATH` has a `/` in it or is the
                directory of a chain.
            values: read what changed, and say by how much.
        """
        from everstep.chain.compare import compare

        (before, one), (after, other) = (history.find_anywhere(ref, lambda: self, branch) for ref in (a, b))
        return compare(before, one, after, other, values=values)

    # -- other stores -------------------------------------------------------------------------------------

    def copy_to(
        self,
        target: str | PathLike[str] | Store,
        *refs: str,
        branch: str = MAIN,
        to: str = "",
        all: bool = False,
        tags: bool = False,
        dry_run: bool = False,
    ) -> Copied:
        """Copy snapshots into another chain, which is created where there is none: those that `refs` mean,
        all that led to the head of `branch` where none are named, or those of all branches. What is there is
        not sent: snapshots, and chunks in whatever pack. See `everstep.chain.copying.copy` for the errors.

        Args:
            branch: the one that is copied, and that `refs` speak of.
            to: the branch of the target that they go to; of the same name unless given.
            tags: give them the tags that they have here.
            dry_run: only say what would be sent.
        """
        from everstep.chain import copying
        from everstep.store.urls import open_store

        if all:
            wanted = [one for name in self.branches() for one in copying.of_branch(self, name, to)]
        elif refs:
            wanted = copying.of_refs(self, refs, branch, to)
        else:
            wanted = copying.of_branch(self, branch, to)
        return copying.copy(self, open_store(target), wanted, tags=tags, dry_run=dry_run)

    # -- states -------------------------------------------------------------------------------------------

    def load(self, ref: str = "head", *, branch: str = MAIN, device: torch.device | str = "cpu") -> Loaded:
        """A snapshot's leaves by name, each read and verified when it is asked for. See `everstep.load`."""
        import torch

        from everstep.run.loading import Loaded

        return Loaded(self, self.find(ref, branch), torch.device(device))

    def restore(
        self,
        ref: str = "head",
        *,
        into: Mapping[str, object],
        only: str = "*",
        strict: bool = True,
        branch: str = MAIN,
    ) -> list[str]:
        """Bring live objects to what a snapshot holds of them, in place: `chain.restore("step:500",
        into={"model": model})`. Needs no right to write, and touches neither the random generators nor any
        loader: to train on, open a run.

        Args:
            into: the objects, by the names under which they were handed over to `everstep.open`; what is not
                named is neither read nor touched.
            only, strict: see `everstep.state.lazy.LazyState.into`.

        Returns:
            What was left as it is because it does not fit, a sentence each; empty where `strict`.

        Raises:
            NotFound: there is no such snapshot, or nothing fits the pattern.
            Mismatch: something does not fit; the message names it, and nothing was touched.
            Damaged: bytes could not be verified; the objects may be partly overwritten.
        """
        return self.load(ref, branch=branch).into(only=only, strict=strict, **into)

    def export(
        self,
        ref: str,
        out: str | PathLike[str],
        *,
        format: str = "safetensors",
        only: str = "",
        overwrite: bool = False,
        dtype: str = "",
        config: str | PathLike[str] | None = None,
        max_shard_bytes: int | None = None,
        branch: str = MAIN,
    ) -> Exported:
        """Write a snapshot to a file or folder that other programs read: it appears whole and durable, or not
        at all. Needs no torch.

        Args:
            out: the file (`safetensors`, `torch`) or folder (`hf`, `dcp`).
            format: `safetensors`, `torch`, `hf` or `dcp`.
            only: only this object, without its name in front.
            overwrite: replace the file `out` where it exists; a folder is never replaced.
            dtype: what floating-point tensors become (`bf16`, `fp16`, `fp32`); hf and safetensors.
            config: a `config.json`, or a folder that has one and the tokenizer's files; hf.
            max_shard_bytes: weights that are larger are several files; hf.

        Raises:
            Mismatch: `out` exists, or `format` is none of these, or does not take what is given.
            NotFound: there is no such snapshot, object or directory.
            Unsupported: the format lacks a dtype.
            Damaged: bytes could not be verified; nothing was written.
        """
        from everstep.integrations import exporting

        return exporting.export(
            self,
            self.find(ref, branch),
            Path(out),
            format,
            only=only,
            overwrite=overwrite,
            dtype=dtype,
            config=None if config is None else Path(config),
            max_shard_bytes=max_shard_bytes,
        )

    def import_(
        self,
        path: str | PathLike[str],
        objects: Mapping[str, str] | None = None,
        *,
        step: int | None = None,
        branch: str = MAIN,
        note: str = "",
    ) -> Imported:
        """Make a snapshot of other people's checkpoint, the head of `branch`; durable on return. Needs no
        torch, and unpickles nothing. See `everstep.integrations.importing.import_` for the arguments.

        Args:
            path: a file of `torch.save`; a safetensors file, or the index of several; a directory of DCP; a
                folder of Hugging Face or of their Trainer.

        Raises:
            NotFound: there is none, or it lacks what was asked for.
            Unsupported: it holds what no state is made of; nothing of it was run.
            Damaged: it is not whole.
            Mismatch: the branch is at a later step.
            Conflict: somebody is writing to the branch.
        """
        from everstep.integrations import importing

        return importing.import_(self, Path(path), objects=objects, step=step, branch=branch, note=note)
