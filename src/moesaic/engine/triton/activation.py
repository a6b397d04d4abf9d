"""What lies between the two projections of an expert, on tiles in registers: `ExpertSpec.activate` and its gradient."""

import triton
import triton.language as tl


@triton.jit
def activate(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """act(gate) * (up + OFFSET), both clamped where there is a LIMIT; act(gate) where not GATED."""
    if GATED:
        if LIMIT is not None:
            gate, up = clamp_gate(gate, LIMIT), clamp_up(up, LIMIT)
        return nonlinearity(gate, ACTIVATION, ALPHA) * (up + OFFSET)
    else:
        return nonlinearity(gate, ACTIVATION, ALPHA)


@triton.jit
def activate_backward(
    gate,
    up,
    grad,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """(activate(gate, up), gradient of gate, gradient of up). At the edge of a clamp the gradient passes."""
    if GATED:
        kept_gate, kept_up = gate, up
        if LIMIT is not None:
            kept_gate, kept_up = clamp_gate(gate, LIMIT), clamp_up(up, LIMIT)
        activated = nonlinearity(kept_gate, ACTIVATION, ALPHA)
        d_gate = grad * (kept_up + OFFSET) * slope(kept_gate, ACTIVATION, ALPHA)
        d_up = grad * activated
        if LIMIT is not None:
            d_gate = tl.where(gate > LIMIT, 0.0, d_gate)
            d_up = tl.where(tl.abs(up) > LIMIT, 0.0, d_up)
        return activated * (kept_up + OFFSET), d_gate, d_up
    else:
        d_gate = grad * slope(gate, ACTIVATION, ALPHA)
        return nonlinearity(gate, ACTIVATION, ALPHA), d_gate, d_gate


@triton.jit
def clamp_gate(gate, LIMIT: tl.constexpr):
    return tl.where(gate > LIMIT, LIMIT, gate)  # not minimum, which would hide a NaN


@triton.jit
def clamp_up(up, LIMIT: tl.constexpr):
    return tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))


@triton.jit
def nonlinearity(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACTIVATION == "gelu_pytorch_tanh":
        return x * tl.sigmoid(_twice_inside(x))  # 0.5 (1 + tanh z) = sigmoid(2 z)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return tl.where(x < 0, 0.0, x * x)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The derivative of `nonlinearity`; 0 at the kink of relu."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(ALPHA * x)
        return sigmoid * (1.0 + ALPHA * x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * density
    elif ACTIVATION == "gelu_pytorch_tanh":
        sigmoid = tl.sigmoid(_twice_inside(x))
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return sigmoid * (1.0 + x * inner_slope * (1.0 - sigmoid))
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return tl.where(x > 0, 2.0 * x, 0.0)


@triton.jit
def _twice_inside(x):
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)  # 2 sqrt(2/pi) (x + 0.044715 x^3)
