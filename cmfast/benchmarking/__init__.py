"""What the benchmarks measure, and how: the cases and timers of `cmfast bench`, `make bench` and benchmarks/gpu.

`calls` has the operators' calls, `accuracy` says when a result is right, `serving` which backend gave it, `devices` has
the timers, `rounds` their turns, `ceilings` what the machine can do at most; `comparison` judges two runs.
"""
