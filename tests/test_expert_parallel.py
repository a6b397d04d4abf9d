"""transformers' own expert parallelism over two processes: what is told under it is what one process tells, or nothing.

A file of its own, so that each process starts with few imports.
"""

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf

import moesaic as ms
from moesaic.hf.modules import moe_layers
from moesaic.train.monitor.run_log import read_log

E, K = 8, 2
DEALS_INSIDE = find_spec("transformers.distributed.expert_parallel") is not None
SHARED = {"tp_size": 2, "ep_size": 2}  # both ranks run the same batch
OWN = {"fsdp_size": 2, "ep_size": 2}
WAYS = {  # and how our engines come to compute
    "own batches": (OWN, "not"), "own batches, ours": (OWN, "by name"),
    "a shared batch": (SHARED, "not"), "a shared batch, ours": (SHARED, "attached"),
}  # fmt: skip
pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers would need a GPU for each rank")


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = hf.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=E, num_experts_per_tok=K, n_group=2, topk_group=2,
        first_k_dense_replace=0, pad_token_id=2,
    )  # fmt: skip
    model = hf.DeepseekV3ForCausalLM(config)
    for layer in moe_layers(model):
        torch.nn.init.normal_(layer.router.weight, std=0.5)
        layer.bias.normal_(0, 0.05)
    model.save_pretrained(folder)


def load_model(folder: Path, **options) -> torch.nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder, **{"experts_implementation": "eager"} | options)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def halves() -> list[dict[str, torch.Tensor]]:
    return [{name: value.chunk(2)[rank] for name, value in batch().items()} for rank in range(2)]


def recorded(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is recorded of a forward, and the logits where others are chosen than the model would."""
    with torch.no_grad(), ms.record(model.eval(), "scores") as rec:
        model(**given)
    trace = rec.trace
    with torch.no_grad(), ms.replay(model, dataclasses.replace(trace, picks=(trace.picks + 3) % E)):
        replayed = model(**given).logits
    return {"picks": trace.picks, "weights": trace.weights, "logits": trace.logits, "replayed": replayed}


def learnt(model: torch.nn.Module, given: dict[str, torch.Tensor], log: Path) -> dict[str, torch.Tensor]:
    """What one step of training counts, and the gradients of the first layer."""
    balance, loss = ms.BiasBalance(0.01).attach(model), ms.BalanceLoss("global_batch", 0.5).attach(model)
    monitor = ms.LoadMonitor(log, loads=True).attach(model)
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    for each in (balance, loss, monitor):
        each.step()
    monitor.detach()
    first = moe_layers(model)[0]
    grads = {"router's": first.router.weight.grad, "experts'": first.experts.gate_up_proj.grad}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
    return {"load": torch.stack(list(balance.load.values())), "bias": first.bias.clone()} | whole


def one_rank(rank: int, folder: Path, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    from transformers.distributed import DistributedConfig

    if not DEALS_INSIDE:
        model = load_model(folder, distributed_config=DistributedConfig(tp_size=2, enable_expert_parallel=True))
        results[rank] = refusals(model, folder)
    for way, (sizes, ours) in WAYS.items() if DEALS_INSIDE else ():
        named = {"experts_implementation": "moesaic"} if ours == "by name" else {}
        model = load_model(folder, distributed_config=DistributedConfig(**sizes), **named)
        model = ms.attach(model) if ours == "attached" else model
        given = batch() if sizes is SHARED else halves()[rank]
        told = recorded(model, given) | learnt(model, given, folder / f"{way}.jsonl")
        results[rank, way] = {name: value.numpy() for name, value in told.items()}
    torch.distributed.destroy_process_group()


def refusals(model: torch.nn.Module, folder: Path) -> list[str]:
    """What each of them says to this model."""
    trace, said = ms.load(folder / "trace.safetensors"), []
    for watched in (
        lambda: ms.record(model).__enter__(),
        lambda: ms.replay(model, trace).__enter__(),
        lambda: ms.BiasBalance().attach(model),
        lambda: ms.BalanceLoss("switch", 0.1).attach(model),
        lambda: ms.LoadMonitor(folder / "log").attach(model),
    ):
        try:
            watched()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_two_ranks_tell_what_one_does_or_refuse(tmp_path):
    save_model(tmp_path)
    model = load_model(tmp_path)
    with ms.record(model) as rec:
        model(**batch())
    rec.trace.save(tmp_path / "trace.safetensors")
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(one_rank, (tmp_path, results), nprocs=2)
        results = dict(results)
    if not DEALS_INSIDE:
        assert all("its experts are spread over ranks" in said for rank in range(2) for said in results[rank])
        return
    of_halves, of_all = [recorded(model, half) for half in halves()], recorded(model, batch())
    of_all |= learnt(model, batch(), tmp_path / "one.jsonl")
    for way, (sizes, _) in WAYS.items():
        for rank in range(2):
            expected = of_all if sizes is SHARED else of_all | of_halves[rank]
            for name, value in results[rank, way].items():
                exact = {"rtol": 0, "atol": 0} if name in ("picks", "load", "bias") else {"rtol": 1e-4, "atol": 1e-6}
                told = torch.from_numpy(value)
                torch.testing.assert_close(told, expected[name], **exact, msg=f"{way}, rank {rank}: {name}")
        logs = [read_log(tmp_path / f"{log}.jsonl").steps for log in (way, "one")]
        (one,), (other,) = ([{k: line[k] for k in ("tokens", "load")} for line in log] for log in logs)
        assert one == other
    assert of_all["load"].sum(1).tolist() == [22 * K] * 2
