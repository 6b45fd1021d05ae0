"""jaxtune as a peer of the side-by-side CPU benchmark: same model, tokens, rank and output line.

    BENCH_CPU=<folder of common.py> python tools/bench/peer_jaxtune.py --model DIR

It describes, fills and steps exactly as `jaxtune.train` does (build.describe, build.fill_*,
step.make_train_step); only the tokens come from the benchmark's own file. `--lean` is the point of
least memory: scanned layers, full rematerialisation. docs/benchmarks.md has the results and says
what common.py must provide.
"""

import os
import sys
import time
from pathlib import Path

BENCH = os.environ.get("BENCH_CPU", "")
if not BENCH or not (Path(BENCH) / "common.py").is_file():
    sys.exit(f"BENCH_CPU={BENCH!r} is no folder with a common.py (see docs/benchmarks.md)")
sys.path.insert(0, BENCH)
# Found through BENCH_CPU.
from common import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    Meter,
    batches,
    parser,
    peak_jax,
)

arguments = parser(pad_to="max")
arguments.add_argument("--lean", action="store_true")
arguments.add_argument("--layers", default="auto", choices=["auto", "scan", "unroll"])
arguments.add_argument("--cache", default="", help="folder of the persistent compilation cache")
arguments.add_argument("--peak", type=int, default=1, help="0: do not measure the matmul peak")
args = arguments.parse_args()

from jaxtune.hardware import prepare  # noqa: E402

prepare(args.cache)  # as every command does, before anything allocates

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxtune import build, config, optim  # noqa: E402
from jaxtune.checkpoint.source import open_checkpoint  # noqa: E402
from jaxtune.data import TokenBatch  # noqa: E402
from jaxtune.sharding.mesh import make_mesh  # noqa: E402
from jaxtune.step import make_train_step  # noqa: E402

tree = config.default()
tree.data.train = ("the benchmark's own tokens",)
tree.model.path = args.model
tree.model.compute_dtype = args.dtype
tree.model.layers = "scan" if args.lean else args.layers
tree.model.remat = "full" if args.lean else "auto"
tree.peft.method = args.mode
tree.peft.rank, tree.peft.alpha = args.rank, args.alpha
tree.optim.learning_rate, tree.optim.schedule = args.lr, "constant"
tree.optim.max_grad_norm = 0.0
cfg = config.resolve(tree)
peak = peak_jax(args.dtype) if args.peak else None
mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
run = build.describe(cfg, mesh, open_checkpoint(args.model))
schedule = optim.make_schedule(cfg.optim, args.steps)
tx = build.make_optimizer(run, schedule)
values = build.fill_base(run, lambda done, total: None)
values |= build.fill_adapter(run, values)
state = build.initial_state(run, tx, values)
frozen = {name: values[name] for name in run.frozen}
del values
shardings = build.shardings(build.abstract_state(run, tx))
train_step = make_train_step(run.skeleton, run.objective, tx, schedule, 0, shardings)

meter = Meter("jaxtune" + "-lean" * args.lean, args)
trained = sum(leaf.size for leaf in state.trainable.values())
for row in batches(args):
    start = time.perf_counter()
    weights = (row["labels"] != -100).astype(np.float32)
    batch = TokenBatch(*(a[None] for a in (row["ids"], row["pos"], row["seg"], weights)))
    state, metrics = train_step(state, frozen, run.put(batch))
    loss = float(metrics["loss"])
    meter.add(time.perf_counter() - start, loss, row["tokens"])
peaks = dict(matmul_peak_gflops=max(peak, peak_jax(args.dtype))) if peak else {}
meter.report(
    trained, jax=jax.__version__, layers=run.policy.layers, remat=run.policy.remat, **peaks
)
