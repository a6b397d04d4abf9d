"""When a run is called sick: beyond chance, by an effect that has a name, and for long enough to be no accident."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import balance_numbers
from moesaic.trace.chance.documents import LoadCounts
from moesaic.trace.shown import short_layer, visible
from moesaic.trace.statistics.verdict import COLLAPSED, LoadTest, dead, judge_loads, status_of
from moesaic.train.monitor.numbers import chance, tokens_of

SUSTAINED = 20  # steps are judged together: one strange batch, a long document say, is an accident
DUE = 32  # assignments per expert among them: where so many are due, none at all has a chance of 1e-14
SEEN = 0.05  # chance of calling any layer of one judgement uneven where it is not, as in `moesaic stats`
SURE = 1e-6  # the same for an alert: 100,000 steps are 5000 judgements, and 1 such run in 200 may cry wolf
SPREAD_OUT = 1.2  # times COLLAPSED: where a collapse ends. A layer near its limit would begin one every 40 steps
DEAD_SHARE = 0.05  # of a layer's experts: that part of its parameters learns nothing
BACK = 0.01  # of its fair share: with less in all the steps an expert is as good as dead, and so is an alert of some
DRIFT = 1.0  # by which the mean of a bias moved, or its range grew: sigmoid and softmax scores lie within 1, so the
# bias outweighs them; and near 1 bfloat16 has steps of 0.008, so that a cast takes eight steps of 0.001 away
CALM = 0.9  # of DRIFT: where the alert ends, so that it does not flicker
GRADIENTS = 3  # logged norms in a row that are not finite: a single one is how a GradScaler finds its scale
EMPTY = 3  # steps in a row without a token: loops that train something else in turn have one every now and then
NO_TOKENS = ("no_tokens", None)  # while this alert is on, nothing is known of any layer

BAD = ("collapsed", "dead", "loss", "gradient")  # alerts that make a run's verdict bad; a drift is a warning
WORDS = {
    "collapsed": ("{layer} collapsed: {value:g} of {of} experts carry 99 % of the load of {steps} steps",
                  "{layer}: collapse over"),
    "dead": ("{layer}: {value:g} of {of} experts never chosen in {steps} steps", "{layer}: no dead experts any more"),
    "drift": ("{layer}: its bias moved {value:g} away (mean, or range) from where it began", "{layer}: bias back"),
    "loss": ("the loss is not finite", "the loss is finite again"),
    "gradient": ("the gradient's norm was not finite {value:g} times in a row", "gradients are finite again"),
    "no_tokens": ("no token was counted in {value:g} steps: is the watched model the one that trains, in training mode "
                  "and with gradients on?", "tokens are counted again"),
}  # fmt: skip


class Alert(NamedTuple):
    """A change of state. kind: one of WORDS. layer: None where it is the whole run's. begins: False where it ends."""

    step: int
    kind: str
    layer: str | None
    begins: bool
    message: str

    def line(self) -> dict[str, Any]:
        return {
            "kind": "alert", "step": self.step, "alert": self.kind, "layer": self.layer, "begins": self.begins,
            "message": self.message,
        }  # fmt: skip


