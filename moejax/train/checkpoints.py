"""Checkpoints that are checked: written by Orbax in the background, read back only if every byte is what was written.

    checkpoints/300/variables/  state/  data/  meta/  checksums.json

`variables` is what a model needs (parameters and collections), `state` what only training does (optimizer, key), `data` where its
data were, and the metrics that were logged on the way. Models that a task runs and nobody trains are in no checkpoint: they come
from where the config says.

`checksums.json` holds the SHA-256 of every file of the four items. It is written before Orbax's atomic rename, so a step
folder that carries its final name is complete, and a process killed at any moment leaves either a whole checkpoint or none.
A checkpoint that fails the check, or lies under another name than that of its step, is moved aside to `<step>.corrupt` with a
warning, and the one before it is used.

An array is one array in a checkpoint, however it was split: each process writes the parts that it holds, and reading splits
them anew, over any mesh. The processes of a run share the folder and do everything here together; the first of them writes
the checksums, when all parts are there, and looks for damage while the others wait.
"""

import base64
import contextlib
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moejax.core.errors import ConfigError
from moejax.core.files import Damaged, changed, digest, set_aside, write_json
from moejax.parallel import hosts
from moejax.surgery.base import Checkpoint
from moejax.train.step import TrainState

MANIFEST = "checksums.json"
ITEMS = ("variables", "state", "data", "meta")

NOTED = ("config", "seed", "step", "shapes")  # what every checkpoint's `meta` says

Meta = dict[str, Any]


