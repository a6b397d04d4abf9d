"""Adding to gradients that exist: done in place where autograd would add the same, and left to it everywhere else."""

import os
import threading
import time
from functools import partial

import pytest
import torch
from cases import leaves_of, problem
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moesaic.engine import batches, multiply, op
from moesaic.engine.accumulation import accumulation_targets
from moesaic.engine.cpu import cpu
from moesaic.engine.grouped import grouped
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


def accumulated(prepare, steps=2, dtype=torch.float32, **options):
    """Gradients of up and down after `steps` backwards of the engine and of the reference, and whether `.grad` was
    added to by the engine itself. `prepare(experts)` may put hooks or strange gradients there."""
    torch.manual_seed(0)
    x, ids, weights, experts = problem(30, 16, 8, dtype=dtype)
    plain = ExpertWeights(*(nn.Parameter(w.detach().clone()) for w in experts[:2]))
    finish = prepare(experts) or (lambda: None)
    own = []
    real = multiply.add_outer

    def spy(out, *args, accumulate, **kwargs):
        own.append(any(w.grad is not None and out.untyped_storage().data_ptr() == w.grad.untyped_storage().data_ptr()
                       for w in experts[:2]))  # fmt: skip
        return real(out, *args, accumulate=accumulate, **kwargs)

    multiply.add_outer = spy
    try:
        for step in range(steps):
            cpu(x, ids, weights, experts, ExpertSpec(), **options).square().sum().backward()
            reference(x.detach(), ids, weights.detach(), plain, ExpertSpec()).square().sum().backward()
            if step == 0:
                own.clear()
    finally:
        multiply.add_outer = real
        finish()
    for ours, theirs in zip(experts[:2], plain[:2], strict=True):
        loose = 1 if dtype == torch.float32 else 500
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=loose * 1e-4, atol=loose * 1e-5 * float(theirs.grad.abs().max())
        )
    return all(own)


def test_an_existing_gradient_is_added_to_in_place():
    assert accumulated(lambda _: None)


def test_a_gradient_added_to_in_place_is_not_what_a_graph_has_saved():
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    saved = [w.grad * nn.Parameter(torch.ones(())) for w in experts[:2]]
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    for product in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_a_gradient_hook_is_called_with_the_whole_gradient():
    seen = []

    def prepare(experts):
        experts.up.register_hook(lambda grad: seen.append(grad.clone()))
        experts.down.register_hook(lambda grad: seen.append(grad.clone()))

    assert not accumulated(prepare)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0].norm(), seen[2].norm())


def test_a_post_accumulate_hook_is_called():
    seen = []

    def prepare(experts):
        for w in experts[:2]:
            w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    assert not accumulated(prepare)
    assert len(seen) == 4


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_sees_every_gradient():
    with torch.autograd.set_detect_anomaly(True):
        assert not accumulated(lambda _: None)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout")
def test_a_strided_gradient_is_left_to_autograd():
    def prepare(experts):
        for w in experts[:2]:
            w.grad = torch.zeros_like(w).mT.contiguous().mT

    assert not accumulated(prepare)


def test_a_gradient_made_in_inference_mode_is_refused_as_by_torch():
    x, ids, weights, experts = problem(30, 16, 8)
    for w in experts[:2]:
        with torch.inference_mode():
            w.grad = torch.zeros_like(w)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()


