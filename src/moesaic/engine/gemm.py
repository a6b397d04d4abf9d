"""One expert's matmul, called in the way this machine's BLAS is fastest at.

What decides is measured (`moesaic doctor --measure` does it again): MKL streams a weight matrix at full bandwidth only
for a few rows and packs it above that, twice the cost, unless it is small; `W @ x.T` stays flat up to 48 rows where
`x @ W.T` climbs, and is the best with AMX; oneDNN is the best for some hundred rows of float32, and on AMD for all,
where MKL leaves the AVX-512 units idle; an AMD without them is fastest by MKL, each thread on its own slabs of W; a
16-bit matmul that the CPU has no instructions for runs several times slower than widening the weights to float32
first. The forms differ in the last bit, so the choice hangs on sizes, alignment, threads and machine alone.
"""

from itertools import takewhile

import torch
from torch import Tensor

from moesaic.engine import matmul_forms  # its constants, which tests set
from moesaic.engine.matmul_forms import (
    ANY,
    Form,
    blocks_form,
    columns_form,
    invariant_form,
    onednn_form,
    rows_form,
    slabs_form,
    step_of,
    turned_form,
    vector_form,
    widening,
    widening_inputs,
)
from moesaic.engine.processor import has_amx, has_instructions, machine

Table = tuple[tuple[int, Form], ...]  # (up to so many rows of x, the form to take)

# float32, microseconds for a 1536 x 2048 weight from memory, 2 threads, torch 2.13 (MKL 2024.2, oneDNN 3.12).
# Intel Xeon, AVX-512:   rows 440 | 460 | 830 | 1080 | 1240 at 1 | 3 | 4 | 8 | 12 rows, blocks 670 | 760 | 850 from 4,
#                        columns 860 | 900 | 890 | 860 | 980 at 4 | 8 | 12 | 16 | 32; at 128 rows 2870 | 2970; oneDNN,
#                        called alone, is between the best of these and 15 % slower, but whole layers are 6 to 12 %
#                        faster with it (qwen3-30b and olmoe T=512, dsv3-quarter T=1024 and 2048, balanced: 64 rows an
#                        expert); over 320 rows its result, which is copied, costs more than it saves: Zipf T=2048, for
#                        all rows | up to 500 | 320 | 224, olmoe 743 | 713 | 707 | 696 ms, qwen3-30b 589 | 569 | 569 |
#                        571; balanced olmoe, 256 rows an expert, 684 | 685 | 690 | 707
# AMD EPYC, AVX-512:     rows 885 | 1840 | 1730 | 5415 at 1 | 2 | 16 | 128 rows, columns 960 | 910 | 1180 | 5510,
#                        oneDNN 440-600 | 780 | 1070 | 5230, and at 1024 rows 196 GF/s against MKL's 131
# AMD EPYC, AVX2:        rows 666 | 1236 | 1469 | 1787 | 3395 | 9784 at 1 | 2 | 8 | 16 | 64 | 256 rows, oneDNN 616 |
#                        906 | 1129 | 1492 | 3135 | 11906, slabs 492 | 606 | 952 | 1223 | 2896 | 9606 (of 2^17 elements
#                        474 | 646 | 1032 | 1325 | 3016 | 10090, of 2^21 486 | 798 | 992 | 1271 | 2976 | 9310); columns
#                        are between oneDNN and slabs from 4 rows on; 2048 x 768: rows 426 | 855 at 1 | 16 rows, slabs
#                        278 | 651
ROW_MAJOR: dict[str, Table] = {
    "intel": ((3, rows_form), (10, blocks_form), (320, onednn_form), (ANY, rows_form)),
    "amd": ((ANY, onednn_form),),
    "amd-avx2": ((ANY, slabs_form),),
    "other": ((ANY, rows_form),),
}
# the same for weights stored [in, out], and for the backward's products with W itself. AMD with AVX-512: rows 905 |
# 3670 | 6430 at 1 | 8 | 64 rows, oneDNN 1310 | 1490 | 3270; with AVX2: rows 660 | 1132 | 1761 | 1983 | 4172 | 11033 at
# 1 | 2 | 8 | 16 | 64 | 256, oneDNN 671 | 841 | 1148 | 1622 | 4424 | 14611, slabs of inputs 394 | 577 | 964 | 1322 |
# 3092 | 10001, of outputs 759 | 929 | 1056 | 1315 | 3002 | 9739; at 512 rows all but oneDNN 19 ms
COLUMN_MAJOR: dict[str, Table] = {
    "intel": ((ANY, rows_form),),
    "amd": ((1, rows_form), (ANY, onednn_form)),
    "amd-avx2": ((ANY, slabs_form),),
    "other": ((ANY, rows_form),),
}
# bfloat16 with AMX, the same weight, x and out column-major so that nothing is copied: turned 318 | 565 at 1 to 6 | 8
# rows, as rows 375 | 705, one by vector 309; layers take 10 to 20 % less up to 32 rows an expert, 5 to 10 % at 128 and
# 256. Stored [in, out] 930 | 1273 at 8 | 128, as rows 573 | 812. With avx512_bf16 or avx512_fp16 alone always slower.
AMX: Table = ((1, vector_form), (ANY, turned_form))
PLAIN: Table = ((ANY, rows_form),)  # float64, small float32, other 16-bit with instructions

