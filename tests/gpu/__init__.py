"""What only a machine with a GPU can show, in one run of less than ten minutes: `scripts/gpu-verify`, `docs/gpu.md`."""
