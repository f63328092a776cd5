"""HDFS, the real one."""

from __future__ import annotations

import pytest

from everstep.store.base import Store
from everstep.store.hdfs import HdfsStore
from everstep.store.patience import Patience
from everstep.testing.store import StoreContract
from servers.fixtures import Directory

pytestmark = [pytest.mark.process]

HASTY = Patience(deadline_s=60, first_wait_s=0.05, longest_wait_s=1, request_s=20)


class TestHdfs(StoreContract):
    @pytest.fixture
    def store(self, directory: Directory) -> Store:
        return HdfsStore(directory(), patience=HASTY)
