"""The article's names do what the article shows, and its transcript says what a recorded forward gave."""

import contextlib
import io
import math
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import densify
from transformers import DeepseekV3Config

from moesaic.article import ASSETS, MoEGate, create_moe_config, demo_moe_gate
from moesaic.config import MoEConfig
from moesaic.layer.experts import Experts
from moesaic.layer.moe import DeepseekV3MoE, MoE
from moesaic.layer.router import Router
from moesaic.trace.store import Trace

SEED = next(iter((Path(__file__).parents[2] / "shared" / "seeds").glob("004_*.txt")), None)
needs_seed = pytest.mark.skipif(SEED is None, reason="the seed documents are not beside this checkout")


@pytest.fixture(scope="module")
def transcript(tmp_path_factory) -> tuple[str, Trace]:
    path = tmp_path_factory.mktemp("article") / "figure.png"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        trace = demo_moe_gate(save_path=path)
    assert path.stat().st_size > 50_000
    return out.getvalue(), trace


def labels(text: str) -> list[str]:
    """What stands before each number: the words of the transcript, character for character."""
    return [re.sub(r"[:(].*", "", line).rstrip() for line in text.splitlines() if line.strip()]


@needs_seed
def test_transcript_has_the_articles_sections_and_labels_in_its_order(transcript):
    document = SEED.read_text(encoding="utf-8")
    theirs = labels(document.split("测试代码运行后输出结果如下所示:")[1].split("```")[1].removeprefix("bash\n"))
    second = len(theirs) - 1 - theirs[::-1].index("🚀 MoE门控前向传播开始")
    saved = theirs.index("✅ 可视化图表已保存到")
    assert theirs[second - 1] == "🎨 开始生成路由过程可视化..."
    expected = [*theirs[:second], *theirs[saved:], "✅ 演示完成!", "=" * 80]  # its second forward is not repeated
    at = expected.index("   - 负载均衡度")
    ours = labels(transcript[0])
    assert ours[:at] == expected[:at]
    assert ours[-len(expected[at + 1 :]) :] == expected[at + 1 :]
    assert [label.strip(" -") for label in ours[at : -len(expected[at + 1 :])]] == [
        "最大负载/平均负载", "MaxVio", "变异系数 CV", "归一化熵", "死专家数", "结论",
    ]  # fmt: skip


def numbers(text: str, label: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.strip(" -").startswith(label))
    return [float(n) for n in re.findall(r"-?(?:\d+\.?\d*|inf)", line.split(":", 1)[1])]


# least and greatest over 60 seeds of the article's own demo
BOUNDS = {
    "数值范围": [(-5.65, -4.55), (4.63, 5.71)],
    "Logits统计": [(-2.79, -2.23), (2.14, 2.85), (-0.004, 0.004)],
    "Sigmoid分数统计": [(0.058, 0.097), (0.895, 0.945), (0.4991, 0.5009)],
    "修正偏置统计": [(0, 0), (0, 0)],
    "组分数统计": [(1.14, 1.24), (1.70, 1.80)],
    "节点索引范围": [(0, 0), (7, 7)],
    "选中节点数": [(1024, 1024)],
    "可用专家数": [(32768, 32768)],
    "掩码后分数统计": [(-math.inf, -math.inf), (0.895, 0.945)],
    "归一化后权重统计": [(0.107, 0.113), (0.144, 0.151)],
    "缩放后权重统计": [(0.107, 0.113), (0.144, 0.151)],
    "被使用的专家数": [(255, 256)],
    "权重平均值": [(0.125, 0.125)],
    "权重标准差": [(0.0052, 0.0056)],
    "总专家使用次数": [(2048, 2048)],
    "期望使用次数": [(2048, 2048)],
}


@pytest.mark.parametrize("label", BOUNDS)
def test_printed_numbers_lie_where_any_seed_puts_them(transcript, label):
    got = numbers(transcript[0], label)
    assert len(got) == len(BOUNDS[label])
    for number, (low, high) in zip(got, BOUNDS[label], strict=True):
        assert low <= number <= high


def test_printed_numbers_are_those_of_the_record(transcript):
    text, trace = transcript
    arrays = trace.to_arrays()
    load = torch.bincount(torch.from_numpy(arrays["picks"]).long().flatten(), minlength=256)
    assert numbers(text, "使用最多的专家")[:2] == [load.argmax(), load.max()]
    assert numbers(text, "权重最大值") == [pytest.approx(arrays["weights"].max(), abs=5e-5)]
    assert numbers(text, "MaxVio")[0] == pytest.approx(float(load.max() / load.float().mean() - 1), rel=1e-3)


def test_seed_changes_the_numbers_and_leaves_the_callers_generator_alone(tmp_path, capsys):
    config = MoEConfig.preset("deepseek-v3", hidden_size=16)
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    runs = []
    for seed in (0, 1, 0):
        demo_moe_gate(config, seed=seed, lang="en", save_path=tmp_path / "f.png")
        runs.append(capsys.readouterr().out)
    assert torch.equal(torch.randn(3), expected)
    assert runs[0] == runs[2] != runs[1]


def test_both_languages_say_the_same():
    def fields(line: str) -> tuple:
        mark = re.match(r"(\[\w+\])?", line)[0]
        return mark, [field for _, field, _, _ in string.Formatter().parse(line) if field]

    zh, en = ((ASSETS / f"transcript.{lang}.txt").read_text(encoding="utf-8").splitlines() for lang in ("zh", "en"))
    assert [fields(line) for line in zh] == [fields(line) for line in en]
    assert not re.search(r"[\u4e00-\u9fff]", "".join(en))


GROUPS_UNUSED = {"mixtral": {"n_group": 8, "group_score": "top2_sum"}}  # one expert each, and a greedy rule


