"""Semantic FPN, RetinaNet, Mask R-CNN and classification of photographs: counts, training, prediction, pictures, bad input."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import spanet
from spanet.cli import main
from spanet.detection import detect, draw_detections, mask_rcnn, retinanet
from spanet.images import read_image, save_picture
from spanet.macs import count_macs
from spanet.predict import class_activation, predict
from spanet.pyramid import load_task
from spanet.segmentation import draw_segmentation, segment, segmentation_loss, semantic_fpn

PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"
TINY = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def photograph():
    return read_image(PHOTOGRAPH).resize((96, 64))


@pytest.mark.parametrize(("name", "millions", "giga"), [("spanet_small", "32.36", "45.51"), ("spanet_medium", "45.44", "56.93")])
def test_counts_of_semantic_fpn(name, millions, giga):
    with torch.device("meta"):
        model = semantic_fpn(name)
        image = torch.empty(1, 3, 512, 512)
    assert f"{parameters(model) / 1e6:.2f}" == millions
    assert f"{count_macs(model, image) / 1e9:.2f}" == giga


@pytest.mark.parametrize(
    ("build", "name", "millions"),
    [(retinanet, "spanet_small", 38), (retinanet, "spanet_medium", 51), (mask_rcnn, "spanet_small", 48), (mask_rcnn, "spanet_medium", 61)],
)
def test_counts_of_detection(build, name, millions):
    with torch.device("meta"):
        model = build(name)
    assert round(parameters(model) / 1e6) == millions


def test_semantic_fpn_learns_and_draws_a_photograph(photograph, tmp_path):
    torch.manual_seed(0)
    model = semantic_fpn("spanet_small", 3, **TINY)
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in model.backbone.normalization)
    x = ((pixels / 255 - mean) / std)[None]
    target = torch.full((1, 64, 96), 2)
    target[:, :, :48] = 1
    target[:, :8] = 255  # no label: any class will do there
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(25):
        losses.append(segmentation_loss(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 3
    assert all(parameter.grad is not None for parameter in model.parameters())
    found = segment(model, photograph, 64)
    labelled = target[0] != 255
    assert (found == target[0])[labelled].float().mean() > 0.9
    picture = np.array(draw_segmentation(photograph, found)).astype(int)
    left, right = picture[32, 4] - np.array(photograph)[32, 4] * 0.4, picture[32, 90] - np.array(photograph)[32, 90] * 0.4
    assert np.abs(left - right).max() > 20, "two classes have two colours"
    load_task_from_file(model, tmp_path)


def test_pixels_without_a_label_cost_nothing():
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 5))
    target[0] = target[1, 2] = 255
    labelled = target != 255
    wanted = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[labelled], target[labelled])
    torch.testing.assert_close(segmentation_loss(logits, target), wanted)
    loss = segmentation_loss(logits, torch.full_like(target, 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def load_task_from_file(model, folder):
    """A file of the whole model gives the same function; one of another model is refused."""
    torch.save(model.state_dict(), folder / "task.pth")
    other = semantic_fpn("spanet_small", 3, **TINY)
    load_task(other, folder / "task.pth")
    x = torch.randn(1, 3, 37, 45) + 1
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"task.pth does not fit SemanticFPN"):
        load_task(semantic_fpn("spanet_small", 4, **TINY), folder / "task.pth")


@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_detection_learns_and_draws_a_photograph(build, photograph):
    torch.manual_seed(0)
    model = build("spanet_small", 2, min_size=64, max_size=96, **TINY)
    if build is mask_rcnn:  # fewer regions than 512, for speed
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
        model.rpn._post_nms_top_n = {"training": 100, "testing": 50}
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1) / 255
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 12:50, 20:70] = 1
    target = {"boxes": torch.tensor([[20.0, 12.0, 70.0, 50.0]]), "labels": torch.tensor([1]), "masks": mask}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    losses = []
    for _ in range(25):
        losses.append(sum(model([pixels], [target]).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean() * 0.6
    found = detect(model, photograph)
    best = found["scores"].argmax()
    assert found["labels"][best] == 1
    drawn = draw_detections(photograph, found, ["nothing", "cat", "dog"], threshold=float(found["scores"][best]))
    x1, y1, *_ = found["boxes"][best].round().int().tolist()
    changed = np.abs(np.array(drawn).astype(int) - np.array(photograph)).max(2) > 0
    assert changed[min(y1 + 1, 63), x1 : x1 + 20].any()
    assert changed.mean() < 0.95
    assert draw_detections(photograph, found, threshold=1.1) == photograph


def test_activation_is_the_logit_by_places():
    torch.manual_seed(0)
    model = timm.create_model("spanet_small", num_classes=7, **TINY).eval()
    torch.nn.init.normal_(model.head.bias)
    x = torch.randn(1, 3, 96, 96) + 1
    logits = model(x)[0]
    for index in (0, 6):
        activation = class_activation(model, x, index)
        assert activation.shape == (3, 3)
        torch.testing.assert_close(activation.sum() + model.head.bias[index], logits[index])
    guesses = predict(model, x, list("abcdefg"), 3)
    assert [guess.name for guess in guesses] == ["abcdefg"[i] for i in logits.argsort(descending=True)[:3]]
    torch.testing.assert_close(torch.tensor(guesses[0].probability), logits.softmax(0).max())


def run(monkeypatch, *arguments):
    """Exit code of a command."""
    monkeypatch.setattr("sys.argv", ["spanet", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", PHOTOGRAPH, "--out", "{folder}"], "out: must end as a picture's name does"),
        (["segment", PHOTOGRAPH, "--out", "{folder}/nowhere/a.png"], "out: must be a file in a folder that is there"),
        (["predict", PHOTOGRAPH, "--model", "swin_tiny_patch4_window7_224", "--size", 100], "size: SwinTransformer does not take an image"),
        (
            ["detect", "{folder}/wide.png", "--size", 64, "--out", "{folder}/a.png"],
            "size: RetinaNet does not take a photograph of 3 x 2000",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_refuse_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    Image.new("RGB", (2000, 3)).save(tmp_path / "wide.png")
    assert run(monkeypatch, *(str(argument).replace("{folder}", str(tmp_path)) for argument in arguments)) == 1
    *_, said = capsys.readouterr().err.strip().split("\n")
    assert said.startswith(f"spanet: {message}")


@pytest.mark.parametrize("kind", [Image.Image, Figure])
def test_a_picture_is_replaced_whole_or_not_at_all(kind, tmp_path, monkeypatch):
    path, picture = tmp_path / "picture.png", Image.new("RGB", (8, 8), "red") if kind is Image.Image else Figure(figsize=(1, 1))
    save_picture(picture, path)
    Image.open(path).verify()
    before = path.read_bytes()

    def full(self, file, *args, **kwargs):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kind, "save" if kind is Image.Image else "savefig", full)
    with pytest.raises(OSError, match=r"could not write .*picture\.png: No space left on device; the one before it is intact"):
        save_picture(picture, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_photographs_stand_upright(tmp_path):
    picture, exif = Image.new("RGB", (30, 20), "red"), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)
    assert read_image(tmp_path / "turned.jpg", upright=False).size == (30, 20)


def test_pixels_of_more_than_8_bits(tmp_path):
    """16 bits are scaled, not clipped; 32 have no scale."""
    for name, values in (("deep.png", np.uint16), ("deep.tif", ">u2")):
        Image.fromarray((np.arange(256) * 257).astype(values)[None]).save(tmp_path / name)
        assert np.array_equal(np.asarray(read_image(tmp_path / name))[0, :, 1], np.arange(256))
    for values in (np.int32, np.float32):
        Image.fromarray(np.ones((2, 2), values)).save(tmp_path / "deeper.tif")
        with pytest.raises(ValueError, match=r"deeper.tif: not an image that can be read: its pixels have 32 bits"):
            read_image(tmp_path / "deeper.tif")


def test_commands(monkeypatch, capsys, tmp_path):
    model = timm.create_model("spanet_small")
    torch.save(model.state_dict(), tmp_path / "small.pth")
    assert run(monkeypatch, "predict", PHOTOGRAPH, "--size", 64, "--top", 2, "--out", tmp_path / "predict.png") == 0
    shown = capsys.readouterr()
    assert "weights are random" in shown.err
    assert len(shown.out.splitlines()) == 2
    checkpoint = ("--checkpoint", tmp_path / "small.pth", "--model", "spanet_small")
    assert run(monkeypatch, "predict", PHOTOGRAPH, "--size", 64, *checkpoint) == 0
    shown = capsys.readouterr()
    assert not shown.err
    best = predict(model, spanet.images.read_input(model, PHOTOGRAPH, 64))[0]
    assert shown.out.splitlines()[0].strip() == f"{best.probability:.2%}  {best.name}"
    assert run(monkeypatch, "segment", PHOTOGRAPH, "--size", 32, "--out", tmp_path / "segment.png") == 0
    assert run(monkeypatch, "detect", PHOTOGRAPH, "--size", 32, "--out", tmp_path / "detect.png") == 0
    for name in ("segment", "detect"):
        assert Image.open(tmp_path / f"{name}.png").size == Image.open(PHOTOGRAPH).size
    assert Image.open(tmp_path / "predict.png").width > 1000


def test_models_of_tasks_need_classes():
    for make in (semantic_fpn, retinanet, mask_rcnn):
        with torch.device("meta"), pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
            make("spanet_small", 0)


def test_modules_are_there_when_asked_for():
    code = "import spanet; print(spanet.segmentation.semantic_fpn, spanet.detection.retinanet, spanet.train.memory_kept); spanet.tests"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "retinanet" in out.stdout
    assert out.stderr.splitlines()[-1] == "AttributeError: module 'spanet' has no attribute 'tests'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "broken.png"), "broken.png: not an image that can be read"),
        (("predict", "text.png"), "text.png: not an image that can be read"),
        (("predict", "broken.ppm"), "broken.ppm: not an image that can be read"),
        (("predict", "absent.png"), "absent.png: not an image that can be read"),
        (("predict", "empty"), "empty: not an image that can be read"),
        (("spectra", "absent.png", "--out", "x"), "absent.png: no such file or folder"),
        (("spectra", "empty", "--out", "x"), "empty: no image in this folder"),
        (("segment", "broken.png", "--out", "x.png"), "broken.png: not an image that can be read"),
        (("detect", "text.png", "--out", "x.png"), "text.png: not an image that can be read"),
        (("predict", PHOTOGRAPH, "--model", "spanet_tiny"), "must be a registered name such as spanet_small, got spanet_tiny"),
        (("segment", PHOTOGRAPH, "--model", "spanet_tiny", "--out", "x.png"), "must be a registered model such as spanet_small"),
        (("spectra", PHOTOGRAPH, "--peer", "spanet_tiny", "--out", "x"), "must be a registered name such as spanet_small, got spanet_tiny"),
        (("spectra", PHOTOGRAPH, "--peer", "spanet_small", "--out", "x"), "peer: must be another model than spanet_small"),
        (("predict", PHOTOGRAPH, "--size", "2"), "the input must have at least 3 x 3 pixels, got 2 x 2"),
        (("segment", PHOTOGRAPH, "--size", "2", "--out", "x.png"), "the input must have at least 3 x 3 pixels, got 2 x 3"),
        (
            ("predict", PHOTOGRAPH, "--model", "spanet_small", "--checkpoint", "text.png"),
            "checkpoint: it is no PyTorch or safetensors",
        ),
        (("detect", PHOTOGRAPH, "--checkpoint", "text.png", "--out", "x.png"), "text.png does not fit RetinaNet"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.png").write_text("no image")
    Path("broken.png").write_bytes(PHOTOGRAPH.read_bytes()[:5000])
    Path("broken.ppm").write_bytes(b"P6 6x 4 255 ")
    assert run(monkeypatch, *arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "no checkpoint" not in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("x.png").exists()
    assert not Path("x").exists()
