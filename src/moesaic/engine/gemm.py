"""One expert's matmul, called in the way this machine's BLAS is fastest at.

What decides is measured (`moesaic doctor --measure` does it again): MKL streams a weight matrix at full bandwidth only
for a few rows and packs it above that, twice the cost; `W @ x.T` stays flat where `x @ W.T` climbs; on AMD MKL leaves
the AVX-512 units to oneDNN; a 16-bit matmul that the CPU has no instructions for runs five times slower than widening
the weights to float32 first. The forms differ in the last bit, so the choice hangs on sizes and machine alone.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # rows of a 16-bit weight widened at a time: 2 MB of float32 at D=2048, which stay in L2
BLOCK_MAX_ROWS = 8  # up to here (rows of x) the matmul is over before a widened block leaves the cache
WHOLE = 10**9


class Workspace:
    """Scratch memory that every expert of one call uses again: fresh pages would cost more than they hold."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised [rows, columns] matrix; it is overwritten when `name` is taken again."""
        size = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(rows, columns)

    def widen(self, name: str, w: Tensor, dtype: torch.dtype) -> Tensor:
        """`w` itself where it has the dtype, else a copy in scratch of the same memory layout."""
        if w.dtype == dtype:
            return w
        if _row_major(w):
            return self.take(name, *w.shape, dtype).copy_(w)
        return self.take(name, *w.mT.shape, dtype).copy_(w.mT).mT


def rows_form(x: Tensor, w: Tensor, work: Workspace, name: str) -> Tensor:
    return torch.mm(x, w.mT, out=work.take(name, len(x), len(w), x.dtype))


def columns_form(x: Tensor, w: Tensor, work: Workspace, name: str) -> Tensor:
    return torch.mm(w, x.mT, out=work.take(name, len(w), len(x), x.dtype)).mT


def vector_form(x: Tensor, w: Tensor, work: Workspace, name: str) -> Tensor:
    return torch.mv(w, x[0], out=work.take(name, 1, len(w), x.dtype)[0])[None]


def onednn_form(x: Tensor, w: Tensor, work: Workspace, name: str) -> Tensor:
    del work, name  # oneDNN brings its own output
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), w, None, "none", [], "")


Form = Callable[[Tensor, Tensor, Workspace, str], Tensor]
Table = tuple[tuple[int, Form], ...]  # (up to so many rows of x, the form to take)

# float32, microseconds for a 1536 x 2048 weight from memory, 2 threads, torch 2.13 (MKL 2024.2, oneDNN 3.12).
# Intel Xeon, AVX-512:   rows 470 | 490 at 1 | 3 rows, then 900-1300 where columns 820-1000; at 128 rows 3165 | 3306
# AMD EPYC, AVX-512:     rows 885 | 1840 | 1730 | 5415 at 1 | 2 | 16 | 128 rows, columns 960 | 910 | 1180 | 5510,
#                        oneDNN 440-600 | 780 | 1070 | 5230, and at 1024 rows 196 GF/s against MKL's 131
ROW_MAJOR: dict[str, Table] = {
    "intel": ((3, rows_form), (63, columns_form), (WHOLE, rows_form)),
    "amd": ((WHOLE, onednn_form),),
    "other": ((WHOLE, rows_form),),
}
# the same for weights stored [in, out], and for the backward's products with W itself. AMD: rows 905 | 3670 | 6430 at
# 1 | 8 | 64 rows, oneDNN 1310 | 1490 | 3270
COLUMN_MAJOR: dict[str, Table] = {
    "intel": ((WHOLE, rows_form),),
    "amd": ((1, rows_form), (WHOLE, onednn_form)),
    "other": ((WHOLE, rows_form),),
}
# 16-bit with the instructions: the plain call is the best at every size. Without them one row alone is worth it.
NATIVE: Table = ((WHOLE, rows_form),)
EMULATED: Table = ((1, vector_form), (WHOLE, rows_form))


def linear(x: Tensor, w: Tensor, work: Workspace, name: str) -> Tensor:
    """x [m, a] through w [b, a] of either layout: [m, b] in x's dtype, rows or columns contiguous.

    `name` is the scratch that the result may live in. A 16-bit w under a wider x is widened block by block.
    """
    if w.dtype != x.dtype:
        return _widened_by_block(x, w, work, name)
    if w.dtype == torch.float32:
        table = (ROW_MAJOR if _row_major(w) else COLUMN_MAJOR)[machine()]
    else:
        table = NATIVE if w.dtype == torch.float64 or has_instructions(w.dtype) else EMULATED
    return next(form for rows, form in table if len(x) <= rows)(x, w, work, name)


def _widened_by_block(x: Tensor, w: Tensor, work: Workspace, name: str) -> Tensor:
    out = work.take(name, len(w), len(x), x.dtype)
    xt = x.mT
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        block = work.take("block", stop - start, w.shape[1], x.dtype).copy_(w[start:stop])
        torch.mm(block, xt, out=out[start:stop])
    return out.mT


def add_outer(out: Tensor, g: Tensor, x: Tensor, work: Workspace, *, accumulate: bool) -> None:
    """out [b, a] (+)= g.T [b, m] @ x [m, a], in place; a 16-bit `out` under wider factors is rounded once."""
    if out.dtype == g.dtype:
        torch.addmm(out, g.mT, x, beta=float(accumulate), out=out)
        return
    wide = torch.mm(g.mT, x, out=work.take("outer", *out.shape, g.dtype))
    if accumulate:
        out.add_(wide)
    else:
        out.copy_(wide)


def matmul_dtype(rows: int, tokens: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """The dtype in which an expert with `rows` tokens multiplies: that of the tokens, unless it is 16-bit without
    instructions for it; then float32, except for a single bfloat16 row, where reading half the bytes wins."""
    if tokens.itemsize > 2 or has_instructions(tokens) or (rows == 1 and tokens == weights == torch.bfloat16):
        return tokens
    return torch.float32


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype itself, so that oneDNN need not emulate it.

    oneDNN can be told to ignore instructions (ONEDNN_MAX_CPU_ISA); then they are not there for us either.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    if limit not in ("ALL", "DEFAULT") and not any(word in limit for word in ("BF16", "FP16", "AMX", "AVX10")):
        return False
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    return any(_capabilities().get(name, False) for name in names[dtype])


@cache
def machine() -> str:
    """Whose BLAS habits to expect: "intel", "amd" or "other"."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return "other"
    return "amd" if "amd" in str(_capabilities().get("cpu_name", "")).lower() else "intel"


def explain(dtype: torch.dtype) -> str:
    """How matrices of this dtype are multiplied here, in words: what `moesaic doctor` prints."""
    habits = {"intel": "MKL, in the form best for the rows", "amd": "oneDNN, faster here than MKL", "other": "the BLAS"}
    if dtype == torch.float64:
        return "float64 by the BLAS as it is"
    if dtype == torch.float32:
        return f"float32 by {habits[machine()]}"
    if has_instructions(dtype):
        return f"{str(dtype)[6:]} by this CPU's own instructions"
    return f"{str(dtype)[6:]} widened to float32, as this CPU would emulate it; then by {habits[machine()]}"


def _capabilities() -> Mapping[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.12


def _row_major(w: Tensor) -> bool:
    return w.stride(-1) == 1
