"""Replay: a model run again with the experts of a record; weights come from its live logits, so gradients flow."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.hf.modules import MoELayer, is_recompute, moe_layers
from moesaic.layer.balance import expert_load
from moesaic.layer.router import Router
from moesaic.trace.recording.calls import listening
from moesaic.trace.recording.forwards import describe_forward, models_with
from moesaic.trace.recording.watch import bound
from moesaic.trace.reroute.reading import PADDING, Reading
from moesaic.trace.reroute.replayable import (
    IN_GRAPH,
    check,
    check_recorded,
    first_tensor,
    logits_in,
    refuse_balance,
    refuse_graph,
    rows_of,
)
from moesaic.trace.rule.derive import weight_tolerance
from moesaic.trace.store import Trace
from moesaic.types import Routing


@contextmanager
def replay(
    model: nn.Module,
    trace: Trace,
    *,
    sequences: Sequence[int] | Tensor | None = None,
    last_unrecorded: bool = False,
    weights: str = "live",
    config: MoEConfig | None = None,
) -> Iterator["Replayer"]:
    """Inside the block `model` chooses the experts of `trace`, token by token, over as many forwards as it took.

    A record of a whole text may be replayed in pieces with a cache, and the reverse: a token is known by its sequence
    and its place there. The rows of the batches are the sequences of the trace in their order, or those that
    `sequences` names, one a row, as a shuffled minibatch needs it. Layers that the trace calls otherwise, as an engine
    does, are known by their depth.

    Padding, which no record holds, keeps the model's own choice; so does, with last_unrecorded=True, the one token by
    which a text is longer than its record: an engine chooses the last token and never reads it. Weights are made from
    the live logits by the rule of the model's config, so the router gets its gradient; weights="recorded" takes those
    of the trace, for layers whose rule is not known. With an unchanged model the results are bit-identical to the
    recorded.

    Right under activation checkpointing, if the backward runs in the block; a compiled model is refused. Raises
    ValueError, before anything runs, where the trace is of another model; in a forward whose tokens are not those of
    the trace; and, with `sequences` or last_unrecorded=True, at the end of a block that did not run every text to the
    end of its record.
    """
    layers = moe_layers(model, config)
    reading = Reading(trace, sequences, last_unrecorded=last_unrecorded)
    replayer = Replayer(model, reading, weights, layers)
    with replayer.running():
        yield replayer
    if not replayer.tokens:
        raise ValueError("nothing was replayed: no forward of this model ran in the block, or it was compiled before")
    reading.check_whole()


class Call(NamedTuple):
    """One forward of one layer: which tokens of the trace it held, as Reading gives them, and how to know it again."""

    tokens: Tensor
    mark: Tensor


class Replayer:
    """Puts recorded experts into a model. Made by `replay`; `tokens` counts what was replayed so far."""

    def __init__(self, model: nn.Module, reading: Reading, weights: str, layers: list[MoELayer]) -> None:
        check(model, reading.trace, weights, layers)
        self.model, self.trace, self.weights = model, reading.trace, weights
        self.layers = layers
        self.tokens = 0
        self._reading = reading
        self._row = rows_of(self.trace, layers)
        self._current: Tensor | None = None  # tokens of the forward that runs
        self._outer: list[Tensor | None] = []  # of the calls of models inside each other that are open
        self._ran: set[str] = set()  # layers that ran in it
        self._alone = dict.fromkeys(self._row, 0)  # tokens that a layer took outside of any forward of the model
        self._calls: dict[str, list[Call]] = {name: [] for name in self._row}
        self._now: dict[str, tuple[Tensor, Tensor]] = {}  # layer -> its tokens of this call, its live logits
        self._proven: set[str] = set()  # layers whose rule gave the model's own weights

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block the hooks are there."""
        with ExitStack() as stack:
            for layer in self.layers:
                router, experts = layer.router, layer.experts
                if isinstance(router, Router):
                    hook = router.register_forward_hook(self._own_router(layer), with_kwargs=True, prepend=True)
                    stack.callback(hook.remove)
                    continue
                assert router is not None  # `check` refuses others
                assert experts is not None
                stack.callback(router.register_forward_hook(self._look_at_router(layer), with_kwargs=True).remove)
                hook = experts.register_forward_pre_hook(self._before_experts(layer), with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            # after the hooks of layers: a bare gate is both
            for module in models_with(self.model, self.layers, nested=True):
                stack.enter_context(listening(module, self))
            yield

    # calls of the model

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._outer:
            self._ran.clear()
        self._outer.append(self._current)
        if self._current is None:  # the outermost call that says which tokens it has
            forward = describe_forward(model, args, kwargs)
            self._current = None if forward is None else self._reading.take(forward)

    def close(self, output: Any, *, failed: bool) -> None:
        del output
        if not self._outer:
            return
        current, self._current = self._current, self._outer.pop()
        if current is None or self._current is not None:
            return
        if failed:  # its tokens are still to come
            self._reading.undo()
        elif self._ran:
            self.tokens += int((current >= 0).sum())
        self._now.clear()

    def opened_in_graph(self, *_args: Any, **_kwargs: Any) -> None:
        raise ValueError(IN_GRAPH)

    # the forward of a layer

    def _tokens_of(self, name: str, hidden: Tensor) -> Tensor:
        """Which tokens of the trace this call of a layer holds, [n], as Reading gives them."""
        if name not in self._row:
            raise ValueError(f"layer {name!r} runs and is not in the trace: record it too")
        rows = hidden.flatten(0, -2)
        mark = None
        if torch.is_grad_enabled() or self.model.training:  # only then may checkpointing run it again
            flat = rows.detach().flatten()
            mark = torch.cat([flat[:64], flat.sum()[None]])
        if is_recompute():
            return self._seen_before(name, len(rows), mark)
        current = self._current
        if current is not None and len(current) == len(rows):
            tokens = current
        elif current is not None and int((current != PADDING).sum()) == len(rows):  # the model cut its padding out
            tokens = current[current != PADDING]
        elif current is not None:
            raise ValueError(f"layer {name!r} routes {len(rows)} tokens of a forward of {len(current)}: not replayable")
        else:
            if self._reading.began:
                raise ValueError(
                    f"layer {name!r} runs outside of the model's forward after others inside: not replayable"
                )
            tokens = self._reading.alone(self._alone[name], len(rows))
            self._alone[name] += len(rows)
            self.tokens = max(self.tokens, self._alone[name])
        if current is not None and name in self._ran:
            raise ValueError(f"layer {name!r} runs twice in one forward: a trace does not tell the two apart")
        self._ran.add(name)
        if mark is not None:
            self._calls[name].append(Call(tokens, mark))
        return tokens

    def _seen_before(self, name: str, n: int, mark: Tensor | None) -> Tensor:
        """The tokens of the call that checkpointing runs again: the one with the same hidden states."""
        calls = [call for call in self._calls[name] if len(call.tokens) == n]
        if not calls or mark is None:
            raise ValueError(f"layer {name!r} runs again in the backward of a forward that was not replayed")
        if len(calls) == 1:
            return calls[0].tokens  # nothing to tell apart, so nothing to wait for on a GPU
        apart = torch.stack([(call.mark - mark).abs().max() for call in calls]).tolist()
        best = [call.tokens for call, distance in zip(calls, apart, strict=True) if not distance > min(apart)]
        picks = self.trace.picks[self._row[name]]
        if any(not torch.equal(picks[tokens], picks[best[0]]) for tokens in best[1:]):
            raise ValueError(
                f"layer {name!r} runs again in a backward, and two forwards with equal hidden states took other "
                "experts: run the backward of each before the next"
            )
        return best[-1]

    def _own_router(self, layer: MoELayer) -> Any:
        """Our Router: what it returns is replaced, and its count of the load follows."""

        def hook(router: Router, args: tuple, kwargs: dict, output: Routing) -> Routing:
            refuse_graph()
            tokens = self._tokens_of(layer.name, first_tensor(args, kwargs))
            ids, weights = self._picks(layer, tokens, output.logits, output.expert_ids, output.weights)
            if router.training:
                router.load.copy_(expert_load(ids, router.config.n_routed_experts))
            return Routing(output.logits, weights, ids)

        return hook

    def _look_at_router(self, layer: MoELayer) -> Any:
        def hook(router: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            refuse_graph()
            refuse_balance(router, layer.name)
            tokens = self._tokens_of(layer.name, first_tensor(args, kwargs))
            logits = logits_in(output, layer.config.n_routed_experts)
            if logits is None and self.weights == "live":
                raise ValueError(f"router of layer {layer.name!r} gives no logits: use weights='recorded'")
            self._now[layer.name] = tokens, tokens.new_zeros(0) if logits is None else logits

        return hook

    def _before_experts(self, layer: MoELayer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            refuse_graph()
            hidden, own_ids, own_weights, *rest = bound(module, args, kwargs)
            if layer.name not in self._now:
                raise ValueError(f"experts of layer {layer.name!r} ran without their router: not replayable")
            tokens, logits = self._now.pop(layer.name)
            flat = own_ids.flatten(0, -2), own_weights.flatten(0, -2)
            ids, weights = self._picks(layer, tokens, logits, *flat)
            ids, weights = ids.to(own_ids.dtype).view(own_ids.shape), weights.view(own_weights.shape)
            return (hidden, ids, weights, *rest), {}

        return hook

    def _picks(
        self, layer: MoELayer, tokens: Tensor, logits: Tensor | None, own_ids: Tensor, own_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ids [n, K] of the record, the model's own for tokens that it does not hold, and their weights."""
        row = self._row[layer.name]
        device = own_ids.device
        read = (tokens >= 0).to(device)[:, None]
        recorded = self.trace.picks[row][tokens.clamp(min=0)]
        check_recorded(self.trace, row, tokens, recorded)
        ids = torch.where(read, recorded.to(device, own_ids.dtype), own_ids)
        if self.weights == "recorded":
            assert self.trace.weights is not None
            weights = self.trace.weights[row][tokens.clamp(min=0)].to(device, own_weights.dtype)
            return ids, weights if bool((tokens >= 0).all()) else torch.where(read, weights, own_weights)
        assert logits is not None
        scores = rules.score(logits.reshape(len(own_ids), -1), layer.config)
        if layer.name not in self._proven:
            self._prove(layer, scores, own_ids, own_weights)
        weights = rules.weigh(scores, ids.long(), layer.config).to(own_weights.dtype)
        # where the model would choose the same, its weights to the last bit, however its code rounds
        same = (ids == own_ids).all(-1, keepdim=True)
        return ids, torch.where(same, own_weights, weights)

    def _prove(self, layer: MoELayer, scores: Tensor, own_ids: Tensor, own_weights: Tensor) -> None:
        """The rule of the config must give the weights that the model itself gives its own choice."""
        with torch.no_grad():
            expected = rules.weigh(scores, own_ids.long(), layer.config).to(own_weights.dtype).float()
            bound = weight_tolerance(own_weights.dtype) * expected.abs().amax(-1, keepdim=True)
            off = ((expected - own_weights.float()).abs() > bound).any(-1)
        if off.any():
            raise ValueError(
                f"layer {layer.name!r} makes its weights by another rule than its config says: use weights='recorded'"
            )
        self._proven.add(layer.name)
