"""Recording what a model handed to its experts. The model and its results stay as they are."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from moesaic.config import MoEConfig
from moesaic.hf.modules import moe_layers
from moesaic.trace.file.limits import check_names, check_seed
from moesaic.trace.recording.forwards import check_one_text
from moesaic.trace.recording.recorder import Recorder
from moesaic.trace.recording.stream import streaming
from moesaic.trace.recording.watch import DETAILS


@contextmanager
def record(
    model: nn.Module,
    detail: str = "picks",
    *,
    config: MoEConfig | None = None,
    labels: Sequence[str] | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    to: str | Path | None = None,
) -> Iterator[Recorder]:
    """Record the routing of every forward of `model` inside the block; `.trace` of what it yields is the result.

    detail: "ids" (expert ids only), "picks" (ids and weights) or "scores" (the routers' logits and biases too).
    Padding is left out where the model was given a 2-D attention mask. labels: one name per sequence, in the order of
    the forwards. tokenizer: gives the text of the tokens to the trace. A model may be compiled, before or inside.

    to: a file that the record goes to, forward by forward, so that memory does not grow with its length; it is there,
    as `save` would have written it, when the block has ended, and `.trace` reads it. A block that ends in an error
    leaves no file, and an older one as it was; but where the error is the recorder's own, what fits together is
    written, and what is left out of the file is kept in a folder that the error names.

    Raises ValueError, before anything runs, where `model` has no MoE layer whose picks can be seen, or, for "scores",
    one of them has no router that can be, where they lie in an encoder and in its decoder, or where `to` cannot be
    written; and at the end of the block where a compiled model was called and none of its layers was heard.
    """
    if detail not in DETAILS:
        raise ValueError(f"detail={detail!r} is unknown: use {', '.join(map(repr, DETAILS[:-1]))} or {DETAILS[-1]!r}")
    check_seed(seed)
    check_names(labels)
    layers = moe_layers(model, config)
    check_one_text(model, layers)
    with ExitStack() as stack:
        streamed = None if to is None else stack.enter_context(streaming(Path(to)))
        recorder = Recorder(model, layers, detail, labels, seed, tokenizer, streamed)
        try:
            with recorder.watching():
                yield recorder
        except ValueError as error:
            if error is recorder.refusal:
                recorder.write(str(error))
            raise
        recorder.write()
