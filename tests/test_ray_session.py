"""Starting Ray: a bad setting is refused first, a running Ray is used, an address that is none is a clear error."""

from __future__ import annotations

import signal

import pytest

from kblam_ray.errors import InputError, RayStartError
from kblam_ray.ray_session import start_ray


def test_fewer_than_one_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="0 CPUs"):
        start_ray(0)


def test_a_failure_to_start_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fail(**settings: object) -> None:
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", fail)
    # Other tests of this process have a Ray of their own.
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RayStartError, match=r"timed out during startup\. \(local Ray\)"):
        start_ray()
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    with pytest.raises(RayStartError, match=r"RAY_ADDRESS=10\.1\.2\.3:6379"):
        start_ray()


def test_a_local_ray_is_small_and_an_announced_cluster_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    calls: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray(2, object_store_bytes=10**8)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    start_ray(2)
    local, joined = calls
    assert (local["address"], local["num_cpus"], local["object_store_memory"]) == ("local", 2, 10**8)
    assert joined["address"] == "auto"
    assert "num_cpus" not in joined


def test_the_jobs_own_way_to_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def own(*_: object) -> None: ...

    monkeypatch.setattr(ray, "init", lambda **settings: signal.signal(signal.SIGTERM, lambda *_: None))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    before = signal.signal(signal.SIGTERM, own)
    try:
        start_ray()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_running_ray_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("started twice"))
    start_ray()


def test_a_local_node_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    done: list[object] = []

    def init(**settings: object) -> None:
        done.append("init")
        if done.count("init") < 3:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray()
    assert done == ["init", "shutdown", "init", "shutdown", "init"]
