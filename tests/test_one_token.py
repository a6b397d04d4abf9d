"""One token in inference: its own short way through the CPU engine, beside the definition."""

import pytest
import torch
from cases import HABITS, in_every_way, needs_habit
from oracles import moe_by_token
from test_engines import DTYPES, VARIANTS, D, E, K, ids_of, weights_like

from moesaic.engine import cpu as engine
from moesaic.engine import gemm, matmul_forms
from moesaic.engine.cpu import cpu
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.fixture(params=HABITS)
def habit(request, monkeypatch):
    needs_habit(request.param)
    monkeypatch.setattr(gemm, "machine", lambda: request.param)
    monkeypatch.setattr(matmul_forms, "SMALL", 0)
    return request.param


@pytest.mark.usefixtures("habit", "instructions")
@in_every_way(*DTYPES)
@pytest.mark.parametrize("kind", ["an empty expert", "all to one expert", "sentinels", "nobody"])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_token_is_the_definition(dtype, kind, transposed):
    experts, ids = weights_like(dtype), ids_of(kind, 1)
    x, weights = torch.randn(1, D).to(dtype), torch.rand(1, K).to(dtype)
    stored = ExpertWeights(*(w.mT.contiguous() for w in experts[:2])) if transposed else experts
    out = cpu(x, ids, weights, stored, ExpertSpec(transposed=transposed))
    expected = torch.from_numpy(moe_by_token(x, ids, weights, experts.up, experts.down))
    assert out.dtype == dtype
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


@pytest.mark.usefixtures("habit", "instructions")
@pytest.mark.parametrize("variant", VARIANTS)
@in_every_way(*DTYPES)
def test_every_kind_of_expert_computes_it(variant, dtype):
    spec, layout = VARIANTS[variant]
    experts, ids = weights_like(dtype, **layout), torch.tensor([[4, E, 1, 4, 0]])  # one of them twice, one nobody
    x, weights = torch.randn(1, D).to(dtype), torch.rand(1, 5).to(dtype)
    wide = ExpertWeights(*(None if w is None else w.double() for w in experts))
    expected = reference(x.double(), ids, weights.double(), wide, spec)
    got = cpu(x, ids, weights, experts, spec)
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert torch.equal(got, cpu(x, ids, weights, experts, spec))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("n", [1, 9])
def test_it_takes_every_dtype_of_ids(dtype, n):
    experts, ids, x, weights = weights_like(torch.float32), ids_of("sentinels", n), torch.randn(n, D), torch.rand(n, K)
    got = cpu(x, ids.to(dtype), weights, experts, ExpertSpec())
    assert torch.equal(got, cpu(x, ids, weights, experts, ExpertSpec()))


@pytest.mark.parametrize("wrong", [-1, E + 1])
def test_ids_that_name_no_expert_are_refused(wrong):
    with pytest.raises(ValueError, match=f"there are {E} experts"):
        cpu(torch.randn(1, D), torch.tensor([[0, wrong]]), torch.rand(1, 2), weights_like(torch.float32), ExpertSpec())


def test_no_expert_for_each_token_is_zero():
    experts = weights_like(torch.float32)
    out = cpu(torch.randn(1, D), torch.zeros(1, 0).long(), torch.zeros(1, 0), experts, ExpertSpec())
    assert torch.equal(out, torch.zeros(1, experts.down.shape[1]))


@pytest.mark.usefixtures("instructions")
def test_autocast_multiplies_in_its_dtype(habit):
    needs_habit(habit, torch.bfloat16)
    experts, ids, x, weights = (
        weights_like(torch.float32),
        ids_of("an empty expert", 1),
        torch.randn(1, D),
        torch.rand(1, K),
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = cpu(x, ids, weights, experts, ExpertSpec())
    expected = reference(x, ids, weights, experts, ExpertSpec())
    assert got.dtype == torch.float32
    assert 1e-5 < float((got - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize(
    ("how", "sorts"), [("plain", False), ("batch_invariant", True), ("trained", True), ("two", True)]
)
def test_who_goes_the_short_way(monkeypatch, how, sorts):
    """One token that nobody will send a gradient to; in batch-invariant mode its bits are to be those of a batch."""
    sorted_, group_by_expert = [], engine.group_by_expert
    monkeypatch.setattr(engine, "group_by_expert", lambda *args: sorted_.append(True) or group_by_expert(*args))
    tokens = 2 if how == "two" else 1
    experts, ids = weights_like(torch.float32), ids_of("an empty expert", tokens)
    x, weights = torch.randn(tokens, D), torch.rand(tokens, K)
    with torch.set_grad_enabled(how == "trained"):
        cpu(x, ids, weights, experts, ExpertSpec(), batch_invariant=how == "batch_invariant")
    assert bool(sorted_) == sorts


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("tokens", [1, 9])
@in_every_way(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_no_width_give_nothing(tokens, dtype, transposed):
    up, down = torch.zeros(E, 0, 16).to(dtype), torch.zeros(E, 16, 0).to(dtype)
    experts, spec = ExpertWeights(*((up.mT, down.mT) if transposed else (up, down))), ExpertSpec(transposed=transposed)
    x, ids = torch.randn(tokens, 16).to(dtype).requires_grad_(), torch.arange(tokens * K).view(tokens, K) % E
    with torch.enable_grad():
        out = cpu(x, ids, torch.rand(tokens, K), experts, spec)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    assert not grad.any()
    assert torch.equal(out, cpu(x, ids, torch.rand(tokens, K), experts, spec))
