"""The GPU engine as a whole: through the operator and autograd, against the reference engine in float64."""

import weakref
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import triton_cases
from triton_cases import DEVICE, ROUTINGS, SPECS, close, interpreted_operator, poisoned  # noqa: F401

from moesaic.engine import op, select
from moesaic.engine import triton as room
from moesaic.engine.op import Gradients, run_experts
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton import experts as engine
from moesaic.engine.triton.blocks import INTERPRETED, Blocks, Tiles
from moesaic.engine.triton.experts import backward, forward
from moesaic.types import ExpertWeights

# one tile wide: several are in test_triton_ops.py, and here where INTERPRETED is taken, by which these are two and one
problem = partial(triton_cases.problem, d=21, i=11)
every_spec = pytest.mark.parametrize("spec", SPECS)
every_routing = pytest.mark.parametrize("routing", ROUTINGS)


@pytest.fixture(autouse=True)
def _on_our_kernels(poisoned, monkeypatch):  # noqa: F811, ARG001
    monkeypatch.setattr(engine, "INTERPRETED", Tiles(*[Blocks(16, 32, 32)] * 4))  # half as long as tiles of 16
    with interpreted_operator():
        yield


def leaves_of(p):
    """(tokens, weights, matrices and biases that there are), asking for gradients."""
    tensors = [p.tokens, p.weights, *p.experts]
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def run(p, leaves, **options):
    tokens, weights, *matrices = leaves
    return run_experts(tokens, p.expert_ids, weights, ExpertWeights(*matrices), p.spec, **options)


def expected(p):
    """Result and gradients by the reference in float64."""
    wide = p.to(torch.float64)
    leaves = leaves_of(wide)
    out = reference(
        leaves[0].cpu(),
        p.expert_ids.cpu(),
        leaves[1].cpu(),
        ExpertWeights(*(None if t is None else t.cpu() for t in leaves[2:])),
        p.spec,
    )
    asked = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, asked, wide.grad.cpu(), allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(asked, grads, strict=True)]


def without_absent(p, grads):
    """The reference multiplies a sentinel's weight by nothing: its gradient is 0, not NaN."""
    grads[1] = grads[1].masked_fill((p.expert_ids >= len(p.experts.up)).to(grads[1].device), 0.0)
    return grads


# an H that is computed again depends on the bias, the gate and how its two halves lie, not on what activates them
@pytest.mark.parametrize(
    ("spec", "routing", "size", "recompute"),
    [*((spec, "sentinels", (21, 11), False) for spec in SPECS),
     *(("gpt-oss", routing, (21, 11), False) for routing in ROUTINGS if routing != "sentinels"),
     *((spec, "sentinels", (37, 21), False) for spec in ("silu", "gpt-oss")),
     *((spec, "sentinels", (21, 11), True) for spec in ("silu", "gpt-oss", "not-gated"))],
    ids=str,
)  # fmt: skip
def test_result_and_gradients_are_the_reference_s(monkeypatch, spec, routing, size, recompute):
    monkeypatch.setattr(engine, "INTERPRETED", INTERPRETED)
    p = problem(spec, routing, d=size[0], i=size[1])
    out, grads = expected(p)
    leaves = leaves_of(p)
    mine = run(p, leaves, recompute=recompute)
    mine.backward(p.grad)
    close(mine.detach(), out.detach())
    for leaf, wanted in zip([t for t in leaves if t is not None], without_absent(p, grads), strict=True):
        close(leaf.grad, wanted)


@every_spec
@pytest.mark.parametrize("sentinels", [False, True], ids=["", "sentinels"])
def test_a_few_tokens_are_not_sorted(monkeypatch, spec, sentinels):
    monkeypatch.setattr(engine, "group_by_expert", None)  # nobody calls it
    p = problem(spec, "sentinels" if sentinels else "spread", t=2, e=40, k=4)
    wanted = expected(p)[0].detach()
    with torch.no_grad():
        close(run(p, [p.tokens, p.weights, *p.experts]), wanted)


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [(torch.float16, "silu"), (torch.float16, "not-gated"), (torch.bfloat16, "silu"), (torch.bfloat16, "gpt-oss")],
    ids=str,
)
def test_16_bits(dtype, spec):
    """float32 sums, rounded where a tensor is stored. (Interpreted, a bfloat16 is cut off instead of rounded.)"""
    p = triton_cases.problem(spec).to(dtype)  # of fewer numbers the largest may be small
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 3e-2}[dtype]
    out, grads = expected(p)
    leaves = leaves_of(p)
    mine = run(p, leaves)
    mine.backward(p.grad)
    assert mine.dtype == dtype
    close(mine.detach(), out.detach(), tolerance)
    for leaf, wanted in zip([t for t in leaves if t is not None], grads, strict=True):
        assert leaf.grad.dtype == dtype
        close(leaf.grad, wanted, tolerance)


