"""The board between the ranks and the driver: where it stands, and what becomes of it when its process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def test_it_stands_beside_the_driver_and_goes_on_when_its_process_dies():
    # In a process of its own: another test may have left a Ray in this one.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def work_on_two_nodes() -> None:
    """What the test checks, by assertions, on a head without CPUs and a node with some."""
    import ray
    from ray.cluster_utils import Cluster

    from kblam_ray.training.loop.ray_workers import board_beside_driver
    from kblam_ray.training.loop.reports import BoardFar

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address)
    try:
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
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    work_on_two_nodes()