class SaveFailed(RuntimeError):
    """A checkpoint could not be written: the disk is full, for example. The one before it is whole."""

    def __init__(self, path: Path, error: Exception):
        reason = " ".join(str(error).split()) or type(error).__name__
        super().__init__(f"checkpoint {path} could not be written: {reason}")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: the training state, the data iterator's state, and what was noted beside them.

    `logs` are copies of what had been logged, of `MetricLog`; None if there are none.
    """

    state: TrainState
    data_state: Any
    meta: Meta
    logs: dict[str, str] | None = None


class Checkpoints:
    """The checkpoints of one run.

    Opening moves damaged checkpoints aside, from the newest down to the first good one, which is `newest`, and removes what
    saves that were cut off left behind.

    Args:
      directory: folder of the step folders; made if need be.
      keep: newest checkpoints that stay.
      asynchronous: `save` returns once the values are copied off the device.
    """

    def __init__(self, directory: Path, keep: int, asynchronous: bool):
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.newest = hosts.share(_prepare(self.directory) if hosts.is_first() else None)
        self._keep, self._asynchronous = keep, asynchronous
        self._saving: int | None = None
        self._signed: int | None = None
        self._failed = False  # the last save
        self._open()

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(
        self, step: int, state: TrainState, data_state: Any, meta: Mapping[str, Any], logs: Mapping[str, str] | None = None
    ) -> None:
        """Saves a step. The state may be donated afterwards; only checkpoints past `keep` are deleted, once this one is whole.

        Args:
          logs: what was logged on the way, as of `MetricLog.copies`; of several processes, the first one's count.

        Raises:
          SaveFailed: the disk refuses, this time and the time before.
        """
        self._wait_or_warn()
        self._saving = self._signed = step
        data = _gathered(data_state) | ({} if logs is None else {"logs": dict(logs)})
        variables, rest = _split(state)
        self._save(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(variables),
                state=ocp.args.StandardSave(rest),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave({**meta, "step": step, "shapes": shapes(state)}),
            ),
            force=True,
        )
        self.newest = step
        if not self._asynchronous:
            self.wait()

    def _wait_or_warn(self) -> None:
        """Waits for a save in progress. Of one that went wrong it tells, once: it may have been the disk, or a folder that somebody
        removed, and the training is worth more. The second in a row is an error, and so is any where processes share the folder."""
        failed = False
        try:
            self.wait()
        except SaveFailed as failure:
            if self._failed or jax.process_count() > 1:
                raise
            failed = True
            warnings.warn(f"{failure}; training goes on to the next one", Damaged, stacklevel=3)
        if failed or (self._gone() and jax.process_count() == 1):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._open()
        self._failed = failed

    def meta(self, step: int) -> Meta:
        """What was noted beside the state at `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, like: TrainState) -> Restored:
        """Reads the checkpoint of `step`.

        Args:
          step: a step that is there.
          like: state of arrays or of shapes. What has no sharding goes to the default device.

        Raises:
          ConfigError: the checkpoint belongs to another config; names the first parameter that differs.
        """
        meta = self.meta(step)
        _check_shapes(meta["shapes"], shapes(like), self.path(step))
        variables, rest = _split(_placed(like))
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardRestore(variables),
                state=ocp.args.StandardRestore(rest),
                data=ocp.args.JsonRestore(),
            ),
        )
        collections = dict(items.variables)
        state = TrainState(params=collections.pop("params"), collections=collections, **items.state)
        return Restored(state, _own(items.data, self.path(step)), meta, items.data.get("logs"))

    def wait(self) -> None:
        """Waits for a save in progress.

        Raises:
          SaveFailed: it went wrong.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
            self.newest = max((step for step in _steps(self.directory) if step < saving), default=None)
            raise SaveFailed(self.path(saving), error) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # of a save that failed, once more
                self._manager.close()

    def _save(self, step: int, **arguments: Any) -> None:
        try:
            self._manager.save(step, **arguments)
        except OSError as error:
            self._saving = None
            raise SaveFailed(self.path(step), error) from error

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
            ),
        )
        self._folder = self.directory.stat().st_ino

    def _gone(self) -> bool:
        return not self.directory.is_dir() or self.directory.stat().st_ino != self._folder

    def _sign(self) -> None:
        # Called by Orbax in its own thread when all items are final, before the folder gets its final name.
        (folder,) = self.directory.glob(f"{self._signed}.orbax-checkpoint-tmp*")
        write_json(folder / MANIFEST, {file.relative_to(folder).as_posix(): digest(file) for file in _files(folder)}, indent=0)


def load(workdir: str | os.PathLike[str], step: int | None = None) -> Checkpoint:
    """A checkpoint of a run as `(config, variables, meta)`, without building its model.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None takes the newest. A damaged one is refused, and nothing is moved.

    Returns:
      the plain config; `{'params': ..., 'router_state': ..., ...}` as nested dicts of arrays; and meta (seed, step, ...).

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is damaged.
    """
    path = find_checkpoint(workdir, step)
    if damage := find_damage(path):
        raise ValueError(f"checkpoint {path} is damaged: {damage}")
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers()))) as checkpointer:
        # The saved shardings may name devices that this machine lacks.
        saved = checkpointer.metadata(path).item_metadata["variables"]
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(saved))
        args = ocp.args.Composite(variables=ocp.args.StandardRestore(_placed(like)), meta=ocp.args.JsonRestore())
        items = checkpointer.restore(path, args=args)
    return Checkpoint(items.meta["config"], items.variables, items.meta)


def load_meta(workdir: str | os.PathLike[str], step: int | None = None) -> Meta:
    """What was noted beside a checkpoint's arrays: `config`, `seed`, `step`, and `shapes` by path.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: what was noted is damaged; the arrays are not looked at.
    """
    path = find_checkpoint(workdir, step)
    if damage := find_damage(path, ("meta",)):
        raise ValueError(f"checkpoint {path} is damaged: {damage}")
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers()))) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def find_checkpoint(workdir: str | os.PathLike[str], step: int | None = None) -> Path:
    """The folder of a checkpoint of a run, the newest if `step` is None; `load` says what it raises."""
    directory = Path(workdir).resolve() / "checkpoints"
    steps = _steps(directory)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"no checkpoint {'' if step is None else step} in {directory}; there are {steps}")
    return directory / str(max(steps) if step is None else step)


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """The steps of which a run's folder has a checkpoint, oldest first; none if it has none."""
    return sorted(_steps(Path(workdir).resolve() / "checkpoints"))


def is_step(name: str) -> bool:
    """Whether a folder of this name may be a checkpoint: to Python, `²` is a digit too."""
    return re.fullmatch(r"0|[1-9][0-9]*", name) is not None


def newest_good(directory: Path) -> int | None:
    """The newest step whose files are what was written, or None. Damaged ones on the way are moved aside with a warning."""
    for step in sorted(_steps(directory), reverse=True):
        path = directory / str(step)
        damage = find_damage(path)
        if damage is None:
            return step
        set_aside(path, "checkpoint", damage)
    return None


def find_damage(path: Path, items: Collection[str] = ITEMS) -> str | None:
    """What is wrong with a checkpoint's files, or with its name, or None.

    Covers every file that is restored. Orbax's own two notes at the top of the folder (time stamps, written at the rename)
    are neither read nor checked.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not readable"
    if not isinstance(manifest, dict) or not set(ITEMS) <= {name.split("/")[0] for name in manifest}:
        return f"{MANIFEST} is incomplete"
    if damage := changed(path, {name: known for name, known in manifest.items() if name.split("/")[0] in items}):
        return damage
    try:
        noted = json.loads((path / "meta" / "metadata").read_text())
        missing = [name for name in NOTED if name not in noted]
    except (OSError, ValueError, TypeError):
        return "meta is not readable"
    if missing:
        return f"meta does not say {missing[0]}"
    return None if str(noted["step"]) == path.name else f"it is the checkpoint of step {noted['step']}"


def _prepare(directory: Path) -> int | None:
    newest = newest_good(directory)
    for path in (directory / str(step) for step in _steps(directory)):
        if path.is_symlink():
            # Orbax deletes old steps, and cannot delete a link.
            whole = shutil.copytree(path, path.with_name(f"{path.name}.copied"), dirs_exist_ok=True)
            path.unlink()
            whole.rename(path)
    return newest


def shapes(state: TrainState) -> dict[str, str]:
    """Path -> dtype and shape of every array of a state, such as 'params/dense/kernel' -> 'float32[3,4]'."""
    tree = vars(state)
    ordered = {name: tree[name] for name in ("params", *(n for n in tree if n not in ("params", "frozen")))}
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/"): _shape(leaf)
        for name, part in ordered.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(part)
    }


def _placed(tree: Any) -> Any:
    """Shapes with shardings: left out, Orbax would ask for the devices that wrote the checkpoint."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    return jax.tree.map(placed, tree)


def _handlers() -> dict[str, Any]:
    # One of each per user: Orbax's handlers hold state.
    return {
        "variables": ocp.StandardCheckpointHandler(),
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    rest = {name: value for name, value in vars(state).items() if name != "frozen"}
    return {"params": rest.pop("params"), **rest.pop("collections")}, rest


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _check_shapes(saved: Mapping[str, str], wanted: Mapping[str, str], path: Path) -> None:
    for name in (*wanted, *(n for n in saved if n not in wanted)):
        if saved.get(name) != wanted.get(name):
            raise ConfigError(
                f"checkpoint {path} is of another config: {name} is {saved.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here; take another workdir, or the config that wrote it"
            )


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("*") if is_step(path.name) and path.is_dir())


def _files(folder: Path) -> Iterator[Path]:
    for item in ITEMS:
        yield from (file for file in sorted((folder / item).rglob("*")) if file.is_file())


def _encoded(data_state: Any) -> dict[str, Any]:
    """A data iterator's state as JSON. Grain gives bytes or nested dicts, depending on the kind of pipeline."""
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode()}
    # Dumped here and not by Orbax: numpy integers become numbers, and key order is kept.
    return {"json": json.dumps(data_state, default=lambda value: value.tolist())}


def _gathered(data_state: Any) -> dict[str, Any]:
    """The states of all processes' iterators; one for all where they are equal, as they are unless documents are streamed."""
    states = hosts.gather(_encoded(data_state))
    return states[0] if all(state == states[0] for state in states) else {"processes": states}


def _own(data: Mapping[str, Any], path: Path) -> Any:
    states = data.get("processes", [data] * jax.process_count())
    if len(states) != jax.process_count():
        raise ConfigError(
            f"checkpoint {path} says where {len(states)} processes were in streamed data, and there are {jax.process_count()}; go on "
            f"with {len(states)}"
        )
    return _decoded(states[jax.process_index()])


def _decoded(data: Mapping[str, Any]) -> Any:
    if "base64" in data:
        return base64.b64decode(data["base64"])
    return json.loads(data["json"])
