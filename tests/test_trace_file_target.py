"""Where a trace may be written, and what is then there."""

import os

import pytest
import torch
from cases import v3
from traces import made

import moesaic as ms
from moesaic.layer.moe import MoE
from moesaic.trace.recording.record import record


def test_a_file_that_is_no_trace_is_refused_and_stays_as_it_was(tmp_path):
    trace, path = made(v3(16, 4, 2, 4)), tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    for write in (trace.save, recorded_to):
        with pytest.raises(
            ValueError, match=r"model.safetensors: is there already and is no whole trace: give another name"
        ):
            write(path)
    assert path.read_bytes() == b"weights"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def recorded_to(path):
    with record(MoE.classic(8, 8, 8, 4, 2), to=path):
        raise AssertionError("the block must not run")


def test_a_link_to_a_trace_stays_one_and_the_trace_behind_it_is_replaced(tmp_path):
    behind, link = tmp_path / "behind.safetensors", tmp_path / "link.safetensors"
    made(v3(16, 4, 2, 4), n_tokens=3).save(behind)
    link.symlink_to(behind)
    made(v3(16, 4, 2, 4), n_tokens=5).save(link)
    assert link.is_symlink()
    assert len(ms.load(behind)) == 5
    with record(MoE.classic(8, 8, 8, 4, 2), to=link) as rec:
        rec.model(torch.randn(2, 8))
    assert link.is_symlink()
    assert len(ms.load(behind)) == 2


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_a_trace_is_what_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        made(v3(16, 4, 2, 4)).save(tmp_path / "run.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "run.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