# 16-bit without the instructions. Reading half the bytes wins while a few rows hide how slow the multiplying is.
# Intel, told to ignore its instructions, bfloat16: as it is 330 | 530 | 770 | 1370 at 1 | 2 | 3 | 8 rows, 22000 at 256,
#                  2^19 elements widened at a time 660 | 620 | 720 | 810 | 1480 at 2 | 3 | 8 | 12 | 16 (half of that
#                  is the widening itself), the whole of it, then W @ x.T, 1110 | 1510 | 1760 at 16 | 32 | 48,
#                  and x @ W.T 2430 | 3420 | 5910 at 64 | 128 | 256 (by 2^20 elements 2510 | 3500 | 5990); layers of 16
#                  to 64 rows an expert take 2 to 6 % less with the whole widened than by 2^20 elements; 2048 x 768 as
#                  it is 300 | 420, widened 330 at 2;
#                  stored [in, out]: as it is 400 | 520 | 665 at 1 | 2 | 3, 2^19 elements of some inputs at a time 860 |
#                  1030 | 1650 at 3 | 8 | 32, the whole widened 980 | 1260 | 1720
#                  float16: as it is 315 | 424 | 735 at 1 | 2 | 4, widened 580 | 570 | 650
# AMD with AVX-512, told to ignore its instructions: as it is 325 | 430 | 580 | 1600 at 1 | 2 | 3 | 4 rows,
#                  row by row 345 | 550 | 670 | 800 | 1000 at 1 | 2 | 3 | 4 | 5,
#                  2^20 elements widened at a time 920 | 910 | 1230 | 2670 | 4940 at 4 | 8 | 16 | 64 | 128,
#                  2^19 elements 995 | 1090 | 1350 | 2810 | 5075, the whole of it 1220 | 1320 | 1580 | 3230 | 5255;
#                  stored [in, out]: as it is 701 | 1146 | 1918 at 1 | 3 | 4, the whole widened 1127 | 2100 | 3050 at
#                  1 | 4 | 32, 2^20 elements of some inputs at a time 1160 | 2160 at 4 | 32
#                  the same where the two cores share an L3 cache | where they share none: as it is by oneDNN 414 | 439,
#                  542 | 535, 1095 | 1109 at 4, 8, 24 rows, 2^20 elements widened 375 | 1169, 419 | 1237, 644 | 1423
# AMD, AVX2:       as it is 320 | 623 | 946 | 1236 | 2423 at 1 | 2 | 3 | 4 | 8 rows, the whole widened, then slabs 636 |
#                  742 | 902 | 1058 | 1208 and 1409 | 3328 | 10515 at 16 | 64 | 256 (rows 2243 | 4919 | 12117, oneDNN
#                  1660 | 3836 | 11381, columns 1391 | 3441 | 10748; by parts 5 to 30 % more); 2048 x 768 as it is 181 |
#                  367 | 554 | 736 at 1 to 4, slabs 573 | 533 | 683 | 689; stored [in, out] one row as it is 8461, by
#                  vector 767, slabs 1303; float16: as it is 277 | 511 | 776 | 995, slabs 587 | 694 | 772 | 942
NARROW: dict[str, Table] = {  # in the dtype of W
    "intel": ((2, rows_form),),
    "amd": ((3, rows_form), (4, vector_form)),
    "amd-avx2": ((2, rows_form),),
    "other": ((1, rows_form),),
}
NARROW_COLUMN_MAJOR: dict[str, Table] = {
    "intel": ((3, rows_form),),
    "amd": ((3, rows_form), (8, onednn_form)),
    "amd-avx2": ((1, vector_form),),
    "other": (),
}
NARROW_HALF: dict[str, Table] = {  # AMD: 274 | 616 | 823, widened 700 up
    "intel": ((2, rows_form),),
    "amd": ((2, rows_form),),
    "amd-avx2": ((3, rows_form),),
    "other": (),
}
# Rows of all experts beyond those that do not yet leave torch's loop over experts. On Intel leaving it takes 450 µs a
# product, each row there 110 to 200 more than in the form it should have: dsv3-quarter T=16, one expert of 3 rows among
# 100, 48.9 -> 47.0 ms. AMD, AVX2, 3 | 8 | 12 | 20: olmoe T=8 42.8 | 40.5 | 40.5 | 40.5, dsv3-quarter T=16 and 24 40.2 |
# 38.1 | 38.2 | 38.1 and 58.7 | 58.3 | 55.9 | 55.9, elsewhere the same.
STRAYS = {"intel": 3, "amd": 3, "amd-avx2": 12, "other": 3}
WIDE: dict[str, Table] = {  # more rows than that, in float32
    "intel": (
        (12, widening(matmul_forms.BLOCK, rows_form)),
        (48, widening(ANY, columns_form)),
        (ANY, widening(ANY, rows_form)),
    ),
    "amd": ((ANY, widening(1 << 20, onednn_form)),),
    "amd-avx2": ((ANY, widening(ANY, slabs_form)),),
    "other": ((ANY, widening(ANY, rows_form)),),
}
WIDE_COLUMN_MAJOR: dict[str, Table] = {
    "intel": ((63, widening_inputs(matmul_forms.BLOCK, rows_form)), (ANY, widening(ANY, rows_form))),
    "amd": ((1, widening_inputs(1 << 20, rows_form)), (ANY, widening_inputs(1 << 20, onednn_form))),
    "amd-avx2": ((ANY, widening(ANY, slabs_form)),),
    "other": ((ANY, widening(ANY, rows_form)),),
}
INVARIANT: Table = ((ANY, invariant_form),)


