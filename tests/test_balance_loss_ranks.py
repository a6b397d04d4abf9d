"""BalanceLoss over two processes. A file of its own, so that each process starts with few imports."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moesaic as ms
from moesaic.layer.losses import switch_loss

ALPHA = 0.3
WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


def layer_of() -> nn.Module:
    torch.manual_seed(0)
    config = ms.MoEConfig(hidden_size=8, moe_intermediate_size=6, n_routed_experts=8, num_experts_per_tok=2)
    layer = ms.DeepseekV3MoE(config, engine="reference").double()
    nn.init.normal_(layer.gate.weight, std=0.5)
    return layer


def inputs() -> torch.Tensor:
    return torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def one_rank(rank: int, rendezvous: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for kind, wrapper in (("global_batch", "DDP"), ("global_batch", "FSDP2"), ("switch", "DDP")):
        layer = layer_of()
        balance = ms.BalanceLoss(kind, ALPHA).attach(layer)
        model = WRAPPERS[wrapper](layer)
        balance(model(inputs().chunk(2)[rank]).square().mean()).backward()
        balance.step()
        grad = layer.gate.weight.grad
        grad = grad.full_tensor() if wrapper == "FSDP2" else grad
        results[rank, kind, wrapper] = grad.tolist(), balance.values[""].item()
    torch.distributed.destroy_process_group()


def test_two_ranks_balance_the_batch_of_both_where_the_loss_is_global(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(one_rank, (str(tmp_path / "rendezvous"), results), nprocs=2)
        results = dict(results)
    layer, routings = layer_of(), []
    layer.gate.register_forward_hook(lambda _module, _args, output: routings.append(output))
    task = layer(inputs()).square().mean()
    loss = switch_loss(routings[0], layer.config)
    (task + ALPHA * loss).backward()

    def differ(kind, wrapper):
        (first, one), (second, two) = (results[rank, kind, wrapper] for rank in range(2))
        assert first == second
        gradient = (torch.tensor(first, dtype=torch.float64) - layer.gate.weight.grad).abs().max().item()
        return gradient, abs((one + two) / 2 - loss.item())

    for wrapper in WRAPPERS:
        assert max(differ("global_batch", wrapper)) < 1e-14
    assert min(differ("switch", "DDP")) > 1e-5
