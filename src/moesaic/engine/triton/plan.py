"""Assignments sorted by expert, without atomics: the order is stable, so a run repeats bit for bit."""

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from moesaic.engine.plan import Plan

ONE_LAUNCH = 4096  # assignments up to which every expert looks through all of them
AT_ONCE = 1024  # so many at a time: one kernel for every number
BLOCK = 128  # assignments that one program ranks by comparing each with each


def group_by_expert(expert_ids: Int[Tensor, "T K"], num_experts: int) -> Plan:
    """Twin of `engine.plan.group_by_expert`. Ids that name no expert (values are not checked on a GPU) come last, as E.

    Up to ONE_LAUNCH assignments in one launch; above in a count, a prefix sum over (expert, block) and a scatter.
    """
    ids = expert_ids.flatten()
    n = len(ids)
    assignments = torch.empty(n, dtype=torch.int64, device=ids.device)
    counts = torch.empty(num_experts, dtype=torch.int64, device=ids.device)
    if n <= ONE_LAUNCH:
        _sort_few[(num_experts + 1,)](ids, assignments, counts, n, num_experts, AT_ONCE, num_warps=4)
        return Plan(assignments, counts)
    blocks = triton.cdiv(n, BLOCK)
    by_block = torch.empty(num_experts + 1, blocks, dtype=torch.int32, device=ids.device)
    _count[(blocks,)](ids, by_block, n, num_experts, blocks, BLOCK, BINS=triton.next_power_of_2(num_experts + 2))
    ends = by_block.flatten().cumsum(0, dtype=torch.int32)
    _scatter[(blocks,)](
        ids,
        by_block,
        ends,
        assignments,
        counts,
        n,
        num_experts,
        blocks,
        BLOCK,
        EXPERTS=triton.next_power_of_2(num_experts),
    )
    return Plan(assignments, counts)


@triton.jit
def _load_ids(ids, assignment, n, num_experts):
    """The id E for whatever names no expert, E + 1 beyond the end."""
    found = tl.load(ids + assignment, mask=assignment < n, other=0).to(tl.int64)
    found = tl.where((found < 0) | (found > num_experts), num_experts, found)
    return tl.where(assignment < n, found, num_experts + 1).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _sort_few(ids, assignments, counts, n, num_experts, SIZE: tl.constexpr):
    expert = tl.program_id(0)
    before = tl.zeros((SIZE,), dtype=tl.int32)
    for done in range(0, n, SIZE):
        before += (_load_ids(ids, done + tl.arange(0, SIZE), n, num_experts) < expert).to(tl.int32)
    first = tl.sum(before, axis=0)
    at = first
    for done in range(0, n, SIZE):
        assignment = done + tl.arange(0, SIZE)
        mine = (_load_ids(ids, assignment, n, num_experts) == expert).to(tl.int32)
        tl.store(assignments + at + tl.cumsum(mine, axis=0) - 1, assignment.to(tl.int64), mask=mine != 0)
        at += tl.sum(mine, axis=0)
    if expert < num_experts:
        tl.store(counts + expert, (at - first).to(tl.int64))


@triton.jit(do_not_specialize=["n", "blocks"])
def _count(ids, by_block, n, num_experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    found = _load_ids(ids, block * BLOCK + tl.arange(0, BLOCK), n, num_experts)
    bins = tl.arange(0, BINS)
    tl.store(by_block + bins.to(tl.int64) * blocks + block, tl.histogram(found, BINS), mask=bins <= num_experts)


@triton.jit(do_not_specialize=["n", "blocks"])
def _scatter(
    ids, by_block, ends, assignments, counts, n, num_experts, blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    block = tl.program_id(0)
    here = tl.arange(0, BLOCK)
    assignment = block * BLOCK + here
    found = _load_ids(ids, assignment, n, num_experts)
    others = _load_ids(ids, block * BLOCK + tl.arange(0, BLOCK), n, num_experts)
    earlier = (found[:, None] == others[None, :]) & (here[:, None] > here[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    cell = found.to(tl.int64) * blocks + block
    inside = assignment < n
    first = tl.load(ends + cell, mask=inside, other=0) - tl.load(by_block + cell, mask=inside, other=0)
    tl.store(assignments + first + rank, assignment.to(tl.int64), mask=inside)
    if block == 0:
        experts = tl.arange(0, EXPERTS).to(tl.int64)
        known = experts < num_experts
        last = tl.load(ends + experts * blocks + blocks - 1, mask=known, other=0)
        before = tl.load(ends + experts * blocks - 1, mask=known & (experts > 0), other=0)
        tl.store(counts + experts, (last - before).to(tl.int64), mask=known)
