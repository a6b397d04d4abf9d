"""Recorder: takes what a model hands to its experts, forward by forward, and puts it together."""

import dataclasses
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.hf.modules import MoELayer
from moesaic.hf.outputs import as_logits
from moesaic.trace.file.limits import check_labels, check_names, check_offsets, check_range
from moesaic.trace.recording.assemble import assemble, outline, write_file
from moesaic.trace.recording.biases import Biases
from moesaic.trace.recording.calls import CACHED, listening
from moesaic.trace.recording.columns import Column
from moesaic.trace.recording.forwards import Forward, cache_of, describe_forward, forward_of, models_with, unseen
from moesaic.trace.recording.kept import Kept, Rows, on_cpu
from moesaic.trace.recording.running import LOOPED, Running, Threads
from moesaic.trace.recording.stream import Stream
from moesaic.trace.recording.watch import observe
from moesaic.trace.store import Trace, id_dtype, name_of
from moesaic.types import Routing

ELSEWHERE = (
    "a MoE layer ran in another thread than the record was begun in, and in no call of the model that began inside the "
    "block: that call is not recorded"
)
UNHEARD = (
    "{n} of the model's calls began in a compiled graph in which no MoE layer said whom it chose: the call failed, or "
    "the graph was made without the recorder; call torch.compiler.reset() before, or record the model uncompiled"
)


