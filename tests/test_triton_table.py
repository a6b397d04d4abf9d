"""The GPU engine as a GPU would have it, without one: the tiles of the table interpreted, a layer traced whole, and
what lives at the peak of a step counted."""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from test_triton_engine import expected, leaves_of, run, without_absent
from triton_cases import DEVICE, close, interpreted_operator, poisoned, problem  # noqa: F401

import moesaic as ms
from moesaic.engine import op
from moesaic.engine import triton as room
from moesaic.engine.op import Gradients
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton import experts as engine
from moesaic.engine.triton.blocks import FLOAT, NARROW, WIDE, suited
from moesaic.types import ExpertWeights

TABLE = {  # for 40 rows an expert and fewer the narrow tiles are the wide ones
    f"{name} {most or 'more'}": tiles
    for name, table in {"wide": WIDE, "narrow": NARROW, "float": FLOAT}.items()
    for most, tiles in table.items()
    if table is not NARROW or tiles is not WIDE[most]
}
ENDS = ("wide 16", "wide more")
SIZES = {"even": ("silu", 256, 128), "wrapped": ("gpt-oss", 256, 112), "masked": ("silu", 100, 72)}
on_a_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="it has kernels of its own there")


@on_a_cpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("row", "spec", "d", "i"),
    [
        # masked all of them; with other sizes, which take the interpreter longest, the smallest and the largest
        pytest.param(row, *size, id=f"{row}-{name}", marks=() if name == "masked" or row in ENDS else pytest.mark.slow)
        for row in TABLE
        for name, size in SIZES.items()
    ],
)
def test_every_row_of_the_table_computes_the_reference(monkeypatch, row, spec, d, i):
    p = problem(spec, "sentinels", t=80, e=3, k=2, d=d, i=i)
    out, grads = expected(p)
    taken = []

    def tiles(*_, **__):
        taken.append(suited(TABLE[row], p.spec, (9, 0)))
        return taken[-1]

    monkeypatch.setattr(engine, "_tiles", tiles)
    leaves = leaves_of(p)
    with interpreted_operator():
        mine = run(p, leaves)
        mine.backward(p.grad)
    close(mine.detach(), out.detach())
    for leaf, wanted in zip([t for t in leaves if t is not None], without_absent(p, grads), strict=True):
        close(leaf.grad, wanted)
    assert len(taken) == 2, "forward and backward asked for tiles"


@on_a_cpu
@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"batch_invariant": True}], ids=str)
def test_a_layer_on_this_engine_is_one_graph(monkeypatch, options):
    """What dynamo sees of it, which is no different on a GPU but for the device."""
    monkeypatch.setattr(room, "why_not", torch.compiler.assume_constant_result(lambda *_: None))
    config = ms.MoEConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=6, num_experts_per_tok=2)
    layer = ms.MoE(config, engine="triton", **options)
    called = []
    made = op.kernels(engine.forward, engine.backward)
    with interpreted_operator():
        op.FORWARD["cpu"] = lambda *a, **o: (called.append(1), made.forward(*a, **o))[1]  # the context takes it back
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            torch.manual_seed(0)
            x = torch.randn(2, 9, 32, requires_grad=True)
            out = run(x)
            out.square().sum().backward()
            results.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
        for ours, eager in zip(*results, strict=True):
            close(ours, eager)
        with torch.no_grad():
            close(compiled(x), results[0][0])
            assert not called, "in a graph nothing goes round the operator"
            layer(x)
        assert called


class Living(TorchDispatchMode):
    """Counts the bytes of storages that were made inside and are held by a tensor, but for sizes to leave out."""

    def __init__(self, *left_out: int) -> None:
        super().__init__()
        self._left_out = left_out
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and func.namespace == "aten":
                self._hold(tensor, new="view" not in func.name() and not func.is_view)
        return out

    def _hold(self, tensor: torch.Tensor, *, new: bool) -> None:
        storage, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if size in self._left_out or not (new or self._holders[storage]):
            return  # a view of what was there before
        if not self._holders[storage]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[storage] += 1
        weakref.finalize(tensor, self._let_go, storage, size)

    def _let_go(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            self.now -= size


@on_a_cpu
def test_what_lives_at_the_peak_of_a_step(monkeypatch):
    """The bounds of performance.md §8 at the shape of the ladder (Qwen3-30B-A3B, 32000 tokens), counted on tensors that
    have no memory: held 1.1 (X + H + metadata), at the peak 1.1 (X + H + A + Y), gradients of weights not counted."""
    from triton.runtime import interpreter

    launched = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    monkeypatch.setattr(engine, "_tiles", lambda *_, **__: WIDE[0])
    t, k, d, i, e = 32000, 8, 2048, 768, 128  # with 32768 H is as large as a matrix, and Living could not tell

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, hidden, activated, rows, metadata = 2 * t * d, 4 * t * k * i, 2 * t * k * i, 2 * t * k * d, 16 * t * k
    experts = ExpertWeights(tensor(e, 2 * i, d), tensor(e, d, i))
    tokens, ids, weights = tensor(t, d), tensor(t, k, dtype=torch.int64), tensor(t, k, dtype=torch.float32)
    with Living(experts.up.nbytes, experts.down.nbytes) as living:
        out, *kept = engine.forward(tokens, ids, weights, experts, ExpertSpec(), keep="hidden", batch_invariant=False)
        returned = 2 * out.numel()
        held = living.now - returned
        assert hidden <= held <= 1.1 * (hidden + metadata)
        bound = 1.1 * (x + hidden + activated + rows)
        assert x + living.peak <= bound
        living.peak = 0
        grad_out = torch.empty_like(out)
        wanted = Gradients(True, True, True, True, False, False)
        engine.backward(grad_out, tokens, weights, experts, *kept, ExpertSpec(), wanted)
        assert hidden < living.peak
        assert x + living.peak - 2 * returned <= bound, "the result and its gradient are the caller's"
    assert {"_up", "_matmul", "_combine", "_d_hidden", "_outer", "_d_weights"} <= set(launched)
