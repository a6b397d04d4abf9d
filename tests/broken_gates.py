# ruff: noqa: ARG002 (a method that is broken by ignoring what it is given)
"""Gates that are broken on purpose, one a trap: each differs from the sound one by a method or two.

Which probe each is made for, and which others it must then fail too, is in test_conformance_broken.py.
"""

import torch
import torch.nn.functional as F
from sound_gate import BIAS, SoundGate, lowest_first
from torch import nn


class WrongScores(SoundGate):
    def score(self, logits):
        return (logits / 2).sigmoid()  # a temperature that the rule does not have


class ClampedBias(SoundGate):
    def biased(self, scores):
        return (scores + self.bias).clamp_min(0.0)


class ArgmaxAgain(SoundGate):
    """Takes the largest K times and puts 0 in its place: below zero it is the largest again."""

    def top(self, values, k):
        chosen, values = [], values.clone()
        for _ in range(k):
            chosen.append(lowest_first(values, 1))
            values = values.scatter(-1, chosen[-1], 0.0)
        return torch.cat(chosen, -1)


class LastOfTies(SoundGate):
    def top(self, values, k):
        return values.shape[-1] - 1 - lowest_first(values.flip(-1), k)


class LastOfTiedGroups(SoundGate):
    def top_groups(self, group_scores, count):
        return self.config.n_group - 1 - lowest_first(group_scores.flip(-1), count)


class MinusOneForNaN(SoundGate):
    def choose(self, biased):
        return super().choose(biased).masked_fill(biased.isnan().any(-1, keepdim=True), -1)

    def weigh(self, scores, biased, ids, x):
        return super().weigh(scores, biased, ids.clamp_min(0), x)


class BatchMaximum(SoundGate):
    def logits(self, x):
        logits = super().logits(x)
        return logits if not logits.numel() else logits - logits.max()  # of all tokens; softmax should not mind


class PlaceInBatch(SoundGate):
    def biased(self, scores):
        return super().biased(scores) + 0.3 * (torch.arange(len(scores))[:, None] % 2) * scores


class ZeroFill(SoundGate):
    def mask(self, biased, kept):
        return biased * kept.repeat_interleave(self.config.experts_per_group, -1)


class FiniteFill(SoundGate):
    def mask(self, biased, kept):
        return biased.masked_fill(~kept.repeat_interleave(self.config.experts_per_group, -1), -10.0)


class GroupMaximum(SoundGate):
    def group_scores(self, biased):
        return biased.unflatten(-1, (self.config.n_group, -1)).amax(-1)