@pytest.mark.parametrize("preset", ["mixtral", "gpt-oss", "classic", "deepseek-v2", "glm4-moe"])
def test_other_gates_print_only_what_they_have(preset, tmp_path, capsys):
    config = MoEConfig.preset(preset, hidden_size=16, **GROUPS_UNUSED.get(preset, {}))
    demo_moe_gate(config, lang="zh", save_path=tmp_path / "f.png")
    out = capsys.readouterr().out
    assert ("组分数统计" in out) == (preset == "deepseek-v2")
    assert ("修正偏置统计" in out) == config.has_correction_bias
    assert ("Softmax分数统计" in out) == (preset in ("mixtral", "deepseek-v2"))


def test_gate_takes_the_articles_config_and_returns_its_pair(capsys):
    config = create_moe_config()
    config.hidden_size = 32
    gate = MoEGate(config)
    topk_idx, topk_weight = gate(torch.randn(4, 6, 32))
    assert capsys.readouterr().out == ""
    assert topk_idx.shape == topk_weight.shape == (24, 8)
    assert (topk_idx.dtype, topk_weight.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(topk_weight.sum(1), torch.ones(24))
    assert isinstance(gate, Router)
    assert gate.state_dict().keys() == {"weight", "e_score_correction_bias"}


@pytest.mark.parametrize("part", [Router, Experts, MoE, DeepseekV3MoE])
@pytest.mark.parametrize("config", [create_moe_config(), DeepseekV3Config(), {"hidden_size": 8}], ids=type)
def test_our_own_parts_say_how_to_read_the_articles_config_and_those_of_transformers(part, config):
    kind = type(config).__name__
    with pytest.raises(ValueError, match=rf"config is of class {kind}: give MoEConfig\.from_hf\(config\), .*moe_int"):
        part(config)


def test_the_articles_config_makes_a_layer():
    config = MoEConfig.from_hf(create_moe_config(), moe_intermediate_size=16)
    assert DeepseekV3MoE(config, device="meta").experts.down_proj.shape == (256, 7168, 16)


def test_gate_trains_and_takes_what_the_articles_could_not():
    """Training mode, 2-D, non-contiguous, empty and bfloat16 input."""
    gate = MoEGate(MoEConfig.preset("deepseek-v3", hidden_size=32)).train()
    for x in (torch.randn(5, 32), torch.randn(32, 5).T, torch.randn(0, 3, 32), torch.randn(2, 3, 32).bfloat16()):
        _, topk_weight = gate(x)
        assert topk_weight.requires_grad


def test_k_equals_one_keeps_the_raw_score_as_the_article_does():
    config = MoEConfig.preset("deepseek-v3", hidden_size=32, num_experts_per_tok=1, routed_scaling_factor=1.0)
    gate, x = MoEGate(config), torch.randn(9, 32)
    idx, weight = gate(x)
    torch.testing.assert_close(weight, (x @ gate.weight.T).sigmoid().gather(1, idx))
    router = Router(config)
    router.load_state_dict(gate.state_dict())
    assert router(x).weights.eq(1.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_visualize_saves_a_figure_and_prints_nothing(dtype, tmp_path, capsys):
    gate = MoEGate(MoEConfig.preset("deepseek-v3", hidden_size=32)).to(dtype)
    saved = gate.visualize_routing_process(
        torch.randn(2, 8, 32, dtype=dtype, requires_grad=True), save_path=tmp_path / "moe_routing.png"
    )
    assert saved == tmp_path / "moe_routing.png"
    assert saved.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == ""


def test_unknown_language_is_refused_before_any_work():
    with pytest.raises(ValueError, match="lang='fr' is unknown: use 'zh' or 'en'"):
        demo_moe_gate(lang="fr")


def test_the_module_runs_as_a_script(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "moesaic.article"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "✅ 演示完成!" in run.stdout
    assert (tmp_path / "moe_routing_visualization.png").is_file()
    assert run.stderr == ""


@pytest.fixture(scope="module")
def article_class() -> Any:
    """The article's own class, executed from the seed document and never stored here."""
    document = SEED.read_text(encoding="utf-8")
    source = next(b for b in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if b.startswith("class MoEGate"))
    from typing import Optional

    names = {
        "torch": torch,
        "nn": torch.nn,
        "F": torch.nn.functional,
        "math": math,
        "Tuple": tuple,
        "Optional": Optional,
    }
    exec(compile(source, "seed", "exec"), names)
    return names["MoEGate"]


@needs_seed
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [0.0, -2.0, 50.0])
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "k"), [(256, 8, 4, 8), (64, 8, 2, 8), (32, 4, 4, 1), (16, 4, 2, 4)]
)
def test_gate_equals_the_articles_own_class(article_class, experts, groups, kept, k, bias, norm):
    config = create_moe_config()
    config.hidden_size, config.n_routed_experts, config.num_experts_per_tok = 48, experts, k
    config.n_group, config.topk_group, config.norm_topk_prob, config.routed_scaling_factor = groups, kept, norm, 2.5
    torch.manual_seed(3)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = article_class(config).eval()
    torch.manual_seed(3)
    ours = MoEGate(config)
    assert torch.equal(ours.weight, theirs.weight), "the same seed initialises both the same"
    with torch.no_grad():
        theirs.e_score_correction_bias.copy_(bias + torch.randn(experts))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 50, 48)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        idx, weight = theirs(x)
    topk_idx, topk_weight = ours(x)
    assert torch.equal(topk_idx.sort(1).values, idx.sort(1).values)
    dense, expected = densify(topk_idx, topk_weight, experts), densify(idx, weight, experts)
    torch.testing.assert_close(dense, expected, rtol=0, atol=5e-7)