def test_weights_used_twice_in_one_graph_get_both_gradients():
    x, ids, weights, experts = problem(30, 16, 8)
    experts.up.grad, experts.down.grad = torch.ones_like(experts.up), torch.ones_like(experts.down)

    def twice(run):
        return run(run(x, ids, weights, experts, ExpertSpec()), ids, weights, experts, ExpertSpec()).square().sum()

    expected = torch.autograd.grad(twice(reference), experts[:2])
    twice(cpu).backward()
    for w, grad in zip(experts[:2], expected, strict=True):
        torch.testing.assert_close(w.grad - 1, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", ["x", "up"])
def test_backward_to_some_inputs_leaves_other_gradients_alone(chosen):
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    before = {name: t.grad.clone() for name, t in {"x": x, "up": experts.up, "down": experts.down}.items()}
    loss = cpu(x, ids, weights, experts, ExpertSpec()).square().sum()
    loss.backward(inputs=[x if chosen == "x" else experts.up])
    for name, tensor in {"x": x, "up": experts.up, "down": experts.down}.items():
        torch.testing.assert_close(tensor.grad, before[name] * (2 if name == chosen else 1), rtol=1e-4, atol=1e-5)


def test_autograd_grad_leaves_gradients_alone():
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    before = experts.up.grad.clone()
    (grad,) = torch.autograd.grad(cpu(x, ids, weights, experts, ExpertSpec()).square().sum(), experts.up)
    assert torch.equal(experts.up.grad, before)
    torch.testing.assert_close(grad, before)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_that_was_made_with_a_graph_is_left_to_autograd():
    x, ids, weights, experts = problem(10, 16, 8, dtype=torch.float64)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward(create_graph=True)
    assert experts.up.grad.requires_grad
    first = experts.up.grad.detach().clone()
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    torch.testing.assert_close(experts.up.grad.detach(), 2 * first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hot_expert_in_pieces_is_added_to_gradients_that_exist(dtype):
    tokens = 2 * batches.PIECE_ROWS + 300
    x, weights, ids = torch.randn(tokens, 8).to(dtype), torch.rand(tokens, 1).to(dtype), torch.zeros(tokens, 1).long()
    ids[::3] = 1
    experts = ExpertWeights(*(nn.Parameter(torch.randn(2, *shape).to(dtype)) for shape in ((8, 8), (8, 4))))
    true = ExpertWeights(*(nn.Parameter(w.detach().double()) for w in experts[:2]))
    for times in (1, 2):
        cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
        grouped(x.double(), ids, weights.double(), true, ExpertSpec()).sum().backward()
        for ours, exact in zip(experts[:2], true[:2], strict=True):
            error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
            assert error < times * (1e-5 if dtype == torch.float32 else 1e-2)


def test_bfloat16_gradients_accumulate_in_place_too():
    assert accumulated(lambda _: None, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("graph", [False, True])
def test_a_weight_frozen_after_its_forward_keeps_its_gradient(graph):
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    loss = cpu(x, ids, weights, experts, ExpertSpec()).sum()
    experts.up.requires_grad_(False)
    before, down = experts.up.grad.clone(), experts.down.grad.clone()
    loss.backward(create_graph=graph)
    assert torch.equal(experts.up.grad, before)
    torch.testing.assert_close(experts.down.grad.detach(), 2 * down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_parameter_as_both_matrices_gets_both_gradients(dtype):
    """A hot expert's sum in 16 bits is written back whole: of two such sums the second would undo the first."""
    tokens, spec = 2 * batches.PIECE_ROWS + 300, ExpertSpec("relu", gated=False)
    x, weights, ids = torch.randn(tokens, 8).to(dtype), torch.rand(tokens, 1).to(dtype), torch.zeros(tokens, 1).long()
    both = nn.Parameter(torch.randn(2, 8, 8).to(dtype) / 3)
    exact = nn.Parameter(both.detach().double())
    for _ in range(2):
        cpu(x, ids, weights, ExpertWeights(both, both), spec).sum().backward()
    grouped(x.double(), ids, weights.double(), ExpertWeights(exact, exact), spec).sum().backward()
    error = (both.grad.double() - 2 * exact.grad).norm() / exact.grad.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_two_threads_add_one_after_the_other(monkeypatch):
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    once = experts.up.grad.clone()
    inside, most = [], []
    real = op.ACCUMULATING["cpu"]

    def slow(*args):
        inside.append(threading.get_ident())
        time.sleep(0.1)  # lets the other thread in, where nothing holds it
        most.append(len(inside))
        returned = real(*args)
        inside.pop()
        return returned

    monkeypatch.setitem(op.ACCUMULATING, "cpu", slow)
    losses = [cpu(x, ids, weights, experts, ExpertSpec()).square().sum() for _ in range(2)]
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
    torch.testing.assert_close(experts.up.grad, 3 * once)


def retained(loss):
    loss.backward(retain_graph=True)
    loss.backward()


def scaled(loss):
    torch.amp.GradScaler("cpu", init_scale=2.0).scale(loss).backward()


@pytest.mark.parametrize("how", [retained, scaled])
@pytest.mark.parametrize("saved", ["kept", "saved_on_cpu"])
def test_twice_a_backward_adds_twice_its_gradients(how, saved):
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    before = [leaf.grad.clone() for leaf in leaves_of(x, weights, experts)]
    around = torch.autograd.graph.save_on_cpu() if saved == "saved_on_cpu" else torch.enable_grad()
    with around:
        loss = cpu(x, ids, weights, experts, ExpertSpec()).square().sum()
    how(loss)
    for leaf, grad in zip(leaves_of(x, weights, experts), before, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * grad, rtol=1e-4, atol=1e-5)


class Only(torch.nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.up, self.down = (torch.nn.Parameter(w.detach().clone()) for w in experts[:2])

    def forward(self, x, ids, weights):
        return cpu(x, ids, weights, ExpertWeights(self.up, self.down), ExpertSpec())


def one_rank(rank: int, rendezvous: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    kept = []
    for wrapper, wrap in WRAPPERS.items():
        torch.manual_seed(0)
        module = Only(problem()[3])
        wrapped = wrap(module)
        kept.append(wrapped)
        torch.manual_seed(rank)
        for step in range(3):  # two micro-batches without an exchange, then one with it
            x, ids, weights, _ = problem()
            if wrapper == "FSDP2":
                wrapped.set_requires_gradient_sync(step == 2)
            with wrapped.no_sync() if wrapper != "FSDP2" and step < 2 else torch.enable_grad():
                wrapped(x, ids, weights).square().sum().backward()
        grad = module.up.grad
        results[rank, wrapper] = (grad.full_tensor() if wrapper == "FSDP2" else grad).tolist()
    torch.distributed.barrier()
    # torch 2.13 can wait for ever when `kept` goes: a reducer joins a thread of gloo that waits for this one's GIL
    os._exit(0)


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP, views": partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True),
    "FSDP2": fully_shard,
}


def test_two_ranks_get_the_mean_of_their_accumulated_gradients(tmp_path):
    """Adding into `.grad` beside the hooks of DistributedDataParallel, which live where Python cannot see them, and
    between the micro-batches of FSDP2, which keeps whole gradients until it exchanges them."""
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(one_rank, (str(tmp_path / "rendezvous"), results), nprocs=2)
        found = {which: torch.tensor(grad) for which, grad in results.items()}
    torch.manual_seed(0)
    _, _, _, experts = problem()
    total = torch.zeros_like(experts.up)
    for rank in range(2):
        torch.manual_seed(rank)
        for _ in range(3):
            x, ids, weights, _ = problem()
            loss = reference(x, ids, weights, experts, ExpertSpec()).square().sum()
            total += torch.autograd.grad(loss, experts.up)[0]
    for wrapper in WRAPPERS:
        torch.testing.assert_close(found[0, wrapper], found[1, wrapper], msg=f"{wrapper}: {{}}".format)
        torch.testing.assert_close(found[0, wrapper], total / 2, rtol=1e-4, atol=1e-5, msg=f"{wrapper}: {{}}".format)


def test_a_gradient_that_lies_in_a_gradient_of_the_weights_is_read_before_anything_is_added():
    x, ids, weights, experts = problem(384, 32, 48, n_experts=8)
    x.data, experts.down.data = torch.randn(384, 32), torch.randn(8, 32, 48)
    grads = []
    for engine in (cpu, reference):
        for leaf in leaves_of(x, weights, experts):
            leaf.grad = None
        engine(x, ids, weights, experts, ExpertSpec()).sum().backward()
        out = engine(x, ids, weights, experts, ExpertSpec())
        out.backward(experts.down.grad.view(384, 32))
        grads.append([leaf.grad for leaf in leaves_of(x, weights, experts)])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("what", ["tokens", "routing weights"])
def test_inputs_that_lie_in_a_gradient_of_the_weights_are_read_before_anything_is_added(what):
    """1152 rows are several batches: the first would change what the others read."""
    x, ids, weights, experts = problem(384, 32, 48, n_experts=8)
    experts.down.data = torch.randn(8, 32, 48)
    grads = []
    for engine in (cpu, reference):
        for leaf in experts[:2]:
            leaf.grad = None
        engine(x, ids, weights, experts, ExpertSpec()).sum().backward()
        there = experts.down.grad.flatten()
        tokens = there[: 384 * 32].view(384, 32) if what == "tokens" else x.detach()
        scales = there[: 384 * 3].view(384, 3) if what == "routing weights" else weights.detach()
        engine(tokens, ids, scales, experts, ExpertSpec()).sum().backward()
        grads.append([experts.up.grad, experts.down.grad])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu"])
def test_gradients_are_added_to_where_what_was_saved_comes_back_as_another_tensor(monkeypatch, around):
    x, ids, weights, experts = problem(30)
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    once, places = [w.grad.clone() for w in experts[:2]], [w.grad.data_ptr() for w in experts[:2]]
    added = []
    real = op.ACCUMULATING["cpu"]
    monkeypatch.setitem(op.ACCUMULATING, "cpu", lambda *args: added.append(args[-1]) or real(*args))
    if around == "checkpoint":
        out = checkpoint(cpu, x, ids, weights, experts, ExpertSpec(), use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            out = cpu(x, ids, weights, experts, ExpertSpec())
    out.sum().backward()
    assert [[target.data_ptr() for target in into] for into in added] == [places]
    for weight, grad in zip(experts[:2], once, strict=True):
        torch.testing.assert_close(weight.grad, 2 * grad)


def test_a_mode_sees_the_operator_of_the_backward_also_where_gradients_exist():
    x, ids, weights, experts = problem(9)
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        out = cpu(x, ids, weights, experts, ExpertSpec()).sum()
        seen.clear()
        with Names():
            out.backward()
        assert "moesaic::experts_backward" in seen


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_nobody_is_left_to_ask_where_all_was_frozen_after_the_forward():
    x, ids, weights, experts = problem(5)
    frozen = ExpertWeights(experts.up, experts.down.detach())
    loss = cpu(x.detach(), ids, weights.detach(), frozen, ExpertSpec()).sum()
    experts.up.requires_grad_(False)
    loss.backward(create_graph=True)
    assert experts.up.grad is None


def test_gradients_that_lie_in_one_bucket_are_added_to():
    """As DistributedDataParallel(gradient_as_bucket_view=True) lays them."""
    x, ids, weights, experts = problem(20)
    expected = torch.autograd.grad(reference(x, ids, weights, experts, ExpertSpec()).sum(), experts[:2])
    bucket = torch.zeros(experts.up.numel() + experts.down.numel())
    experts.up.grad = bucket[: experts.up.numel()].view_as(experts.up)
    experts.down.grad = bucket[experts.up.numel() :].view_as(experts.down)
    places = [weight.grad.data_ptr() for weight in experts[:2]]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "accumulation_targets", lambda *a: seen.append(accumulation_targets(*a)) or seen[-1])
        cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    assert [target.data_ptr() for target in seen[0]] == places == [weight.grad.data_ptr() for weight in experts[:2]]
    torch.testing.assert_close(bucket, torch.cat([grad.flatten() for grad in expected]), rtol=1e-4, atol=1e-5)
