"""A small training job for the demo: NumPy, Adam on a linear model, one line of log per step.

It knows nothing of checkpoints. A random token, drawn once at start and held in memory only, is in every line: after a restore
the same token means the same process, and the step counter goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="memory for weights and optimizer state")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between steps")
    arguments = parser.parse_args()

    token = os.urandom(8).hex()
    rng = np.random.default_rng(7)
    width = 512
    rows = arguments.mib * (1 << 20) // (3 * 4 * width)
    truth = rng.standard_normal((16, width), dtype=np.float32)
    weights = rng.standard_normal((rows, width), dtype=np.float32)  # as large as asked for; 16 rows are trained per step
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    first[:] = weights * np.float32(0.1)
    second[:] = np.square(first)

    step = 0
    while True:
        step += 1
        at = (step * 16) % (rows - 16)
        batch = rng.standard_normal((width, 64), dtype=np.float32)
        error = (weights[at : at + 16] - truth) @ batch
        gradient = error @ batch.T / 64
        first[at : at + 16] = 0.9 * first[at : at + 16] + 0.1 * gradient
        second[at : at + 16] = 0.999 * second[at : at + 16] + 0.001 * np.square(gradient)
        weights[at : at + 16] -= 0.01 * first[at : at + 16] / (np.sqrt(second[at : at + 16]) + 1e-8)
        print(f"step={step} loss={float(np.square(error).mean()):.6f} token={token}", flush=True)
        time.sleep(arguments.pause)


if __name__ == "__main__":
    main()
