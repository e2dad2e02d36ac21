"""Fine-tuning in several processes (``torchrun ... -f``): any choice of ``-s`` trains, and as one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compat

# What s3prl's runner does: DDP around the upstream with find_unused_parameters, its Featurizer and a head behind it.
SCRIPT = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
rank, world, store, path, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
import s3prl.hub as hub
from s3prl.upstream.interfaces import Featurizer
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
KEYS = ["hidden_states", "last_hidden_state", "block_1", "hidden_state_2", "mfa", "embedding", "fbank"]
losses = {}
for key in KEYS:
    torch.manual_seed(0)
    upstream = hub.ecapa_tdnn_local(ckpt=path)
    featurizer = Featurizer(upstream, key, upstream_device="cpu")
    head = torch.nn.Linear(featurizer.output_dim, 2)
    for norm in (m for m in upstream.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        norm.requires_grad_(False)  # statistics of half a batch are not those of the whole
    model = DDP(upstream.train(), find_unused_parameters=True)
    parts = [model, DDP(featurizer) if key == "hidden_states" else featurizer, DDP(head)]
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters() if p.requires_grad], lr=0.5)
    batch = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (4000, 4000)]
    mine = batch[rank::world]
    for step in range(3):
        optimizer.zero_grad()
        features = parts[1](mine, model(mine))
        loss = torch.stack([parts[2](f).mean(0).square().sum() for f in features]).mean()
        loss.backward()
        optimizer.step()
    total = loss.detach() / world
    dist.all_reduce(total)
    losses[key] = [float(total), float(sum(p.detach().double().abs().sum() for p in upstream.parameters()))]
if rank == 0:
    json.dump(losses, open(out, "w"))
dist.destroy_process_group()
"""


def train(folder, path, processes: int) -> dict[str, list[float]]:
    script, out = folder / "script.py", folder / f"losses{processes}.json"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                str(rank),
                str(processes),
                str(folder / f"store{processes}"),
                str(path),
                str(out),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    return json.loads(out.read_text())


def test_every_choice_of_features_trains_with_one_and_with_two_processes(untrained, tmp_path):
    one, two = (train(tmp_path, untrained, processes) for processes in (1, 2))
    assert len(one) == 7
    for key, numbers in one.items():
        assert numbers == pytest.approx(two[key], rel=1e-5), key
        assert (numbers[1] != one["fbank"][1]) == (key != "fbank"), "all but the features have something to learn"