def test_routing_weights_may_be_wider_than_tokens():
    p = problem().to(torch.float16)
    p = p._replace(weights=p.weights.float())
    leaves = leaves_of(p)
    run(p, leaves).backward(p.grad)
    assert leaves[1].grad.dtype == torch.float32
    close(leaves[1].grad, expected(p)[1][1], 2e-3)


def test_one_input_alone_is_trained():
    """Everybody else is frozen: their gradients are not computed, and this one's is right."""
    p = problem("biases")
    right = expected(p)[1]
    for trained, name in enumerate(Gradients._fields):
        one = leaves_of(p)
        for n, leaf in enumerate(one):
            leaf.requires_grad_(n == trained)
        run(p, one).backward(p.grad)
        assert [leaf.grad is not None for leaf in one] == [n == trained for n in range(6)], name
        close(one[trained].grad, right[trained])


@pytest.mark.parametrize("spec", ["silu", "gpt-oss"])
def test_gradients_are_added_to_those_that_exist(spec):
    p = problem(spec)
    leaves = leaves_of(p)
    run(p, leaves).backward(p.grad)
    once = [t.grad.clone() for t in leaves if t is not None]
    places = [t.grad.data_ptr() for t in leaves[2:4]]
    run(p, leaves).backward(p.grad)
    assert [t.grad.data_ptr() for t in leaves[2:4]] == places
    for leaf, first in zip([t for t in leaves if t is not None], once, strict=True):
        close(leaf.grad, 2 * first.double())


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreted, programs run one after another: bits repeat in any case")
@every_routing
def test_repeats_bit_for_bit(routing):
    p = problem("biases", routing)
    results = []
    for _ in range(2):
        leaves = leaves_of(p)
        out = run(p, leaves)
        out.backward(p.grad)
        results.append([out.detach(), *(t.grad for t in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_token_s_bits_do_not_depend_on_its_companions():
    p = problem("biases", t=40, e=30, k=2)
    with torch.no_grad():
        together = run(p, [p.tokens, p.weights, *p.experts], batch_invariant=True)
        for rows in (slice(0, 1), slice(3, 7), slice(20, 40)):
            some = p._replace(tokens=p.tokens[rows], expert_ids=p.expert_ids[rows], weights=p.weights[rows])
            alone = run(some, [some.tokens, some.weights, *p.experts], batch_invariant=True)
            assert torch.equal(alone, together[rows])


def test_the_invariant_mode_takes_the_same_tiles_for_every_number_of_tokens(monkeypatch):
    monkeypatch.setattr(engine, "capability_of", lambda _device: (9, 0))

    class OnGpu:
        is_cuda, dtype, device = True, torch.bfloat16, None

    matrices = ExpertWeights(torch.empty(128, 2, 1, dtype=torch.bfloat16), torch.empty(128, 1, 1))
    sizes = (8, 1024, 262144)
    assert len({engine._tiles(n, OnGpu(), matrices, ExpertSpec(), batch_invariant=True) for n in sizes}) == 1
    assert len({engine._tiles(n, OnGpu(), matrices, ExpertSpec()) for n in sizes}) > 1, "or the test could not fail"


@pytest.mark.parametrize(("capability", "widest"), [((9, 0), 256), ((10, 0), 128), ((10, 3), 128), ((12, 0), 256)])
def test_no_matmul_is_wider_than_was_looked_at(monkeypatch, capability, widest):
    monkeypatch.setattr(engine, "capability_of", lambda _device: capability)

    class OnGpu:
        is_cuda, dtype, device = True, torch.bfloat16, None

    matrices = ExpertWeights(torch.empty(32, 2, 1, dtype=torch.bfloat16), torch.empty(32, 1, 1))
    for interleaved in (False, True):
        across = []
        for n in (4, 512, 2048, 4096, 65536):
            tiles = engine._tiles(n, OnGpu(), matrices, ExpertSpec(interleaved=interleaved))
            across += [blocks.columns for blocks in tiles] + [tiles.up.columns * (2 if interleaved else 1)]
        assert max(across) <= widest
        assert max(across) >= 128, "narrower than it need be"


def test_in_the_invariant_mode_h_is_computed_again_with_the_bits_it_had(monkeypatch):
    def tiles(*_, batch_invariant=False):
        return INTERPRETED._replace(up=INTERPRETED.up._replace(depth=64 if batch_invariant else 16))

    computed = []
    real = engine.up

    def recorded(*args, **options):
        projected = real(*args, **options)
        computed.append((args[-1], projected.hidden))
        return projected

    monkeypatch.setattr(engine, "_tiles", tiles)
    monkeypatch.setattr(engine, "up", recorded)
    p = problem("biases", d=70)
    grads = []
    for recompute in (False, True):
        leaves = leaves_of(p)
        run(p, leaves, batch_invariant=True, recompute=recompute).backward(p.grad)
        grads.append([leaf.grad for leaf in leaves])
    (_, kept), (forwards, _), (again, recomputed) = computed
    assert again == forwards
    assert torch.equal(kept, recomputed)
    assert all(map(torch.equal, *grads))
    assert forwards != tiles().up, "or the test could not fail"


@pytest.mark.parametrize(
    ("spec", "d", "parts"), [("silu", 32, [16, 16]), ("gpt-oss", 96, [48, 48]), ("silu", 21, [21])]
)
def test_the_tokens_gradients_in_two_halves_are_those_in_one(monkeypatch, spec, d, parts):
    p = problem(spec, "sentinels", d=d)
    monkeypatch.setattr(engine, "_tiles", lambda *_, **__: INTERPRETED)
    whole, halves = leaves_of(p), leaves_of(p)
    run(p, whole).backward(p.grad)
    widths, real = [], engine.combine
    monkeypatch.setattr(engine, "HALVED", 1)
    monkeypatch.setattr(engine, "combine", lambda rows, *args: widths.append(rows.shape[1]) or real(rows, *args))
    run(p, halves).backward(p.grad)
    assert widths[1:] == parts, "after that of the forward"
    assert torch.equal(halves[0].grad, whole[0].grad)


def test_an_h_that_was_computed_again_is_given_back_before_the_gradients_of_the_tokens(monkeypatch):
    p, seen = problem("silu"), []
    real_up, real_matmul = engine.up, engine.matmul

    def up(*args, **options):
        projected = real_up(*args, **options)
        seen.append(weakref.ref(projected.hidden))
        return projected

    def matmul(*args):
        assert [ref() for ref in seen] == [None]
        return real_matmul(*args)

    given = forward(p.tokens, p.expert_ids, p.weights, p.experts, p.spec, keep="order", batch_invariant=False)
    monkeypatch.setattr(engine, "up", up)
    monkeypatch.setattr(engine, "matmul", matmul)
    backward(
        p.grad, p.tokens, p.weights, p.experts, *given[1:], p.spec, Gradients(True, True, True, True, False, False)
    )
    assert len(seen) == 1


def test_a_nan_stays_in_its_token():
    p = problem("biases")
    clean = run(p, leaves_of(p)).detach()
    p.tokens[4] = torch.nan
    leaves = leaves_of(p)
    out = run(p, leaves)
    others = torch.arange(19, device=DEVICE) != 4
    assert torch.equal(out.detach()[others], clean[others])
    assert out[4].isnan().all()
    out.backward(p.grad)
    assert leaves[0].grad[others].isfinite().all()
    assert leaves[1].grad[others].isfinite().all()


@pytest.mark.parametrize("k", [0, 3])
def test_no_tokens(k):
    p = problem("biases", t=2)
    empty = p._replace(
        tokens=p.tokens[:0] if k else p.tokens,
        expert_ids=p.expert_ids[:0] if k else p.expert_ids[:, :0],
        weights=p.weights[:0] if k else p.weights[:, :0],
        grad=p.grad[:0] if k else p.grad,
    )
    leaves = leaves_of(empty)
    out = run(empty, leaves)
    assert out.shape == (0 if k else 2, 23)
    out.backward(empty.grad)
    assert (out == 0).all()
    for leaf in leaves:
        assert (leaf.grad == 0).all(), "an optimizer that decays weights wants a zero, not nothing"


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_kept_for_the_backward(recompute):
    """The tokens, the weights and what the caller gave; of its own H and the order, and no [S, D] at all."""
    p = problem(t=40, d=64, i=16)
    saved, leaves = {}, leaves_of(p)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        run(p, leaves, recompute=recompute)
    given = {t.data_ptr() for t in (p.expert_ids, *leaves) if t is not None}
    sizes = sorted(t.numel() for pointer, t in saved.items() if pointer not in given and t.numel())
    assert sizes == sorted([5, 40 * 3, *([] if recompute else [40 * 3 * 32])])


@pytest.mark.parametrize("how", ["expanded", "by-column"])
def test_gradients_that_do_not_lie_in_a_row(how):
    p = problem("biases")
    grad = p.grad[:1].expand_as(p.grad) if how == "expanded" else p.grad.mT.contiguous().mT
    results = []
    for given in (grad, grad.contiguous()):
        leaves = leaves_of(p)
        run(p, leaves).backward(given)
        results.append([t.grad for t in leaves])
    assert all(map(torch.equal, *results))


def test_a_gradient_that_is_negated_when_read_is_added_with_its_sign():
    """`_neg_view`: what a kernel finds at its address has the other sign."""
    p = problem()
    leaves = leaves_of(p)
    run(p, leaves).backward(p.grad)
    once = [None if t is None else t.grad.clone() for t in leaves]
    run(p, leaves).backward(p.grad.neg()._neg_view())
    for leaf, grad in zip(leaves, once, strict=True):
        if leaf is not None:
            close(leaf.grad, 2 * grad.double())


@pytest.mark.parametrize("what", ["tokens", "routing weights"])
def test_inputs_that_lie_in_a_gradient_of_the_weights_are_read_before_anything_is_added(what):
    """The gradient of `down` is written before the kernels of other gradients read the tokens and the weights."""
    p = problem("biases", i=40)
    p = p._replace(grad=p.grad / 50)  # moderate numbers: they are to serve as tokens
    leaves = leaves_of(p)
    run(p, leaves).backward(p.grad)
    once = [leaf.grad.clone() for leaf in leaves]
    there = leaves[3].grad.flatten()
    tokens, weights = p.tokens, p.weights
    if what == "tokens":
        tokens = there[: tokens.numel()].view(tokens.shape)
    else:
        weights = there[: weights.numel()].view(weights.shape)
    again = p._replace(tokens=tokens.clone(), weights=weights.clone())
    wanted = expected(again)[1]
    run(again, [tokens, weights, *leaves[2:]]).backward(p.grad)
    for leaf, before, grad in zip(leaves[2:], once[2:], wanted[2:], strict=True):
        close(leaf.grad, before.double() + grad)


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_operator_that_made_no_plan_trains_yet(tokens):
    p = problem(t=tokens, e=40)
    leaves = leaves_of(p)
    x, weights, *matrices = leaves
    out, *_ = torch.ops.moesaic.experts(x, p.expert_ids, weights, *matrices, *p.spec.fields, "nothing", False)
    out.backward(p.grad)
    for leaf, wanted in zip([t for t in leaves if t is not None], expected(p)[1], strict=True):
        close(leaf.grad, wanted)


def test_autocast_multiplies_16_bit_tokens_by_weights_of_32():
    p = problem("biases")
    out, grads = expected(p)
    leaves = leaves_of(p)
    with torch.autocast(DEVICE, torch.bfloat16):
        mine = run(p, leaves)
    mine.backward(p.grad)
    close(mine.detach(), out.detach(), 3e-2)
    for leaf, wanted in zip(leaves, grads, strict=True):
        assert leaf.grad.dtype == torch.float32
        close(leaf.grad, wanted, 3e-2)


def test_ids_beyond_32_bits_name_no_expert():
    for case in (problem(t=6), problem(t=1, e=60)):  # with a plan and without
        absent, far = case.expert_ids.clone(), case.expert_ids.clone()
        absent[0, 1], far[0, 1] = len(case.experts.up), 2**32 + 1
        with torch.no_grad():
            outs = [
                run(case._replace(expert_ids=ids), [case.tokens, case.weights, *case.experts]) for ids in (absent, far)
            ]
        assert torch.equal(*outs)


def test_more_assignments_than_are_counted_are_refused():
    p = problem(t=2)
    ids = torch.empty(2**30, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"2147483648 assignments .* 2147479552 at most"):
        forward(p.tokens, ids, p.weights, p.experts, p.spec, keep="nothing", batch_invariant=False)


def test_create_graph_goes_through_torch():
    p = problem(t=6)
    leaves = leaves_of(p)
    (grad,) = torch.autograd.grad(run(p, leaves), leaves[2], p.grad, create_graph=True)
    assert grad.requires_grad
    close(grad.detach(), expected(p)[1][2])


@pytest.mark.parametrize("tokens", [0, 19])
def test_the_operator_tells_graphs_the_truth(tokens):
    """Shapes, dtypes and strides of every output are what the fake says, whatever is kept."""
    p = problem("biases").to(torch.bfloat16)  # in float32 no dtype could be wrong
    if tokens == 0:
        p = p._replace(tokens=p.tokens[:0], expert_ids=p.expert_ids[:0], weights=p.weights[:0])
    rules = p.spec.fields

    def compare(real, fake, *args):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            told = fake(*args)
        for mine, other in zip(real(*args), told, strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())

    inputs = (p.tokens, p.expert_ids, p.weights, *p.experts)
    for keep in ("nothing", "order", "hidden"):
        compare(torch.ops.moesaic.experts, op._fake_experts, *inputs, *rules, keep, False)
    kept = torch.ops.moesaic.experts(*inputs, *rules, "hidden", False)[1:]
    by_column = [matrix.mT.contiguous().mT for matrix in p.experts[:2]]  # gradients lie as their weights
    for up, down in (p.experts[:2], by_column):
        given = (p.grad[: len(p.tokens)], p.tokens, p.weights, up, down, *p.experts[2:], *kept)
        for wanted in ([True] * 6, [False, True] * 3):
            compare(torch.ops.moesaic.experts_backward, op._fake_backward, *given, *rules, False, wanted)


def test_forward_and_backward_take_a_plan_of_anybody():
    """The backward reads assignments and counts alone, in the order that forward gave."""
    p = problem("silu", "sentinels")
    _, hidden, assignments, counts = forward(
        p.tokens, p.expert_ids, p.weights, p.experts, p.spec, keep="hidden", batch_invariant=False
    )
    wanted = Gradients(True, True, True, True, False, False)
    first = backward(p.grad, p.tokens, p.weights, p.experts, hidden, assignments, counts, p.spec, wanted)
    again = backward(p.grad, p.tokens, p.weights, p.experts, hidden[:0], assignments, counts, p.spec, wanted)
    for one, other in zip(first, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other.double())


@pytest.mark.skipif(DEVICE == "cuda", reason="it can run here")
def test_where_it_cannot_run_it_says_why_and_names_who_can():
    p = problem()
    with pytest.raises(
        ValueError, match=r"engine='triton' cannot serve this: its kernels run on cuda, not on cpu: use 'cpu'"
    ):
        select.select_engine("triton", p.tokens.device, p.tokens.dtype)(
            p.tokens, p.expert_ids, p.weights, p.experts, p.spec
        )
    assert "float64" in room.why_not("cuda", torch.float64)
    assert room.why_not("cuda", torch.bfloat16) is None


def test_without_triton_a_layer_refuses_it_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(room, "INSTALLED", False)
    with pytest.raises(
        ValueError, match=r"engine='triton' cannot run here: .* pip install triton, or use 'auto' or 'grouped'"
    ):
        select.check_engine("triton")
    name, reason = select.best_engine("cuda", torch.bfloat16)
    assert name == "grouped"
    assert "pip install triton" in reason


def test_what_auto_takes_on_a_gpu():
    assert select.best_engine("cuda", torch.bfloat16)[0] == "triton"
    assert select.best_engine("cuda", torch.float64)[0] == "grouped"
    assert select.best_engine("mps", torch.bfloat16)[0] == "grouped"


def test_auto_asks_the_gpu_that_the_tensors_are_on(monkeypatch):
    """An A100 that is the current device, and a T4 beside it."""
    monkeypatch.setattr(room, "_capability", {None: (8, 0), 0: (8, 0), 1: (7, 5)}.get)
    assert select.select_engine("auto", torch.device("cuda", 0), torch.float16) is select.ENGINES["triton"]
    assert select.select_engine("auto", torch.device("cuda", 1), torch.float16) is select.ENGINES["grouped"]
