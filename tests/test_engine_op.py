"""`moesaic::experts` as one opaque operator: compiled, exported, under autocast, checkpointed, opcheck'ed."""

import pytest
import torch
from cases import problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moesaic as ms
from moesaic.engine import op
from moesaic.engine.cpu import cpu
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.tracing import constant_in_graphs
from moesaic.types import ExpertWeights


def layer(dtype=torch.float32, **options):
    config = ms.MoEConfig(
        hidden_size=32, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        n_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return ms.DeepseekV3MoE(config, dtype=dtype, **options)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def gradients(module, run, x, steps=1):
    """(output, gradients of x and of every parameter) after `steps` backwards through `run`."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    for _ in range(steps):
        out = run(x)
        out.float().square().sum().backward()
    return out.detach(), [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"batch_invariant": True}], ids=str)
def test_the_layer_compiles_whole_forward_and_backward(dtype, options):
    module = layer(dtype, **options)
    x = torch.randn(2, 9, 32).to(dtype)
    out, grads = gradients(module, module, x, steps=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    again, compiled_grads = gradients(module, compiled, x, steps=2)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(again, out, rtol=tolerance, atol=tolerance)
    for ours, eager in zip(compiled_grads, grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance * float(eager.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), out, rtol=tolerance, atol=tolerance)


@pytest.mark.compile
def test_a_graph_returns_the_gradients_of_weights_and_autograd_adds_them(monkeypatch):
    module, x = layer(), torch.randn(9, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    _, once = gradients(module, compiled, x)
    monkeypatch.setitem(op.ACCUMULATING, "cpu", lambda *_: pytest.fail("a graph's backward added in place"))
    _, twice = gradients(module, compiled, x, steps=2)
    for two, one in zip(twice, once, strict=True):
        torch.testing.assert_close(two, 2 * one)
    with pytest.raises(pytest.fail.Exception, match="added in place"):
        gradients(module, module, x, steps=2)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_takes_column_major_tokens():
    x, ids, weights, experts = problem(9)
    x = x.detach().T.contiguous().T.requires_grad_()

    def loss(x, weights, up, down):
        return cpu(x, ids, weights, ExpertWeights(up, down), ExpertSpec()).square().sum()

    given = (x, weights, *experts[:2])
    expected = torch.autograd.grad(loss(*given), given)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*given), given)
    for ours, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_another_number_of_tokens_needs_one_more_graph_at_most():
    module, graphs = layer().eval(), []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for tokens in (5, 9, 17, 33):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) <= 2
    assert any("moesaic.experts" in str(node.target) for node in graphs[-1].graph.nodes)


@pytest.mark.compile
def test_the_layer_exports_with_the_operator_inside():
    module, x = layer().eval(), torch.randn(6, 32)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert any(node.target is torch.ops.moesaic.experts.default for node in program.graph.nodes)
    for tokens in (2, 6, 31):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that torch 2.15 reads of what it makes of leaves itself
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", ["nothing", "order", "hidden"])
def test_what_graphs_are_told_about_the_operator_is_so(dtype, keep):
    """torch.library.opcheck: the schema, the fake's shapes, dtypes and strides, autograd's registration."""
    x, ids, weights, experts = problem(7, dtype=dtype)
    args = (x, ids, weights, *experts, *ExpertSpec().fields, keep, False)
    torch.library.opcheck(torch.ops.moesaic.experts.default, args)
    with torch.no_grad():
        out, hidden, order, counts = torch.ops.moesaic.experts(*args[:-2], "hidden", False)
        given = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    back = (
        out,
        given[0],
        given[2],
        *given[3:7],
        hidden,
        order,
        counts,
        *ExpertSpec().fields,
        False,
        [True, True, True, False, *[False] * 2],
    )
    torch.library.opcheck(torch.ops.moesaic.experts_backward.default, back)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("keep", ["nothing", "order", "hidden"])
def test_an_operator_trains_whatever_it_kept(tokens, keep):
    """A graph that was made for inference keeps nothing, and of one token makes no plan, and may be trained yet."""
    x, ids, weights, experts = problem(tokens)
    out, *_ = torch.ops.moesaic.experts(x, ids, weights, *experts, *ExpertSpec().fields, keep, False)
    grads = torch.autograd.grad(out.square().sum(), [x, weights, *experts[:2]])
    expected = reference(x, ids, weights, experts, ExpertSpec()).square().sum()
    for ours, theirs in zip(grads, torch.autograd.grad(expected, [x, weights, *experts[:2]]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_program_keeps_nothing_and_trains_yet(tokens, strict):
    module, x = layer().eval(), torch.randn(tokens, 32)
    program = torch.export.export(module, (x,), strict=strict)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.moesaic.experts.default]
    assert [node.args[-2] for node in calls] == ["nothing"]
    run = program.module()
    out, grads = gradients(module, module, x)
    again, of_program = gradients(run, run, x)
    torch.testing.assert_close(again, out)
    by_name = dict(zip([name for name, _ in run.named_parameters()], of_program[1:], strict=True))
    for (name, _), expected in zip(module.named_parameters(), grads[1:], strict=True):
        torch.testing.assert_close(by_name[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_program[0], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients_also_where_they_exist(reentrant):
    module, x = layer(), torch.randn(11, 32)
    _, plain = gradients(module, module, x, steps=2)
    _, checkpointed = gradients(module, lambda x: checkpoint(module, x, use_reentrant=reentrant), x, steps=2)
    for ours, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_another_thread_exports_meanwhile_is_nothing_to_a_training_step(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # as it says in every thread then
    x, ids, weights, experts = problem(5)
    assert cpu(x, ids, weights, experts, ExpertSpec()).grad_fn.keep == "hidden"


def test_the_mark_for_dynamo_is_the_one_that_torch_sets():
    ours = constant_in_graphs(lambda: None)
    assert vars(ours) == vars(torch.compiler.assume_constant_result(lambda: None))


class Subclass(torch.Tensor):
    pass


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def as_subclass(x):
    return x.as_subclass(Subclass)


def negated_view(x):
    return (-x)._neg_view()


def same(x):
    return x


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11
@pytest.mark.parametrize(
    ("around", "tokens", "through_operator"),
    [
        pytest.param(torch.no_grad, same, False, id="no_grad"),
        pytest.param(torch.inference_mode, same, False, id="inference_mode"),
        pytest.param(torch.no_grad, torch.nn.Parameter, False, id="a Parameter"),
        pytest.param(torch.enable_grad, torch.nn.Parameter, True, id="gradients"),
        pytest.param(torch.no_grad, as_subclass, True, id="a subclass"),
        pytest.param(torch.no_grad, negated_view, True, id="a view that is negated when read"),
        pytest.param(Silent, same, True, id="a dispatch mode"),
        pytest.param(lambda: torch.device("meta"), same, True, id="a default device"),
        pytest.param(torch.profiler.profile, same, True, id="a profiler"),
    ],
)
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_inference_that_nobody_watches_leaves_the_operator_out(monkeypatch, n_tokens, around, tokens, through_operator):
    x, ids, weights, experts = problem(n_tokens)
    expected = cpu(x, ids, weights, experts, ExpertSpec())
    x, weights, experts = x.detach(), weights.detach(), ExpertWeights(*(w.detach() for w in experts[:2]))
    calls = []
    forward = op.FORWARD["cpu"]
    monkeypatch.setitem(op.FORWARD, "cpu", lambda *args, **options: calls.append(options) or forward(*args, **options))
    x = tokens(x)
    with around():
        out = cpu(x, ids, weights, experts, ExpertSpec())
    assert out.device.type == "cpu"
    assert calls == ([] if through_operator else [{"keep": "nothing", "batch_invariant": False}])
    torch.testing.assert_close(out.detach(), expected.detach())


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_kernels_keep_no_book_of_views_and_what_they_give_is_a_tensor_like_any(monkeypatch, n_tokens):
    x, ids, weights, experts = problem(n_tokens)
    views, activate, back = [], ExpertSpec.activate, ExpertSpec.activate_backward
    monkeypatch.setattr(ExpertSpec, "activate", lambda *a: views.append(a[1][:1]._is_view()) or activate(*a))
    monkeypatch.setattr(ExpertSpec, "activate_backward", lambda *a: views.append(a[1][:1]._is_view()) or back(*a))
    with torch.no_grad():
        inferred = cpu(x, ids, weights, experts, ExpertSpec())
    out = cpu(x, ids, weights, experts, ExpertSpec())
    out.square().sum().backward()
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    assert views == [False] * 5, "forward, forward and backward, and the backward that adds"
    scale = nn.Parameter(torch.ones(()))
    (inferred * scale).sum().backward()  # saved, which a tensor of inference mode cannot be
    torch.testing.assert_close(scale.grad, inferred.sum())
    assert out[:1]._is_view()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_the_operator_is_there_under_autocast_and_in_a_traced_graph(monkeypatch):
    x, ids, weights, experts = problem(9)
    x, weights, experts = x.detach(), weights.detach(), ExpertWeights(*(w.detach() for w in experts[:2]))
    monkeypatch.delitem(op.FORWARD, "cpu")
    with torch.no_grad():
        expected = cpu(x, ids, weights, experts, ExpertSpec())
        monkeypatch.setitem(op.FORWARD, "cpu", None)  # which nobody can call
        with torch.autocast("cpu", torch.bfloat16):
            out = cpu(x, ids, weights, experts, ExpertSpec())
        traced = torch.jit.trace(lambda x: cpu(x, ids, weights, experts, ExpertSpec()), x, check_trace=False)
    assert 0 < float((out - expected).norm() / expected.norm()) < 1e-2
    assert "moesaic::experts" in str(traced.graph)
    torch.testing.assert_close(traced(x.flip(1)), reference(x.flip(1), ids, weights, experts, ExpertSpec()))


def test_autocast_keeps_the_dtype_of_tokens_and_of_gradients():
    x, ids, weights, experts = problem(40, 64, 32)
    exact = reference(x, ids, weights, experts, ExpertSpec())
    with torch.autocast("cpu", torch.bfloat16):
        out = cpu(x, ids, weights, experts, ExpertSpec())
    out.square().sum().backward()
    assert out.dtype == x.grad.dtype == experts.up.grad.dtype == torch.float32
    expected = torch.autograd.grad(exact.square().sum(), experts.up)[0]
    assert 0 < float((out - exact).detach().norm() / exact.detach().norm()) < 1e-2
    assert float((experts.up.grad - expected).norm() / expected.norm()) < 2e-2


def test_autocast_takes_bfloat16_tokens_to_float32_experts_which_else_is_refused():
    x, ids, weights, experts = problem(10)
    narrow = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = cpu(narrow, ids, weights, experts, ExpertSpec())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(x, ids, weights, experts, ExpertSpec()), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match=r"cast one, or use torch\.autocast"):
        cpu(narrow, ids, weights, experts, ExpertSpec())


def test_float16_autocast_computes_in_float16():
    x, ids, weights, experts = problem(9)
    with torch.autocast("cpu", torch.float16):
        out = cpu(x, ids, weights, experts, ExpertSpec())
    halves = ExpertWeights(*(w.detach().half() for w in experts[:2]))
    expected = cpu(x.detach().half(), ids, weights.detach(), halves, ExpertSpec()).float()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    out.square().sum().backward()
    assert x.grad.dtype == experts.up.grad.dtype == torch.float32


class Wrapper(torch.Tensor):
    """A tensor with parts, as torchao's quantized ones: it runs the operators it knows, and ours is none of them."""

    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} is not known")


def test_a_tensor_that_cannot_run_the_operator_is_named():
    x, ids, weights, experts = problem(9)
    with pytest.raises(ValueError, match="down: the operator of the experts cannot run on a Wrapper"):
        cpu(x, ids, weights, experts._replace(down=Wrapper(experts.down.detach())), ExpertSpec())
