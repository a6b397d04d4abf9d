"""What one BalanceLoss remembers of forwards, and of the backward that runs.

A backward gives the balancing the scale of its own loss, which nobody knows before it runs, and checkpointing then runs
layers again: they get what they got in their forward, whatever ran in between.
"""

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moesaic.hf.modules import is_recompute
from moesaic.layer.balance import expert_load
from moesaic.trace.recording.calls import IDLE
from moesaic.trace.recording.forwards import read_arguments, rows_and_length, token_mask
from moesaic.train.ranks import has_ranks

REMEMBERED = 256  # forwards: as many may wait for one backward
NOT_TIED = (
    "the balancing loss does not know the scale of this backward, since no loss it knows of is in it: let the model "
    "compute the loss (give it labels), or write `loss = balance_loss(loss)` before loss.backward(), in a Trainer at "
    "the end of a compute_loss of your own, with share=1 / self.current_gradient_accumulation_steps where that loss is "
    "divided by them already"
)
FORGOTTEN = (
    "a checkpoint runs a forward again that no known loss of this backward is of: write `loss = balance_loss(loss)` of "
    f"all that were made of it; if {REMEMBERED} forwards without gradients ran between the two, checkpoint with "
    "use_reentrant=False, or run them before the forward that trains"
)
_numbers = itertools.count()
# by the number in a module's key: whose it is, the layer's name, and the key; a copy of the module has a copy of that
_ledgers: dict[int, tuple["Ledger", str, Tensor]] = {}


@dataclass(eq=False)
class Pass:
    """One run of a layer in a call; a looped model has several. chosen: what its tokens chose, padding with them."""

    chosen: Float[Tensor, " E"]
    n_tokens: int
    load: Float[Tensor, " E"] | None = None  # of the step so far, over all ranks; None until it is known to train
    valued: bool = False


