"""NVIDIA GPUs: what the CUDA driver does to a process, and what a node has."""
