"""A byte-level language model with one MoE layer, trained by a plain PyTorch loop and balanced by the selection bias.

    python examples/train_loop.py              # MaxVio falls to the level of chance
    python examples/train_loop.py --speed 0    # it does not

The text is the source code of torch.nn.functional, so nothing is downloaded.
"""

import argparse
import inspect

import torch
import torch.nn.functional as F
from torch import nn

import moesaic as ms
from moesaic.trace.chance.bands import chance_bands

CONTEXT, BATCH, MICRO_BATCHES, REPORT_EVERY = 8, 128, 2, 25


class Model(nn.Module):
    """The next byte from the last CONTEXT bytes: embedding, MoE layer with residual, head."""

    def __init__(self, config: ms.MoEConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, config.hidden_size // CONTEXT)
        self.norm = nn.RMSNorm(config.hidden_size)
        self.moe = ms.DeepseekV3MoE(config)
        self.head = nn.Linear(config.hidden_size, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).flatten(-2)
        return self.head(x + self.moe(self.norm(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--speed", type=float, default=1e-2, help="how far a bias moves per step; 0 = no balancing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = ms.MoEConfig(
        hidden_size=128, moe_intermediate_size=64, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
        n_shared_experts=1,
    )  # fmt: skip
    text = torch.tensor(list(inspect.getsource(F).encode()))
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # the bias is a buffer: no gradient, no weight decay
    balance = ms.BiasBalance({"*": args.speed}).attach(model)  # of all layers; with 0 it only counts

    band = chance_bands(config, BATCH * MICRO_BATCHES)["max_vio"]
    print(f"chance alone gives a MaxVio of {band.low:.2f} to {band.high:.2f} a step, {band.mean:.2f} on average")

    losses, violations = [], []
    for step in range(1, args.steps + 1):
        for _ in range(MICRO_BATCHES):
            at = torch.randint(len(text) - CONTEXT, (BATCH,))[:, None] + torch.arange(CONTEXT + 1)
            ids = text[at]
            loss = F.cross_entropy(model(ids[:, :-1]), ids[:, -1])
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

        balance.step()  # after the optimizer: by the load of all micro-batches, and of all ranks where there are some
        (load,) = balance.load.values()
        violations.append(float(load.max() / load.mean() - 1))
        if step % REPORT_EVERY == 0:
            loss, max_vio = sum(losses) / len(losses), sum(violations) / len(violations)
            print(f"steps to {step:4}: loss {loss:.2f}, MaxVio {max_vio:.2f}")
            losses, violations = [], []


if __name__ == "__main__":
    main()
