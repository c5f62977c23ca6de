"""Training of a classifier by a recipe: in one process or many, killed and resumed, the loss takes the same course.

All randomness is a function of (seed, epoch, image) in the data, and of (seed, step, chunk) in the model and in mixup. So a
checkpoint holds no random state, any number of workers reads the same images, and n processes differ from one that accumulates n
chunks in nothing but the order of a sum. The learning rate is a function of the step.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .data import Chunks, Images, evaluation_transform, find_images, training_transform
from .errors import as_value_error
from .evaluate import Accuracy, evaluate
from .processes import copied, of_all, progress_bar, rank_and_world
from .recipe import Recipe, build, seed_all
from .runs import Run, State

LOG_STEPS = 20  # between reads of the loss, each of which waits for the device
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    device: torch.device,
    workers: int = 4,
    fsdp: bool = False,
    compiled: bool = False,
    resume: bool = False,
) -> Accuracy:
    """Train a registered model on DATA/train and evaluate it on DATA/val after every epoch: see `fit`.

    Raises:
        what `find_images`, `build`, `training_transform` and `fit` raise; ValueError: the model does not take the image_size.
    """
    samples, classes = find_images(data / "train")
    held_out, _ = find_images(data / "val", classes)
    model, size = build(recipe, len(classes)), recipe.image_size
    with as_value_error(f"recipe: image_size must be one that {recipe.model} takes, got {size}"), torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    training = Images(samples, training_transform(recipe, model), recipe.seed)
    validation = Images(held_out, evaluation_transform(size, model))
    return fit(recipe, model, training, validation, classes, out, device, workers, fsdp, compiled, resume)


def fit(
    recipe: Recipe,
    model: nn.Module,
    training: Images,
    validation: Images,
    classes: list[str],
    out: Path,
    device: torch.device,
    workers: int = 0,
    fsdp: bool = False,
    compiled: bool = False,
    resume: bool = False,
    show: bool = True,
) -> Accuracy:
    """Train model in place, evaluate it after every epoch; returns the accuracy of the best one, whose weights are in OUT.

    Args:
        recipe: of which model and images have been made already.
        classes: names, kept with the weights.
        out: folder of the run, see `spanet.runs`.
        device: of this process.
        workers: processes that read images; the result does not depend on their number.
        fsdp: shard parameters, gradients and moments over the processes, instead of a copy in each.
        compiled: by torch.compile.
        resume: continue the run in out.
        show: a progress bar.

    Raises:
        ValueError: the recipe does not fit the images or the run, or one process shall shard.
        FileExistsError, FileNotFoundError: out holds a run, or none. FloatingPointError: the loss is not finite.
        OSError: a file could not be written, the last one of its name is intact.
    """
    if fsdp and not dist.is_initialized():
        raise ValueError("fsdp: needs processes to share the model among, start it by torchrun")
    rank, world = rank_and_world()
    chunks = Chunks(len(training), recipe, rank, world)
    trainer = Trainer(recipe, model, len(classes), chunks, device, fsdp, compiled)
    run = Run(out, {"recipe": asdict(recipe), "images": len(training), "classes": classes}, resume)
    best, broken = Accuracy(-1.0, 0.0, 0.0, 0, 0), set[int]()
    if run.state:
        trainer.load(run.state)
        best, broken = Accuracy(**run.state["best"]), set(run.state["broken"])
    chunks.start = run.start
    losses: list[Tensor] = []
    with progress_bar(show) as bar, uncollected(), memory_kept(device):
        task = bar.add_task("", total=chunks.steps, completed=run.start)

        def reported(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            pixels, targets, lost = batch
            for index in set(lost[lost >= 0].tolist()) - broken:
                broken.add(index)
                bar.console.print(
                    f"broken image, another takes its place: {training.samples[index][0]}", soft_wrap=True, markup=False, emoji=False
                )
            return pixels, targets

        batches = map(reported, DataLoader(training, batch_sampler=chunks, num_workers=workers, pin_memory=device.type == "cuda"))
        for step in range(run.start, chunks.steps):
            epoch, place = divmod(step, chunks.steps_per_epoch)
            losses.append(trainer.step(step, batches))
            ends = place + 1 == chunks.steps_per_epoch
            saves = ends or (step + 1) % recipe.checkpoint_steps == 0
            if saves or len(losses) == LOG_STEPS:
                for done, loss in enumerate(mean_over_processes(losses), step + 1 - len(losses)):
                    run.log_step(step=done, epoch=done // chunks.steps_per_epoch, lr=trainer.lr(done), loss=loss)
                    if not abs(loss) < float("inf"):
                        raise FloatingPointError(f"the loss of step {done} is {loss}; checkpoints in {out} are of earlier steps")
                losses.clear()
                bar.update(task, completed=step + 1, description=f"epoch {epoch + 1}/{recipe.epochs}, loss {loss:.4f}")
            if ends:
                broken |= set().union(*of_all(broken))
                accuracy = evaluate(trainer.judged, validation, recipe.micro_batch, device, recipe.amp, workers, bar)
                run.log_epoch(step=step, epoch=epoch, **asdict(accuracy) | {"broken": len(broken) + accuracy.broken})
                if accuracy.top1 > best.top1:
                    best = accuracy
                    run.save_best(trainer.weights(), {"epoch": epoch, "accuracy": asdict(best)})
            if saves:
                run.save_last({"step": step + 1, "best": asdict(best), "broken": sorted(broken), **trainer.state()})
        if broken:
            bar.console.print(f"{len(broken)} of {len(training)} training images are broken")
    return best


class Trainer:
    """A model with its optimizer, schedule and averaged weights, which takes steps; spread over processes where there are several.

    Args:
        chunks: the cut of a step into forward passes, see `Chunks`; the others as in `fit`.

    Raises:
        ValueError: timm has no such optimizer or schedule, the optimizer takes second derivatives or has no state to save, or there is more
            warm-up than training.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, num_classes: int, chunks: Chunks, device: torch.device, fsdp: bool, compiled: bool
    ) -> None:
        _check_optimizer(recipe)
        if recipe.warmup_epochs > recipe.epochs:  # the learning rate would stay below the recipe's
            raise ValueError(f"recipe: warmup_epochs must be at most epochs {recipe.epochs}, got {recipe.warmup_epochs}")
        self.recipe, self.model, self.chunks, self.device = recipe, model, chunks, device
        # parameters that are sharded must be contiguous
        model.to(device, memory_format=torch.contiguous_format if fsdp else torch.channels_last)  # type: ignore[call-overload]
        self.average = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.judged: nn.Module = self.average.module if self.average else model
        if compiled:
            model.compile()
        self.copies: DistributedDataParallel | None = None
        if fsdp:
            for network in {model, self.judged}:
                _shard(network, device)
        elif dist.is_initialized():
            self.copies = copied(model, device)
        self.optimizer = create_optimizer_v2(model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay)
        with as_value_error(f"recipe: scheduler must be one of timm that goes by steps, got {recipe.scheduler}"):
            self.schedule, _ = create_scheduler_v2(
                self.optimizer,
                recipe.scheduler,
                num_epochs=recipe.epochs,
                warmup_epochs=recipe.warmup_epochs,
                warmup_lr=recipe.warmup_lr,
                min_lr=recipe.min_lr,
                step_on_epochs=False,
                updates_per_epoch=chunks.steps_per_epoch,
            )
            self.schedule.step_update(0)  # timm's "none" is None
        smoothing = recipe.label_smoothing
        self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=num_classes) if recipe.mixes else None
        self.smoothing = 0.0 if self.mix else smoothing  # mixed targets are smooth already

    def step(self, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimizer over this process's chunks; returns their mean loss before it."""
        self.schedule.step_update(step)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for chunk in range(self.chunks.per_step):
            pixels, targets = next(batches)
            seed_all(self.recipe.seed, step, self.chunks.first + chunk)
            pixels = pixels.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            if self.mix:
                pixels, targets = self.mix(pixels, targets)
            with self._exchange(chunk + 1 == self.chunks.per_step):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
                    logits = (self.copies or self.model)(pixels)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing) / self.chunks.per_step
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.model, step + 1)
        return total

    def lr(self, step: int) -> float:
        return cast(float, self.schedule._get_lr(step)[0])

    @contextmanager
    def _exchange(self, last: bool) -> Iterator[None]:
        """Gradients travel between processes once per step, with its last chunk."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        with self.copies.no_sync() if self.copies and not last else nullcontext():
            yield

    def weights(self) -> dict[str, Tensor]:
        """Of the evaluated network, whole and on the CPU; every process must ask."""
        return cast(dict[str, Tensor], get_model_state_dict(self.judged, options=_WHOLE))

    def state(self) -> State:
        """All that `load` wants, whole and on the CPU; every process must ask."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_WHOLE)
        return {"model": model, "optimizer": optimizer, "model_ema": self.weights() if self.average else None}

    def load(self, state: State) -> None:
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts, options=_WHOLE)
        if self.average:
            set_model_state_dict(self.judged, state["model_ema"], options=_WHOLE)


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that could not take a step or be saved, by a step on a layer of two neurons."""
    with torch.random.fork_rng(devices=[]), as_value_error(f"recipe: optimizer must be one of timm, got {recipe.optimizer}"):
        layer = nn.Linear(2, 2)
        optimizer = create_optimizer_v2(layer, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it takes second derivatives")
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with as_value_error("its state cannot be saved"):
            get_state_dict(layer, optimizer, options=_WHOLE)


def _shard(network: nn.Module, device: torch.device) -> None:
    """Give every process a part of each parameter; the units gathered as one are the members of the network's sequences."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sequences = [module for module in network.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    for sequence in reversed(sequences):  # inner ones first
        for block in sequence:
            if any(block.children()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def mean_over_processes(losses: list[Tensor]) -> list[float]:
    """Numbers that every process has, averaged; it waits for the device."""
    mean = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return cast(list[float], mean.tolist())


@contextmanager
def uncollected() -> Iterator[None]:
    """Meanwhile the garbage collector leaves alone what is there now: to look through the model and all modules takes 3 to 6 % of a step
    on a CPU. Within another one there is nothing to do."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # options of glibc's mallopt


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """Meanwhile glibc keeps what is freed, for a training on a CPU: to give gradients and large activations back in every step and to map
    them anew takes 6 % of it and more. Where its options are set in the environment, and with another library, nothing changes."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and device.type == "cpu" else None
    if set_option is None or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    set_option(_TRIM_THRESHOLD, 2**31 - 1)
    set_option(_MMAP_MAX, 0)
    try:
        yield
    finally:
        set_option(_TRIM_THRESHOLD, 64 * 2**20)  # as after `import spanet_kernels`
        set_option(_MMAP_MAX, 65536)
