"""The board between the ranks and the driver: where it stands, and what becomes of it when its process dies."""

from __future__ import annotations

import os
import signal

import pytest
import ray
from ray.cluster_utils import Cluster

from kblam_ray.training.loop.ray_workers import board_beside_driver
from kblam_ray.training.loop.reports import BoardFar


@pytest.fixture
def two_nodes():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_it_stands_beside_the_driver_and_goes_on_when_its_process_dies(two_nodes):
    boards = [board_beside_driver() for _ in range(3)]
    places = [board.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for board in boards]
    assert set(ray.get(places)) == {ray.get_runtime_context().get_node_id()}
    board = boards[0]
    BoardFar(board).post({"kind": "say", "text": "before"})
    assert ray.get(board.take.remote()) == [{"kind": "say", "text": "before"}]
    os.kill(ray.get(board.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    BoardFar(board).post({"kind": "say", "text": "after"})
    assert ray.get(board.take.remote()) == [{"kind": "say", "text": "after"}]
    assert not BoardFar(board).wants_stop()
