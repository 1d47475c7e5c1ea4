"""What `benchmarks/gpu_check.py` runs: a module a stage, each a process of its own under `supervisor`."""
