# ruff: noqa: ARG002, ARG004 (broken gates need what this one ignores)
"""A gate that passes every probe, in plain torch and with every step as a method: the twin of `broken_gates`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SCORING = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1),
    "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),
}
BIAS = "e_score_correction_bias"


def lowest_first(values, k):
    """Indices of the k largest, ties to the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class SoundGate(nn.Module):
    """DeepSeek's gate with and without groups, bias and normalisation; every step is a method to break."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.check_sizes(config)
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) / config.hidden_size**0.5)
        if config.has_correction_bias:
            self.keep_bias(torch.zeros(config.n_routed_experts))
            self.register_load_state_dict_pre_hook(self.before_loading)

    def keep_bias(self, bias):
        self.register_buffer(BIAS, bias)

    @staticmethod
    def check_sizes(config):
        if config.n_group > 1 and config.num_experts_per_tok > config.topk_group * config.experts_per_group:
            raise ValueError("more experts than the kept groups hold")

    @staticmethod
    def before_loading(module, state_dict, prefix, *_):
        state_dict[prefix + BIAS] = state_dict[prefix + BIAS].float()

    def _apply(self, fn, recurse=True):
        kept = None if self.bias is None else self.bias.detach().clone()
        super()._apply(fn, recurse)
        if kept is not None:
            self.bias.data = kept
        return self

    @property
    def bias(self):
        return getattr(self, BIAS, None)

    def forward(self, x):
        x = self.flatten(x)
        scores = self.score(self.logits(x))
        biased = self.biased(scores)
        ids = self.choose(biased)
        return ids, self.weigh(scores, biased, ids, x)

    def flatten(self, x):
        return x.reshape(-1, x.shape[-1])

    def logits(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())

    def score(self, logits):
        return SCORING[self.config.scoring_func](logits)

    def biased(self, scores):
        return scores if self.bias is None else scores + self.bias

    def choose(self, biased):
        biased = self.clean(biased).detach()
        if self.config.n_group > 1:
            biased = self.mask(biased, self.kept_groups(self.group_scores(biased)))
        return self.top(biased, self.config.num_experts_per_tok)

    def clean(self, biased):
        return biased.nan_to_num(nan=9e9, posinf=9e9, neginf=-9e9)

    def group_scores(self, biased):
        count = 2 if self.config.has_correction_bias else 1
        return biased.unflatten(-1, (self.config.n_group, -1)).topk(count, dim=-1).values.sum(-1)

    def kept_groups(self, group_scores):
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        return kept.scatter(-1, self.top_groups(group_scores, self.config.topk_group), True)

    def top_groups(self, group_scores, count):
        return lowest_first(group_scores, count)

    def mask(self, biased, kept):
        return biased.masked_fill(~kept.repeat_interleave(self.config.experts_per_group, -1), -torch.inf)

    def top(self, values, k):
        return lowest_first(values, k)

    def weigh(self, scores, biased, ids, x):
        return self.scale(self.normalise(scores.gather(-1, ids), x))

    def normalise(self, weights, x):
        if not self.config.norm_topk_prob:
            return weights
        return weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def scale(self, weights):
        return weights * self.config.routed_scaling_factor
