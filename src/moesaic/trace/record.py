"""Recording: hooks that copy what a model handed to its experts. The model and its results stay as they are."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.hf.modules import MoELayer, correction_bias, is_recompute, is_router, moe_layers
from moesaic.trace.store import Trace
from moesaic.types import Routing

Observer = Callable[[str, Routing], None]


@contextmanager
def observe(modules: Mapping[str, nn.Module], observer: Observer) -> Iterator[None]:
    """Hand every call of the watched modules to `observer`; the modules' own results are untouched.

    A router is reported after its call, with logits. An experts module is reported before its call, with the ids and
    weights it was given and logits None: that is what the model really used. Recomputation under activation
    checkpointing is not reported again. Tensors are the live ones: copy what you keep.
    """
    handles = []
    for name, module in modules.items():
        if is_router(module):
            handles.append(module.register_forward_hook(_router_reporter(name, observer)))
        else:
            handles.append(module.register_forward_pre_hook(_experts_reporter(name, observer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record(
    model: nn.Module,
    detail: str = "picks",
    *,
    config: MoEConfig | None = None,
    labels: Sequence[str] | None = None,
    seed: int | None = None,
) -> Iterator["Recorder"]:
    """Record the routing of every forward of `model` inside the block; `.trace` of what it yields is the result.

    detail: "picks" (ids and weights) or "scores" (the routers' logits and biases too). Padding is left out where the
    model was given a 2-D attention mask. labels: one name per sequence, in the order of the forwards.
    """
    if detail not in ("picks", "scores"):
        raise ValueError(f"detail={detail!r} is unknown: use 'picks' or 'scores'")
    recorder = Recorder(model, moe_layers(model, config), detail == "scores", labels, seed)
    with recorder.watching():
        yield recorder


class Forward(NamedTuple):
    """What one call of a model says about its tokens, batch-major, padding still in."""

    rows: Tensor  # int64 [n], the row of the batch a token is in
    keep: Tensor | None = None  # bool [n]; False is padding
    input_ids: Tensor | None = None  # [n]
    continues: bool = False  # a decoding step: its rows go on with the sequences of the forward before

    def kept(self, tensor: Tensor) -> Tensor:
        return tensor if self.keep is None else tensor[self.keep.to(tensor.device)]


class Recorder:
    """Collects copies on the CPU; `trace` puts them together. Made by `record`."""

    def __init__(
        self, model: nn.Module, layers: Sequence[MoELayer], scores: bool, labels: Sequence[str] | None, seed: int | None
    ) -> None:
        self.model, self.layers, self.scores = model, layers, scores
        self.labels, self.seed = labels, torch.initial_seed() if seed is None else seed
        self._routers = {layer.name: layer.router for layer in layers}
        self._picks: dict[str, list[Routing]] = {layer.name: [] for layer in layers}
        self._logits: dict[str, list[Tensor | None]] = {layer.name: [] for layer in layers}
        self._forwards: dict[str, list[Forward]] = {layer.name: [] for layer in layers}
        self._biases: dict[str, Tensor | None] = {}
        self._moved_biases: set[str] = set()
        self._dtypes = {"logits": "float32", "weights": "float32"}
        self._current: Forward | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        experts = {layer.name: layer.router if layer.experts is None else layer.experts for layer in self.layers}
        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True).remove)
            stack.enter_context(observe(experts, self._take_picks))
            if self.scores:
                stack.enter_context(observe(self._routers, self._take_logits))
            stack.callback(self.model.register_forward_hook(self._close, always_call=True).remove)
            yield

    @property
    def trace(self) -> Trace:
        """Everything recorded so far. Layers that never ran are left out; if nothing ran, all layers and no tokens."""
        seen = [layer for layer in self.layers if self._picks[layer.name]] or list(self.layers)
        if moved := sorted(self._moved_biases):
            raise ValueError(
                f"the correction bias of layer {moved[0]!r} changed while its scores were recorded: "
                "record one step at a time, or detail='picks'"
            )
        forwards = self._forwards[seen[0].name]
        ids = [f.kept(f.input_ids) for f in forwards if f.input_ids is not None]
        return Trace.from_routings(
            {layer.name: self._joined(layer) for layer in seen},
            [layer.config for layer in seen],
            self._biases,
            sequences=_number(forwards),
            input_ids=torch.cat(ids) if ids and len(ids) == len(forwards) else None,
            labels=None if self.labels is None else tuple(self.labels),
            dtypes=self._dtypes,
            model=Path(getattr(self.model, "name_or_path", "")).name or type(self.model).__name__,
            seed=self.seed,
        )

    def _joined(self, layer: MoELayer) -> Routing:
        picks, logits = self._picks[layer.name], self._logits[layer.name]
        if not picks:
            e, k = layer.config.n_routed_experts, layer.config.num_experts_per_tok
            none = torch.zeros(0, e) if self.scores else None
            return Routing(none, torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64))
        scores = None
        if self.scores:
            scores = torch.cat([row for row in logits if row is not None] or [torch.zeros(0)])
            if len(scores) != sum(len(row.expert_ids) for row in picks):
                raise ValueError(f"the router of layer {layer.name!r} gave no logits per token: use detail='picks'")
        return Routing(
            scores,
            torch.cat([row.weights for row in picks]),
            torch.cat([row.expert_ids for row in picks]),
        )

    def _open(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not is_recompute():
            self._current = describe_forward(self.model, args, kwargs)

    def _close(self, *_: Any) -> None:
        if not is_recompute():
            self._current = None

    def _forward_of(self, n_tokens: int) -> Forward:
        """The root call these tokens belong to; one sequence of its own where an inner module was called alone."""
        if self._current is not None and len(self._current.rows) == n_tokens:
            return self._current
        return Forward(torch.zeros(n_tokens, dtype=torch.int64))

    def _take_picks(self, name: str, routing: Routing) -> None:
        forward = self._forward_of(len(routing.expert_ids))
        self._dtypes["weights"] = _name_of(routing.weights)
        self._forwards[name].append(forward)
        ids = _copy(forward.kept(routing.expert_ids), torch.int32)
        weights = _copy(forward.kept(routing.weights), torch.float32)
        self._picks[name].append(Routing(None, weights, ids))

    def _take_logits(self, name: str, routing: Routing) -> None:
        if routing.logits is None:
            return
        forward = self._forward_of(len(routing.logits))
        self._dtypes["logits"] = _name_of(routing.logits)
        self._logits[name].append(_copy(forward.kept(routing.logits), torch.float32))
        bias = correction_bias(self._routers[name])
        bias = None if bias is None else _copy(bias, torch.float32)
        before = self._biases.setdefault(name, bias)
        if bias is not None and before is not None and not torch.equal(bias, before):
            self._moved_biases.add(name)


def _router_reporter(name: str, observer: Observer) -> Callable[..., None]:
    def report(_module: nn.Module, _args: Any, output: Any) -> None:
        if not is_recompute():
            if len(output) == 2:  # a gate that returns (expert_ids, weights), DeepSeek's order
                output = (None, output[1], output[0])
            logits, weights, ids = output[:3]
            if ids.is_floating_point():
                raise ValueError(f"router {name!r} returns no expert ids where transformers 5 has them: not recordable")
            logits = None if logits is None else logits.flatten(0, -2)
            routing = Routing(logits, weights.flatten(0, -2), ids.flatten(0, -2))
            observer(name, routing)

    return report


def _experts_reporter(name: str, observer: Observer) -> Callable[..., None]:
    def report(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not is_recompute():
            if kwargs:
                args = inspect.signature(module.forward).bind(*args, **kwargs).args
            _, ids, weights = args[:3]
            routing = Routing(None, weights.flatten(0, -2), ids.flatten(0, -2))
            observer(name, routing)

    return report


def describe_forward(model: nn.Module, args: tuple, kwargs: dict) -> Forward | None:
    """Rows, padding and token ids of one call of the root model; None where its inputs do not say."""
    given = {**inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments, **kwargs}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        shape = ids.shape
    elif isinstance(embeds, Tensor) and embeds.dim() == 3:
        ids, shape = None, embeds.shape[:2]
    else:
        x = next((value for value in given.values() if isinstance(value, Tensor)), None)
        if x is None or not x.is_floating_point() or x.dim() < 2:
            return None
        ids, shape = None, (x.shape[:-2].numel(), x.shape[-2])  # [..., S, D]; a plain [T, D] is one sequence
    n_rows, length = shape
    rows = torch.arange(n_rows).repeat_interleave(length)
    mask = given.get("attention_mask")
    keep = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == n_rows and mask.shape[1] >= length:
        keep = mask[:, mask.shape[1] - length :].flatten().bool().cpu()  # with a cache the mask covers the past too
    cache = given.get("past_key_values")
    continues = hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0
    return Forward(rows, keep, None if ids is None else ids.detach().flatten().long().cpu(), continues)


def _number(forwards: Sequence[Forward]) -> Tensor:
    """Sequences numbered through all forwards, one number per kept token."""
    start = end = 0
    numbers = [torch.zeros(0, dtype=torch.int64)]
    for forward in forwards:
        start = start if forward.continues else end
        if len(forward.rows):
            end = max(end, start + int(forward.rows[-1]) + 1)
        numbers.append(forward.kept(start + forward.rows))
    return torch.cat(numbers)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)


def _name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
