"""What flows between the stages of an MoE layer.

Axis letters, the same everywhere: `T` tokens, `D` hidden size, `O` output size, `I` expert width, `U` rows of the up
projection (2I where experts are gated, I where not), `E` routed experts, `K` experts per token, `G` groups,
`M` groups kept, `S` assignments (T*K).
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Routing(NamedTuple):
    """Every decision of one router call. The order of fields is that of Hugging Face routers.

    logits: gate output before scoring, [T, E]. None only where an observer saw nothing but picks.
    weights: what combine multiplies by, [T, K]; taken from unbiased scores, normalised and scaled.
    expert_ids: chosen experts, int64 [T, K]. The id E means "no expert": skipped, weight ignored, no gradient.
    """

    logits: Float[Tensor, "T E"] | None
    weights: Float[Tensor, "T K"]
    expert_ids: Int[Tensor, "T K"]


class ExpertWeights(NamedTuple):
    """Stacked weights of all experts, in Hugging Face's layouts. `up` holds gate and up rows where experts are gated.

    up: [E, U, D], or [E, D, U] where the spec says transposed.  down: [E, O, I], or [E, I, O].
    up_bias: [E, U] or None.  down_bias: [E, O] or None.
    """

    up: Float[Tensor, "E a b"]
    down: Float[Tensor, "E c d"]
    up_bias: Float[Tensor, "E U"] | None = None
    down_bias: Float[Tensor, "E O"] | None = None
