"""A whole model that generates under every experts implementation in turn: prefill and decoding as a user waits for
them, attention and head included."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.bench.timing import Entrant, Spread, interleave, spread
from moesaic.hf.attach import attach
from moesaic.hf.experts import NAME, is_on_seam
from moesaic.hf.load import HERE, auto_class, check_is_moe, first_line, quietly

REFERENCE = "eager"  # transformers' definition
# of |logits - eager's| / |eager's|, and as a share of what that is where the experts give nothing: in 16 bits a token
# near a tie reaches other experts than under eager, in everybody, and of random weights the experts change little
ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
OF_NOTHING = 0.25  # engines that are right were at 0.05 to 0.15


class Generating(NamedTuple):
    """What one implementation took, in seconds; None where it is wrong or failed, as `note` says.

    step: of decoding, one token of every row.  difference: of its logits from eager's, relative, in the 2-norm.
    """

    name: str
    prefill: Spread | None = None
    step: Spread | None = None
    difference: float | None = None
    note: str = ""


class Script:
    """Hears every step of `generate`, its time and, unless it is one of many, its logits; lets everybody write the same
    `tokens` [B, N]."""

    def __init__(self, tokens: Tensor, *, one_of_many: bool) -> None:
        self.tokens, self.one_of_many = tokens, one_of_many
        self.at: list[float] = []
        self.logits: list[Tensor] = []
        self.begun = time.perf_counter()

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.at.append(time.perf_counter())
        if not self.one_of_many:
            self.logits.append(logits)
        return torch.full_like(logits, -torch.inf).scatter_(1, self.tokens[:, len(self.at) - 1, None], 0.0)

    def difference(self, truth: "Script") -> float:
        """Of the logits of all steps, relative, in the 2-norm."""
        logits, wanted = torch.stack(self.logits), torch.stack(truth.logits)
        return float((logits - wanted).norm() / wanted.norm())

    @property
    def prefill(self) -> float:
        return self.at[0] - self.begun

    @property
    def step(self) -> float:
        return (self.at[-1] - self.at[0]) / (len(self.at) - 1)


def compare_generating(
    model: Any,
    tokens: Tensor,
    new: int,
    peers: Sequence[str],
    rounds: int = 5,
    done: Callable[[int, str], None] = lambda _runs, _name: None,
) -> list[Generating]:
    """Let `model` read `tokens` [B, T] but for the last `new`, and write those, under "moesaic" and each peer in turn.

    The model's own `generate` runs, with a cache and nothing of its generation config, and writes what is given:
    everybody does the same work. The logits of all steps are compared with eager's first; who differs by more than
    rounding, or fails, has no speed. The model is left as it came. Returned are ours, then the peers. `done` hears of
    every run, (rounds + 1) for each, one of eager and one without experts.

    Raises ValueError where ours cannot serve the model or tokens are too few.
    """
    from transformers import GenerationConfig

    if not 2 <= new < tokens.shape[1]:
        raise ValueError(f"{new} of {tokens.shape[1]} tokens to write: 2 or more are needed, and one to read before")
    settings, before = model.generation_config, getattr(model.config, "_experts_implementation", None)

    def write(name: str, *, one_of_many: bool = False) -> Script:
        model.set_experts_implementation(name)
        read, script = tokens[:, :-new], Script(tokens[:, -new:], one_of_many=one_of_many)
        mask = torch.ones_like(read)
        model.generate(read, attention_mask=mask, logits_processor=[script], max_new_tokens=new)
        done(1, name)
        return script

    try:
        model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True, do_sample=False, num_beams=1)
        attach(model)
        truth = write(REFERENCE)
        with _no_experts(model):
            nothing = write(REFERENCE).difference(truth)
        allowed = min(ALLOWED[model.dtype], OF_NOTHING * nothing)
        return _in_turn(write, truth, allowed, list(dict.fromkeys([NAME, *peers])), rounds)
    finally:
        model.generation_config = settings
        model.set_experts_implementation(before)


@contextmanager
def _no_experts(model: Any) -> Iterator[None]:
    """What the experts give is nothing."""
    handles = [
        module.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
        for module in model.modules()
        if is_on_seam(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_turn(
    write: Callable[..., Script], truth: Script, allowed: float, names: Sequence[str], rounds: int
) -> list[Generating]:
    found = {name: _first(write, name, truth, allowed) for name in names}
    runs: dict[str, list[Script]] = {name: [] for name in names if not found[name].note}

    def entrant(name: str) -> Entrant:
        return Entrant(name, _nothing, lambda: runs[name].append(write(name, one_of_many=True)))

    entrants = [entrant(name) for name in runs]
    if entrants:
        interleave(entrants, dict.fromkeys(runs, rounds))
    for name, scripts in runs.items():
        prefill, step = spread([run.prefill for run in scripts]), spread([run.step for run in scripts])
        found[name] = found[name]._replace(prefill=prefill, step=step)
    return list(found.values())


def _first(write: Callable[..., Script], name: str, truth: Script, allowed: float) -> Generating:
    """The first run of somebody is not timed but judged."""
    try:
        difference = write(name).difference(truth)
    except Exception as error:  # an implementation may raise anything
        return Generating(name, note=f"failed: {first_line(error)}")
    wrong = f"wrong: logits differ from eager's by {difference:.1e}, allowed is {allowed:.1e}"
    return Generating(name, difference=difference, note="" if difference <= allowed else wrong)


def _nothing() -> None:
    """To switch the implementation is no part of a run: the clock of a Script begins after it."""


def random_model(folder: Path, layers: int | None, dtype: torch.dtype | None = None) -> Any:
    """The model of a config.json with random weights, of the config's dtype unless one is given, and with its first
    `layers` only where that is given.

    ValueError where the config cannot be read, is of no MoE model or cannot be made into one, or those layers have no
    experts that take an implementation.
    """
    from transformers import AutoConfig

    check_is_moe(folder)
    with quietly():
        try:
            config = AutoConfig.from_pretrained(folder, **HERE)
            if layers is not None:
                _cut(config.get_text_config(), layers)
            torch.manual_seed(0)
            model = auto_class(config).from_config(config, **({} if dtype is None else {"dtype": dtype})).eval()
        except Exception as error:  # transformers raises many kinds
            raise ValueError(f"{folder}: no model can be made of its config.json ({first_line(error)})") from None
    if layers is not None and not any(is_on_seam(module) for module in model.modules()):
        raise ValueError(f"--layers {layers}: none of the first {layers} layers has experts: give more")
    return model


def _cut(config: Any, layers: int) -> None:
    """Fewer layers, and what the config lists for each of them."""
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = min(layers, whole)
