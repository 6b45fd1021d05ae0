"""The training command, and the only training loop.

python -m jaxtune.train --config=configs/lora_llama.py [--config.section.field=value ...]
"""

import dataclasses
import hashlib
import sys
import types
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jaxtune
from jaxtune import build, config, data, distributed, fit, hardware, optim, process, tree
from jaxtune.checkpoint.adapted import require_mergeable
from jaxtune.checkpoint.labels import labelling_of, with_labels
from jaxtune.checkpoint.lock import NAME as LOCK
from jaxtune.checkpoint.lock import RunLock
from jaxtune.checkpoint.manifest import write_synced
from jaxtune.checkpoint.source import open_checkpoint
from jaxtune.checkpoint.store import Store
from jaxtune.errors import ConfigError, run_command
from jaxtune.exports import write_results
from jaxtune.faults import fault
from jaxtune.held_out import HeldOut
from jaxtune.log import Log, every_few_seconds, info, warn
from jaxtune.meter import Meter
from jaxtune.peers import Peers
from jaxtune.peft import prompt
from jaxtune.schema import Distributed, RunConfig
from jaxtune.sharding.mesh import make_mesh
from jaxtune.sharding.rules import batch_shards
from jaxtune.signals import StopSignal
from jaxtune.step import TrainState
from jaxtune.tree import Params
from jaxtune.watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        steps: optimizer steps taken in all.
        metrics: the last row of training metrics, and of held-out ones as "eval_<name>".
        paths: files and folders written, by what they are: metrics, checkpoints, and where asked
            for plot, samples, adapter, merged.
    """

    steps: int
    metrics: dict[str, float]
    paths: dict[str, Path]


def train(cfg: Any) -> Result:
    """Fine-tunes as the config says, going on from the newest good checkpoint if there is one.

    Args:
        cfg: `config.default()` with changes, or a resolved `RunConfig`.

    Raises:
        JaxtuneError: its subclass for whatever a user can cause, before weights load if possible.
    """
    cfg = config.resolve(dataclasses.asdict(cfg) if isinstance(cfg, RunConfig) else cfg)
    distributed.start(cfg.distributed)
    with Peers(cfg.distributed.silence_seconds) as peers, StopSignal() as stop:
        hardware.prepare(cfg.train.compilation_cache)
        folder = Path(cfg.train.output_dir)
        with RunLock(folder) if process.is_first() else nullcontext():
            distributed.wait_for_all("locked")
            watchdog = Watchdog(cfg.distributed.step_timeout_seconds, peers.tell)
            result = _train(cfg, folder, stop, watchdog)
            distributed.wait_for_all("done")
    for what, path in result.paths.items():
        info(f"{what}: {path}")
    return result


def _train(cfg: RunConfig, folder: Path, stop: StopSignal, watchdog: Watchdog) -> Result:
    """The run, in a folder that is ours."""
    with ExitStack() as cleanup:
        run, tokenizer, batches, held_out_set = _describe(cfg)
        cfg = run.config
        _check_processes(cfg, folder, batches.dataset, held_out_set)
        num_steps = cfg.train.num_steps or batches.num_steps(cfg.train.num_epochs)
        _report(run, batches.dataset, held_out_set, num_steps)
        store = _store(cfg, folder)
        cleanup.callback(store.close)
        schedule = optim.make_schedule(cfg.optim, num_steps)
        tx = build.make_optimizer(run, schedule, num_steps)
        run, train_step = fit.fitted_step(run, tx, schedule)
        state, frozen, start, position = _fill(run, tx, store, tokenizer)
        # Not before: a refused run must not replace the config of the run that is there.
        if process.is_first():
            if start > 0:
                warn_of_changes(cfg, folder / "config.json")
            shared = dataclasses.replace(cfg, distributed=Distributed())
            write_synced(folder / "config.json", config.to_json(shared).encode())
        log = Log(cfg.log, folder, start, num_steps)
        cleanup.callback(log.close)
        held_out = HeldOut(run, tokenizer, held_out_set, frozen, log)
        if start == 0:
            held_out.answer(0, state.learnt)
        vote = distributed.Vote(run.mesh)
        if vote.decide(stop.received is not None):
            raise stop.error(f"stopped before step {start + 1} - start the same command again")
        meter = Meter(run, log, batches.dataset.mean_length)
        cleanup.callback(watchdog.stop)
        stream = batches.batches(position, lambda batch: run.put(batch, batches.rows))
        cleanup.callback(stream.close)
        for step in range(start + 1, num_steps + 1):
            batch, position = meter.take(stream)
            if fault("step_pre", step):
                batch = dataclasses.replace(batch, weights=batch.weights * float("nan"))
            watchdog.start(step, fit.shapes(batch))
            state, metrics = train_step(state, frozen, batch)
            meter.add(step, metrics, batch)
            fault("step_post", step)
            stopping, last = vote.ask(stop.received is not None), step == num_steps
            watchdog.stop()
            if last or not stopping and _every(step, cfg.eval.every_steps):
                meter.flush()
                held_out.measure(step, state.learnt)
                meter.restart_clock()
            if last or stopping or _every(step, cfg.checkpoint.every_steps):
                meter.flush()
                metric = held_out.loss_at(step)
                store.save(step, state, batches.whole(position), metric, final=last or stopping)
                meter.restart_clock()
            if stopping and not last:
                how = "" if cfg.checkpoint.resume == "auto" else " with checkpoint.resume=auto"
                raise stop.error(
                    f"stopped after step {step}, state saved - start the same command{how}"
                )
        if start >= num_steps:
            log.say(f"already at step {start} of {num_steps}: nothing left to train")
            held_out.measure(start, state.learnt)
        paths = {"metrics": log.path, "checkpoints": store.folder, **log.plot()}
        paths |= held_out.answer(num_steps, state.learnt)
        paths |= write_results(run, frozen | state.learnt | state.taken, tokenizer, folder)
        metrics = {**meter.last, **held_out.last, "failed_saves": float(store.failed_saves)}
    return Result(num_steps, metrics, paths)


def _describe(
    cfg: RunConfig,
) -> tuple[build.Run, Any, data.Loader | data.Lanes, data.Dataset | None]:
    """Opens everything the run reads, and describes it; no weights are read."""
    mesh = make_mesh(cfg.mesh.axes())
    checkpoint = open_checkpoint(cfg.model.path, cfg.model.revision)
    cfg = with_labels(cfg, checkpoint)
    run = build.describe(cfg, mesh, checkpoint)
    if cfg.checkpoint.export_merged and run.adapters is not None:
        require_mergeable(run.adapters, run.variables)
    source = cfg.model.tokenizer or checkpoint.tokenizer_source
    tokenizer = data.load_tokenizer(
        source, template=cfg.data.template, enable_thinking=cfg.data.enable_thinking
    )
    vocab_size = run.model_config.vocab_size
    train_set, held_out_set = data.load(
        cfg.data,
        tokenizer,
        seed=cfg.train.seed,
        vocab_size=vocab_size,
        num_virtual_tokens=run.skeleton.model(run.skeleton.abstract()).num_virtual_tokens,
        labelling=labelling_of(run.checkpoint),
        paired=cfg.objective.is_paired,
    )
    if cfg.peft.method == "reft" and isinstance(train_set, data.Dataset):
        _require_prompts(train_set.stats)
    rows = cfg.train.micro_batch_size * batch_shards(mesh)
    batches = data.make_loader(
        train_set,
        cfg.data,
        rows=rows,
        accumulation=cfg.train.gradient_accumulation_steps,
        seed=cfg.train.seed,
        held=run.held_rows(rows),
    )
    return run, tokenizer, batches, held_out_set


def _check_processes(
    cfg: RunConfig,
    folder: Path,
    train_set: data.Dataset | data.Stream,
    held_out_set: data.Dataset | None,
) -> None:
    """Raises ConfigError if the processes would not run the same, or do not share the folder."""
    place = dataclasses.replace(cfg.distributed, process_id=None, local_device_ids=())
    sections = dataclasses.asdict(dataclasses.replace(cfg, distributed=place))
    lock = folder / LOCK
    facts = {
        f"config.{section}.{name}": repr(value)
        for section, fields in sections.items()
        for name, value in fields.items()
    }
    facts |= {
        "jaxtune": jaxtune.__version__,
        "jax": jax.__version__,
        "training data": train_set.fingerprint,
        "held-out data": held_out_set.fingerprint if held_out_set else "none",
        f"{lock} (on a file system that all share)": lock.read_text() if lock.exists() else "none",
    }
    distributed.check_same(facts)


def _fill(
    run: build.Run, tx: Any, store: Store, tokenizer: Any
) -> tuple[TrainState, Params, int, dict | None]:
    """State, frozen parameters, step and data position: of a checkpoint, or of the beginning."""
    resume, restored = run.config.checkpoint.resume, None
    if resume != "never":
        wanted = None if resume == "auto" else int(resume)
        restored = store.restore(wanted, build.abstract_state(run, tx))
    values: Params = {}
    if restored is None or run.frozen:
        taken = restored[1].taken if restored else None
        values = build.fill_base(run, every_few_seconds("loading weights"), taken)
        values |= build.fill_adapter(run, values)
    frozen = {name: values[name] for name in run.frozen}
    if restored is None:
        values |= _start_prompt(run, values, tokenizer)
        return build.initial_state(run, tx, values), frozen, 0, None
    step, state, position = restored
    info(f"resuming after step {step}")
    return state, frozen, step, position


def _start_prompt(run: build.Run, values: Params, tokenizer: Any) -> Params:
    """The virtual tokens, by name, if they start as embeddings (`peft.prompt.start_ids`)."""
    config = run.adapters.config if run.adapters else None
    if run.imported or not isinstance(config, prompt.Config) or config.prompt_init == "random":
        return {}

    def encode(text: str) -> list[int]:
        return tokenizer(text).input_ids

    ids = prompt.start_ids(config, run.model_config.vocab_size, encode, run.config.train.seed)
    ((name, leaf),) = run.trainable.items()
    scale = run.model_config.embed_scale  # virtual tokens come after it

    def rows(table: jax.Array) -> jax.Array:
        return table[ids].astype(leaf.dtype) * scale

    return {name: jax.jit(rows, out_shardings=leaf.sharding)(values["embed.table"])}


def _store(cfg: RunConfig, folder: Path) -> Store:
    return Store(
        folder / "checkpoints",
        keep_last=cfg.checkpoint.keep_last,
        keep_best=cfg.checkpoint.keep_best,
        verify=cfg.checkpoint.verify,
        fingerprint=_fingerprint(cfg),
    )


def _report(
    run: build.Run,
    train_set: data.Dataset | data.Stream,
    held_out_set: data.Dataset | None,
    num_steps: int,
) -> None:
    """Says what is about to happen."""
    if not process.is_first():
        return
    cfg, policy = run.config, run.policy
    trained, total = tree.count(run.trainable), tree.count(run.variables)
    info(config.to_json(cfg).rstrip())
    info(f"model: {run.checkpoint.name}, {total:,} parameters, {trained:,} trained")
    info(
        f"computed in {policy.compute_dtype}, attention {policy.attention}, "
        f"layers {policy.layers}, remat {policy.remat}, "
        f"mesh {dict(run.mesh.shape)} of {run.mesh.devices.flat[0].platform}"
    )
    for warning in run.imported.warnings if run.imported else ():
        warn(warning)
    info(f"training data: {train_set.stats}")
    if held_out_set is not None:
        info(f"held-out data: {held_out_set.stats}")
    rows = cfg.train.micro_batch_size * batch_shards(run.mesh)
    info(
        f"{num_steps} steps of {cfg.train.gradient_accumulation_steps} x {rows} rows "
        f"of {cfg.data.max_seq_len} tokens; output in {cfg.train.output_dir}"
    )


def _require_prompts(stats: data.Stats) -> None:
    """Raises ConfigError if all tokens but the first of every row are trained."""
    if stats.trained_tokens >= stats.tokens - stats.rows:
        raise ConfigError(
            "config.peft.method=reft edits prompts, and the training rows have none: everything in "
            "them is trained - use rows with prompts and answers, or another method"
        )


def _fingerprint(cfg: RunConfig) -> str:
    """Of the options that change what a step computes; a resume with others is warned of."""
    model = dataclasses.replace(cfg.model, offload_frozen=False)
    parts = (model, cfg.peft, cfg.objective, dataclasses.replace(cfg.optim, offload=False))
    if cfg.train.attention_group:
        parts += (cfg.train.attention_group,)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def warn_of_changes(cfg: RunConfig, before: Path) -> None:
    """Warns if the number of steps, or what a step learns from, is not as in the resumed run.

    Args:
        cfg: of this run.
        before: config.json of the run that is resumed.
    """
    try:
        old = config.from_json(before.read_text("utf-8"))
    except (OSError, ConfigError):  # moved here without its config, or of another version
        return
    sizes = ("num_steps", "num_epochs", "micro_batch_size", "gradient_accumulation_steps")
    routing = ("router_aux_loss", "router_bias_update_rate")
    fields = [("train", name) for name in (*sizes, "neftune_alpha", *routing)]
    fields += [("data", "max_seq_len"), *(("mesh", name) for name in cfg.mesh.axes())]
    changes = []
    for section, name in fields:
        was, now = (getattr(getattr(c, section), name) for c in (old, cfg))
        if was != now:
            changes.append(f"{section}.{name} was {was} and is {now}")
    if changes:
        warn(
            f"the run goes on with other steps than it began with: {', '.join(changes)} - the "
            "schedule, the rows of a step or their order are not those of an uninterrupted run"
        )


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def main() -> None:
    """Reads the command line and trains."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        info(config.usage("jaxtune.train"))
        return
    train(config.parse_arguments(arguments))


class _CallableModule(types.ModuleType):
    """`jaxtune.train` names this file and the API's function: calling the module trains."""

    def __call__(self, cfg: Any) -> Result:
        return train(cfg)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run_command(main)