def table_for(dtype: torch.dtype, w: Tensor) -> Table:
    """The forms for x of `dtype` and w [..., a, b], one matrix or all experts'; a w of another dtype is converted."""
    if w.dtype != dtype:
        return (WIDE if _is_row_major(w) else WIDE_COLUMN_MAJOR)[machine()]
    if dtype == torch.float32 and w.shape[-2] * w.shape[-1] > matmul_forms.SMALL:
        return (ROW_MAJOR if _is_row_major(w) else COLUMN_MAJOR)[machine()]
    return AMX if dtype == torch.bfloat16 and has_amx() and _is_row_major(w) else PLAIN


def narrow_table(w: Tensor, dtype: torch.dtype) -> Table:
    """The forms for the few rows of x of `dtype` that are better multiplied as they are, in 16 bits, than widened; none
    where w has another dtype, or the CPU the instructions."""
    if w.dtype != dtype or matmul_dtype(dtype) == dtype:
        return ()
    if dtype == torch.bfloat16:
        return (NARROW if _is_row_major(w) else NARROW_COLUMN_MAJOR)[machine()]
    return NARROW_HALF[machine()] if _is_row_major(w) else ()


def _is_row_major(w: Tensor) -> bool:
    """Of W = w.T."""
    return w.stride(-2) == 1


def form_for(table: Table, rows: int) -> Form:
    return next(form for up_to, form in table if rows <= up_to)


def most_rows(table: Table) -> int:
    """Up to how many rows the table has a form."""
    return table[-1][0] if table else 0


def looped_rows(table: Table) -> int:
    """Up to how many rows on average torch's own loop over experts will do: it makes the plain call, on W or on blocks
    of it."""
    leading = takewhile(lambda entry: entry[1] in (rows_form, blocks_form), table)
    return max((rows for rows, _ in leading), default=0)


def stray_rows() -> int:
    """How many rows too many do not yet leave a loop in 16 bits."""
    return STRAYS[machine()]


def part_of(stack: Tensor, table: Table, rows: float) -> int:
    """How many columns of each w [a, b] of a stack torch's loop over experts takes at a time, for so many rows on
    average: all of them, or blocks in steps of 16 numbers."""
    columns = stack.shape[2]
    if rows <= table[0][0]:
        return columns
    return -(-step_of(columns, stack.shape[1] * columns, matmul_forms.BLOCK) // 16) * 16


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tokens of `dtype` are multiplied: their own, or float32 where this CPU would emulate it."""
    return dtype if dtype.itemsize > 2 or has_instructions(dtype) else torch.float32


def explain(dtype: torch.dtype) -> str:
    """How matrices of this dtype are multiplied here, in words: what `moesaic doctor` prints."""
    habits = {
        "intel": "MKL or oneDNN, in the form best for the rows",
        "amd": "oneDNN, faster here than MKL",
        "amd-avx2": "MKL, each thread on its own slabs of the weight",
        "other": "the BLAS",
    }
    if dtype == torch.float64:
        return "float64 by the BLAS as it is"
    if dtype == torch.float32:
        return f"float32 by {habits[machine()]}"
    if has_instructions(dtype):
        return f"{str(dtype)[6:]} by {'AMX' if dtype == torch.bfloat16 and has_amx() else 'instructions of this CPU'}"
    return (
        f"{str(dtype)[6:]} widened to float32 for more than a few rows, as this CPU would emulate it; "
        f"then by {habits[machine()]}"
    )
