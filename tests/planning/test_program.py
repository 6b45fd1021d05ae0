"""What travels between devices in a compiled step, and when."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

from jaxtune import build, fit
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.hlo.collectives import collectives
from jaxtune.hlo.flops import flops
from jaxtune.hlo.text import Computation, Program, parse
from jaxtune.planning.topology import DEVICELESS
from jaxtune.schema import Data, Mesh, Model, Peft, RunConfig, Train
from jaxtune.sharding.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]
RATE = optax.constant_schedule(0.1)
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
LAYER_BYTES = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)


@functools.cache
def compiled(layers: int, method: str = "lora", remat: str = "full") -> tuple[build.Run, Any]:
    """The step of a small Llama on eight devices: large weights, few tokens."""
    config = RunConfig(
        model=Model(path="tiny:llama", remat=remat),
        peft=Peft(method=method) if method == "full" else Peft(method=method, rank=2),
        data=Data(train=("rows.jsonl",), max_seq_len=8),
        train=Train(micro_batch_size=1),
        mesh=Mesh(fsdp=8),
    )
    checkpoint = open_checkpoint("tiny:llama")
    checkpoint.config.update(SHAPE | {"num_hidden_layers": layers})
    run = build.describe(config, make_mesh(config.mesh.axes(), jax.devices()), checkpoint)
    return fit.compiled_step(run, optax.sgd(RATE), RATE)


def largest(program: Program, *kinds: str) -> int:
    """Elements of the largest array that a collective of these kinds makes."""
    sizes = [
        leaf.bytes / 4
        for scope in program.computations.values()
        for op in scope.values()
        if any(one.kind in kinds for one in collectives(program, op, 8))
        for leaf in op.results
    ]
    return int(max(sizes, default=0))


def test_no_gradient_of_a_frozen_weight_is_reduced():
    """The smallest frozen matrix is larger than anything that is summed over devices."""
    found = {}
    for method in ("lora", "full"):
        run, program = compiled(2, method)
        found[method] = largest(parse(program.as_text()), "all-reduce", "reduce-scatter")
        if method == "lora":
            frozen = (n for n in run.frozen if n.startswith("layers.") and n.endswith(".kernel"))
            smallest = min(run.frozen[name].size // 2 for name in frozen)
    assert 0 < found["lora"] < smallest / 8 < found["full"]


def test_weights_are_gathered_a_layer_at_a_time():
    """No gather brings a stack, and six more layers add less than one layer's weights."""
    few, many = compiled(2)[1], compiled(8)[1]
    gathered = largest(parse(many.as_text()), "all-gather")
    assert gathered == 256 * 512, "the largest matrix of one layer"
    more = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert more < LAYER_BYTES
    assert few.memory_analysis().temp_size_in_bytes > 256 * 512 * 4


COMPILE = """
import sys, optax
from jaxtune import build, config, fit
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.planning.topology import topology_devices
from jaxtune.sharding.mesh import make_mesh
cfg = config.default()
cfg.data.train, cfg.data.max_seq_len, cfg.model.remat = ("none",), 1024, "full"
cfg.train.micro_batch_size = 1
cfg = config.resolve(cfg)
checkpoint = open_checkpoint("tiny:llama")
checkpoint.config.update(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, head_dim=128,
    num_attention_heads=8, num_key_value_heads=8)
mesh = make_mesh(cfg.mesh.axes(), topology_devices("v5e:2x2"))
rate = optax.constant_schedule(0.1)
_, program = fit.compiled_step(build.describe(cfg, mesh, checkpoint), optax.sgd(rate), rate)
open(sys.argv[1], "w").write(program.as_text())
"""


@pytest.mark.slow
def test_gathers_run_beside_products_on_tpus(tmp_path: Path):
    """Most weights of a layer are on their way while its products run, forward and backward."""
    pytest.importorskip("libtpu", reason="compiles for TPUs with libtpu")
    text = tmp_path / "step.hlo"
    command = [sys.executable, "-c", COMPILE, str(text)]
    settings = DEVICELESS | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    program = parse(text.read_text())
    loops = [op for scope in program.computations.values() for op in scope.values()]
    bodies = [op.called("body") for op in loops if op.kind == "while"]
    hidden = [hidden_bytes(program, program.computations[name]) for name in bodies]
    layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert sum(size > layer / 2 for size in hidden) == 2, hidden


def hidden_bytes(program: Program, body: Computation) -> float:
    """Bytes gathered in a loop between a start and an end that have a product between them."""
    open_since: dict[str, tuple[float, float]] = {}
    products = hidden = 0.0
    for op in body.values():
        texts = [inner.rest for inner in program.inside(op).values()]
        moved = collectives(program, op, 4)
        if moved and any('"AsyncCollectiveDone"' in text for text in texts):
            before, size = open_since.pop(moved[0].key)
            hidden += size if products > before else 0.0
        products += flops(program, body, op)
        if moved and any('"AsyncCollectiveStart"' in text for text in texts):
            size = sum(one.received * 4 / 3 for one in moved if one.kind == "all-gather")
            open_since[moved[0].key] = (products, size)
    return hidden
