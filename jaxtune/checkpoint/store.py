"""Checkpoints of a run: saved in the background, verified when read, pruned.

`checkpoints/<step>/` holds `state/` (arrays, by orbax), `meta.json` (data position, metric, and
path, shape and dtype of every array) and `manifest.json` (checksums of all of it). A step is
written as `<step>.tmp/` and gets its name by one rename after everything is on disk: a finished
name is a finished step, whatever killed the writer.

Why not orbax's CheckpointManager: it lists steps by directory name from a cache that still holds
failed saves, reports errors of background saves only to whoever waits, leaves failed saves on disk,
and checks no contents. `AsyncCheckpointer` gives the part worth having (asynchronous, sharded,
collective array writes); the rest is directory handling, in `steps.py`.

A run that starts from step n (or from nothing) begins a new line: checkpoints after n belong to an
abandoned one, and go once the new line has its first checkpoint.

In a multi-process run every process calls `save` and `restore` together; orbax writes the arrays
collectively, process 0 does the rest. The folder is on a file system that all share. Whoever saves
must hold the folder's `RunLock`.
"""

import logging
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxtune import process
from jaxtune.checkpoint import manifest, meta, steps
from jaxtune.errors import StorageError, WeightError, listing
from jaxtune.faults import fault
from jaxtune.log import warn

STATE = "state"


class _Damaged(Exception):
    """One step cannot be read; an older one may do."""


