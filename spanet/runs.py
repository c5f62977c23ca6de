"""The files of a training run: each is whole at any moment, whatever happens to the process that writes it.

RUN/steps.csv            step, epoch, lr, loss
RUN/epochs.csv           step, epoch, and the accuracy on the validation images
RUN/last.pt              all that a resumed run needs
RUN/best.safetensors     the weights of the best epoch; its metadata tells recipe, classes and accuracy as JSON

A dense task, evaluated at its end alone, has in place of epochs.csv and best.safetensors:

RUN/model.safetensors    the weights after the last step
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch
from torch import Tensor

from .errors import as_value_error
from .processes import rank_and_world

State = dict[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of path, or of what that links to, in one step when it has been written.

    Raises:
        OSError: it could not be written, or path is a folder or a device; it is as it was.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"could not write {path}: it is not a file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save, closing its archive, hides what stopped it
        if not isinstance(cause, OSError):
            raise
        kept = "; the one before it is intact" if path.exists() else ""
        raise OSError(f"could not write {path}: {cause.strerror}{kept}") from cause
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step. Raises OSError if it cannot be written; path is as it was then."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write *.safetensors in one step. Raises OSError if it cannot be written; path is as it was then."""
    with replacing(path) as file:
        file.write(safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata))


class Run:
    """The folder of a run, from its first step or, resumed, from the one after its last checkpoint. The first process writes.

    Args:
        folder: made if it is not there.
        identity: what all parts of one run have in common: JSON values by name, those of dictionaries by their own names.
        resume: continue the run that is there; otherwise there must be none.
        evaluates: whether it has epochs.csv, too.

    Attributes:
        state: of the checkpoint, None for a new run; start: the step to go on with.

    Raises:
        FileExistsError, FileNotFoundError: there is a run, or what one left, or none; ValueError: last.pt is damaged or of another run.
    """

    STEPS = ("step", "epoch", "lr", "loss")
    EPOCHS = ("step", "epoch", "top1", "top5", "loss", "images", "broken")

    def __init__(self, folder: Path, identity: State, resume: bool, evaluates: bool = True) -> None:
        self.folder, self.identity, self.writes = folder, identity, rank_and_world()[0] == 0
        self.last = folder / "last.pt"
        self.state = self._load() if resume else None
        self.start: int = self.state["step"] if self.state else 0
        if not resume and self.last.exists():
            raise FileExistsError(f"out: {folder} holds a run; resume it, or name another folder")
        if not resume and (best := folder / "best.safetensors").exists() and not self._wrote(best):
            raise FileExistsError(f"out: {folder} holds the best weights of another run; name another folder")
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("last.pt", "best.safetensors", "model.safetensors", "steps.csv", "epochs.csv"):
                for unfinished in folder.glob(f".{name}.*.tmp"):  # of a process that was killed while it wrote
                    unfinished.unlink()
            self._rewind(folder / "steps.csv", self.STEPS)
            if evaluates:
                self._rewind(folder / "epochs.csv", self.EPOCHS)

    def _wrote(self, best: Path) -> bool:
        """Whether such a run wrote it, and was killed before its first checkpoint."""
        try:
            with safetensors.safe_open(best, "pt") as file:
                then = _flat(json.loads(file.metadata()["run"]))
        except Exception:  # of no run of ours
            return False
        return _difference(then, _flat(json.loads(json.dumps(self.identity)))) is None

    def _load(self) -> State:
        if not self.last.exists():
            raise FileNotFoundError(f"resume: there is no {self.last}")
        with as_value_error(f"resume: {self.last} is damaged, or of no run"):
            state = cast(State, torch.load(self.last, map_location="cpu", weights_only=True))
            then, now = _flat(state["identity"]), _flat(self.identity)
        if (name := _difference(then, now)) is not None:
            raise ValueError(f"resume: {name} was {then.get(name)} when {self.folder} was started, got {now[name]}")
        return state

    def _rewind(self, path: Path, columns: tuple[str, ...]) -> None:
        """Keep the rows of the steps before `start`: a killed process may have written more."""
        text = io.StringIO()
        table = csv.DictWriter(text, columns)
        table.writeheader()
        if self.start:
            with path.open(newline="") as file:
                table.writerows(row for row in csv.DictReader(file) if int(row["step"]) < self.start)
        with replacing(path) as new:
            new.write(text.getvalue().encode())

    def log_step(self, **row: float) -> None:
        self._append("steps.csv", self.STEPS, row)

    def log_epoch(self, **row: float) -> None:
        self._append("epochs.csv", self.EPOCHS, row)

    def _append(self, name: str, columns: tuple[str, ...], row: dict[str, float]) -> None:
        if self.writes:
            with (self.folder / name).open("a", newline="") as file:
                csv.DictWriter(file, columns).writerow(row)

    def save_last(self, state: State) -> None:
        if self.writes:
            with replacing(self.last) as file:
                torch.save({"identity": self.identity, **state}, file)

    def save_best(self, weights: dict[str, Tensor], facts: State) -> None:
        # one key: safetensors writes several in any order
        self.save_weights("best.safetensors", weights, {"run": json.dumps(self.identity | facts)})

    def save_weights(self, name: str, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        if self.writes:
            write_weights(self.folder / name, weights, metadata)


def _difference(then: State, now: State) -> str | None:
    """The first name whose value was another one then."""
    return next((name for name in now if then.get(name) != now[name]), None)


def _flat(identity: State) -> State:
    flat: State = {}
    for name, value in identity.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