class GroupSumKOverM(SoundGate):
    def group_scores(self, biased):
        count = max(1, self.config.num_experts_per_tok // self.config.topk_group)
        size = self.config.experts_per_group
        return biased.unflatten(-1, (self.config.n_group, -1)).topk(min(count, size), dim=-1).values.sum(-1)


class OneGroupHalved(SoundGate):
    def choose(self, biased):
        if self.config.n_group == 1:  # "there are always two groups at least"
            biased = biased.masked_fill(torch.arange(biased.shape[-1]) >= biased.shape[-1] // 2, -torch.inf)
        return super().choose(biased)


class NeverAllGroups(SoundGate):
    def kept_groups(self, group_scores):
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        count = min(self.config.topk_group, self.config.n_group - 1)
        return kept.scatter(-1, lowest_first(group_scores, count), True)


class RefusesBoundary(SoundGate):
    @staticmethod
    def check_sizes(config):
        if config.n_group > 1 and config.num_experts_per_tok >= config.topk_group * config.experts_per_group:
            raise ValueError("too many experts")


class AcceptsTooMany(SoundGate):
    @staticmethod
    def check_sizes(config):
        pass


class LimitForSigmoidAlone(SoundGate):
    def mask(self, biased, kept):
        return super().mask(biased, kept) if self.config.scoring_func == "sigmoid" else biased


class BiasedWeights(SoundGate):
    def weigh(self, scores, biased, ids, x):
        return self.scale(self.normalise(biased.gather(-1, ids), x))


class RecoveredWeights(SoundGate):
    def weigh(self, scores, biased, ids, x):
        return self.scale(self.normalise(biased.gather(-1, ids) - self.bias[ids], x))


class SoftmaxAfterMask(SoundGate):
    def weigh(self, scores, biased, ids, x):
        groups = torch.zeros(len(ids), self.config.n_group, dtype=torch.bool)
        groups = groups.scatter(-1, ids // self.config.experts_per_group, True)
        left = scores * groups.repeat_interleave(self.config.experts_per_group, -1)
        return self.scale(self.normalise((left / left.sum(-1, keepdim=True)).gather(-1, ids), x))


class ScaledTwice(SoundGate):
    def scale(self, weights):
        return super().scale(super().scale(weights))


class NeverScaled(SoundGate):
    def scale(self, weights):
        return weights


class NeverNormalised(SoundGate):
    def normalise(self, weights, x):
        return weights


class SingleNotNormalised(SoundGate):
    def normalise(self, weights, x):
        return weights if weights.shape[-1] == 1 else super().normalise(weights, x)


class PlainDenominator(SoundGate):
    def normalise(self, weights, x):
        return weights / weights.sum(-1, keepdim=True)


class WeightsInModelDtype(SoundGate):
    def normalise(self, weights, x):
        return super().normalise(weights.to(x.dtype), x)


class CountsFromOne(SoundGate):
    def forward(self, x):
        ids, weights = super().forward(x)
        return ids + 1, weights


class SmallIds(SoundGate):
    def forward(self, x):
        ids, weights = super().forward(x)
        return ids.int(), weights


class ReadsMemory(SoundGate):
    def flatten(self, x):
        if x.is_contiguous():
            return super().flatten(x)
        n_tokens = x.shape[:-1].numel()
        have = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0)  # as a kernel that never asks
        return have.repeat(n_tokens)[: n_tokens * x.shape[-1]].view(n_tokens, -1)


class ViewsOnly(SoundGate):
    def flatten(self, x):
        return x.view(-1, x.shape[-1])


class PrintsRange(SoundGate):
    def logits(self, x):
        logits = super().logits(x)
        logits.min().item()  # for a line of log
        return logits


class DecodeWithoutBias(SoundGate):
    def biased(self, scores):
        return scores if len(scores) == 1 else super().biased(scores)


class CastBias(SoundGate):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class CastAndBack(SoundGate):
    """Float32 again, and the value lost."""

    def _apply(self, fn, recurse=True):
        nn.Module._apply(self, fn, recurse)
        self.bias.data = self.bias.data.float()
        return self


class LoadsAnyBias(SoundGate):
    @staticmethod
    def before_loading(module, state_dict, prefix, *_):
        pass


class RoundedBias(SoundGate):
    def keep_bias(self, bias):
        super().keep_bias(bias + 5.0 + 0.02 * torch.rand_like(bias))  # as a released model's: 8 bits cannot tell them

    def biased(self, scores):
        return scores + self.bias.bfloat16().float()


class NarrowLinear(SoundGate):
    def logits(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype)).float()


class FollowsWeight(SoundGate):
    def logits(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight).float()


class UnderAutocast(SoundGate):
    def logits(self, x):
        return F.linear(x.float(), self.weight.float()).float()


class DetachedSum(SoundGate):
    def normalise(self, weights, x):
        return weights / (weights.detach().sum(-1, keepdim=True) + 1e-20)


class FrozenWeight(SoundGate):
    def logits(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.detach().float())


class LearnedBias(SoundGate):
    def weigh(self, scores, biased, ids, x):
        through = (self.bias - self.bias.detach())[ids]  # zero, with a gradient
        return self.scale(self.normalise(scores.gather(-1, ids) + through, x))


class ParameterBias(SoundGate):
    def keep_bias(self, bias):
        self.register_parameter(BIAS, nn.Parameter(bias))


class NoisyTraining(SoundGate):
    def logits(self, x):
        logits = super().logits(x)
        return logits + 0.5 * torch.randn_like(logits) if self.training else logits


class OwnNoise(SoundGate):
    """Its own generator: activation checkpointing cannot put it back."""

    def __init__(self, config):
        super().__init__(config)
        self.seed = 0

    def logits(self, x):
        logits = super().logits(x)
        self.seed += self.training
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(self.seed))
        return logits + 0.5 * noise if self.training else logits


