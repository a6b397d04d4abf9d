"""`moesaic::route` as an operator: differentiated, compiled, transformed, refused. Its kernel is Triton's."""

import pytest
import torch
from cases import no_waiting, v3

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

import moesaic.layer.router as router_module
from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.engine import route_op
from moesaic.engine.route_op import RouteSpec, run_route, serves
from moesaic.families import PRESETS
from moesaic.layer.router import Router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's 0 / 0 in the interpreter, not chosen
CONFIGS = {
    "V3": v3(16, 4, 2, 4),
    "softmax": v3(12, 1, 1, 3, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    "gpt-oss": v3(8, 1, 1, 4, scoring_func="softmax", score_after_topk=True, topk_method="greedy"),
    "V4": v3(9, 3, 2, 4, scoring_func="sqrtsoftplus"),
}


@pytest.fixture(autouse=True)
def _kernels_on_this_device():
    """Where there is no GPU, the kernels stand in as those of the CPU, which has none of its own."""
    torch._dynamo.reset()
    if DEVICE == "cuda":
        yield
        return
    with torch.library._scoped_library("moesaic", "IMPL") as library:
        library.impl("route", route_op._route_cuda, "CPU")
        library.impl("route_backward", route_op._route_backward_cuda, "CPU")
        yield


def draw(config: MoEConfig, n_tokens: int = 3):
    n_experts, k = config.n_routed_experts, config.num_experts_per_tok
    logits = torch.randn(n_tokens, n_experts, device=DEVICE, requires_grad=True)
    replay = torch.stack([torch.randperm(n_experts)[:k] for _ in range(n_tokens)])
    replay[0, 0] = n_experts
    return logits, torch.randn(n_experts, device=DEVICE), replay.to(DEVICE)


class Called(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autograd_goes_through_the_operator(config, replayed):
    logits, bias, replay = draw(config)
    grad = torch.randn(replay.shape, device=DEVICE)
    options = {"replay": replay} if replayed else {}
    expected = rules.route(logits, bias, config, **options)
    (expected_grad,) = torch.autograd.grad(expected.weights, logits, grad)
    with Called() as called:
        ours = run_route(logits, bias, config, **options)
        ours.weights.backward(grad)
    assert {"moesaic::route", "moesaic::route_backward"} <= set(called.names)
    assert ours.logits is logits
    assert ours.weights.requires_grad
    assert not ours.expert_ids.requires_grad
    assert torch.equal(ours.expert_ids, expected.expert_ids)
    torch.testing.assert_close(ours.weights, expected.weights, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_gradients_are_those_of_the_rules(config):
    logits, bias, _ = draw(config)
    answers = []
    for implementation in (rules.route, run_route):
        weights = implementation(logits, bias, config).weights
        (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
        answers.append((grad, *torch.autograd.grad(grad.pow(3).sum(), logits)))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-6)


def test_a_hook_on_the_logits_runs_once_under_create_graph():
    config = CONFIGS["V3"]
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    answers = []
    for implementation in (rules.route, run_route):
        logits = x.sin()
        logits.register_hook(lambda grad: 2 * grad)
        weights = implementation(logits, None, config).weights
        answers.append(torch.autograd.grad(weights.square().sum(), x, create_graph=True)[0])
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)


def test_gradients_may_come_in_batches():
    config = CONFIGS["softmax"]
    logits, _, _ = draw(config)
    several = torch.randn(2, 3, 3, device=DEVICE)
    answers = [
        torch.autograd.grad(implementation(logits, None, config).weights, logits, several, is_grads_batched=True)[0]
        for implementation in (rules.route, run_route)
    ]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch, when it first loads jvp
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_of_functions_take_the_rules(transform):
    config = CONFIGS["V3"]
    layers = torch.randn(2, 3, 16, device=DEVICE)

    def answer(implementation):
        def total(logits):
            return implementation(logits, None, config).weights.square().sum(-1)

        if transform == "vmap":
            return torch.func.vmap(total)(layers)
        if transform == "grad":
            return torch.func.grad(lambda logits: total(logits).sum())(layers[0])
        return torch.func.jvp(total, (layers[0],), (layers[1],))[1]

    torch.testing.assert_close(answer(run_route), answer(rules.route))


@pytest.mark.compile
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_graph_holds_forward_and_backward(config, replayed):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    def loss(logits, bias, replay):
        routing = run_route(logits, bias, config, replay=replay if replayed else None)
        return (routing.weights * torch.arange(1.0, 1 + routing.weights.shape[1], device=DEVICE)).sum()

    for backend in ("aot_eager", count):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
        for n_tokens in (3, 5):
            logits, bias, replay = draw(config, n_tokens)
            (expected,) = torch.autograd.grad(loss(logits, bias, replay), logits)
            (ours,) = torch.autograd.grad(compiled(logits, bias, replay), logits)
            torch.testing.assert_close(ours, expected)
    assert len(graphs) == 1
    assert "moesaic.route" in str(graphs[0].code)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that torch 2.15 reads of what it makes of leaves itself
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_graphs_are_told_about_the_operator_is_so(dtype, replayed):
    """torch.library.opcheck: the schema, the fake's shapes, dtypes and strides, autograd's registration."""
    config = CONFIGS["V3"]
    logits, bias, replay = draw(config)
    logits = logits.detach().to(dtype).requires_grad_()
    args = (logits, bias, replay if replayed else None, *RouteSpec.of(config))
    torch.library.opcheck(torch.ops.moesaic.route.default, args)
    column_major = logits.detach().T.contiguous().T
    back = (torch.randn(3, 4, device=DEVICE), column_major, replay, *RouteSpec.of(config))
    torch.library.opcheck(torch.ops.moesaic.route_backward.default, back)


def test_what_is_not_served_is_routed_by_the_rules():
    config = CONFIGS["V3"]
    logits, bias, replay = (t.detach() for t in draw(config))
    model = v3(16, 4, 2, 4, score_dtype="model")
    assert serves(logits, bias, config, None)
    assert serves(logits, None, model, replay)
    assert serves(logits.bfloat16(), bias, config, replay)
    refused = [
        (logits.double(), None, config, None),
        (logits.half(), bias, model, None),
        (logits, bias.double(), config, None),
        (logits, bias[:1], config, None),
        (logits, bias.expand(3, -1) + torch.randn(3, 16), config, None),
        (logits, None, v3(16, 4, 2, 4, topk_method="balanced"), None),
    ]
    for *inputs, refused_replay in refused:
        assert not serves(*inputs, refused_replay)
        with Called() as called:
            ours = run_route(*inputs)
        expected = rules.route(*inputs)
        assert "moesaic::route" not in called.names
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with pytest.raises(ValueError, match=r"replay has shape \(2, 4\), not \[T, K\] = \(3, 4\): give one row a token"):
        run_route(logits, None, config, replay=replay[:2])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_spec_says_all_that_weighing_reads(preset):
    """Back from the operator's arguments to a config that weighs the same: what create_graph is computed by."""
    config = MoEConfig.preset(preset)
    again = RouteSpec.of(config).config(config.n_routed_experts)
    logits = torch.randn(4, config.n_routed_experts)
    expected = rules.route(logits, torch.randn(config.n_routed_experts), config)
    assert torch.equal(rules.route(logits, None, again, replay=expected.expert_ids).weights, expected.weights)


def test_a_router_trains_the_same_through_the_operator(monkeypatch):
    """Both ways to the gate's weight: through the weights, and through the logits that balancing losses read."""
    router = Router(v3(16, 4, 2, 4, weights_dtype="model"), dtype=torch.bfloat16, device=DEVICE)
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16, device=DEVICE)

    def step():
        router.zero_grad()
        routing = router(x)
        (routing.weights.float().square().sum() + routing.logits.logsumexp(-1).square().sum()).backward()
        return routing.expert_ids, routing.weights.detach(), router.load.clone(), router.weight.grad.float()

    monkeypatch.setattr(router_module, "run_route", rules.route)
    ids, weights, load, grad = step()
    monkeypatch.setattr(router_module, "run_route", run_route)
    monkeypatch.setattr(router_module, "route", run_route)
    ours = step()
    assert torch.equal(ours[0], ids)
    assert torch.equal(ours[2], load)
    torch.testing.assert_close(ours[1], weights)
    torch.testing.assert_close(ours[3], grad, rtol=2e-2, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("training", [False, True])
def test_a_router_on_a_gpu_takes_the_operator_and_waits_for_nothing(training):
    router = Router(CONFIGS["V3"], device=DEVICE).train(training)
    x = torch.randn(7, 32, device=DEVICE)
    router(x).weights.sum().backward()  # compiles the kernels
    torch.cuda.synchronize()
    with no_waiting(), Called() as called:
        router(x).weights.sum().backward()
    assert {"moesaic::route", "moesaic::route_backward"} <= set(called.names)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_graph_of_the_gpu_replays_the_router():
    router = Router(CONFIGS["V3"], device=DEVICE).eval().requires_grad_(False)
    x = torch.randn(7, 32, device=DEVICE)
    router(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router(x)
    x.normal_()
    graph.replay()
    expected = router(x)
    assert torch.equal(captured.expert_ids, expected.expert_ids)
    assert torch.equal(captured.weights, expected.weights)
