"""Training and evaluation: what is learned, what is resumed, what many processes do, and every kind of bad input."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from spanet import digits
from spanet.checkpoint import read_state
from spanet.cli import main
from spanet.data import Chunks, Images, find_images, training_transform
from spanet.evaluate import evaluate, evaluate_checkpoint
from spanet.recipe import Recipe, build, load_recipe, recipe_names
from spanet.runs import Run
from spanet.train import fit, train

CPU = torch.device("cpu")
# everything random is on: augmentation, erasing, mixup, cutmix, drop path; averaged weights too
RECIPE = """
model: spanet_small
model_args: {depths: [1, 1, 1], dims: [12, 24, 36], radii: [2, 1, 1]}
image_size: 32
epochs: 3
batch_size: 12
micro_batch: 6
lr: 1e-3
warmup_epochs: 1
drop_path_rate: 0.2
ema: 0.9
amp: false
checkpoint_steps: 2
"""


SMALL = Recipe(
    epochs=2, batch_size=6, micro_batch=6, mixup=0, cutmix=0, label_smoothing=0, amp=False, warmup_epochs=0, image_size=8, min_lr=0
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """36 training and 11 validation images of 3 classes, each with more of its own colour."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, counts in {"train": (12, 12, 12), "val": (4, 4, 3)}.items():
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (40, 44, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{index}.png")
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def command(data: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = ["--config", str(data / "recipe.yaml"), "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [sys.executable, *launcher, "-m", "spanet", "train", *options, *more]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(data, out, "--workers", "0"), check=True, capture_output=True)
    return out


def losses(run: Path) -> list[float]:
    with (run / "steps.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_a_killed_run_resumes_to_the_same_curve(data, whole, tmp_path):
    out, pause = tmp_path / "run", random.Random()
    kills = 0
    while kills < 2:
        more = ["--resume"] if (out / "last.pt").exists() else []
        process = subprocess.Popen(command(data, out, "--workers", "1", *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        written = [path.stat().st_mtime_ns for path in (out / "last.pt",) if path.exists()]
        while process.poll() is None and (not (out / "last.pt").exists() or [(out / "last.pt").stat().st_mtime_ns] == written):
            time.sleep(0.01)
        time.sleep(pause.uniform(0, 0.3))
        process.kill()
        process.wait()
        kills += 1
    subprocess.run(command(data, out, "--resume"), check=True, capture_output=True)
    for name in ("steps.csv", "epochs.csv", "best.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["copies", "sharded"])
def test_two_processes_take_the_same_course(data, whole, tmp_path, more):
    subprocess.run(command(data, tmp_path / "run", *more, processes=2), check=True, capture_output=True)
    ours, wanted = losses(tmp_path / "run"), losses(whole)
    assert len(ours) == len(wanted) == 9
    assert ours == pytest.approx(wanted, rel=1e-6)
    assert (tmp_path / "run" / "epochs.csv").read_text().count(",11,0") == 3, "11 images, shared unevenly, each counted once"


def test_chunks_share_out_every_step():
    recipe = replace(SMALL, batch_size=12, micro_batch=3)
    whole = list(Chunks(31, recipe))
    assert len(whole) == 2 * 2 * 4
    for epoch in range(2):
        seen = [index for chunk in whole for key, index in chunk if key == epoch]
        assert len(set(seen)) == len(seen) == 24
    assert [key for chunk in whole[:8] for _, key in chunk] != [key for chunk in whole[8:] for _, key in chunk]
    shares = [list(Chunks(31, recipe, rank, 2)) for rank in range(2)]
    assert [chunk for step in range(4) for share in shares for chunk in share[2 * step : 2 * step + 2]] == whole
    later = Chunks(31, recipe)
    later.start = 3
    assert list(later) == whole[12:]
    assert len(later) == 4


class Coloured(nn.Module):
    """Logits are the means of the image's channels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x.mean((2, 3)) * self.scale


def pictures(count: int = 12, size: int = 8) -> list[tuple[Image.Image, int]]:
    generator = np.random.default_rng(1)
    made = []
    for index in range(count):
        pixels = generator.integers(0, 120, (size, size, 3), np.uint8)
        pixels[..., index % 3] += 100
        made.append((Image.fromarray(pixels), index % 3))
    return made


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def test_accuracy_counts_what_it_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    samples = pictures()
    samples[4] = (samples[4][0], 0)  # a wrong label
    samples[7] = (str(tmp_path / "broken.png"), samples[7][1])
    found = evaluate(Coloured(), Images(samples, to_tensor), 5, CPU)
    assert (found.images, found.broken) == (11, 1)
    assert found.top1 == pytest.approx(10 / 11)
    assert found.top5 == 1
    pixels = torch.stack([to_tensor(image) for index, (image, _) in enumerate(samples) if index != 7])
    labels = torch.tensor([label for index, (_, label) in enumerate(samples) if index != 7])
    assert found.loss == pytest.approx(nn.functional.cross_entropy(Coloured()(pixels), labels).item(), rel=1e-6)


def test_the_file_of_a_run_gives_its_averaged_weights(whole):
    saved, read = torch.load(whole / "last.pt", weights_only=True), read_state(whole / "last.pt")
    assert all(torch.equal(read[key], value) for key, value in saved["model_ema"].items())
    assert not all(torch.equal(read[key], value) for key, value in saved["model"].items())


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "v0", "augmix-m10"])
def test_no_level_of_a_policy_stops_a_training(policy):
    """Whatever the magnitude, a colour keeps a bit: Pillow refuses none."""
    transform = training_transform(Recipe(augment=policy, image_size=32), build(Recipe(), 3))
    policies = [policy for policy in transform.transforms if hasattr(policy, "ops") or hasattr(policy, "policy")]
    ops = [op for policy in policies for op in getattr(policy, "ops", None) or itertools.chain(*policy.policy)]
    found = [op for op in ops if op.name.startswith("Posterize")]
    assert found
    picture = Image.new("RGB", (40, 50), (200, 100, 50))
    for op in found:
        for level in range(11):
            op.prob, op.magnitude, op.magnitude_std = 1.0, level, 0
            assert op(picture).size == picture.size


def test_overfits_a_tiny_set(tmp_path, data):
    """A SPANet learns labels without a pattern by heart."""
    recipe = replace(load_recipe(data / "recipe.yaml"), ema=0, drop_path_rate=0, mixup=0, cutmix=0, label_smoothing=0)
    recipe = replace(recipe, micro_batch=12, epochs=60, lr=1e-2, warmup_epochs=5)
    images = Images([(image, 2 - (label + place // 3) % 3) for place, (image, label) in enumerate(pictures(size=32))], to_tensor)
    best = fit(recipe, build(recipe, 3), images, images, ["a", "b", "c"], tmp_path, CPU, show=False)
    assert best.top1 == 1
    assert losses(tmp_path)[-1] < 0.05 < 1 < losses(tmp_path)[0]


def test_accumulated_chunks_are_one_batch(tmp_path):
    found, images = [], Images(pictures(), to_tensor)
    for micro_batch in (6, 2):
        out = tmp_path / str(micro_batch)
        fit(replace(SMALL, micro_batch=micro_batch), Coloured(), images, images, ["r", "g", "b"], out, CPU)
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert len(set(found[0])) == 4, "the loss moves"


def test_broken_images_are_reported_and_counted(data, tmp_path, capsys):
    samples, classes = find_images(data / "train")
    whole = Path(str(samples[0][0])).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    samples[3], samples[20] = (str(tmp_path / "cut.png"), 0), (str(tmp_path / "text.png"), 1)
    recipe = replace(SMALL, epochs=3)

    def resized(image: Image.Image) -> torch.Tensor:
        return to_tensor(image.resize((8, 8)))

    fit(recipe, Coloured(), Images(samples, resized), Images(pictures(), to_tensor), classes, tmp_path / "run", CPU)
    said = capsys.readouterr().err
    assert said.count("cut.png") == said.count("text.png") == 1
    assert "2 of 36 training images are broken" in said
    assert [row["broken"] for row in csv.DictReader((tmp_path / "run" / "epochs.csv").open())] == ["2", "2", "2"]
    with pytest.raises(OSError, match=r"20 broken images in a row, from .*text.png"):
        Images([samples[20]] * 30, resized)[0, 0]


def test_an_error_of_a_worker_is_one_line(data, tmp_path, capsys, monkeypatch):
    for index in range(12):
        (tmp_path / "data" / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "train" / "a" / f"{index}.png").write_bytes(b"")
    (tmp_path / "data" / "val").symlink_to(tmp_path / "data" / "train")
    arguments = ["--data", str(tmp_path / "data"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", command(data, tmp_path / "run", *arguments)[2:])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "0/3" not in line]
    assert said.startswith("spanet: OSError: data: 20 broken images in a row, from ")


def test_folders_that_are_no_data(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="must hold one folder of images per class, it holds no folder"):
        find_images(tmp_path)
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "dogs" / "1.png")
    with pytest.raises(FileNotFoundError, match="no image in 1 of 2 classes: cats"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="must hold the 2 classes of the training set, differing: cats, class0, class1"):
        find_images(data / "train", ["cats", "class2"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "unknown key learning_rate, the nearest known one is"),
        ("lrr=1", "unknown key lrr, the nearest known one is lr"),
        ("epochs=many", "epochs must be of type int, got 'many'"),
        ("amp=1", "amp must be of type bool, got 1"),
        ("lr=high", "lr must be of type float, got 'high'"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("micro_batch=5", "batch_size must be a multiple of micro_batch 5, got 12"),
        ("batch_size=9 micro_batch=3", "micro_batch must be even where mixup or cutmix is on, got 3"),
        ("lr", "must be key=value, got lr"),
    ],
)
def test_recipes_that_are_none(data, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(data / "recipe.yaml", override.split())


def test_recipe_files(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="config: spanet_tiny is neither a file nor one of digits, spanet_base"):
        load_recipe("spanet_tiny")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken.yaml is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold `key: value` lines, got a list"):
        load_recipe(tmp_path / "list.yaml")
    assert load_recipe(data / "recipe.yaml", ["lr=1e-4"]).lr == 1e-4


def test_the_recipes_of_the_paper():
    rates = {"small": 0.1, "medium": 0.2, "mediumx": 0.3, "base": 0.3, "basex": 0.5}
    assert recipe_names() == sorted(["digits", *(f"spanet_{size}" for size in rates)])
    for size, rate in rates.items():
        assert load_recipe(f"spanet_{size}") == replace(Recipe(), model=f"spanet_{size}", drop_path_rate=rate)
    expected = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 1024, "weight_decay": 0.05, "epochs": 300, "scheduler": "cosine"}
    expected |= {"warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0}
    expected |= {"label_smoothing": 0.1, "random_erasing": 0.25, "ema": 0.0}
    assert expected.items() <= asdict(Recipe()).items()


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="batch_size must be at most the 10 training images, got 12"):
        Chunks(10, Recipe(batch_size=12, micro_batch=6))
    with pytest.raises(ValueError, match="batch_size must be a multiple of micro_batch 6 x 4 processes, got 12"):
        Chunks(20, Recipe(batch_size=12, micro_batch=6), 0, 4)


def test_a_run_is_continued_by_itself_alone(whole, data, tmp_path):
    recipe = load_recipe(data / "recipe.yaml")
    with pytest.raises(FileExistsError, match="holds a run; resume it, or name another folder"):
        train(recipe, data, whole, CPU, workers=0)
    with pytest.raises(ValueError, match=r"resume: lr was 0.001 when .* was started, got 0.5"):
        train(replace(recipe, lr=0.5), data, whole, CPU, workers=0, resume=True)
    with pytest.raises(FileNotFoundError, match=r"resume: there is no .*last.pt"):
        train(recipe, data, tmp_path, CPU, workers=0, resume=True)
    torch.save([1], tmp_path / "foreign.pt")
    for damage in ((whole / "last.pt").read_bytes()[:1000], b"", (tmp_path / "foreign.pt").read_bytes()):
        (tmp_path / "last.pt").write_bytes(damage)
        with pytest.raises(ValueError, match=r"resume: .*last.pt is damaged, or of no run"):
            train(recipe, data, tmp_path, CPU, workers=0, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    identity = {"recipe": {"lr": 1.0}}
    run = Run(tmp_path, identity, resume=False)
    run.save_last({"step": 1, "weights": torch.ones(1000)})
    run.save_best({"weights": torch.ones(1000)}, {"epoch": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what a write to a full disk meets, with another number
    try:
        with pytest.raises(OSError, match=r"could not write .*last.pt: File too large; the one before it is intact"):
            run.save_last({"step": 2, "weights": torch.ones(100_000)})
        with pytest.raises(OSError, match=r"could not write .*best.safetensors: File too large; the one before it is intact"):
            run.save_best({"weights": torch.ones(100_000)}, {"epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.safetensors", "epochs.csv", "last.pt", "steps.csv"]
    resumed = Run(tmp_path, identity, resume=True)
    assert resumed.start == 1
    assert torch.equal(resumed.state["weights"], torch.ones(1000))
    with safetensors.safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["epoch"] == 0


def test_a_resumed_run_removes_what_a_killed_one_left_half_written(tmp_path):
    Run(tmp_path, {}, resume=False).save_last({"step": 1})
    (tmp_path / ".last.pt.1.tmp").write_bytes(b"PK")
    Run(tmp_path, {}, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "last.pt", "steps.csv"]


def test_the_best_weights_of_another_run_stay(tmp_path):
    recipe = {"recipe": {"lr": 0.1, "mixes": (1, 2)}}
    killed = Run(tmp_path, recipe, resume=False)
    killed.save_best({"weight": torch.ones(2)}, {"top1": 0.5})  # and no last.pt
    Run(tmp_path, recipe, resume=False)
    with pytest.raises(FileExistsError, match="holds the best weights of another run; name another folder"):
        Run(tmp_path, {"recipe": {"lr": 0.2, "mixes": (1, 2)}}, resume=False)
    (tmp_path / "best.safetensors").write_bytes(b"of something else")
    with pytest.raises(FileExistsError, match="of another run"):
        Run(tmp_path, recipe, resume=False)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Poisoned(Coloured):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) * (math.nan if self.calls > 3 else 1)

    images = Images(pictures(), to_tensor)
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        fit(SMALL, Poisoned(), images, images, ["r", "g", "b"], tmp_path, CPU)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


def test_evaluate_reads_the_best_weights(whole, data):
    command = [sys.executable, "-m", "spanet", "evaluate", "--checkpoint", str(whole / "best.safetensors"), "--device", "cpu"]
    done = subprocess.run([*command, "--data", str(data / "val"), "--workers", "0"], capture_output=True, text=True)
    with (whole / "epochs.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["top1"]))
    assert done.returncode == 0, done.stderr
    expected = f"top-1 {float(best['top1']):.2%}, top-5 100.00%, loss {float(best['loss']):.4f} of 11 images, 0 broken"
    assert expected in done.stdout


def test_spectra_reads_the_best_weights(whole, data, tmp_path, monkeypatch, capsys):
    arguments = ["spectra", data / "val" / "class0" / "0.png", "--checkpoint", whole / "best.safetensors", "--out", tmp_path / "spectra"]
    monkeypatch.setattr(sys, "argv", ["spanet", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0, capsys.readouterr().err
    assert len(list((tmp_path / "spectra").iterdir())) == 4


def test_what_a_checkpoint_does_not_tell(whole, data, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: .*last.pt does not tell its model, give its name"):
        evaluate_checkpoint(whole / "last.pt", data / "val", CPU)
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no file"):
        evaluate_checkpoint(tmp_path / "none.pt", data / "val", CPU)


def test_training_starts_from_given_weights(whole, data):
    recipe = replace(load_recipe(data / "recipe.yaml"), weights=str(whole / "best.safetensors"))
    trained = safetensors.torch.load_file(whole / "best.safetensors")
    started = build(recipe, 5).state_dict()
    assert started["head.weight"].shape == (5, 36)
    assert all(torch.equal(value, trained[name]) for name, value in started.items() if not name.startswith("head"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere"], "spanet: config: nowhere is neither a file nor one of digits"),
        (["--set", "lrs=1"], "spanet: recipe: unknown key lrs, the nearest known one is lr"),
        (["--set", "model=spanet_huge"], "spanet: recipe: model must be a registered name, got spanet_huge"),
        (["--set", "batch_size=48"], "spanet: recipe: batch_size must be at most the 36 training images, got 48"),
        (["--set", "epochs=["], "spanet: set: epochs=[ is not YAML behind the equals sign"),
        (["--set", "model_args={foo: 1}"], "spanet: recipe: model spanet_small does not take model_args {'foo': 1}"),
        (["--set", "weights=nope.pth"], "spanet: recipe: weights must be a file, there is no nope.pth"),
        (["--set", "augment=nonsense"], "spanet: recipe: augment must be a policy of timm, got nonsense"),
        (["--set", "drop_path_rate=2"], "spanet: recipe: drop_path_rate must be from 0 to 1, got 2"),
        (["--set", "ema=1.5"], "spanet: recipe: ema must be from 0 to 1, got 1.5"),
        (["--set", "mixup=-1"], "spanet: recipe: mixup must be at least 0, got -1"),
        (["--set", "optimizer=nope"], "spanet: recipe: optimizer must be one of timm, got nope: "),
        (["--set", "optimizer=adahessian"], "spanet: recipe: optimizer must be one of timm, got adahessian: it takes second derivatives"),
        (["--set", "optimizer=adafactorbv"], "spanet: recipe: optimizer must be one of timm, got adafactorbv: its state cannot be saved: "),
        (["--set", "epochs=many"], "spanet: recipe: epochs must be of type int, got 'many'"),
        (["--set", "scheduler=nope"], "spanet: recipe: scheduler must be one of timm that goes by steps, got nope: "),
        (["--set", "scheduler=plateau"], "spanet: recipe: scheduler must be one of timm that goes by steps, got plateau: "),
        (["--set", "scheduler=none"], "spanet: recipe: scheduler must be one of timm that goes by steps, got none: "),
        (["--set", "warmup_epochs=4"], "spanet: recipe: warmup_epochs must be at most epochs 3, got 4"),
        (["--device", "tpu"], "spanet: device: must be cpu, or cuda where torch finds one, got tpu"),
        (["--fsdp"], "spanet: fsdp: needs processes to share the model among, start it by torchrun"),
    ],
)
def test_bad_input_gets_one_line(data, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", command(data, tmp_path / "run", "--workers", "0", *arguments)[2:])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_out_is_a_folder_and_nothing_is_a_text(data, tmp_path, capsys, monkeypatch):
    assert load_recipe(data / "recipe.yaml", ["augment="]).augment == ""
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for arguments in (command(data, taken)[2:], ["spanet", "train-task", "nowhere", "--data", str(data), "--out", str(taken)]):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err == f"spanet: out: must be a folder, got the file {taken}\n"
    assert taken.read_text() == "mine"


def test_digits_are_split_once_and_learned(tmp_path):
    images, held_out = digits.digits()
    assert (len(images), len(held_out)) == (1437, 360)
    seen = {image.tobytes() for image, _ in images.samples}
    assert not [image for image, _ in held_out.samples if image.tobytes() in seen]
    assert min(sum(label == digit for _, label in held_out.samples) for digit in range(10)) >= 34
    assert images[0, 5][0].shape == (1, 32, 32)
    recipe = replace(load_recipe("digits"), epochs=2, warmup_epochs=0, batch_size=1437 // 2, micro_batch=1437 // 2)
    rows = [digits.training(variant, recipe) for variant in ("SPANet, r = 2", "no filter")]
    result = {"recipe": asdict(recipe), "rows": rows}
    assert rows[0]["training loss"][1] < rows[0]["training loss"][0]
    assert rows[0]["training loss"] != rows[1]["training loss"]
    assert digits.table(result).row_count == 2
    assert len(digits.figure(result).axes[0].lines) == 3
    with pytest.raises(ValueError, match="digits: test accuracy must reach 98%, got "):
        digits.check(result)


def test_a_folder_that_cannot_be_made_is_met_before_the_trainings(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(digits, "ProcessPoolExecutor", lambda *_: pytest.fail("trains"))
    with pytest.raises(NotADirectoryError):
        digits.demo(tmp_path / "file" / "out")


KEPT = """
import resource, torch
from spanet.train import memory_kept
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (10, 20, 90, 50):
        torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with memory_kept(torch.device("cpu")):
    faults()
    print(faults())
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's options")
def test_memory_is_kept():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True, env=environment).stdout
    kept, given_back = map(int, out.split())
    assert kept < given_back / 10