@dataclass(eq=False)
class Call:
    """One forward of a model. mask: [T] or None. n_rows: rows of the batch, of equal length; None where nobody said."""

    number: int
    trains: bool  # it began with gradients on; so they are off only where checkpointing takes them away
    mask: Bool[Tensor, " T"] | None = None
    n_rows: int | None = None
    sequences: Int[Tensor, " T"] | None = None  # which one each token is in, where positions were given
    scale: Tensor | None = None  # of the backward that runs
    over: bool = False  # the model returned, so what comes is no part of it
    by_hand: bool = False  # by a loss that the user named: then what the model calls its loss does not count
    passes: dict[str, list[Pass]] = field(default_factory=dict)  # by layer

    def mask_of(self, ids: Int[Tensor, "T K"]) -> Bool[Tensor, " T"]:
        """Which tokens of a layer are no padding: all of them where it was cut out, or where a part ran alone."""
        if self.mask is None or len(self.mask) != len(ids):
            return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        return self.mask.to(ids.device, copy=True)

    def says(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Which tokens it has. Padding that it was told of before stays known where no mask is given."""
        padding = token_mask(tokens, mask)
        self.mask = self.mask if padding is None else padding
        self.n_rows, _ = rows_and_length(tokens)

    def sequences_of(self, name: str, ids: Int[Tensor, "T K"]) -> Int[Tensor, " T"]:
        """Which sequence each token of a layer is in."""
        n_tokens = len(ids)
        if self.sequences is not None and len(self.sequences) == n_tokens:
            return self.sequences.to(ids.device, copy=True)
        if not self.n_rows or n_tokens % self.n_rows:
            raise ValueError(
                f"{name}: which of its {n_tokens} tokens are of one sequence cannot be told: call the model with "
                "input_ids or inputs_embeds [batch, length, ...], or use kind='switch'"
            )
        return torch.arange(n_tokens, device=ids.device) // (n_tokens // self.n_rows)


class Ledger:
    """What one BalanceLoss remembers of forwards and of the backward that runs. `owner()` gives that BalanceLoss."""

    def __init__(self, owner: Any) -> None:
        self.owner: Callable[[], Any] = lambda: owner
        self.kind, self.group = owner.kind, owner.group
        self.keys: list[int] = []
        self.parts: list[nn.Module] = []  # encoders and decoders, each of whose calls in another is one of its own
        self._running = 0  # calls of models, inside each other
        self._current: Call | None = None
        self._together: deque[Call] = deque(maxlen=REMEMBERED)  # it and those before it in the same outermost call
        self._calls: OrderedDict[int, Call] = OrderedDict()
        self._notes: OrderedDict[int, tuple[list[Call], bool, Tensor | None]] = OrderedDict()
        self._untied: deque[Call] = deque(maxlen=REMEMBERED)
        # without gradients, as reentrant checkpointing runs a whole model first, or as a text is generated
        self._idle: deque[Call] = deque(maxlen=REMEMBERED)
        self._noted: dict[int, Call] = {}  # in the backward that runs
        self._again: set[Pass] = set()  # what that backward has run again
        self._asking: dict[str, tuple[Call, Pass]] = {}
        self._loads: dict[str, Tensor] = {}  # of this step so far
        self._values: dict[str, tuple[Tensor, int]] = {}
        self._before = self._loads, self._values  # before the call that runs

    def key(self, name: str) -> Tensor:
        """A tensor by which operators find this ledger and a layer."""
        number = next(_numbers)
        with torch.inference_mode(False):
            key = torch.tensor(number, device="cpu")
        _ledgers[number] = self, name, key
        self.keys.append(number)
        return key

    def remove(self) -> None:
        for number in self.keys:
            del _ledgers[number]

    def take(self) -> dict[str, Tensor]:
        """The mean value of each layer since the last take; starts the next step."""
        values = {name: total / count for name, (total, count) in self._values.items()}
        for memory in (self._values, self._loads, self._calls, self._notes, self._untied, self._idle, self._together):
            memory.clear()
        self._current = None
        return values

    # calls of the model

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        found = read_arguments(model, args, kwargs)
        if not self._running:
            self._before = self._loads.copy(), self._values.copy()
        if not self._running or model in self.parts:
            call = self._begin(torch.is_grad_enabled(), joins=self._running > 0)
            if found is not None:
                call.says(found.tokens, found.mask)
        self._running += 1
        self._place(None if found is None else found.positions)

    def close(self, output: Any, *, failed: bool) -> None:
        """It is over; what it counted goes with it if it `failed`."""
        del output
        self._running = max(0, self._running - 1)
        if self._running or self._current is None:
            return
        if failed:
            self._loads, self._values = self._before
        for call in self._together:
            call.over = True  # its loss may be noted still
            for waiting in (self._untied, self._idle):
                if failed and call in waiting:
                    waiting.remove(call)

    def opened_in_graph(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        flag: int,
        *,
        nested: bool = False,
        part: bool = False,
    ) -> None:
        if part or not self._running:
            call, trains = self._current, not flag & IDLE
            if not nested or call is None or call.passes or call.over or call.trains != trains:
                call = self._begin(trains, joins=part)  # else it is a part of the call that began last
            call.says(tokens, mask)
        self._place(positions)

    def _place(self, positions: Tensor | None) -> None:
        """The position of each token of the call that runs, by which rows that hold several sequences are split."""
        call = self._current
        if self.kind != "sequence" or positions is None or call is None or call.n_rows is None:
            return
        if call.sequences is None and len(positions) in (1, call.n_rows):
            call.sequences = sequence_numbers(positions.long().expand(call.n_rows, -1))

    def _begin(self, trains: bool, *, joins: bool = False) -> Call:
        """joins: it is in the same outermost call as the one before it."""
        self.backward_is_over()  # one that failed did not say so
        self._current = Call(next(_numbers), trains)
        if not joins:
            self._together.clear()
        self._together.append(self._current)
        (self._untied if trains else self._idle).append(self._current)
        return self._current

    # what the operators do

    def describe(self, name: str, ids: Int[Tensor, "T K"], n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mask [T], sequence of each token [T], and load of the step so far [E], for one call of a layer."""
        call, found = self._asking[name] = self._pass_of(name, ids, n_experts)
        self._sum_load(name, call, found, ids)
        sequences = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        if self.kind == "sequence" and len(ids):
            sequences = call.sequences_of(name, ids)
        load = found.load
        load = torch.zeros(n_experts, dtype=torch.float64, device=ids.device) if load is None else load.clone()
        return call.mask_of(ids), sequences, load

    def count(self, name: str, ids: Int[Tensor, "T K"], n_experts: int) -> None:
        """Remember a layer that runs without gradients: checkpointing may run it again, after other layers."""
        call = self._current
        if call is not None and not call.over and not is_recompute():
            found = self._begin_pass(call, name, ids, n_experts)
            if call.trains:
                self._sum_load(name, call, found, ids)

    def value(self, name: str, loss: Float[Tensor, ""]) -> int:
        """Keep the value of a layer; returns the number of the call it is of."""
        call, found = self._asking.pop(name)
        if not found.valued:
            found.valued = True
            total, count = self._values.get(name, (0.0, 0))
            self._values[name] = (loss.detach().double() + total, count + 1)
        _remember(self._calls, call.number, call)
        return call.number

    def note(self, share: Tensor | None, by_hand: bool) -> int:
        """A loss was computed: by the model, of what runs in its call, or by the user, of all calls since the last."""
        calls = [*self._together]
        if by_hand:
            calls = [*self._idle, *self._untied]
            self._idle.clear()
            self._untied.clear()
            for call in calls:
                call.over = call.over or not self._running
        number = next(_numbers)
        _remember(self._notes, number, (calls, by_hand, share))
        return number

    def noted(self, number: int, grad: Float[Tensor, "..."]) -> None:
        """The backward that runs has reached this loss, or the log-probabilities that it sums, with this gradient."""
        calls, by_hand, share = self._notes.get(number, ([], False, None))
        for call in calls:
            if by_hand or not call.by_hand:
                call.by_hand = by_hand
                call.scale = grad.detach().double().sum() * (1.0 if share is None else share.to(grad.device))
                self._noted[call.number] = call
        torch.autograd.Variable._execution_engine.queue_callback(self.backward_is_over)

    def scale(self, number: int) -> Tensor:
        """What the gradient of a layer's loss is in the backward that runs."""
        call = self._calls.get(number)
        if call is None or call.scale is None:
            raise ValueError(NOT_TIED)
        return call.scale * self.owner().alpha

    def backward_is_over(self) -> None:
        for call in self._noted.values():
            call.scale, call.by_hand = None, False
        self._noted.clear()
        self._again.clear()

    def _pass_of(self, name: str, ids: Int[Tensor, "T K"], n_experts: int) -> tuple[Call, Pass]:
        """What a layer runs in; in a recomputation what it ran in before, of what the losses of this backward name.

        Of several with as many tokens it is the one that chose the same experts: nothing else tells passes and calls
        apart, since some of them may be in no loss, and what checkpointing recomputes at once may hold several. Of
        those that chose alike, as of a batch that comes twice, it is the last that was not run again yet: a backward
        goes from the last on. One of a call without gradients comes after all others: it need not be a checkpoint's,
        and where the checkpoint's may be forgotten it has to have chosen just the same.
        """
        if not is_recompute():
            call = self._begin(True) if self._current is None or self._current.over else self._current
            return call, self._begin_pass(call, name, ids, n_experts)
        noted = self._noted.values()
        passes = [(call, found) for call in noted for found in call.passes.get(name, ())[::-1]]
        passes = [(call, found) for call, found in passes if found.n_tokens == len(ids)]
        if not passes:
            raise ValueError(FORGOTTEN if noted else NOT_TIED)
        passes.sort(key=lambda one: (not one[0].trains, one[1] in self._again, -one[0].number))
        may_be_forgotten = len(noted) >= REMEMBERED and not passes[0][0].trains
        nearest = 0
        if len(passes) > 1 or may_be_forgotten:
            chosen = expert_load(ids, n_experts)
            off = torch.stack([(found.chosen - chosen).abs().sum() for _, found in passes])
            nearest = int(off.argmin())
            if may_be_forgotten and off[nearest] > 0:
                raise ValueError(FORGOTTEN)
        self._again.add(passes[nearest][1])
        return passes[nearest]

    def _begin_pass(self, call: Call, name: str, ids: Int[Tensor, "T K"], n_experts: int) -> Pass:
        found = Pass(expert_load(ids, n_experts), len(ids))
        call.passes.setdefault(name, []).append(found)
        return found

    def _sum_load(self, name: str, call: Call, found: Pass, ids: Int[Tensor, "T K"]) -> None:
        """Once a pass; all ranks in the same order."""
        if self.kind != "global_batch" or found.load is not None:
            return
        n_experts = len(found.chosen)
        load = expert_load(ids.masked_fill(~call.mask_of(ids).unsqueeze(-1), n_experts), n_experts).double()
        if has_ranks():
            torch.distributed.all_reduce(load, group=self.group)
        found.load = self._loads[name] = self._loads.get(name, 0.0) + load


def sequence_numbers(positions: Int[Tensor, "R S"]) -> Int[Tensor, " T"]:
    """Of each token, row by row. A sequence begins where a position does not follow the one before it.

    So transformers reads packed rows too (find_packed_sequence_indices), but for positions that repeat: those are the
    padding of packed rows, which no mask tells, and here one sequence rather than one a token.
    """
    step = positions.diff(dim=-1)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = (step != 1) & (step != 0)
    return begins.flatten().cumsum(0) - 1


def _remember(memory: OrderedDict[int, Any], number: int, value: Any) -> None:
    memory[number] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)


def ledger_of(key: Tensor) -> tuple[Ledger, str]:
    """Whose a key is, and the name of the layer."""
    if int(key) not in _ledgers:
        raise ValueError("this forward was made for a BalanceLoss that is detached now: run it again")
    return _ledgers[int(key)][:2]


def is_heard(key: Tensor) -> bool:
    """Whether it is the key of a module that a BalanceLoss is attached to, not that of a copy (EMA, teacher)."""
    number = int(key)
    return number in _ledgers and _ledgers[number][2].data_ptr() == key.data_ptr()