class AddsUp(SoundGate):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def choose(self, biased):
        ids = super().choose(biased)
        if self.training:
            self.load += torch.bincount(ids.flatten(), minlength=len(self.load))
        return ids


class StepsAlways(SoundGate):
    def choose(self, biased):
        ids = super().choose(biased)
        load = torch.bincount(ids.flatten(), minlength=biased.shape[-1]).float()
        with torch.no_grad():
            self.bias.add_(0.001 * (load.mean() - load).sign())
        return ids


class CappedBias(SoundGate):
    def biased(self, scores):
        return scores + self.bias.clamp_max(6.0)


class PaddedIds(SoundGate):
    """Ids of an array with two rows before the experts'."""

    def forward(self, x):
        ids, weights = super().forward(x)
        return ids + 2, weights


class CountsFromMinusOne(SoundGate):
    def forward(self, x):
        ids, weights = super().forward(x)
        return ids - 1, weights


class LastWhereAllTie(SoundGate):
    def top(self, values, k):
        last = values.shape[-1] - 1 - lowest_first(values.flip(-1), k)
        open_to_choice = values.masked_fill(values.isinf(), torch.nan)
        flat = (open_to_choice.nan_to_num(-9.0).amax(-1) == open_to_choice.nan_to_num(9.0).amin(-1))[..., None]
        return torch.where(flat, last, super().top(values, k))


class LastWhereSomeTie(SoundGate):
    def top(self, values, k):
        last = values.shape[-1] - 1 - lowest_first(values.flip(-1), k)
        open_to_choice = values.masked_fill(values.isinf(), torch.nan)
        flat = (open_to_choice.nan_to_num(-9.0).amax(-1) == open_to_choice.nan_to_num(9.0).amin(-1))[..., None]
        return torch.where(flat, super().top(values, k), last)


class NoLimitForSigmoid(SoundGate):
    def mask(self, biased, kept):
        return biased if self.config.scoring_func == "sigmoid" else super().mask(biased, kept)


class NoLimitForSqrtsoftplus(SoundGate):
    def mask(self, biased, kept):
        return biased if self.config.scoring_func == "sqrtsoftplus" else super().mask(biased, kept)


class ScaledByHeart(SoundGate):
    """The factor of the model it was written for."""

    def scale(self, weights):
        return weights * 2.5


class ForgottenBias(SoundGate):
    """Not in the state dict: a checkpoint loads, and the balance is gone."""

    def keep_bias(self, bias):
        self.register_buffer(BIAS, bias, persistent=False)


class DetachedRest(SoundGate):
    """Softmax whose denominator takes a gradient from the chosen experts alone."""

    def weigh(self, scores, biased, ids, x):
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)
        log = scores.log()
        exps = torch.where(chosen, log.exp(), log.detach().exp())
        return self.scale((exps / exps.sum(-1, keepdim=True)).gather(-1, ids))


class NoisyWithoutGradient(SoundGate):
    """Reentrant checkpointing runs the first forward without a graph, and this one takes it for evaluation."""

    def logits(self, x):
        logits = super().logits(x)
        return logits if torch.is_grad_enabled() or not self.training else logits.flip(-1)


class CountsGraphs(SoundGate):
    """Counts the forwards that carry a gradient and routes every second one otherwise. Reentrant checkpointing runs one
    such forward, the other kind two."""

    def __init__(self, config):
        super().__init__(config)
        self.graphs = 0

    def logits(self, x):
        logits = super().logits(x)
        odd = self.graphs % 2
        self.graphs += self.training and torch.is_grad_enabled()
        return logits.flip(-1) if odd else logits
