import pytest

import moesaic

PUBLIC = [
    "BalanceLoss", "BiasBalance", "DeepseekV3MoE", "ExpertSpec", "ExpertWeights", "Experts", "LoadMonitor", "MoE",
    "MoEConfig", "MoEGate", "Router", "Routing", "attach", "coselection", "diff", "domain_preference", "join", "load",
    "record", "replay", "route", "stability", "stats", "steps", "upcycle", "what_if",
]  # fmt: skip


def test_public_names_are_pinned():
    assert sorted(moesaic.__all__) == sorted(PUBLIC)


def test_dir_lists_the_public_names_once_and_nothing_else_without_underscores():
    assert isinstance(moesaic.MoE, type), "a name that was used is a global too"
    assert [name for name in dir(moesaic) if not name.startswith("_")] == sorted(PUBLIC)
    assert {"__all__", "__version__", "__doc__"} <= set(dir(moesaic))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there_and_documented(name):
    assert getattr(moesaic, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moesaic' has no attribute 'MoEEE'"):
        _ = moesaic.MoEEE
