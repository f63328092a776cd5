"""For processes that run PyTorch's own tests: its file system writer and reader are Everstep's, in spawned
children too, whose interpreters import this before anything else. Does nothing unless it is asked to.

EVERSTEP_TEST_SWAP     "everstep": swap them; "none": leave them, to see what passes without.
"""

import importlib
import importlib.machinery
import os
import sys


def _swap_classes():
    import swapped
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import _storage_utils, filesystem

    # What inherits from torch's own classes goes on doing so.
    importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")
    for module in (dcp, filesystem, _storage_utils):
        module.FileSystemWriter = swapped.FileSystemWriter
        module.FileSystemReader = swapped.FileSystemReader


def _need_no_gpus():
    """Tests that ask for GPUs run on the CPU with gloo, as far as they find them missing themselves."""
    import torch
    from torch.testing._internal import common_distributed

    def needs_none(*args, **kwargs):
        return lambda test: test

    common_distributed.skip_if_lt_x_gpu = needs_none
    # What asks for a GPU outright stays where it is.
    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self
    for name in ("rand", "randn", "randint", "ones", "zeros", "empty", "tensor", "arange", "full"):
        setattr(torch, name, _here(getattr(torch, name)))


def _here(make):
    def made(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def _gloo_for_meshes():
    """Tests that ask for a group of the GPUs' get one of the CPUs'."""
    from torch.testing._internal.distributed._tensor.common_dtensor import DTensorTestBase

    init = DTensorTestBase.init_pg

    def init_pg(self, eager_init, backend=None):
        init(self, eager_init, "gloo")

    DTensorTestBase.init_pg = init_pg


def _shard_on_the_cpu():
    """FSDP1 looks for an accelerator, unless it is told which device to use."""
    import torch
    from torch.distributed.fsdp import _init_utils

    init = _init_utils._init_device_handle

    def init_device_handle(state, module, ignored_params, device_id):
        return init(state, module, ignored_params, device_id or torch.device("cpu"))

    _init_utils._init_device_handle = init_device_handle


class _Loader:
    """Loads a module as it would be, then does something more."""

    def __init__(self, loader, then):
        self._loader = loader
        self._then = then

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.__spec__.loader = self._loader
        self._then()

    def __getattr__(self, name):
        return getattr(self._loader, name)


class _Finder:
    def __init__(self, then):
        self._then = then

    def find_spec(self, name, path=None, target=None):
        then = self._then.get(name)
        if then is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Loader(spec.loader, then)
        return spec


if os.environ.get("EVERSTEP_TEST_SWAP"):
    _then = {
        "torch.testing._internal.common_distributed": _need_no_gpus,
        "torch.testing._internal.distributed._tensor.common_dtensor": _gloo_for_meshes,
        "torch.distributed.fsdp._init_utils": _shard_on_the_cpu,
    }
    if os.environ["EVERSTEP_TEST_SWAP"] == "everstep":
        _then["torch.distributed.checkpoint"] = _swap_classes
    sys.meta_path.insert(0, _Finder(_then))
