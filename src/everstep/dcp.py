"""Everstep as a back end of torch.distributed.checkpoint: see `everstep.integrations.dcp`."""

from __future__ import annotations

from everstep.integrations.dcp import LoadPlanner, Reader, SavePlanner, Stager, Writer

__all__ = ["LoadPlanner", "Reader", "SavePlanner", "Stager", "Writer"]
