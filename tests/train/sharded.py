"""Two processes that shard a model by FSDP2 (torchrun, gloo): the packed forward pass and fused adapters against one.

Accelerate shards on GPUs only; here torch's own `fully_shard` is asked, which is what accelerate would call.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from harness.sweep.problems import load_run
from harness.train.adapter import fuse_adapters
from harness.train.attention import ATTENTION
from harness.train.packed import Packed, groups_of, pack, packed_logps
from harness.train.trainers import answer_packed_calls
from tests.conftest import load_base, tokens_of, training_overrides

CONFIG = load_run(training_overrides("+method=dpo"))


def make() -> tuple[Any, Any]:
    """Return a policy with an adapter that is not at its start, and the base inside of it."""
    torch.manual_seed(0)
    base = load_base(CONFIG)
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fuse_adapters(base)
    base.set_attn_implementation(ATTENTION)
    answer_packed_calls(base, packed_logps, metrics=lambda: True)
    return policy.train(), base


def batch() -> dict[str, torch.Tensor | Packed]:
    """Return four pairs as one packed row, and their labels as TRL lays them out: chosen rows, then rejected ones."""
    pairs = tokens_of(CONFIG).train.rows[:4]
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    labels = torch.full((len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)), -100)
    for i, (prompt, answer) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return {"labels": labels, "packed": pack(groups_of(pairs, share_prefix=True))}


def step(policy: Any) -> float:
    """Run forward and backward, and return the summed log-probs."""
    loss = policy(**batch()).log_probs.sum()
    loss.backward()
    return float(loss)


def main() -> None:
    """Print, from the first process, losses and the largest relative gap of a gradient."""
    dist.init_process_group("gloo")
    whole, _ = make()
    losses = [step(whole)]
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    sharded, base = make()
    mesh = init_device_mesh("cpu", (2,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh)
    losses.append(step(sharded))
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    gaps = {name: float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in expected.items()}
    local = sum(p.to_local().numel() for p in sharded.parameters())
    if dist.get_rank() == 0:
        about = {"losses": losses, "names": sorted(found) == sorted(expected), "gap": max(gaps.values())}
        print(json.dumps(about | {"local": local, "total": sum(p.numel() for p in whole.parameters())}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
