"""What is said about an import: which of a record's contents are in the trace and which are not."""

from typing import Any, NamedTuple


class Note(NamedTuple):
    """A sentence in both languages."""

    en: str
    zh: str


NOTES = {
    "partly": (
        '{count} of {all} token-layers have no picks: there they are "none"',
        "{all} 个（token，层）中有 {count} 个没有选择，记为“无专家”",
    ),
    "no_pick": ("tokens left out because they have no pick: {count}", "{count} 个没有任何选择的 token 已略去"),
    "empty": (
        "no picks in {names}: dense layers, or not recorded; the config does not say",
        "{names} 没有选择：是稠密层或未被记录，配置没有说明",
    ),
    "missing": ("no data of {names}, which the config says are MoE layers", "配置中的 MoE 层 {names} 没有数据"),
    "absent": ("the record does not reach layers {names}, which are MoE layers", "记录中没有 MoE 层 {names}"),
    "dense": (
        "picks in {names}, which the config says have no experts: is it the right config?",
        "{names} 有选择，而配置说它们没有专家：配置对吗？",
    ),
    "copy": (
        "rank {rank} repeats rank {twin} (tensor parallelism) and is left out",
        "rank {rank} 与 rank {twin} 相同（张量并行），已略去",
    ),
    "shared": (
        "ids a token that are left out because they are shared experts fused into the routed ones: {count}",
        "每个 token 有 {count} 个编号是并入路由的共享专家，已略去",
    ),
    "heads": (
        "records of multi-token-prediction heads that are left out: {count}",
        "{count} 条多 token 预测头的记录已略去",
    ),
    "recomputed": (
        "records left out because they repeat one of their step and layer (a recomputed forward): {count}",
        "{count} 条记录与同一步同一层的另一条相同（重计算的前向），已略去",
    ),
    "incomplete": (
        "micro-batches left out because they lack a layer: {count}",
        "{count} 个缺少某层的 micro-batch 已略去",
    ),
    "from_1": (
        "layers count from 1 in this record, and from 0 in the trace",
        "此记录的层从 1 开始编号，导入后从 0 开始",
    ),
    "no_documents": (
        "every micro-batch (in inference, every step) of a rank is one sequence: the record has no documents",
        "每个 rank 的每个 micro-batch（推理时为每一步）算作一个序列：记录中没有文档",
    ),
}


def note(key: str, **values: Any) -> Note:
    """The sentence `key` of NOTES with its values put in."""
    en, zh = NOTES[key]
    return Note(en.format(**values), zh.format(**values))
