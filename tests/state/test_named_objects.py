from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from everstep.state.objects import named, summed_anew


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_ddp_that_is_to_lay_its_gradients_out_anew_is_named() -> None:
    model = DistributedDataParallel(nn.Linear(2, 2))
    steady = DistributedDataParallel(nn.Linear(2, 2), find_unused_parameters=True)
    objects = {
        "model": model,
        "compiled": torch.compile(model),
        "listed": [nn.Linear(1, 1), model],
        "steady": steady,
        "plain": nn.Linear(1, 1),
        "text": "x",
        "empty": [],
    }
    assert summed_anew(objects) == ["model", "compiled", "listed"]
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
    assert summed_anew(objects) == [], "it has done so"


@pytest.mark.usefixtures("group")
def test_names_are_those_of_what_is_wrapped() -> None:
    inner = nn.Linear(2, 2)
    found = named({"model": torch.compile(DistributedDataParallel(inner)), "all": {"a": inner, "b": inner}})
    assert list(found.values()) == [inner] * 3
    assert list(found) == ["model", "all/a", "all/b"]
