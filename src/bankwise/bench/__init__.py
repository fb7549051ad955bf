"""`bankwise bench`: sparse against the strongest dense paths, interleaved in one run, correctness first."""

from bankwise.bench.crossover import bench_crossover, crossover_of
from bankwise.bench.decode import bench_decode
from bankwise.bench.ffn import bench_ffn
from bankwise.bench.ffn_cuda import bench_ffn_cuda
from bankwise.bench.prefill import bench_prefill
from bankwise.bench.results import BenchResult, print_table, write_csv
from bankwise.bench.shapes import SHAPES
from bankwise.bench.train_step import bench_train_step

__all__ = [
    "SHAPES",
    "BenchResult",
    "bench_crossover",
    "bench_decode",
    "bench_ffn",
    "bench_ffn_cuda",
    "bench_prefill",
    "bench_train_step",
    "crossover_of",
    "print_table",
    "write_csv",
]
