"""Two ranks do one's step: plain data parallel and DeepSpeed's three stages, with checkpoints in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
OFFLOADED = tuple(f"cluster/deepspeed/zero{stage}-offload.json" for stage in (1, 2, 3))
CASES = [f"{strategy}:shared:float32" for strategy in (*STRATEGIES, *OFFLOADED)]
CASES += ["ddp:paper:float32", "zero3:paper:float32"]

RUN = """
import os, sys, traceback
from tests.training.engine_ranks import main
try:
    main()
except BaseException:  # torch's own handler would wait for the other ranks
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""


def start(rank: int, world: int, folder: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LOCAL_RANK": str(rank),
        # No compiler and no ninja can be found, and whatever is compiled all the same would land here.
        "PATH": str(folder / "empty"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            RUN,
            str(rank),
            str(world),
            str(folder / f"store{world}"),
            str(folder / f"{world}.pt"),
            *CASES,
        ],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, dict]:
    """By number of ranks, what each case gave."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "empty").mkdir()
    found = {}
    for world in (1, 2):
        ranks = [start(rank, world, folder) for rank in range(world)]
        try:
            said = [rank.communicate(timeout=280)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert not any(rank.returncode for rank in ranks), said[0][-3000:]
        found[world] = torch.load(folder / f"{world}.pt", weights_only=False)
    built = folder / "extensions"
    assert not built.exists() or not list(built.rglob("*.so"))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_every_strategy_takes_the_step_of_one_process(runs, case, world):
    wanted, found = runs[1][f"ddp:{case.split(':', 1)[1]}"], runs[world][case]
    assert found["losses"] == pytest.approx(wanted["losses"], abs=2e-6)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    for part in ("tensors", "state"):
        assert found[part].keys() == wanted[part].keys()
        for name, value in wanted[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_cases_can_tell_wrong_from_right(runs):
    wanted = runs[1]["ddp:shared:float32"]
    assert max(wanted["norms"]) > 0.5  # the largest norm allowed: clipping was at work
    before, after = wanted["resumed"][0], wanted["tensors"]
    assert all(not torch.equal(before[name], after[name]) for name in after if not name.startswith("key_"))
