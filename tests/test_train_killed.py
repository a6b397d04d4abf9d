"""A run that SIGKILL ends at any moment goes on to bit-identical weights, optimizer, RNG, bias and record.

The runs are children of one process that has imported everything and runs on one thread: a few seconds each.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Every call of these is a moment at which a process can die: before it, and for writers half way through it.
MOMENTS = """
import hashlib, json, os, pathlib, pickle, random, shutil, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"
import numpy, torch
torch.set_num_threads(1)
import safetensors.torch, transformers, accelerate
import transformers.trainer, transformers.modeling_utils
import moesaic.train.data as data
from moesaic.train.data import Document
from moesaic.train import checkpoints
from moesaic.train.muon import Muon
from moesaic.train.training import Recipe, train

whole = data._documents
data._documents = lambda domain, split: tuple(
    Document(title, text[:800]) for title, text in whole(domain, split)[:12]
)
RECIPE = Recipe(steps=4, warmup_steps=1, evaluate_every=2, held_out_windows=1, bias_speed=0.01)
count = 0
muon_step = Muon.step


def drawing(*args, **kwargs):
    # training itself draws nothing, so a lost RNG state would not show
    torch.rand(1), numpy.random.rand(), random.random()
    return muon_step(*args, **kwargs)


Muon.step = drawing


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def mortal(holder, name, at, torn=None):
    real = getattr(holder, name)

    def call(*args, **kwargs):
        global count
        count += 1
        if count == at:
            if torn is not None:
                torn(*args)
            die()
        return real(*args, **kwargs)

    setattr(holder, name, call)


def half_a_file(_value, path, *_):
    pathlib.Path(path).write_bytes(b"half")


def half_a_folder(path, *_):
    for file in sorted(pathlib.Path(path).iterdir())[::2]:
        file.unlink()


def state(checkpoint):
    # of all that training goes on from: parameters and biases in float32, optimizer, schedule, RNG
    parts = {"model": safetensors.torch.load_file(checkpoint / "model.safetensors")}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        parts[name] = torch.load(checkpoint / name, weights_only=False)
    found = {}
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(parts)[0]:
        value = leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else pickle.dumps(leaf)
        found[torch.utils._pytree.keystr(path)] = hashlib.sha256(value).hexdigest()
    assert len(found) > 100, "two states that hold nothing would be equal"
    return found


def keeping_the_last_state(folder):
    drop = checkpoints.drop_checkpoints

    def kept(at):
        whole = [path for path in checkpoints._numbered(at) if path.name == f"checkpoint-{RECIPE.steps}"]
        if whole and not folder.with_suffix(".state").exists():  # else it was killed while they were removed
            folder.with_suffix(".state").write_bytes(json.dumps(state(whole[0])).encode())
        drop(at)

    checkpoints.drop_checkpoints = kept


def child(at, **kwargs):
    # returns whether it lived, and how many moments it had
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        keeping_the_last_state(kwargs.get("out", kwargs.get("resume")))
        mortal(torch, "save", at, half_a_file)
        mortal(transformers.modeling_utils, "safe_save_file", at, half_a_file)
        mortal(pathlib.Path, "replace", at)
        mortal(pathlib.Path, "write_text", at)
        mortal(shutil, "rmtree", at, half_a_folder)
        mortal(Muon, "step", at)
        code = 1
        try:
            train(**kwargs)
            code = 0
        except ValueError as error:  # killed while its last checkpoints were removed
            code = 0 if "has finished" in str(error) else 1
        finally:
            os.write(writing, str(count).encode())
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    said = os.read(reading, 100)
    os.close(reading)
    if not os.WIFSIGNALED(status):
        assert status == 0, "the run failed by itself"
    return not os.WIFSIGNALED(status), int(said or 0)


def result(folder):
    record = json.loads((folder / "training.json").read_text())
    del record["minutes"]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    last = json.loads(folder.with_suffix(".state").read_text())
    return record, weights, last, sorted(path.name for path in folder.iterdir())


root = pathlib.Path(sys.argv[1])
lived, moments = child(0, out=root / "whole", seed=3, recipe=RECIPE)
expected = result(root / "whole")
step = int(sys.argv[2])
wrong, killed = [], 0
for at in range(1, moments + 1, step):
    folder = root / str(at)
    lived, _ = child(at, out=folder, seed=3, recipe=RECIPE)
    assert not lived, at
    killed += 1
    if (folder / "training.json").exists():
        lived, _ = child(0, resume=folder)
    else:  # nothing had begun
        lived, _ = child(0, out=folder, seed=3, recipe=RECIPE)
    if not lived or result(folder) != expected:
        wrong.append(at)
print(json.dumps({"moments": moments, "killed": killed, "wrong": wrong}))
"""


def run(folder: Path, step: int) -> dict:
    done = subprocess.run([sys.executable, "-c", MOMENTS, str(folder), str(step)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_now_and_then_goes_on_to_the_same_bits(tmp_path):
    found = run(tmp_path, 13)
    assert found["killed"] >= 3
    assert found["wrong"] == []


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    found = run(tmp_path, 1)
    assert found["killed"] == found["moments"] > 20
    assert found["wrong"] == []
