"""The GPU's side of the benchmark, which benchmarks/gpu.py runs: cells by importance, CUDA events, graph replay."""
