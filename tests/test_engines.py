"""Every engine against the definition in oracles.py, forward and backward."""

import dataclasses
import math
from inspect import signature

import numpy as np
import pytest
import torch
from cases import configs
from hypothesis import given
from hypothesis import strategies as st
from oracles import moe_by_token

from moesaic.engine.plan import group_by_expert
from moesaic.engine.select import ENGINES, best_engine, check_engine, select_engine
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

E, D, WIDTH, OUT, K = 6, 10, 7, 9, 3
FEW = {"d": 3, "width": 2, "out": 3}  # numerical gradients take two runs for every number
HERE = {name: engine for name, engine in ENGINES.items() if name != "triton"}  # which has tests of its own
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def weights_like(dtype, *, bias=False, gated=True, transposed=False, d=D, width=WIDTH, out=OUT):
    def random(*shape):
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    u = 2 * width if gated else width
    up, down = ((E, d, u), (E, width, out)) if transposed else ((E, u, d), (E, out, width))
    return ExpertWeights(random(*up), random(*down), random(E, u) if bias else None, random(E, out) if bias else None)


def ids_of(kind: str, tokens: int) -> torch.Tensor:
    distinct = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)]) if tokens else torch.zeros(0, K).long()
    if kind == "an empty expert":
        return distinct  # expert E-1 never chosen
    if kind == "all to one expert":
        return torch.full((tokens, K), E).index_fill(1, torch.tensor([1]), 2)
    if kind == "sentinels":
        return distinct.masked_fill(torch.rand(tokens, K) < 0.5, E)
    return torch.full((tokens, K), E)  # nobody


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("kind", ["an empty expert", "all to one expert", "sentinels", "nobody"])
def test_engine_equals_the_definition(name, dtype, tokens, kind):
    experts, ids = weights_like(dtype), ids_of(kind, tokens)
    x = torch.randn(tokens, D).to(dtype)
    weights = torch.rand(tokens, K).to(dtype)
    out = HERE[name](x, ids, weights, experts, ExpertSpec())
    expected = moe_by_token(x, ids, weights, experts.up, experts.down)
    assert out.dtype == dtype
    assert out.shape == (tokens, OUT)
    # four roundings on the way (up, activation, down, result), each within half an eps of values of this size
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(out.detach().double().numpy(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


VARIANTS = {
    "swiglu": (ExpertSpec(), {}),
    "biased": (ExpertSpec(), {"bias": True}),
    "plain mlp": (ExpertSpec(activation="relu", gated=False), {"gated": False}),
    "relu squared": (ExpertSpec(activation="relu2", gated=False), {"gated": False, "bias": True}),
    "geglu": (ExpertSpec(activation="gelu"), {}),
    "geglu tanh": (ExpertSpec(activation="gelu_pytorch_tanh"), {}),
    "clamped": (ExpertSpec(limit=0.5), {}),
    "softcapped": (ExpertSpec(gate_softcap=0.7, up_softcap=1.5), {}),
    "gpt-oss": (
        ExpertSpec(limit=0.5, alpha=1.702, up_offset=1.0, interleaved=True, transposed=True),
        {"bias": True, "transposed": True},
    ),
}


def activated(variant: str, projected: np.ndarray) -> np.ndarray:
    """What lies between the projections, from the families' own formulas, in numpy."""
    gate, up = np.split(projected, 2, axis=1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    erf = np.vectorize(math.erf)
    match variant:
        case "swiglu" | "biased":
            return gate * sigmoid(gate) * up
        case "plain mlp":
            return np.maximum(projected, 0)
        case "relu squared":
            return np.maximum(projected, 0) ** 2
        case "geglu":
            return gate * (1 + erf(gate / 2**0.5)) / 2 * up
        case "geglu tanh":
            return gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2 * up
        case "clamped":
            gate = np.minimum(gate, 0.5)
            return gate * sigmoid(gate) * np.clip(up, -0.5, 0.5)
        case "softcapped":  # transformers: Inkling2SoftcappedSwiGLU
            return 0.7 * np.tanh(gate / 0.7) * sigmoid(gate) * 1.5 * np.tanh(up / 1.5)
        case "gpt-oss":  # alternating rows, transformers: GptOssExperts
            gate, up = np.minimum(projected[:, ::2], 0.5), np.clip(projected[:, 1::2], -0.5, 0.5)
            return (up + 1) * gate * sigmoid(1.702 * gate)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_is_the_formula_of_its_family(variant):
    projected = torch.randn(50, 2 * WIDTH, dtype=torch.float64)
    got = VARIANTS[variant][0].activate(projected).numpy()
    np.testing.assert_allclose(got, activated(variant, projected.numpy()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softcaps_of_16_bits_round_once(dtype):
    """As in transformers, where Inkling 2 computes them in float32."""
    spec = ExpertSpec(gate_softcap=4.0, up_softcap=25.0)
    projected, grad = ((4 * torch.randn(500, size * WIDTH)).to(dtype) for size in (2, 1))
    exact = spec.activate_backward(projected.float(), grad.float())
    assert torch.equal(spec.activate(projected), exact[0].to(dtype))
    for ours, wide in zip(spec.activate_backward(projected, grad), exact, strict=True):
        assert torch.equal(ours, wide.to(dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_engines_agree_forward_and_backward(variant):
    spec, layout = VARIANTS[variant]
    experts, ids = weights_like(torch.float64, **layout), ids_of("sentinels", 23)
    x = torch.randn(23, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(23, K, dtype=torch.float64, requires_grad=True)
    leaves = [t for t in (x, weights, *experts) if t is not None]
    upstream = torch.randn(23, OUT, dtype=torch.float64)
    results = {}
    for name, engine in HERE.items():
        out = engine(x, ids, weights, experts, spec)
        results[name] = [out, *torch.autograd.grad(out, leaves, upstream)]
    for name, got in results.items():
        for ours, reference in zip(got, results["reference"], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("variant", ["swiglu", "gpt-oss", "softcapped", "plain mlp"])
def test_gradcheck(name, variant):
    spec, layout = VARIANTS[variant]
    if spec.activation == "relu":
        spec = ExpertSpec(activation="gelu", gated=False)  # relu has a kink
    experts, ids = weights_like(torch.float64, **layout, **FEW), ids_of("sentinels", 4)
    x = torch.randn(4, FEW["d"], dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, K, dtype=torch.float64, requires_grad=True)
    given_weights = [w for w in experts if w is not None]

    def run(x, weights, *given_weights):
        return HERE[name](x, ids, weights, ExpertWeights(*given_weights), spec)

    assert torch.autograd.gradcheck(run, (x, weights, *given_weights))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_zeros_where_nobody_is_chosen(name, tokens, bias):
    experts, ids = weights_like(torch.bfloat16, bias=bias), ids_of("nobody", tokens)
    x, weights = torch.randn(tokens, D).bfloat16().requires_grad_(), torch.rand(tokens, K).bfloat16().requires_grad_()
    out = HERE[name](x, ids, weights, experts, ExpertSpec())
    assert not out.any()
    leaves = [x, weights, *(w for w in experts if w is not None)]
    for create_graph in (True, False):
        grads = torch.autograd.grad(out.sum(), leaves, retain_graph=True, create_graph=create_graph)
        assert all(not grad.any() and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("name", HERE)
def test_the_sentinel_gives_its_weight_no_gradient_and_ignores_nan(name):
    experts = weights_like(torch.float64)
    ids = torch.tensor([[0, E, 1]])
    weights = torch.tensor([[0.5, float("nan"), 0.25]], dtype=torch.float64, requires_grad=True)
    out = HERE[name](torch.randn(1, D, dtype=torch.float64), ids, weights, experts, ExpertSpec())
    out.sum().backward()
    assert out.isfinite().all()
    assert weights.grad[0, 1] == 0
    assert experts.up.grad[2:].eq(0).all()


def test_a_row_of_the_reference_does_not_depend_on_its_companions():
    experts = weights_like(torch.float32)
    x, ids, weights = torch.randn(31, D), ids_of("an empty expert", 31), torch.rand(31, K)
    whole = ENGINES["reference"](x, ids, weights, experts, ExpertSpec())
    for rows in (torch.randperm(31), torch.arange(5, 9), torch.tensor([30])):
        part = ENGINES["reference"](x[rows], ids[rows], weights[rows], experts, ExpertSpec())
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("name", HERE)
def test_a_poisoned_token_leaves_other_rows_alone(name):
    experts = weights_like(torch.float32)
    x, ids, weights = torch.randn(12, D), ids_of("an empty expert", 12), torch.rand(12, K)
    clean = HERE[name](x, ids, weights, experts, ExpertSpec())
    x[5] = float("nan")
    poisoned = HERE[name](x, ids, weights, experts, ExpertSpec())
    others = torch.arange(12) != 5
    assert torch.equal(clean[others], poisoned[others])
    assert poisoned[5].isnan().all()


@pytest.mark.parametrize("name", HERE)
def test_strided_inputs_compute_as_their_copies(name):
    experts, ids = weights_like(torch.float64), ids_of("sentinels", 8)
    x = torch.randn(D, 8, dtype=torch.float64).T
    weights = torch.rand(K, 8, dtype=torch.float64).T
    strided = experts._replace(up=experts.up.detach().mT.contiguous().mT)
    out = HERE[name](x, ids.T.contiguous().T, weights, strided, ExpertSpec())
    expected = ENGINES["reference"](x.contiguous(), ids, weights.contiguous(), experts, ExpertSpec())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_have_the_gradients_of_their_copies(name, dtype):
    experts, ids = weights_like(dtype), ids_of("sentinels", 8)
    upstream = torch.randn(2 * OUT, 8).to(dtype)[::2].T

    def gradients(x, weights):
        x, weights = x.requires_grad_(), weights.requires_grad_()
        out = HERE[name](x, ids, weights, experts, ExpertSpec())
        return torch.autograd.grad(out, [x, weights, experts.up, experts.down], upstream)

    x, weights = torch.randn(D, 8).to(dtype).T, torch.rand(K, 8).to(dtype).T
    for strided, copied in zip(gradients(x, weights), gradients(x.contiguous(), weights.contiguous()), strict=True):
        assert torch.equal(strided, copied)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
def test_where_nobody_is_chosen_every_gradient_is_zero(dtype, tokens):
    """In the engine with a backward of its own; the others' results then depend on nothing."""
    experts = weights_like(dtype, bias=True)
    x, weights = torch.randn(tokens, D).to(dtype).requires_grad_(), torch.rand(tokens, K).to(dtype).requires_grad_()
    out = HERE["cpu"](x, ids_of("nobody", tokens), weights, experts, ExpertSpec())
    leaves = [x, weights, *experts]
    for grad, leaf in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), leaves, strict=True):
        assert (grad.shape, grad.dtype, int(grad.count_nonzero())) == (leaf.shape, dtype, 0)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: given.update(ids=given["ids"] * 0 - 1),
            f"expert_ids reach from -1 to -1: there are {E}",
        ),
        (lambda given: given.update(ids=given["ids"] * 0 + E + 1), f"expert_ids reach from {E + 1} to {E + 1}"),
        (lambda given: given.update(x=given["x"][:, 1:]), rf"tokens have width {D - 1}, up .* takes {D}"),
        (lambda given: given.update(x=given["x"].bfloat16()), "tokens are torch.bfloat16, up is torch.float32: cast"),
    ],
)
def test_every_engine_names_what_does_not_fit(name, change, message):
    given = {"x": torch.randn(3, D), "ids": ids_of("an empty expert", 3), "weights": torch.rand(3, K)}
    change(given)
    with pytest.raises(ValueError, match=message):
        HERE[name](*given.values(), weights_like(torch.float32), ExpertSpec())


@pytest.mark.parametrize("name", HERE)
def test_int32_ids_compute_as_int64(name):
    experts, ids = weights_like(torch.float64), ids_of("sentinels", 8)
    x, weights = torch.randn(8, D, dtype=torch.float64), torch.rand(8, K, dtype=torch.float64)
    out = HERE[name](x, ids.int(), weights, experts, ExpertSpec())
    assert torch.equal(out, HERE[name](x, ids, weights, experts, ExpertSpec()))


@given(configs(), st.integers(0, 20), st.integers(0, 2**31))
def test_every_assignment_reaches_exactly_one_expert(config, tokens, seed):
    """Conservation: nothing is dropped, nothing runs twice."""
    n, k = config.n_routed_experts, config.num_experts_per_tok
    ids = torch.randint(0, n + 1, (tokens, k), generator=torch.Generator().manual_seed(seed))
    plan = group_by_expert(ids, n)
    assert plan.assignments.sort().values.tolist() == list(range(tokens * k))
    assert plan.counts.tolist() == [(ids == e).sum() for e in range(n)]
    start = 0
    for expert, count in enumerate(plan.counts.tolist()):
        mine = plan.assignments[start : start + count]
        assert ids.flatten()[mine].eq(expert).all()
        assert mine.tolist() == sorted(mine.tolist())
        start += count
    assert ids.flatten()[plan.assignments[start:]].eq(n).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_spec_is_made_again_from_its_fields(variant):
    spec = VARIANTS[variant][0]
    assert ExpertSpec(*spec.fields) == spec
    assert len(spec.fields) == len(dataclasses.fields(spec))


@pytest.mark.parametrize("option", ["batch_invariant", "recompute"])
@pytest.mark.parametrize("name", HERE)
def test_an_engine_takes_an_option_or_the_refusal_names_those_that_do(name, option):
    able = [engine for engine in ENGINES if option in signature(ENGINES[engine]).parameters]
    if option == "batch_invariant":
        able.insert(0, "reference")  # by definition
    x, ids, weights, experts = torch.randn(9, D), ids_of("sentinels", 9), torch.rand(9, K), weights_like(torch.float32)
    if name in able:
        engine = select_engine(name, x.device, x.dtype, **{option: True})
        expected = HERE[name](x, ids, weights, experts, ExpertSpec())
        assert torch.allclose(engine(x, ids, weights, experts, ExpertSpec()), expected, atol=1e-6)
    else:
        message = f"engine='{name}' has no {option}: use one of {', '.join(map(repr, able))}"
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_engine(name, **{option: True})


def test_engines_are_chosen_by_name_once():
    with pytest.raises(
        ValueError, match="engine='fastest' is unknown: use 'auto' or one of 'reference', 'grouped', 'cpu'"
    ):
        check_engine("fastest")
    assert select_engine("reference", torch.device("cpu"), torch.float32) is ENGINES["reference"]
    name, reason = best_engine("cpu", torch.bfloat16)
    assert select_engine("auto", torch.device("cpu"), torch.bfloat16) is ENGINES[name]
    assert "cpu" in reason