class Store:
    """The checkpoints in one folder.

    Attributes:
        failed_saves: saves of this process that did not reach the disk.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        verify: str = "full",
        fingerprint: str = "",
    ):
        """Describes the store; reads and writes nothing.

        Args:
            folder: where the steps are; created by the first save.
            keep_last: newest steps kept.
            keep_best: steps with the lowest metric kept besides.
            verify: check on restore: "full" (checksums), "size" or "off".
            fingerprint: of the run's configuration; a difference on restore is a warning.
        """
        self.folder = Path(folder).resolve()
        self.failed_saves = 0
        self._keep_last, self._keep_best = keep_last, keep_best
        self._verify, self._fingerprint = verify, fingerprint
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        logging.getLogger("absl").addFilter(_is_not_orbax_error)
        self._thread: threading.Thread | None = None
        self._error: str | None = None  # why the newest save failed
        self._start = -1  # the step this run goes on from
        self._saved: set[int] = set()  # steps this process has committed or restored
        self._stale: set[int] | None = None  # finished steps of abandoned lines
        self._size_bytes = 0  # of the newest step on disk

    def steps(self) -> list[int]:
        """The finished steps on disk, ascending; their contents are not checked."""
        return steps.finished(self.folder)

    def save(
        self,
        step: int,
        state: Any,
        position: dict,
        metric: float | None = None,
        *,
        final: bool = False,
    ) -> None:
        """Starts saving a step; returns when `state` may be donated or changed.

        Waits for the previous save first. A failure (full disk) is a warning and counts in
        `failed_saves`; with `final` the call waits for the disk and a failure is an error.
        A step that this run has already saved or restored is not saved again.

        Args:
            step: the number of finished training steps.
            state: any pytree of jax arrays (no typed PRNG keys).
            position: the data position, as JSON.
            metric: what `keep_best` goes by, lower is better.
            final: nothing comes after this save.

        Raises:
            StorageError: `final`, and the step is not on disk.
        """
        self.wait()
        if _broadcast(step not in self._saved):
            self._error = None
            arrays = meta.flatten(state)
            forms = meta.forms(arrays)
            described = meta.Meta(step, position, metric, self._fingerprint, forms).encode()
            try:
                fault("save_begin", step)
                self._make_room(step, arrays, final)
                path = steps.partial(self.folder, step) / STATE
                self._checkpointer.save(path, args=ocp.args.StandardSave(arrays))
            except Exception as error:  # orbax raises whatever the layers below it raise
                self._fail(step, error)
            else:
                self._thread = threading.Thread(target=self._finish, args=(step, described))
                self._thread.start()
        if final:
            self.wait()
            if _broadcast(self._error is not None):
                raise StorageError(
                    f"the checkpoint of step {step} could not be saved: {self._error} - make room "
                    f"in {self.folder} and start again; finished checkpoints: {self.steps()}"
                )

    def restore(self, step: int | None, abstract_state: Any) -> tuple[int, Any, dict] | None:
        """Reads a step, or with None the newest one that is whole; each damaged one is a warning.

        Args:
            step: which one; None for the newest.
            abstract_state: ShapeDtypeStructs with shardings, in the structure that was saved.

        Returns:
            (step, state, data position); None if `step` is None and there is no checkpoint.

        Raises:
            WeightError: the step is absent or damaged, all are damaged, or its arrays are not the
                ones of `abstract_state`: nothing is cast or padded.
        """
        self.wait()
        _broadcast(True)  # process 0 has ended its save, too: all see the same folder
        numbered = steps.numbered(self.folder)
        if step is not None and step not in numbered:
            there = self.steps() or "none"
            raise WeightError(f"no checkpoint of step {step} in {self.folder} - there are {there}")
        if step is None and process.is_first():
            if odd := steps.oddities(self.folder):
                warn(f"ignored in {self.folder}, not checkpoints: {', '.join(odd[:10])}")
        causes = []
        for candidate in [step] if step is not None else numbered[::-1]:
            try:
                state, position = self._read(candidate, abstract_state)
            except _Damaged as error:
                causes.append(f"step {candidate}: {error}")
                if step is None and process.is_first():
                    warn(f"checkpoint {candidate} is damaged ({error}); trying an older one")
                continue
            self._start = candidate
            self._saved = {candidate}
            self._stale = None
            return candidate, state, position
        if causes:
            raise WeightError(
                f"no usable checkpoint in {self.folder}:{listing(causes)}\n- "
                "choose another step with checkpoint.resume, or start anew with "
                "checkpoint.resume=never"
            )
        return None

    def wait(self) -> None:
        """Waits until the save under way, if any, has succeeded or failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits and lets go of orbax's threads; safe in `finally`, and twice."""
        self.wait()
        self._checkpointer.close()

    # Saving.

    def _make_room(self, step: int, arrays: dict[str, jax.Array], final: bool) -> None:
        """Prepares an empty `<step>.tmp`; with too little space only a final save is tried."""
        problem = ""
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if self._stale is None:
                    self._stale = {old for old in self.steps() if old > self._start}
                    steps.clean(self.folder)
                needed = self._size_bytes * 1.2 or sum(array.nbytes for array in arrays.values())
                free = shutil.disk_usage(self.folder).free
                if free < needed and not final:
                    problem = f"{free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed"
                else:
                    steps.remove_partial(self.folder, step)
                    steps.partial(self.folder, step).mkdir()
            except OSError as error:
                problem = str(error)
        if _broadcast(bool(problem)):
            raise OSError(problem or "process 0 cannot write")

    def _finish(self, step: int, described: bytes) -> None:
        """In the background: waits for the arrays, completes the folder, renames it, prunes."""
        try:
            fault("save_bg", step)
            self._checkpointer.wait_until_finished()
            fault("save_commit", step)
            if jax.process_index() == 0:
                self._commit(step, described)
            self._saved.add(step)
        except Exception as error:  # as in save
            self._fail(step, error)
            return
        if jax.process_index() == 0:
            try:
                self._prune(step)
            except OSError as error:
                warn(f"old checkpoints could not be removed: {error}")

    def _commit(self, step: int, described: bytes) -> None:
        partial = steps.partial(self.folder, step)
        manifest.write_synced(partial / meta.NAME, described)
        fault("manifest", step)
        self._size_bytes = manifest.write(partial)
        steps.finish(self.folder, step)

    def _fail(self, step: int, error: Exception) -> None:
        """Counts and tells a failed save, and removes what it wrote."""
        self._error = _cause(error)
        self.failed_saves += 1
        warn(f"the checkpoint of step {step} could not be saved: {self._error}")
        try:
            self._checkpointer.wait_until_finished()  # nothing may write while it is removed
        except Exception:  # the one just told, or its consequence
            pass
        if jax.process_index() == 0:
            steps.remove_partial(self.folder, step)

    def _prune(self, newest: int) -> None:
        stale = (self._stale or set()) - self._saved
        line = [step for step in self.steps() if step not in stale]
        metrics = {step: self._metric(step) for step in line} if self._keep_best else {}
        ranked = sorted((metric, -step) for step, metric in metrics.items() if metric is not None)
        best = [-step for _, step in ranked[: self._keep_best]]
        steps.keep_only(self.folder, {newest, *line[-self._keep_last :], *best})
        fault("prune", newest)
        steps.empty_trash(self.folder)

    def _metric(self, step: int) -> float | None:
        try:
            return meta.read(self.folder / str(step)).metric
        except (OSError, ValueError, KeyError, TypeError, WeightError):
            return None  # damaged, or of another version

    # Reading.

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        path = self.folder / str(step)
        damage = None
        if jax.process_index() == 0:
            damage = self._find_damage(path)
        if _broadcast(damage is not None):
            raise _Damaged(damage or "process 0 found damage")
        try:
            saved = meta.read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damaged(f"{meta.NAME}: {error}") from error
        abstract = meta.flatten(abstract_state)
        meta.check_same(path, saved.arrays, meta.forms(abstract))
        if self._fingerprint and saved.fingerprint not in ("", self._fingerprint):
            warn(f"checkpoint {step} was saved with another configuration")
        try:
            target = {name: _placed(leaf) for name, leaf in abstract.items()}
            arrays = self._checkpointer.restore(path / STATE, args=ocp.args.StandardRestore(target))
        except Exception as error:  # six types for damaged files alone
            if self._verify == "full" and path.exists():
                raise  # every byte is as it was written: not damage, and not pruned meanwhile
            raise _Damaged(f"{STATE}: {type(error).__name__}: {_cause(error)}") from error
        leaves = [arrays[name] for name in abstract]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), saved.position

    def _find_damage(self, path: Path) -> str | None:
        if not (path / manifest.NAME).is_file():
            return f"{manifest.NAME}: missing, the save never finished"
        return manifest.find_damage(path, self._verify)


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Without a sharding orbax would look for the devices that saved the array."""
    if leaf.sharding is not None:
        return leaf
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def _cause(error: Exception) -> str:
    """One line; of tensorstore's, which names every file and layer, what the system said."""
    system = re.search(r"([^:]+) \[os_error_code=", str(error))
    text = system.group(1) if system else " ".join(str(error).split())[:300]
    return text.strip() or type(error).__name__


def _broadcast(flag: bool) -> bool:
    """What process 0 says."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
    """Drops orbax's own report, with tracebacks, of errors that it also raises."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)
