"""Samples in bulk on a Ray cluster: the files that `cmfast sample --out FOLDER` makes, to the byte.

    pip install 'cmfast[ray]'
    python examples/bulk/ray_bulk.py --model digits --count 50000 --out /shared/digits

The folder must be one that all machines of the cluster share. A run that was killed continues.
"""

import argparse

import ray

import cmfast
from cmfast.bulk import Run, Shards


class Worker:
    """An actor with the model, which makes the shards that Ray gives it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Load the model, on the actor's GPU where it has one."""
        model = cmfast.load(arguments.model, device="cuda" if arguments.gpus else "cpu")
        self.run = Run(
            cmfast.accelerate(model),
            arguments.out,
            arguments.count,
            format=arguments.format,
            shard_size=arguments.shard_size,
            seed=arguments.seed,
        )

    def __call__(self, batch: dict) -> dict:
        """From the indices of first samples to the paths of their shards."""
        shards = batch["first_sample"] // self.run.shards.size
        return {"path": [str(self.run.make(int(index))) for index in shards]}


def main() -> None:
    """Read the command line, and have the shards made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--count", type=int, required=True, help="how many samples")
    parser.add_argument("--out", required=True, help="the folder")
    parser.add_argument("--format", default="npz", choices=["npz", "png", "tar"])
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of an actor")
    arguments = parser.parse_args()

    shards = Shards(0, arguments.count, arguments.shard_size)
    firsts = ray.data.from_items([{"first_sample": shard.first_sample} for shard in shards])
    made = firsts.map_batches(
        Worker,
        fn_constructor_args=[arguments],
        batch_size=1,
        concurrency=arguments.actors,
        num_gpus=arguments.gpus,
        num_cpus=1,
    )
    paths = [row["path"] for row in made.take_all()]
    print(f"{arguments.out}: {len(paths)} of {len(shards)} shards are there")


if __name__ == "__main__":
    main()
