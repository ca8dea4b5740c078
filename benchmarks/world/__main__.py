"""Run methods in the world and write the table.

python -m benchmarks.world dpo                 # the rows of a group, or one row, with seeds 101 to 103
python -m benchmarks.world --all               # every row; what is there already is kept
python -m benchmarks.world sft-clean --quick   # a minute, prints, writes nothing
python -m benchmarks.world dpo --tune 1 2 3    # seeds and split for tuning, prints, writes nothing
python -m benchmarks.world --table             # the table from what is there
"""

import argparse
import json
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world", description="measure alignment methods")
    parser.add_argument("method", nargs="*", help="rows or groups of rows")
    parser.add_argument("--all", action="store_true", help="every row")
    parser.add_argument("--seeds", type=int, default=3, help="how many of the table's seeds (default 3)")
    parser.add_argument("--quick", action="store_true", help="few steps and questions, one seed; writes nothing")
    parser.add_argument("--tune", type=int, nargs="+", metavar="SEED", help="these seeds, on the development split")
    parser.add_argument("--table", action="store_true", help="write the table from the results that are there")
    given = parser.parse_args()
    if not (given.method or given.all or given.table):
        parser.error("name a row or a group, or --all, or --table")

    import torch

    from benchmarks.world import bench, tables
    from benchmarks.world.methods import METHODS, named

    torch.set_num_threads(1)
    methods = list(METHODS.values()) if given.all else named(given.method)
    if given.quick or given.tune:
        setup = bench.Setup("dev", 40, 20, bench.RUNS / "quick") if given.quick else bench.Setup("dev")
        for method in methods:
            for seed in given.tune or (1,):
                done = bench.run(method, seed, setup)
                print(method.name, json.dumps(bench.rounded(done)), tables.in_short(done), flush=True)
        return
    for method in methods:
        bench.complete(method, bench.TABLE_SEEDS[: min(given.seeds, method.seeds)], bench.Setup())
    tables.write()


if __name__ == "__main__":
    main()
