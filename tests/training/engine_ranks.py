"""One rank of a run that compares engines: `python -m tests.training.engine_ranks RANK WORLD STORE OUT STRATEGY...`.

Every strategy trains the same adapter on the same global batches, with rows that differ between ranks (one rank has
rows without facts). Written: per strategy the losses, gradient norms, final tensors and optimizer state.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kblam_ray.attention.attach import attach
from kblam_ray.training.loop.deepspeed_config import completed, read_deepspeed_config
from kblam_ray.training.loop.engines import DataParallel, Engine, Zero, adamw, parameter_groups
from tests.attention.tiny import random_facts, random_ids, tiny_adapter, tiny_llama

GLOBAL_BATCH = 4
STEPS = 4
RATE = 1e-2


class Trained(nn.Module):
    """The smallest thing with the loop's shape: this rank's share of the global batch's next-token loss."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        base_model = tiny_llama().to(dtype).requires_grad_(False)
        self.base = (base_model,)  # no part of the module
        # Larger than the threshold below which ZeRO 3 leaves parameters whole.
        self.adapter = tiny_adapter(base_model, kind, dim=DIM).train()
        attach(base_model, self.adapter)
        self.facts = random_facts(7, dim=DIM)

    def forward(self, ids_BT: torch.Tensor, has_facts: bool, count: int) -> torch.Tensor:
        memory = self.facts.memory(self.adapter) if has_facts else None
        logits = self.base[0](input_ids=ids_BT, knowledge=memory).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum") / count
        return loss + 0 * torch.stack([parameter.sum() for parameter in self.adapter.parameters()]).sum()


DIM = 40


def make_engine(strategy: str, module: Trained, accumulation: int, clipping: float) -> Engine:
    optimizer = adamw(parameter_groups(module.adapter, 10.0), 0.01, (0.9, 0.95))
    if strategy == "ddp":
        return DataParallel(module, module.adapter, optimizer, clipping)
    config = read_deepspeed_config(strategy)
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    config = completed(config, micro_batch_size=1, accumulation=accumulation, clipping=clipping)
    return Zero(module, module.adapter, optimizer, config)


def run(strategy: str, kind: str, dtype: torch.dtype, rank: int, world: int) -> dict:
    module = Trained(kind, dtype)
    engine = make_engine(strategy, module, GLOBAL_BATCH // world, clipping=0.5)
    result: dict = {"losses": [], "norms": []}
    for step in range(STEPS):
        if step == 2:  # as a checkpoint and its resumption do
            tensors, state = engine.adapter_tensors(), engine.optimizer_state()
            result["resumed"] = (tensors, state)
            module = Trained(kind, dtype)
            nn.Module.load_state_dict(module.adapter, tensors)
            engine = make_engine(strategy, module, GLOBAL_BATCH // world, clipping=0.5)
            engine.load_optimizer_state(state, step)
        ids_BT = random_ids(GLOBAL_BATCH, 9, seed=step)
        rows = range(rank, GLOBAL_BATCH, world)
        total = torch.zeros(())
        for number, row in enumerate(rows):
            loss = engine(ids_BT[row : row + 1], row % 2 == 0, GLOBAL_BATCH * 8)
            total += loss.detach()
            engine.backward(loss, is_last=number == len(rows) - 1)
        if world > 1:
            dist.all_reduce(total)
        result["losses"].append(float(total))
        result["norms"].append(engine.step(RATE))
    result["tensors"], result["state"] = engine.adapter_tensors(), engine.optimizer_state()
    return result


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for name in sys.argv[5:]:
        strategy, kind, dtype = name.split(":")
        found[name] = run(strategy, kind, getattr(torch, dtype), rank, world)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
