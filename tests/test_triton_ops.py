"""Every kernel against its twin in plain torch, in float64, with memory full of NaN before: odd sizes, empty experts,
all tokens on one expert, ids that name nobody, experts of every kind."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_cases import BLOCKS, DEVICE, ROUTINGS, SPECS, close, poisoned, problem, rows_like, written  # noqa: F401

from moesaic.engine.triton import few, twins
from moesaic.engine.triton.activation import softcap
from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.combine import combine
from moesaic.engine.triton.d_hidden import d_hidden
from moesaic.engine.triton.d_weights import d_weights
from moesaic.engine.triton.few import down_and_combine
from moesaic.engine.triton.layout import unsorted
from moesaic.engine.triton.matmul import matmul
from moesaic.engine.triton.outer import outer
from moesaic.engine.triton.sum_rows import sum_rows
from moesaic.engine.triton.tile import place, product
from moesaic.engine.triton.up import up

pytestmark = pytest.mark.usefixtures("poisoned")
every_spec = pytest.mark.parametrize("spec", SPECS)
every_routing = pytest.mark.parametrize("routing", ROUTINGS)
# rows, columns and depth that divide the sizes below and that do not; several tiles of each
SIZES = {"odd": (37, 21), "even": (32, 16), "depth-alone-even": (48, 21), "one-tile": (5, 3)}


# what masks there are depends on sizes and on how experts lie in memory, not on what activates
SPECS_AND_SIZES = [
    *((spec, "odd") for spec in SPECS),
    *((spec, size) for spec in ("silu", "gpt-oss", "not-gated") for size in SIZES if size != "odd"),
]


def of_double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


@pytest.mark.parametrize(("spec", "size"), SPECS_AND_SIZES)
def test_up(spec, size):
    d, i = SIZES[size]
    p = problem(spec, d=d, i=i)
    layout, wide = p.layout(), p.to(torch.float64)
    got = up(p.tokens, p.k, layout, p.experts, p.spec, BLOCKS, keep_hidden=True)
    expected = twins.up(wide.tokens, p.k, layout, wide.experts, p.spec, BLOCKS, keep_hidden=True)
    for mine, theirs in zip(got, expected, strict=True):
        close(written(mine, layout), written(theirs, layout))


@every_routing
def test_up_under_any_routing(routing):
    p = problem("biases", routing)
    layout, wide = p.layout(), p.to(torch.float64)
    got = up(p.tokens, p.k, layout, p.experts, p.spec, BLOCKS, keep_hidden=True)
    expected = twins.up(wide.tokens, p.k, layout, wide.experts, p.spec, BLOCKS, keep_hidden=True)
    for mine, theirs in zip(got, expected, strict=True):
        close(written(mine, layout), written(theirs, layout))


@pytest.mark.parametrize(("hidden", "activated"), [(True, False), (False, True)])
def test_up_makes_what_is_to_be_kept(hidden, activated):
    p = problem()
    got = up(p.tokens, p.k, p.layout(), p.experts, p.spec, BLOCKS, keep_hidden=hidden, keep_activated=activated)
    assert (got.hidden is not None, got.activated is not None) == (hidden, activated)
    both = up(p.tokens, p.k, p.layout(), p.experts, p.spec, BLOCKS, keep_hidden=True)
    layout = p.layout()
    for one, other in zip(got, both, strict=True):
        if one is not None:
            assert torch.equal(written(one, layout), written(other, layout))


@every_spec
def test_unsorted_rows_of_a_few_tokens(spec):
    p = problem(spec, "sentinels", t=3, e=40, k=4)
    layout, wide = unsorted(p.expert_ids), p.to(torch.float64)
    present = (p.expert_ids < 40).flatten()
    mine = up(p.tokens, p.k, layout, p.experts, p.spec, BLOCKS, keep_hidden=False).activated
    theirs = twins.up(wide.tokens, p.k, layout, wide.experts, p.spec, BLOCKS, keep_hidden=False).activated
    close(mine[present], theirs[present])
    matrix = p.experts.down if p.spec.transposed else p.experts.down.mT
    got = down_and_combine(mine, p.expert_ids, p.weights, matrix, p.experts.down_bias)
    args = (wide.weights, matrix.double(), wide.experts.down_bias)
    close(got, twins.down_and_combine(theirs, p.expert_ids, *args))


@pytest.mark.parametrize("deepest", [16, 1024], ids=["in-steps", "at-once"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "broad"])
@pytest.mark.parametrize("size", [(37, 21), (32, 16), (33, 48)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_down_and_combine(monkeypatch, deepest, deep, size, k):
    monkeypatch.setattr(few, "DEEP" if deep else "BROAD", (8, deepest))
    width, depth = size
    p = problem(t=3, k=k)
    matrix, rows = torch.randn(5, depth, width, device=DEVICE), rows_like(p, depth)
    stored, bias = matrix.mT.contiguous().mT if deep else matrix, torch.randn(5, width, device=DEVICE)
    expected = twins.down_and_combine(rows.double(), p.expert_ids, p.weights.double(), matrix.double(), bias.double())
    close(down_and_combine(rows, p.expert_ids, p.weights, stored, bias), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_nobody_s_share_is_zero_whatever_lies_there(biased):
    """Not the row is read, which nobody wrote, nor the first expert instead."""
    ids = torch.tensor([[3, 1], [3, 2]], device=DEVICE)  # 3: no expert
    rows = torch.randn(4, 16, device=DEVICE)
    matrix, bias = torch.randn(3, 16, 32, device=DEVICE), torch.randn(3, 32, device=DEVICE)
    weights = torch.rand(2, 2, device=DEVICE)
    expected = weights[:, 1, None] * (torch.einsum("ti,tio->to", rows[1::2], matrix[ids[:, 1]]) + biased * bias[1:])
    for unread in (rows[::2], weights[:, 0], matrix[0], bias[0]):
        unread.fill_(torch.nan)
    for stored in (matrix, matrix.mT.contiguous().mT):
        close(down_and_combine(rows, ids, weights, stored, bias if biased else None), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])
def test_matmul(size, bias, flip):
    depth, width = SIZES[size]
    p = problem()
    matrix = torch.randn((5, width, depth) if flip else (5, depth, width), device=DEVICE)
    matrix = matrix.mT if flip else matrix
    offset = torch.randn(5, width, device=DEVICE) if bias else None
    rows, layout = rows_like(p, depth), p.layout()
    expected = twins.matmul(*of_double(rows, matrix, offset), layout, BLOCKS)
    close(written(matmul(rows, matrix, offset, layout, BLOCKS), layout), written(expected, layout))


@every_routing
def test_matmul_under_any_routing(routing):
    p = problem(routing=routing)
    rows, matrix, layout = rows_like(p, 21), p.experts.down.mT, p.layout()
    expected = twins.matmul(*of_double(rows, matrix, None), layout, BLOCKS)
    close(written(matmul(rows, matrix, None, layout, BLOCKS), layout), written(expected, layout))


@pytest.mark.parametrize(("allowed", "dtype", "taken"), [
    ("ieee", torch.float32, "ieee"), ("tf32", torch.float32, "tf32"), ("tf32", torch.float16, "ieee"),
])  # fmt: skip
def test_float32_is_multiplied_as_such_unless_torch_was_told_otherwise(allowed, dtype, taken):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = allowed
    try:
        assert product(BLOCKS, dtype, torch.empty(5, 16, 16, dtype=dtype), 16)["TILE"].precision == taken
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("group", [2, 3, 8])
def test_the_order_of_tiles_changes_nothing(group):
    p = problem(d=40)
    rows, matrix, layout = rows_like(p, 21), p.experts.down.mT, p.layout()
    blocks = BLOCKS._replace(group=group)
    plain = written(matmul(rows, matrix, None, layout, BLOCKS), layout)
    assert torch.equal(written(matmul(rows, matrix, None, layout, blocks), layout), plain)


@triton.jit
def _places(out, tiles, columns, GROUP: tl.constexpr):
    tile, column = place(tl.program_id(0), tiles, columns, GROUP)
    tl.store(out + tl.program_id(0), tile * columns + column)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize(("tiles", "columns"), [(1, 1), (5, 1), (7, 3), (16, 2), (3, 9)])
def test_every_tile_has_its_program(tiles, columns, group):
    out = torch.empty(tiles * columns, dtype=torch.int32, device=DEVICE)
    _places[(tiles * columns,)](out, tiles, columns, GROUP=group)
    assert sorted(out.tolist()) == list(range(tiles * columns))


@triton.jit
def _softcaps(x, out, CAP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, softcap(tl.load(x + at), CAP))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the branch that is not taken
def test_a_softcap_is_exact_to_the_last_bits_also_near_zero():
    sizes = 2.0 ** torch.linspace(-30, 6, 2046)
    x = torch.cat([sizes, torch.tensor([torch.inf, 0.0])])
    for signed in (x, -x):
        signed = signed.to(DEVICE)
        out = torch.empty_like(signed)
        _softcaps[(1,)](signed, out, 1.0, N=2048)
        torch.testing.assert_close(out.double(), signed.double().tanh(), rtol=5e-7, atol=0.0)  # a GPU divides to 2 ulp
    nan = torch.full((2048,), torch.nan, device=DEVICE)
    _softcaps[(1,)](nan, out, 4.0, N=2048)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("routing", "width"), [*((routing, 37) for routing in ROUTINGS), ("sentinels", 1), ("sentinels", 1100)]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_combine(routing, weighted, width):
    p = problem(routing=routing)
    rows, layout = rows_like(p, width), p.layout()
    weights = p.weights if weighted else None
    expected = twins.combine(*of_double(rows, weights), p.k, layout)
    close(combine(rows, weights, p.k, layout), expected)
    wider = torch.full((len(p.tokens), width + 3), 7.0, device=DEVICE)
    combine(rows, weights, p.k, layout, wider[:, 2:-1])
    close(wider[:, 2:-1], twins.combine(*of_double(rows, weights), p.k, layout, torch.empty_like(expected)))
    assert (wider[:, [0, 1, -1]] == 7.0).all()


@pytest.mark.parametrize(("spec", "size"), SPECS_AND_SIZES)
def test_d_hidden(spec, size):
    d, i = SIZES[size]
    check_d_hidden(problem(spec, d=d, i=i))


@every_routing
def test_d_hidden_under_any_routing(routing):
    check_d_hidden(problem("gpt-oss", routing))


def check_d_hidden(p, blocks=BLOCKS, wanted=(True, True, True)):
    layout, wide = p.layout(), p.to(torch.float64)
    hidden = rows_like(p, p.spec.up_size(p.experts))
    got = d_hidden(p.grad, hidden, p.weights, layout, p.experts, p.spec, blocks, wanted=wanted)
    expected = twins.d_hidden(
        wide.grad, hidden.double(), wide.weights, layout, wide.experts, p.spec, blocks, wanted=(True, True, True)
    )
    assert tuple(t is not None for t in got) == wanted
    if got.d_hidden is not None:
        close(written(got.d_hidden, layout), written(expected.d_hidden, layout))
    if got.scaled is not None:
        close(written(got.scaled, layout), written(expected.scaled, layout))
    if got.partials is not None:
        close(written(got.partials.sum(0), layout), written(expected.partials.sum(0), layout))
        close(d_weights(got.partials, layout, p.weights), twins.d_weights(expected.partials, layout, wide.weights))


@pytest.mark.parametrize("which", range(3))
def test_d_hidden_makes_what_is_wanted(which):
    """Another kernel is compiled for each: on a GPU it need not add in the same order."""
    check_d_hidden(problem("biases"), wanted=tuple(n == which for n in range(3)))


@every_routing
def test_d_weights(routing):
    p = problem(routing=routing)
    layout, partials = p.layout(), torch.randn(3, p.expert_ids.numel(), device=DEVICE)
    partials[:, int(layout.ends[-1]) :] = torch.nan
    got = d_weights(partials, layout, p.weights)
    close(got, twins.d_weights(partials.double(), layout, p.weights.double()))
    assert (got[p.expert_ids >= 5] == 0).all()


# an expert without rows is where a routing meets the accumulating; strides matter to the result alone
@pytest.mark.parametrize(
    ("routing", "gather", "accumulate", "flip"),
    [
        *itertools.product(["empty-experts"], ["left", "right"], [False, True], [False, True]),
        *itertools.product([name for name in ROUTINGS if name != "empty-experts"], ["left", "right"], [False], [False]),
    ],
)
def test_outer(routing, gather, accumulate, flip):
    p = problem(routing=routing)
    layout, rows = p.layout(), rows_like(p, 21)
    rows[int(layout.ends[-1]) :] = torch.nan  # rows of no expert: nobody wrote them
    left, right = (p.tokens, rows) if gather == "left" else (rows, p.tokens)
    shape = (5, left.shape[1], right.shape[1])
    out = torch.randn(shape[0], shape[2], shape[1], device=DEVICE).mT if flip else torch.randn(shape, device=DEVICE)
    expected = twins.outer(*of_double(left, right, out), layout, BLOCKS, gather=gather, accumulate=accumulate)
    if not accumulate:
        out.fill_(torch.nan)
    returned = outer(left, right, out, layout, BLOCKS, gather=gather, accumulate=accumulate)
    assert returned.data_ptr() == out.data_ptr()
    close(out, expected)


@every_routing
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("width", [3, 70])
def test_sum_rows(routing, weighted, width):
    p = problem(routing=routing, t=40)
    layout = p.layout()
    rows = torch.randn(len(p.tokens), width, device=DEVICE)
    if not weighted:
        rows = rows_like(p, width)
        rows[int(layout.ends[-1]) :] = torch.nan
    weights, like = (p.weights if weighted else None), torch.empty(5, width, device=DEVICE)
    expected = twins.sum_rows(*of_double(rows, weights), layout, like.double())
    close(sum_rows(rows, weights, layout, like), expected)


@pytest.mark.parametrize(
    "blocks", [Blocks(32, 16, 16), Blocks(16, 32, 16), Blocks(16, 16, 32), Blocks(64, 64, 64)], ids=str
)
def test_tiles_of_other_sizes(blocks):
    p = problem("biases", d=70, i=40)
    wide, layout = p.to(torch.float64), p.layout(blocks.rows)
    got = up(p.tokens, p.k, layout, p.experts, p.spec, blocks, keep_hidden=True)
    expected = twins.up(wide.tokens, p.k, layout, wide.experts, p.spec, blocks, keep_hidden=True)
    close(written(got.activated, layout), written(expected.activated, layout))
    inner = d_hidden(p.grad, got.hidden, p.weights, layout, p.experts, p.spec, blocks, wanted=(True, True, True))
    theirs = twins.d_hidden(
        wide.grad, expected.hidden, wide.weights, layout, wide.experts, p.spec, blocks, wanted=(True, True, True)
    )
    close(written(inner.d_hidden, layout), written(theirs.d_hidden, layout))
    grad = outer(inner.d_hidden, p.tokens, torch.empty_like(p.experts.up), layout, blocks, gather="right")
    close(
        grad,
        twins.outer(theirs.d_hidden, wide.tokens, torch.empty_like(wide.experts.up), layout, blocks, gather="right"),
    )


@pytest.mark.parametrize("spec", ["silu", "gpt-oss", "not-gated"])
def test_columns_beyond_the_last_may_be_read_but_count_nowhere(spec):
    """Widths that are a multiple of 16 and not of a tile, as gpt-oss has: no masks, as long as the depth is even."""
    blocks = Blocks(16, 32, 16)
    p = problem(spec, d=48, i=48)
    assert product(blocks, torch.float32, torch.empty(5, 48, 96), 48)["TILE"].wrapped
    wide, layout = p.to(torch.float64), p.layout()
    got = up(p.tokens, p.k, layout, p.experts, p.spec, blocks, keep_hidden=True)
    expected = twins.up(wide.tokens, p.k, layout, wide.experts, p.spec, blocks, keep_hidden=True)
    for mine, theirs in zip(got, expected, strict=True):
        close(written(mine, layout), written(theirs, layout))
    matrix = torch.randn(5, 48, 80, device=DEVICE)
    theirs = twins.matmul(expected.activated, matrix.double(), None, layout, blocks)
    close(written(matmul(got.activated, matrix, None, layout, blocks), layout), written(theirs, layout))
    check_d_hidden(problem(spec, d=46, i=48), blocks)  # its depth is 48
