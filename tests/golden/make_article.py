"""Golden vectors of the article's own MoEGate, executed from the seed document.

Run: `python tests/golden/make_article.py SEED_DOCUMENT`.
"""

import contextlib
import io
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import record
import torch
import torch.nn as nn
import torch.nn.functional as F

CONVENTIONS = {
    "group_score": "top2_sum",
    "group_mask": "-inf",
    "norm_eps": 1e-20,
    "norm_single_expert": False,
    "router_dtype": "float32",
    "score_dtype": "float32",
    "weights_dtype": "float32",
}


def load_gate(document: Path) -> type[nn.Module]:
    """The class as the document has it; the drawing libraries it names are not needed to route."""
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    code = next(block for block in blocks if block.startswith("class MoEGate"))
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "Tuple": tuple}
    exec(compile(code, document.name, "exec"), namespace)
    return namespace["MoEGate"]


def main(document: Path) -> None:
    gate_class = load_gate(document)

    def run(trial: record.Trial, inputs: record.Inputs):
        config = SimpleNamespace(**record.fields(trial, CONVENTIONS))
        with contextlib.redirect_stdout(io.StringIO()):
            gate = gate_class(config).eval()
            gate.weight.copy_(inputs.weight)
            gate.e_score_correction_bias.copy_(inputs.bias)
            expert_ids, weights = gate(inputs.x.unsqueeze(0))
        return expert_ids, weights, {}

    source = {
        "package": "the article's MoEGate (second seed document, chapter 1.3)",
        "version": document.stem,
        "command": "python tests/golden/make_article.py SEED_DOCUMENT",
    }
    record.write("article", run, record.v3_grid(), CONVENTIONS, source)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
