"""Everstep's writer and reader with the signatures of the file system's: a directory is a chain, and each
save to it the next snapshot."""

import os

import everstep


def _chain_in(path):
    """Some tests have files of their own in the directory, and a chain has a place for itself."""
    return os.path.join(os.fspath(path), "chain")


class FileSystemWriter(everstep.dcp.Writer):
    def __init__(self, path, *args, **kwargs):
        super().__init__(_chain_in(path))

    @property
    def path(self):
        return self.checkpoint_id

    def reset(self, checkpoint_id=None):
        if checkpoint_id is not None:
            self._place = _chain_in(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return "://" not in os.fspath(checkpoint_id)


class FileSystemReader(everstep.dcp.Reader):
    def __init__(self, path, *args, **kwargs):
        super().__init__(_chain_in(path))

    @property
    def path(self):
        return self.checkpoint_id

    def reset(self, checkpoint_id=None):
        if checkpoint_id is not None:
            self._place = _chain_in(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return "://" not in os.fspath(checkpoint_id)
