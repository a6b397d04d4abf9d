"""What lies 2^31 numbers and more from where it begins: matrices far apart, and rows far down. Only the pages that are
touched cost memory on a CPU, so none of it is filled before; on a GPU it takes 26 GB."""

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import BLOCKS, DEVICE, close, problem, rows_like, written

from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton import twins
from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.combine import combine
from moesaic.engine.triton.d_hidden import d_hidden
from moesaic.engine.triton.few import down_and_combine
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.matmul import matmul
from moesaic.engine.triton.outer import outer
from moesaic.engine.triton.up import up
from moesaic.types import ExpertWeights

FAR = pytest.mark.parametrize("far", ["experts", "lines", "steps"])


def far_apart(shape, far):
    """float16 [E, a, b] of random numbers that lie far apart, 2^31 elements and more from the first expert, line or
    number of a line to the last: only the pages that are touched cost memory."""
    e, a, b = shape
    strides = {
        "experts": (2**31 // (e - 1), b, 1),
        "lines": (b, 2**31 // (a - 2), 1),
        "steps": (a, 1, 2**31 // (b - 2)),
    }
    last = sum((n - 1) * s for n, s in zip(shape, strides[far], strict=True))
    assert last > 2**31
    try:
        room = torch.UntypedStorage(2 * (last + 1), device=DEVICE)
    except RuntimeError:
        pytest.skip("no address space for it here")
    matrix = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(room, 0, shape, strides[far])
    return matrix.copy_(torch.randn(shape) / 4)


def near(matrix):
    return matrix.clone(memory_format=torch.contiguous_format)


@FAR
def test_up_of_matrices_beyond_32_bits(far):
    p = problem(e=4, d=40, i=8, k=2).to(torch.float16)
    layout, matrix = p.layout(), far_apart((4, 16, 40), far)
    got, expected = (
        up(p.tokens, 2, layout, ExpertWeights(w, p.experts.down), p.spec, BLOCKS, keep_hidden=True).hidden
        for w in (matrix, near(matrix))
    )
    assert torch.equal(written(got, layout), written(expected, layout))


@FAR
def test_matmul_by_matrices_beyond_32_bits(far):
    p = problem(e=4, k=2).to(torch.float16)
    layout, matrix = p.layout(), far_apart((4, 24, 40), far)
    rows = rows_like(p, 24).half()
    got, expected = (matmul(rows, w, None, layout, BLOCKS) for w in (matrix, near(matrix)))
    assert torch.equal(written(got, layout), written(expected, layout))


@FAR
def test_d_hidden_by_matrices_beyond_32_bits(far):
    p = problem(e=4, d=40, i=24, k=2).to(torch.float16)
    layout, matrix, hidden = p.layout(), far_apart((4, 40, 24), far), rows_like(p, 48).half()
    got, expected = (
        d_hidden(
            p.grad,
            hidden,
            p.weights,
            layout,
            ExpertWeights(p.experts.up, w),
            p.spec,
            BLOCKS,
            wanted=(True, False, False),
        ).d_hidden
        for w in (matrix, near(matrix))
    )
    assert torch.equal(written(got, layout), written(expected, layout))


@FAR
def test_down_and_combine_by_matrices_beyond_32_bits(far):
    """In which order a GPU adds depends on how it loads, and that on the strides: the result is a float16's rounding
    from the twin's in float64."""
    p = problem(e=4, t=3, k=2).to(torch.float16)
    matrix, rows = far_apart((4, 24, 40), far), rows_like(p, 24).half()
    wide = p.to(torch.float64)
    expected = twins.down_and_combine(rows.double(), p.expert_ids, wide.weights, near(matrix).double(), None)
    close(down_and_combine(rows, p.expert_ids, p.weights, matrix, None), expected, 2**-11 + 1e-5)


@FAR
def test_gradients_beyond_32_bits(far):
    p = problem(e=4, d=40, k=2).to(torch.float16)
    layout, rows, matrix = p.layout(), rows_like(p, 24).half(), far_apart((4, 24, 40), far)
    expected = outer(rows, p.tokens, near(matrix), layout, BLOCKS, gather="right", accumulate=True)
    outer(rows, p.tokens, matrix, layout, BLOCKS, gather="right", accumulate=True)
    assert torch.equal(matrix, expected)


# Rows FIRST to FIRST + ROWS - 1 of so many; times LONG that is 2^32, which 32 bits take for 0: a kernel that reckons in
# them reads and writes other memory that is there.
FIRST, ROWS, LONG, SHORT = 1 << 20, 5, 4096, 16
OF_RELU = ExpertSpec("relu", gated=False)
WIDE = BLOCKS if DEVICE == "cuda" else Blocks(16, 256, 256)  # numpy takes as long for a small tile as for a wide one


def low(width):
    """float16 [FIRST + 16, width], of which the rows of the test have numbers; or a skip where there is no room."""
    try:  # two more as large for results
        rows, *_ = (torch.empty(FIRST + 16, n, dtype=torch.float16, device=DEVICE) for n in (width, LONG, LONG))
    except RuntimeError:
        pytest.skip("no room for it here")
    rows[FIRST : FIRST + ROWS] = torch.randn(ROWS, width) / 4
    rows[0] = 0  # in place of rows that are none, token 0 is read, and numpy warns of what may lie there
    return rows


def one_tile(first):
    """Of the rows from `first` on, all of expert 0; row and token are the same."""
    number = torch.arange(FIRST + 16, dtype=torch.int32, device=DEVICE)
    tile = [torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (0, first, first + ROWS)]
    return Layout(*tile, number, number.long(), number)


def of_rows(function, *rows):
    """The rows of the test as `function` has them far down, and at the top."""
    tops = [some[FIRST : FIRST + 16].clone() for some in rows]
    return function(one_tile(FIRST), *rows)[FIRST : FIRST + ROWS], function(one_tile(0), *tops)[:ROWS]


@pytest.mark.parametrize(("inputs", "outputs"), [(SHORT, LONG), (LONG, SHORT)])
def test_matmul_of_rows_beyond_32_bits(inputs, outputs):
    matrix = torch.randn(1, inputs, outputs, device=DEVICE).half()
    far, close_by = of_rows(lambda layout, x: matmul(x, matrix, None, layout, WIDE), low(inputs))
    assert torch.equal(far, close_by)
    assert far.any()


@pytest.mark.parametrize("which", ["hidden", "activated"])
@pytest.mark.parametrize(("inputs", "outputs"), [(SHORT, LONG), (LONG, SHORT)])
def test_up_of_rows_beyond_32_bits(inputs, outputs, which):
    experts = ExpertWeights(torch.randn(1, outputs, inputs, device=DEVICE).half(), torch.empty(1, 1, outputs).half())

    def project(layout, x):
        keep = {"keep_hidden": which == "hidden", "keep_activated": which == "activated"}
        return getattr(up(x, 1, layout, experts, OF_RELU, WIDE, **keep), which)

    far, close_by = of_rows(project, low(inputs))
    assert torch.equal(far, close_by)
    assert far.any()


@pytest.mark.parametrize("which", ["d_hidden", "scaled"])
def test_d_hidden_of_rows_beyond_32_bits(which):
    experts = ExpertWeights(torch.empty(1), torch.randn(1, SHORT, LONG, device=DEVICE).half())
    wanted = (which == "d_hidden", which == "scaled", False)

    def back(layout, g, hidden):
        weights = torch.ones(len(g), 1, device=DEVICE)
        return getattr(d_hidden(g, hidden, weights, layout, experts, OF_RELU, WIDE, wanted=wanted), which)

    far, close_by = of_rows(back, low(SHORT), low(LONG))
    assert torch.equal(far, close_by)
    assert far.any()


def test_combine_of_rows_beyond_32_bits():
    """Of two tokens only: they are all that the kernel has programs for."""
    rows = low(LONG)
    row_of = torch.tensor([0, 3, 1, -1], dtype=torch.int32, device=DEVICE)
    far_rows = torch.where(row_of < 0, row_of, row_of + FIRST)
    close_by = combine(rows[FIRST : FIRST + 4].clone(), None, 2, one_tile(0)._replace(row_of=row_of))
    far = combine(rows[:4], None, 2, one_tile(FIRST)._replace(row_of=far_rows))
    assert torch.equal(far, close_by)
    assert far.any()
