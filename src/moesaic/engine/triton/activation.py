"""What lies between the two projections of an expert, on tiles in registers: `ExpertSpec.activate` and its gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from moesaic.engine.spec import ExpertSpec


class Activation(NamedTuple):
    """Those facts of an ExpertSpec that kernels are compiled for."""

    name: str
    gated: bool
    interleaved: bool
    limit: float | None
    alpha: float
    offset: float
    gate_softcap: float | None
    up_softcap: float | None

    @classmethod
    def of(cls, spec: ExpertSpec) -> "Activation":
        interleaved = spec.gated and spec.interleaved
        caps = (spec.gate_softcap, spec.up_softcap)
        return cls(spec.activation, spec.gated, interleaved, spec.limit, spec.alpha, spec.up_offset, *caps)


@triton.jit
def activate(gate, up, ACT: tl.constexpr):
    """act(gate) * (up + offset), both clamped or softcapped where the spec says so; act(gate) where not gated."""
    if ACT.gated:
        if ACT.limit is not None:
            gate, up = clamp_gate(gate, ACT), clamp_up(up, ACT)
        return nonlinearity(gate, ACT) * (softcap(up, ACT.up_softcap) + ACT.offset)
    else:
        return nonlinearity(gate, ACT)


@triton.jit
def activate_backward(gate, up, grad, ACT: tl.constexpr):
    """(activate(gate, up), gradient of gate, gradient of up). At the edge of a clamp the gradient passes."""
    if ACT.gated:
        kept_gate, kept_up = gate, up
        if ACT.limit is not None:
            kept_gate, kept_up = clamp_gate(gate, ACT), clamp_up(up, ACT)
        kept_up = softcap(kept_up, ACT.up_softcap)
        activated = nonlinearity(kept_gate, ACT)
        d_gate = grad * (kept_up + ACT.offset) * slope(kept_gate, ACT)
        d_up = grad * activated
        if ACT.up_softcap is not None:
            d_up = d_up * softcap_slope(kept_up, ACT.up_softcap)
        if ACT.limit is not None:
            d_gate = tl.where(gate > ACT.limit, 0.0, d_gate)
            d_up = tl.where(tl.abs(up) > ACT.limit, 0.0, d_up)
        return activated * (kept_up + ACT.offset), d_gate, d_up
    else:
        d_gate = grad * slope(gate, ACT)
        return nonlinearity(gate, ACT), d_gate, d_gate


@triton.jit
def clamp_gate(gate, ACT: tl.constexpr):
    return tl.where(gate > ACT.limit, ACT.limit, gate)  # not minimum, which would hide a NaN


@triton.jit
def clamp_up(up, ACT: tl.constexpr):
    return tl.where(up > ACT.limit, ACT.limit, tl.where(up < -ACT.limit, -ACT.limit, up))


@triton.jit
def nonlinearity(x, ACT: tl.constexpr):
    if ACT.name == "silu":
        return softcap(x, ACT.gate_softcap) * tl.sigmoid(ACT.alpha * x)
    elif ACT.name == "gelu":
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACT.name == "gelu_pytorch_tanh":
        return x * tl.sigmoid(_twice_inside(x))  # 0.5 (1 + tanh z) = sigmoid(2 z)
    elif ACT.name == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACT.name == "relu2")
        return tl.where(x < 0, 0.0, x * x)


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of `nonlinearity`; 0 at the kink of relu."""
    if ACT.name == "silu":
        sigmoid = tl.sigmoid(ACT.alpha * x)
        capped = softcap(x, ACT.gate_softcap)
        return sigmoid * (softcap_slope(capped, ACT.gate_softcap) + ACT.alpha * capped * (1.0 - sigmoid))
    elif ACT.name == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * density
    elif ACT.name == "gelu_pytorch_tanh":
        sigmoid = tl.sigmoid(_twice_inside(x))
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return sigmoid * (1.0 + x * inner_slope * (1.0 - sigmoid))
    elif ACT.name == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACT.name == "relu2")
        return tl.where(x > 0, 2.0 * x, 0.0)


@triton.jit
def _twice_inside(x):
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)  # 2 sqrt(2/pi) (x + 0.044715 x^3)


@triton.jit
def softcap(x, CAP: tl.constexpr):
    if CAP is None:
        return x
    else:
        return CAP * _tanh(x / CAP)


@triton.jit
def softcap_slope(capped, CAP: tl.constexpr):
    if CAP is None:
        return 1.0
    else:
        share = capped / CAP
        return 1.0 - share * share


@triton.jit
def _tanh(x):
    """To two units in the last place. Near 0, where 1 - 2 / (exp(2x) + 1) cancels, a polynomial (Cephes, tanhf.c)."""
    square = x * x
    tail = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    near = x + x * square * ((tail + 1.33314422036e-1) * square - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