class Judge:
    """Sums the loads of each layer until there is enough to judge it, then says how it stands and which alerts begin or
    end.

    layers: names, with what of each bias is known from the begin of the log, [least, greatest, mean] or None.
    active: alerts, by kind and layer, that are on already, in a run that goes on.
    """

    def __init__(self, layers: Mapping[str, Any], active: Iterable[tuple[str, str | None]] = ()) -> None:
        self.layers = layers
        self.active = set(active)
        self._bad_gradients = self._empty = 0
        self._steps = [0] * len(layers)  # since each was judged, and its load of them
        self._loads: list[np.ndarray] = []

    def add(
        self, step: int, steps: int, loads: Sequence[np.ndarray], rules: Sequence[MoEConfig], biases: Sequence[Any]
    ) -> tuple[dict[str, Any] | None, list[Alert]]:
        """The verdict line, where one is due, and alerts. loads: of the last `steps` steps; biases: [least, greatest,
        mean] of each layer or None."""
        self._steps = [before + steps for before in self._steps]
        self._loads = [a + b for a, b in zip(self._loads, loads, strict=True)] if self._loads else list(loads)
        alerts = self._drifts(step, biases) + self._emptiness(step, steps, loads)
        since = min(self._steps)
        if since < SUSTAINED:
            return None, alerts
        due = [row for row, load in enumerate(self._loads) if load.sum() >= DUE * len(load)]
        statuses = ["too_few" if load.any() else "no_data" for load in self._loads]
        if not due and "too_few" in statuses:
            return None, alerts
        for row, status, found in self._judge(step, due, rules):
            statuses[row], alerts = status, alerts + found
        for row, status in enumerate(statuses):
            if status != "too_few":  # which goes on gathering
                self._steps[row], self._loads[row] = 0, np.zeros_like(self._loads[row])
        return {"kind": "verdict", "step": step, "from": step - since + 1, "status": statuses}, alerts

    def add_loss(self, step: int, loss: float) -> list[Alert]:
        return self._changed(step, "loss", None, not np.isfinite(loss))

    def add_gradient(self, step: int, norm: float) -> list[Alert]:
        """The norm of the gradient, where the Trainer logs it: it shows what its filter of losses hides."""
        self._bad_gradients = 0 if np.isfinite(norm) else self._bad_gradients + 1
        if 0 < self._bad_gradients < GRADIENTS:
            return []
        return self._changed(step, "gradient", None, self._bad_gradients > 0, value=self._bad_gradients)

    def _judge(
        self, step: int, due: Sequence[int], rules: Sequence[MoEConfig]
    ) -> Iterator[tuple[int, str, list[Alert]]]:
        """(row, status, alerts) of the layers that are due."""
        names, counts = list(self.layers), [_counts(self._loads[row], rules[row]) for row in due]
        for row, each, test in zip(due, counts, _tests(counts, len(names)), strict=True):
            name, alerts = names[row], []
            numbers = {key: float(value) for key, value in balance_numbers(each.load).items()}
            bands = chance(rules[row], each.n_tokens)
            status = status_of(each, test, numbers, {key: bands[key].mean for key in numbers}, SEEN)
            about = {"of": len(each.load), "steps": self._steps[row]}
            limit = COLLAPSED * bands["carriers"].mean * (SPREAD_OUT if ("collapsed", name) in self.active else 1)
            collapsed = numbers["carriers"] <= limit  # which where DUE are due is no chance at all
            alerts += self._changed(step, "collapsed", name, collapsed, value=numbers["carriers"], **about)
            missed = len(dead(each, test, SURE))
            if (each.load >= BACK * each.load.mean()).all():
                alerts += self._changed(step, "dead", name, False)
            elif missed >= DEAD_SHARE * len(each.load) and not collapsed:  # which says it already
                alerts += self._changed(step, "dead", name, True, value=missed, **about)
            yield row, status, alerts

    def _emptiness(self, step: int, steps: int, loads: Sequence[np.ndarray]) -> list[Alert]:
        self._empty = 0 if any(load.any() for load in loads) else self._empty + steps
        if 0 < self._empty < EMPTY:
            return []
        return self._changed(step, *NO_TOKENS, self._empty > 0, value=self._empty)

    def _drifts(self, step: int, biases: Sequence[Any]) -> list[Alert]:
        alerts = []
        for (name, begin), now in zip(self.layers.items(), biases, strict=True):
            if begin is None or now is None or None in begin:
                continue
            moved = np.inf
            if None not in now:
                least, most, mean = np.subtract(now, begin)
                moved = max(abs(mean), most - least)
            limit = CALM * DRIFT if ("drift", name) in self.active else DRIFT
            alerts += self._changed(step, "drift", name, moved > limit, value=float(np.round(moved, 3)))
        return alerts

    def _changed(self, step: int, kind: str, layer: str | None, on: bool, **values: Any) -> list[Alert]:
        on = bool(on)  # numpy has its own, which JSON does not know
        if ((kind, layer) in self.active) == on:
            return []
        (self.active.add if on else self.active.discard)((kind, layer))
        shown = "" if layer is None else visible(layer, 80) or short_layer(layer)
        return [Alert(step, kind, layer, on, WORDS[kind][not on].format(layer=shown, **values))]


def _counts(load: np.ndarray, rule: MoEConfig) -> LoadCounts:
    """A load of tokens that are taken to be independent; effect sizes stand in for what their likeness adds."""
    return LoadCounts(load.astype(np.int64), tokens_of(load, rule), 1, 0.0, np.zeros(len(load)), 1.0)


def _tests(counts: Sequence[LoadCounts], n_layers: int) -> list[LoadTest]:
    """The tests of layers, those of one size at once, each as one of `n_layers`: what is judged never depends on which
    others are."""
    found: dict[int, LoadTest] = {}
    for size in {len(each.load) for each in counts}:
        rows = [row for row, each in enumerate(counts) if len(each.load) == size]
        tests = judge_loads([counts[row] for row in rows], n_layers, [False] * len(rows))
        found |= dict(zip(rows, tests, strict=True))
    return [found[row] for row in range(len(counts))]
