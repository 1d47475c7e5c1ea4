"""Where the time of bulk sampling goes: processor time of a sample of the digits, evaluated and written, by one thread.

    python benchmarks/bulk_sampling.py

The clock is the thread's own, so that waiting for the disk is not in it. How many samples a minute come of it, with
everything beside one another, the command itself says: docs/bulk.md.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import cmfast
from cmfast.bulk import FORMATS, Run
from cmfast.environment import processor

SHARDS, SIZE = 5, 1024


def main():
    torch.set_num_threads(1)
    model = cmfast.accelerate(cmfast.load("digits"))
    print(f"{processor()}, one thread, microseconds of a sample, the best of {SHARDS} shards of {SIZE}")
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as compressors:
            run = Run(model, folder, SHARDS * SIZE, format=name, shard_size=SIZE)
            evaluated, written = [], []
            for shard in run.shards:
                begin = time.thread_time()
                block = run._evaluate(shard)
                middle = time.thread_time()
                run._write(block, compressors)
                evaluated.append(middle - begin)
                written.append(time.thread_time() - middle)
        print(
            f"{name}: evaluation {1e6 * min(evaluated) / SIZE:.0f}, writing {1e6 * min(written) / SIZE:.0f}", flush=True
        )


if __name__ == "__main__":
    main()