class Recorder:
    """Collects copies on the CPU; `trace` puts them together. Made by `record`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MoELayer],
        detail: str,
        labels: Sequence[str] | None,
        seed: int | None,
        tokenizer: Any = None,
        stream: Stream | None = None,
    ) -> None:
        self.model, self.layers, self.detail = model, layers, detail
        self.labels, self.seed = labels, torch.initial_seed() if seed is None else seed
        self.tokenizer, self._stream = tokenizer, stream
        self._by_name = {layer.name: layer for layer in layers}
        self._kept: Kept = Kept(self._by_name, (lambda _, dtype: Column(dtype)) if stream is None else stream.part)
        self._given: dict[str, Any] = {}  # fields of the trace that were told, not recorded
        self._biases = Biases()
        self._dtypes = {"logits": "float32", "weights": "float32"}
        self._threads = Threads()
        self._lock = threading.RLock()  # forwards of several threads are kept one after the other, each whole
        self._over = False
        self.refusal: ValueError | None = None  # with which the recorder itself ended a forward

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block every forward of the model is recorded."""
        scores = self.detail == "scores"
        experts = {
            layer.name: layer.experts
            for layer in self.layers
            if layer.origin == "experts" and layer.experts is not None
        }
        asked = [layer for layer in self.layers if scores or layer.origin != "experts"]
        routers = {layer.name: layer.router for layer in asked if layer.router is not None}
        if blind := [layer.name for layer in asked if layer.router is None]:
            raise ValueError(f"layer {blind[0]!r} has no router that can be watched: use detail='picks'")
        with ExitStack() as stack:
            stack.enter_context(observe(experts, self._take_picks, self.detail))
            stack.enter_context(observe(routers, self._take_routing, routers=True))
            for module in models_with(self.model, self.layers):  # after the hooks of layers: a bare gate reports first
                stack.enter_context(listening(module, self))
            try:
                yield
                for running in self._threads.ended():
                    self._commit(running)
                self._check_heard()
            finally:
                with self._lock:
                    self._over = True  # what another thread still runs did not end inside the block: it is not kept

    @property
    def trace(self) -> Trace:
        """Everything recorded so far. Layers that never ran are named in `missing`; if nothing ran, all layers and no
        tokens. The record goes on from here: what it holds is then this trace's own memory. A record that goes to a
        file is read from there, after its block."""
        if self._stream is not None:
            return self._stream.read()
        with self._lock:
            self._commit(self._threads.here)
            return assemble(self.outline(), self._kept, self._given, self.tokenizer)

    def describe(
        self,
        *,
        sequences: Tensor | Sequence[int],
        labels: Sequence[str] | None = None,
        offsets: Tensor | Sequence[Sequence[int]] | None = None,
        pieces: Mapping[int, str] | None = None,
    ) -> None:
        """What the caller knows better than a model's arguments tell: which document [T] each token belongs to, the
        names of the documents, where tokens lie in them [T, 2], and the text of a token id."""
        sequences = torch.as_tensor(sequences)
        if sequences.dim() != 1 or sequences.is_floating_point() or sequences.dtype == torch.bool:
            shape = list(sequences.shape)
            raise ValueError(f"sequences of {name_of(sequences)} {shape} were given: give one whole number a token")
        if len(sequences):
            check_range("sequences", int(sequences.min()), int(sequences.max()), 0)
        sequences = sequences.to("cpu", torch.int64)
        if offsets is not None:
            offsets = torch.as_tensor(offsets)
            check_offsets(offsets)
        check_names(labels)
        given = {"sequences": sequences, "offsets": offsets, "pieces": pieces}
        self._given = {name: value for name, value in given.items() if value is not None}
        self.labels = self.labels if labels is None else labels

    def write(self, *said: str) -> None:
        """Put the file together, where the record goes to one. What does not fit together is left out of it and told in
        a ValueError, after what was `said` already."""
        if (stream := self._stream) is None:
            return
        told = list(said)
        try:
            stream.flush()
            like = self._fitting(told)
            write_file(stream.path, like, self._kept, self._given, self.tokenizer)
        except ValueError as error:
            stream.keeps_parts = any(stream.folder.iterdir())
            kept = f"; what was recorded lies in {stream.folder}, part by part" if stream.keeps_parts else ""
            told.append(f"{error}{kept}")
            raise ValueError("; ".join(told)) from None
        stream.written = True
        if told:
            raise ValueError("; ".join([*told, f"what was recorded is in {stream.path}"]))

    def _fitting(self, told: list[str]) -> Trace:
        """The outline of what fits together; what does not is `told`, and stays in the parts."""
        try:
            like = self.outline()
        except ValueError as error:
            like = self.outline(only_agreeing=True)
            assert self._stream is not None
            self._stream.keeps_parts = True
            told.append(f"{error}; {', '.join(like.missing)}: left out, and in {self._stream.folder}")
        if short := self._lacks_labels():
            told += [] if short in told else [short]
            told.append("its labels are left out")
            like = dataclasses.replace(like, labels=None)
        return like

    def _lacks_labels(self) -> str:
        """What is wrong with the labels, if anything is."""
        given = self._given.get("sequences")
        n = self._kept.n_sequences if given is None else int(given.max()) + 1 if len(given) else 0
        try:
            check_labels(self.labels, n)
        except ValueError as error:
            return str(error)
        return ""

    def outline(self, *, only_agreeing: bool = False) -> Trace:
        """The trace so far without its tokens: layers, sizes, rules and where it comes from."""
        return outline(
            self.layers,
            self._kept,
            self._biases.values,
            detail=self.detail,
            model=self.model,
            only_agreeing=only_agreeing,
            labels=None if self.labels is None else tuple(self.labels),
            dtypes=dict(self._dtypes),
            seed=self.seed,
        )

    # calls of the model

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call of a model begins."""
        running = self._threads.here
        if not running.depth:
            self._commit(running)
        running.depth += 1
        if running.depth == 1:
            running.ran.clear()
            running.forward = describe_forward(model, args, kwargs)

    def close(self, output: Any, *, failed: bool) -> None:
        """It is over. What a failed one has left is dropped."""
        running = self._threads.here
        if not running.depth or self._over:  # it began before the recording, or ends after it
            return
        running.depth -= 1
        if failed:
            running.pending.clear()
        if not running.depth:
            running.name_cache(cache_of(output))
            running.forward = None
            self._commit(running)

    def opened_in_graph(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, flag: int) -> None:
        """A call begins whose end nobody will tell."""
        del positions
        running = self._threads.here
        if not running.depth:
            self._commit(running)
            running.forward = forward_of(tokens, mask, cached=bool(flag & CACHED))
            running.silent = True

    def _check_heard(self) -> None:
        """ValueError for a record that is empty because no layer of a compiled model was heard; a warning where other
        calls were, since one that failed in its graph does not say so either."""
        if n := self._threads.unheard:
            if not any(tally.n_forwards for tally in self._kept.tallies.values()):
                raise ValueError(UNHEARD.format(n=n))
            warnings.warn(UNHEARD.format(n=n), stacklevel=2)

    def _forward_of(self, layer: str | None, n_tokens: int) -> Forward:
        """The call these tokens belong to; one sequence of its own where an inner module was called alone."""
        running = self._threads.here
        current = running.forward
        if current is None:
            return unseen(n_tokens)
        if current.keep is not None and n_tokens == int(current.keep.sum()) != len(current.rows):  # padding was cut out
            ids = None if current.input_ids is None else current.kept(current.input_ids)
            return current._replace(rows=current.kept(current.rows), keep=None, input_ids=ids)
        if len(current.rows) != n_tokens:
            return unseen(n_tokens)
        if not running.depth and any(rows.layer == layer and "ids" in rows.columns for rows in running.pending):
            self._commit(running)  # a compiled model does not say when it ends; the layer ran again, by itself
            running.forward = None
            return unseen(n_tokens)
        return current

    # what layers report

    def _take_picks(self, name: str, routing: Routing) -> None:
        ids, weights = routing.expert_ids, routing.weights
        n_experts = self._by_name[name].config.n_routed_experts
        columns = {"ids": ids.detach().to(id_dtype(n_experts), copy=True)}
        if self.detail != "ids" and weights is not None:
            self._dtypes["weights"] = name_of(weights)
            columns["weights"] = weights.detach().to(torch.float32, copy=True)
        forward = self._forward_of(name, len(ids))
        if self._threads.here.depth and forward.known and self._threads.here.again(name):
            self.refusal = ValueError(LOOPED.format(name=name))
            raise self.refusal
        self._add(Rows(name, forward, columns))

    def _take_routing(self, name: str, routing: Routing) -> None:
        layer = self._by_name[name]
        if layer.origin != "experts":
            self._take_picks(name, routing)
        logits = routing.logits
        if self.detail != "scores" or logits is None or logits.shape[-1] != layer.config.n_routed_experts:
            return
        self._dtypes["logits"] = name_of(logits)
        with self._lock:
            try:
                self._biases.see(name, layer.bias)
            except ValueError as error:
                self.refusal = error
                raise
        logits = as_logits(layer.router, logits.detach().to(torch.float32, copy=True))
        self._add(Rows(name, self._forward_of(None, len(logits)), {"logits": logits}))

    def _add(self, rows: Rows) -> None:
        running = self._threads.here
        if self._over:
            return
        running.silent &= "ids" not in rows.columns
        if running.depth or running.forward is not None:
            running.pending.append(rows)
        elif self._threads.at_home:
            running.pending.append(rows)
            self._commit(running)
        else:  # the middle of a call that began before the block, as like as not: layers would get different tokens
            warnings.warn(ELSEWHERE, stacklevel=2)

    def _commit(self, running: Running) -> None:
        """Keep what is pending: its forward came to an end."""
        running.unheard, running.silent = running.unheard + running.silent, False
        pending, running.pending = running.pending, []
        if not pending:
            return
        if not all(t.is_cpu for r in pending for t in r.columns.values()):
            pending = on_cpu(pending)
        with self._lock:
            for rows in pending if not self._over else ():
                self._kept.add(rows)
            if "sequences" not in self._given and (short := self._lacks_labels()):
                self.refusal = ValueError(short)
                raise self.refusal
