"""Train a small dense model, make an MoE of it that starts at the same loss, and train both on for as many steps.

    python examples/upcycle.py                       # 8 copies of every MLP, a token visits 2 of them
    python examples/upcycle.py --granularity 4       # cut in 4: 32 experts, top 8, at the same cost
    python examples/upcycle.py --noise 0.5           # half of every expert drawn anew: another start

A Qwen3 of 0.1 million parameters on the bytes of the shipped corpus; a minute or two on one thread of a CPU.
"""

import argparse

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import moesaic as ms
from moesaic.train.data import DOMAINS, Split, corpus

WINDOW, BATCH, HELD_OUT = 64, 16, 400  # bytes, windows a step, windows
WARMUP = 20  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-steps", type=int, default=600, help="before upcycling")
    parser.add_argument("--steps", type=int, default=600, help="of each of the two models after it")
    parser.add_argument("--experts", type=int, default=8, help="copies of every MLP")
    parser.add_argument("--k", type=int, default=2, help="copies that a token visits")
    parser.add_argument("--granularity", type=int, default=1, help="experts that a copy is cut into")
    parser.add_argument("--noise", type=float, default=0.0, help="share of every expert to draw anew")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--speed", type=float, default=1e-3, help="of the selection bias that balances the experts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    batches = training_batches(args.dense_steps + args.steps, args.seed)
    held_out = held_out_windows()

    dense = Qwen3ForCausalLM(small())
    train(dense, batches[: args.dense_steps], args.lr)
    print(f"dense, {dense.num_parameters():,} parameters: held-out loss {loss(dense, held_out):.4f}")
    moe = ms.upcycle(
        dense, experts=args.experts, k=args.k, granularity=args.granularity, noise=args.noise, seed=args.seed
    )
    print(f"MoE, {moe.num_parameters():,} parameters: held-out loss {loss(moe, held_out):.4f}")

    train(dense, batches[args.dense_steps :], args.lr)
    print(f"dense, {args.steps} steps later: held-out loss {loss(dense, held_out):.4f}")
    balance = ms.BiasBalance(args.speed, add_bias=True).attach(ms.attach(moe))
    train(moe, batches[args.dense_steps :], args.lr, balance)
    print(f"MoE, {args.steps} steps later: held-out loss {loss(moe, held_out):.4f}")
    violations = (load.max() / load.mean() - 1 for load in balance.load.values())
    print("MaxVio of the last step by layer:", ", ".join(f"{violation:.2f}" for violation in violations))


def small() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, max_position_embeddings=WINDOW,
    )  # fmt: skip


def text_of(split: Split) -> torch.Tensor:
    """The four domains one after the other, as bytes."""
    text = "\n\n".join(document.text for name in DOMAINS for document in corpus(name, split))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def training_batches(count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Windows drawn at random from the whole; both models get the same ones in the same order."""
    text = text_of("train")
    starts = torch.randint(len(text) - WINDOW, (count, BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(WINDOW)].unbind()


def held_out_windows() -> torch.Tensor:
    """Windows spread evenly over documents that are not trained on."""
    text = text_of("held_out")
    starts = torch.linspace(0, len(text) - WINDOW, HELD_OUT).long()[:, None]
    return text[starts + torch.arange(WINDOW)]


def train(
    model: torch.nn.Module,
    batches: tuple[torch.Tensor, ...],
    lr: float,
    balance: ms.BiasBalance | None = None,
) -> None:
    """AdamW without a memory of what was before, so that both models go on alike; the rate rises, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / len(batches))
    )
    model.train()
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        rate.step()
        if balance is not None:
            balance.step()


@torch.inference_mode()
def loss(model: torch.nn.Module, held_out: torch.Tensor) -> float:
    """Nats per byte."""
    model.eval()
    return float(np.mean([model(input_ids=ids, labels=ids).loss.item() for ids in held_out.split(100)]))


if __name__ == "__main__":
    main()
