"""One process of a data-parallel training: `torchrun --nproc-per-node N -m benchmarks.parallel cpu`; rank 0 prints its times as JSON."""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from .peers import create
from .timing import Timing

BATCH, SIZE, STEPS = 4, 96, 12  # images per process, pixels of a side, timed steps


def main(kind: str) -> None:
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = distributed.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    model = create("spanet_small", SIZE).to(device, memory_format=torch.channels_last).train()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), generator=generator).to(device)
    seconds = []
    for _ in range(STEPS + 3):
        distributed.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(parallel(x), labels).backward()
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    first = torch.cat([parameter.detach().flatten()[:1] for parameter in model.parameters()])
    copies = [torch.empty_like(first) for _ in range(distributed.get_world_size())]
    distributed.all_gather(copies, first)
    if not all(torch.equal(copy, first) for copy in copies):
        raise SystemExit("the processes hold different weights after the same steps")
    if rank == 0:
        print(json.dumps(Timing.of(seconds[3:]).json() | {"batch": BATCH, "size": SIZE}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
