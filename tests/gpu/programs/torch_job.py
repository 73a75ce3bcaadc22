"""A small training whose losses show whether anything on the GPU was lost: PyTorch, fixed seed, dropout (the GPU's generator counts).

Appends `<step> <loss, its bits> <token>` to OUT for each step; the token exists only in this process's memory. Run without any pause and
with --steps, it is the twin that another run has to be equal to, bit by bit.

usage: torch_job.py OUT [--seed 1] [--steps 0] [--interval-ms 20] [--ballast-mib 0] [--workers 0] [--graph]
"""

from __future__ import annotations

import argparse
import os
import struct
import time
from collections.abc import Iterator
from itertools import count

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch is there: the same sums in the same order

import torch
from torch import nn

WIDTH, BATCH = 512, 64


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """Inputs by number, the same wherever they are made."""

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))


def batches(workers: int) -> Iterator[torch.Tensor]:
    if workers:
        made = torch.utils.data.DataLoader(Rows(), batch_size=BATCH, num_workers=workers, shuffle=False, pin_memory=True)
        yield from made
    for first in count(0, BATCH):
        yield torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(first))


def main() -> None:
    say = argparse.ArgumentParser()
    say.add_argument("out")
    say.add_argument("--seed", type=int, default=1)
    say.add_argument("--steps", type=int, default=0, help="end after so many; 0: never")
    say.add_argument("--interval-ms", type=int, default=20)
    say.add_argument("--ballast-mib", type=int, default=0, help="further memory on the GPU, full of noise")
    say.add_argument("--workers", type=int, default=0, help="of a DataLoader, forked when CUDA is in use already")
    say.add_argument("--graph", action="store_true", help="replay a CUDA graph in each step, too")
    options = say.parse_args()

    token = os.urandom(8).hex()
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    ballast = [noise(256 << 20, device) for _ in range(options.ballast_mib // 256)]
    ballast += [noise(options.ballast_mib % 256 << 20, device)] if options.ballast_mib % 256 else []
    sums = [int(part.view(torch.int64).sum()) for part in ballast]
    replay = graph(device) if options.graph else None
    feed = batches(options.workers)
    with open(options.out, "a", buffering=1) as out:
        for step in count(1):
            rows = next(feed).to(device)
            loss = (model(rows) - rows.flip(1)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if replay is not None:
                replay(step)
            if ballast and step % 50 == 0:
                number = step // 50 % len(ballast)
                if int(ballast[number].view(torch.int64).sum()) != sums[number]:
                    raise SystemExit(f"ballast {number} is not what it was")
            out.write(f"{step} {struct.pack('<f', loss.item()).hex()} {token}\n")
            if step == options.steps:
                return
            time.sleep(options.interval_ms / 1e3)


def noise(size: int, device: torch.device) -> torch.Tensor:
    """From a generator of its own: the dropouts stay as they are without."""
    own = torch.Generator(device).manual_seed(size)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=own)


class graph:  # noqa: N801 - called like a function
    """A captured addition, replayed; what it makes is compared."""

    def __init__(self, device: torch.device) -> None:
        self._cell = torch.zeros(1024, device=device)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self._cell.add_(0.0)  # warm
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._cell.add_(1.0)

    def __call__(self, step: int) -> None:
        self._graph.replay()
        if float(self._cell[0]) != step or float(self._cell[1023]) != step:
            raise SystemExit(f"the graph has added {float(self._cell[0])} in {step} steps")


if __name__ == "__main__":
    main()
