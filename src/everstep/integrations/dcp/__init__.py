"""Everstep as a back end of torch.distributed.checkpoint (`everstep.dcp`).

    dcp.save(state_dict, storage_writer=everstep.dcp.Writer("s3://bucket/runs/gpt", step=step))
    dcp.load(state_dict, storage_reader=everstep.dcp.Reader("s3://bucket/runs/gpt"))

Each save is a snapshot of the chain, the same that `everstep.open` takes of these objects; see
docs/guides/dcp.md.
"""

from __future__ import annotations

from everstep.integrations.dcp.planning import LoadPlanner, SavePlanner
from everstep.integrations.dcp.reading import Reader
from everstep.integrations.dcp.staging import Stager
from everstep.integrations.dcp.writing import Writer

__all__ = ["LoadPlanner", "Reader", "SavePlanner", "Stager", "Writer"]
