"""Start Ray for a job: join the cluster the job was submitted to, or start a small one in this process.

`ray job submit`, KubeRay and `RAY_ADDRESS` all announce their cluster through Ray's own environment variable. Without
it a job gets its own Ray, sized by hand: left alone, Ray takes 30 % of the machine's memory for its object store, opens
a dashboard and reports usage over the network.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from kblam_ray.errors import InputError, MissingDependencyError, RayStartError

OBJECT_STORE_BYTES = 400_000_000
"""Object store of a local Ray: holds the blocks in flight between tasks; Ray spills to disk beyond it."""

START_TRIES = 3
"""How often a local Ray is started before it is given up: its node may be late on a busy machine."""


def start_ray(num_cpus: int | None = None, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names, else start Ray in this process; do nothing if it runs already.

    Args:
        num_cpus: logical CPUs of a local Ray; None counts the machine's. A cluster keeps its own.
        object_store_bytes: object store of a local Ray.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: fewer than one CPU.
        RayStartError: the cluster does not answer, or the local Ray does not start.
    """
    if num_cpus is not None and num_cpus < 1:
        raise InputError(f"{num_cpus} CPUs for Ray", where="--num-cpus", help="give at least 1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "Ray is not installed", where="jobs run on Ray", help="pip install 'kblam-ray[ray]'"
        ) from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        on_terminate = signal.getsignal(signal.SIGTERM)
        # Workers' prints would land on the driver's stdout, which belongs to the summary line; their errors arrive as
        # exceptions, and all of it is in Ray's log files.
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        # Ray warns before it has set its own level: that tokens are on, that our progress replaces its bars.
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                _start_local(num_cpus, object_store_bytes, quiet)
        # Ray raises a bare Exception when its node does not come up.
        except Exception as error:
            raise RayStartError(
                f"Ray does not start: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                where=f"RAY_ADDRESS={address}" if address else "local Ray",
                help="unset RAY_ADDRESS to run on this machine alone, or check the cluster with `ray status`",
            ) from error
        _keep_handler(signal.SIGTERM, on_terminate)
    _quiet_ray_data()


def require_gpus(gpus_per_worker: float) -> None:
    """Make sure that the running Ray can have a worker: a local one never gets more GPUs than it has, and would wait
    for them forever; a cluster may grow.

    Raises:
        InputError: more GPUs are asked for than a local Ray has.
    """
    import ray

    found = ray.cluster_resources().get("GPU", 0)
    if gpus_per_worker > found and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            f"{gpus_per_worker:g} GPUs for each worker, and Ray finds {found:g} here",
            where="--gpus-per-worker",
            help="run where the GPUs are, or leave the flag out to work on CPUs",
        )


def _start_local(num_cpus: int | None, object_store_bytes: int, quiet: dict[str, Any]) -> None:
    import ray

    for tries_left in reversed(range(START_TRIES)):
        try:
            # "local" because None would join whichever Ray was last started on this host.
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                **quiet,
            )
            return
        except Exception as error:
            # A busy machine may need longer than the 30 s that Ray gives its node, which cannot be set.
            if not tries_left or "timed out" not in str(error):
                raise
            ray.shutdown()


def _keep_handler(number: signal.Signals, handler: Any) -> None:
    """Ray puts its own handler in the place of the job's, and ends the process before the job's last line."""
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def _quiet_ray_data() -> None:
    """Ray Data draws bars and logs plans on stderr; jobs report their own progress there."""
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
