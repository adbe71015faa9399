# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one, and a model can be sent to another process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch.distributed import fsdp
from torch.testing import assert_close

import gpart
from tests.models import FUSED, MODELS, backward, normal, one_process, slow, variant

needs_fsdp2 = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="FSDP2 needs CUDA before torch 2.7"
)


@FUSED
@needs_fsdp2
def test_a_sharded_model_computes_the_same(fused):
    """Under fully_shard, weights and theta are shards: output and gradient are those of
    the whole model."""
    case = variant("sequential", fused=fused, inputs=(normal(4, 16),))
    (whole, adapter), (model, _) = case.adapted(), case.adapted()
    with one_process() as mesh:
        for module in (*model[::2], model):
            fsdp.fully_shard(module, mesh=mesh)
        y = backward(case(whole, grad=True))
        assert_close(backward(case(model, grad=True)), y)
        assert type(model.gpart.theta).__name__ == "DTensor"
        assert_close(model.gpart.theta.grad.full_tensor(), adapter.theta.grad)


WORKER = """
import json, sys, torch, gpart
from torch import distributed as dist, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

how, base, out = sys.argv[1:]
rank, ranks, wire = 0, 1, []  # wire: how many numbers each reduction of gradients sends
model = torch.load(base, weights_only=False)
adapter = gpart.attach(model, 37, target_modules=("all-linear", "bias"))
theta = adapter.theta
theta.data.copy_(torch.linspace(-1, 1, 37))
net = model.bfloat16() if how == "bf16" else model
if how not in ("float32", "bf16"):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

def average(theta):
    wire.append(theta.grad.numel())
    dist.all_reduce(theta.grad)
    theta.grad /= ranks

def hook(state, bucket):
    wire.append(bucket.buffer().numel())
    future = dist.all_reduce(bucket.buffer().div_(ranks), async_op=True).get_future()
    return future.then(lambda f: f.value()[0])

if how == "ddp":
    net = nn.parallel.DistributedDataParallel(model)
    net.register_comm_hook(None, hook)
elif how.startswith("fsdp"):
    settings = {"mesh": dist.device_mesh.init_device_mesh("cpu", (ranks,))}
    if how == "fsdp-bf16":  # theta is small: each process keeps it whole, in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        settings |= {"mp_policy": policy, "ignored_params": {theta}}
        theta.register_post_accumulate_grad_hook(average)
    for module in (*model[::2], model):
        fully_shard(module, **settings)
theta = adapter.theta  # fully_shard makes it a shard of its own

def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).tolist()

optimizer, steps = torch.optim.AdamW([theta], lr=0.1), []
dtype = next(model.parameters()).dtype
for step in range(3):
    batch = torch.linspace(-1, 1, 8 * 16).view(8, 16).roll(step).to(dtype)
    net(batch.chunk(ranks)[rank]).square().mean().backward()
    steps.append(whole(theta.grad))
    optimizer.step()
    optimizer.zero_grad()
gpart.save(model, f"{out}.{rank}")
result = {"steps": steps, "theta": whole(theta.detach()), "wire": wire}
result["dtype"] = str(theta.dtype)
with open(f"{out}.{rank}.json", "w", encoding="utf-8") as file:
    json.dump(result, file)
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder, how, *launch):
    """Train with the worker in folder: what each process found."""
    root = pathlib.Path(gpart.__file__).parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "worker.py", how, "base.pt", how]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    results = sorted(folder.glob(f"{how}.?.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in results]


@slow
@needs_fsdp2
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp-bf16"])
def test_two_processes_train_as_one(how, tmp_path):
    """DistributedDataParallel, FSDP2, and FSDP2 in bf16 with theta left out: on half of
    the batch each, theta's gradients and three AdamW steps are those of one process, in
    float32; every process saves the same file; and where that can be counted, d numbers
    a step cross the wire."""
    torch.save(MODELS["sequential"].pristine, tmp_path / "base.pt")
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    half = how == "fsdp-bf16"
    [alone] = run(tmp_path, "bf16" if half else "float32")
    both = run(tmp_path, how, *TORCHRUN)
    assert len(both) == 2
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if half else {"rtol": 1e-4, "atol": 1e-6}
    for result in both:
        assert result["dtype"] == "torch.float32"
        assert result["wire"] == ([] if how == "fsdp" else [37] * 3)
        for key in ("steps", "theta"):
            found, expected = torch.tensor(result[key]), torch.tensor(alone[key])
            assert_close(found, expected, **tolerance)
    digests = set()
    for rank in (0, 1):
        with safe_open(tmp_path / f"{how}.{rank}", "pt") as file:
            digests.add(file.metadata()["sha256"])
    assert len(digests) == 1


def output_of(model, name, queue):
    queue.put(MODELS[name](model).tolist())


@slow
@pytest.mark.parametrize("name", ["conv-embedding", "gpt2"])
def test_a_model_may_be_sent_to_a_spawned_process(name):
    """An adapted Embedding, Conv or Conv1D computes the same there."""
    case = MODELS[name]
    model, _ = case.adapted()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=output_of, args=(model, name, queue))
    worker.start()
    assert_close(torch.tensor(queue.get(timeout=300)), case(model), rtol=0, atol=0)
    worker.join()
    assert worker.exitcode == 0
