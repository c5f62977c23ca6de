"""Training and evaluation of the dense tasks by recipes, on folders laid out as ADE20K and COCO are."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from spanet import tasks
from spanet.cli import main
from spanet.pyramid import load_task

PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"
TINY = {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]}
PER_EPOCH = 100
FIT = "task: semantic_fpn\nnum_classes: 2\nbatch_size: 2\nlr: 0.1\nweight_decay: 0\nsize: 32\nsteps: 2"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Photographs whose dark left is class 0, right class 1, top without a label."""
    root = tmp_path_factory.mktemp("scenes")
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(4):
            pixels = np.array(Image.open(PHOTOGRAPH).resize((64, 48)))
            pixels[:, :32] //= 4
            Image.fromarray(pixels).save(root / "images" / split / f"{index}.jpg")
            labels = np.ones((48, 64), np.uint8)
            labels[:, 32:] = 2
            labels[:4] = 0
            Image.fromarray(labels).save(root / "annotations" / split / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Photographs with an object of category 7, one of category 90 and a crowd."""
    root = tmp_path_factory.mktemp("objects")
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(3):
            Image.open(PHOTOGRAPH).resize((64, 48)).save(root / split / f"{index}.jpg")
            images.append({"id": 10 + index, "file_name": f"{index}.jpg", "height": 48, "width": 64})
            for category, (x, y, w, h) in ((7, (4, 6, 30, 20)), (90, (30, 20, 24, 24))) if index < 2 else ():
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append({"category_id": category, "bbox": [x, y, w, h], "segmentation": [polygon], "area": w * h, "iscrowd": 0})
                annotations[-1] |= {"id": len(annotations), "image_id": 10 + index}
        crowd = {"counts": [0, 48 * 64], "size": [48, 64]}
        annotations.append({"id": 99, "image_id": 10, "category_id": 7, "bbox": [0, 0, 64, 48], "segmentation": crowd, "iscrowd": 1})
        annotations[-1]["area"] = 48 * 64
        categories = [{"id": 90, "name": "ear"}, {"id": 7, "name": "eye"}]
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        ("ade20k_semantic_fpn", 0, 2e-4),
        ("ade20k_semantic_fpn", 40_000, 2e-4 * 0.5**0.9),
        ("coco_retinanet", 0, 1e-7),
        ("coco_retinanet", 250, 1e-4 * 0.5005),
        ("coco_retinanet", 500, 1e-4),
        ("coco_retinanet", 8 * PER_EPOCH - 1, 1e-4),
        ("coco_retinanet", 8 * PER_EPOCH, 1e-5),
        ("coco_mask_rcnn", 11 * PER_EPOCH, 2e-6),
    ],
)
def test_learning_rate(name, step, rate):
    recipe = tasks.load_task_recipe(name)
    assert recipe.rate(step, recipe.steps or 12 * PER_EPOCH, PER_EPOCH) == pytest.approx(rate)


def test_recipes_are_the_paper_s():
    recipes = [tasks.load_task_recipe(name) for name in ("ade20k_semantic_fpn", "coco_retinanet", "coco_mask_rcnn")]
    assert [(recipe.batch_size, recipe.num_classes, recipe.steps, recipe.epochs) for recipe in recipes] == [
        (16, 150, 80_000, 0),
        (16, 80, 0, 12),
        (8, 80, 0, 12),
    ]


def test_batches_are_permutations_and_resume():
    recipe = replace(tasks.load_task_recipe("coco_mask_rcnn"), batch_size=3)
    batches = list(tasks.keys(10, recipe, 0, 7))
    assert [len(batch) for batch in batches] == [3] * 7
    for epoch in (0, 3):
        assert len({index for batch in batches[epoch : epoch + 3] for _, index in batch}) == 9
    assert [[index for _, index in batch] for batch in batches[:3]] != [[index for _, index in batch] for batch in batches[3:6]]
    assert list(tasks.keys(10, recipe, 4, 7)) == batches[4:]


def test_mean_iou():
    target = torch.tensor([[0, 0, 1], [1, 1, 255]])
    found = torch.tensor([[0, 1, 1], [1, 0, 0]])
    counts = tasks.confusion(found, target, 4)
    assert counts.sum() == 5
    assert tasks.mean_iou(counts) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_segmentation_trains_resumes_and_is_evaluated(scenes, tmp_path, monkeypatch):
    recipe = tasks.TaskRecipe("semantic_fpn", 2, 2, 1e-3, 1e-4, size=32, steps=12, model_args=TINY, checkpoint_steps=6)
    cpu = torch.device("cpu")
    whole = tasks.train_task(recipe, scenes, tmp_path / "whole", cpu, 0)
    assert sum(whole[-3:]) < 0.8 * sum(whole[:3])

    loss, calls = tasks.losses, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(tasks, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        tasks.train_task(recipe, scenes, tmp_path / "parts", cpu, 0)
    assert tasks.train_task(recipe, scenes, tmp_path / "parts", cpu, 1) == pytest.approx(whole[6:], rel=1e-5)
    with pytest.raises(ValueError, match=r"resume: lr was 0.001 when .* was started, got 0.01"):
        tasks.train_task(replace(recipe, lr=1e-2), scenes, tmp_path / "parts", cpu, 0)
    fewer = shutil.copytree(scenes, tmp_path / "fewer")
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        (fewer / kind / "training" / f"3.{ending}").unlink()
    with pytest.raises(ValueError, match=r"resume: images was 4 when .* was started, got 3"):
        tasks.train_task(recipe, fewer, tmp_path / "parts", cpu, 0)

    model = tasks.build_task(recipe)
    load_task(model, tmp_path / "whole" / "model.safetensors")
    after, before = tasks.evaluate_task(recipe, model, scenes), tasks.evaluate_task(recipe, tasks.build_task(recipe), scenes)
    assert 0 <= before["mIoU"] < after["mIoU"] <= 1


def test_detection_reads_its_data(objects):
    recipe = replace(tasks.load_task_recipe("coco_mask_rcnn"), num_classes=2, model_args=TINY, size=48)
    data = tasks.training_data(recipe, tasks.build_task(recipe), objects)
    assert len(data) == 2, "one image has no objects"
    torch.manual_seed(0)
    seen = set()
    for _ in range(8):
        image, target = data[0]
        assert image.shape == (3, 48, 64)
        assert 0 <= image.min() < image.max() <= 1
        assert target["labels"].tolist() == [1, 2], "categories 7 and 90; the crowd is left out"
        x1, y1, x2, y2 = (int(value) for value in target["boxes"][0])
        assert target["masks"][0].sum() == target["masks"][0, y1:y2, x1:x2].sum() == 600
        seen.add(x1)
    assert seen == {4, 30}, "as it is, and flipped"


@pytest.mark.parametrize("task", ["retinanet", "mask_rcnn"])
def test_detection_trains_and_is_evaluated(objects, tmp_path, task, monkeypatch):
    recipe = tasks.TaskRecipe(task, 2, 2, 1e-4, 1e-4, size=48, steps=2, model_args=TINY)
    course = tasks.train_task(recipe, objects, tmp_path, torch.device("cpu"), 0)
    assert len(course) == 2
    assert np.isfinite(course).all()

    def perfect(model, image):
        masks = torch.zeros(2, 1, 48, 64)
        masks[0, 0, 6:26, 4:34] = masks[1, 0, 20:44, 30:54] = 1
        labels = torch.tensor([0, 1]) + (task == "mask_rcnn")
        boxes = torch.tensor([[4.0, 6, 34, 26], [30, 20, 54, 44]])
        return {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9, 0.8]), "masks": masks}

    model = tasks.build_task(recipe)
    found = tasks.evaluate_task(recipe, model, objects)
    assert all(0 <= value < 0.5 for value in found.values())
    monkeypatch.setattr(tasks, "detect", perfect)
    perfected = tasks.evaluate_task(recipe, model, objects)
    assert list(perfected) == ["AP bbox"] + ["AP segm"] * (task == "mask_rcnn")
    # the third image has no object: what is found there costs precision
    assert all(0.6 < value <= 1 for value in perfected.values())


@pytest.mark.parametrize("task", ["semantic_fpn", "retinanet", "mask_rcnn"])
def test_processes_share_batches_and_evaluation(scenes, objects, tmp_path, task):
    text = f"task: {task}\nnum_classes: 2\nbatch_size: 2\nlr: 1e-3\nweight_decay: 0\nsize: 48\nsteps: 3\nmodel_args: {json.dumps(TINY)}"
    (tmp_path / "recipe.yaml").write_text(text)
    data = scenes if task == "semantic_fpn" else objects
    said, courses = [], []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        command = [sys.executable, *launcher, "-m", "spanet", "train-task", str(tmp_path / "recipe.yaml"), "--data", str(data)]
        out = tmp_path / str(processes)
        command += ["--out", str(out), "--device", "cpu", "--workers", "0"]
        said.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert {path.name for path in out.iterdir()} == {"last.pt", "model.safetensors", "steps.csv"}
        with (out / "steps.csv").open() as file:
            courses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert [len(course) for course in courses] == [3, 3]
    lines = {"semantic_fpn": ["mIoU"], "retinanet": ["AP bbox"], "mask_rcnn": ["AP bbox", "AP segm"]}[task]
    assert [[line.partition(":")[0] for line in text.splitlines()] for text in said] == [lines] * 2
    if task == "retinanet":  # its loss is a mean over images, of which none knows of another
        assert courses[1] == pytest.approx(courses[0], rel=1e-4)


def test_a_batch_that_processes_cannot_share(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "rank_and_world", lambda: (0, 3))
    recipe = tasks.TaskRecipe("semantic_fpn", 2, 2, 1e-3, 1e-4, size=32, steps=1, model_args=TINY)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 3, the processes, got 2"):
        tasks.train_task(recipe, scenes, tmp_path / "out", torch.device("cpu"), 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((48, 64), 3, np.uint8), r"1.png must hold a byte per pixel, from 0 to 2, got mode L and \(3, 3\)"),
        (np.ones((48, 64), np.uint16), "1.png must hold a byte per pixel, from 0 to 2, got mode I;16"),
        (np.ones((48, 64, 3), np.uint8), "1.png must hold a byte per pixel, from 0 to 2, got mode RGB"),
    ],
    ids=["too many", "16 bits", "colours"],
)
def test_labels_that_are_none(scenes, tmp_path, labels, message):
    shutil.copytree(scenes, tmp_path / "scenes")
    path = tmp_path / "scenes" / "annotations" / "training" / "1.png"
    Image.fromarray(labels).save(path)
    data = tasks.Scenes(tmp_path / "scenes", "training", 2, lambda *sample: sample)
    with pytest.raises(ValueError, match=message):
        data[1]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"1.png: not an image that can be read"):
        data[1]


def test_annotations_of_boxes_alone_and_such_that_do_not_fit(objects, tmp_path):
    shutil.copytree(objects, tmp_path / "objects")
    path = tmp_path / "objects" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    path.write_text(json.dumps(content))
    recipe = tasks.TaskRecipe("retinanet", 2, 2, 1e-4, 1e-4, size=48, steps=1, model_args=TINY)
    assert tasks.training_data(recipe, tasks.build_task(recipe), tmp_path / "objects")[0][1].keys() == {"boxes", "labels"}
    with pytest.raises(ValueError, match=r"instances_train2017.json must have at most 1 categories, num_classes, got 2"):
        tasks.Objects(tmp_path / "objects", "train2017", 1, False, lambda *sample: sample)
    with pytest.raises(ValueError, match=r"json must have an image and a category of the file and a segmentation for .* id 1$"):
        tasks.Objects(tmp_path / "objects", "train2017", 2, True, lambda *sample: sample)
    for key in ("image_id", "category_id"):
        foreign = content["annotations"][-1] | {key: 1234}
        path.write_text(json.dumps(content | {"annotations": [*content["annotations"][:-1], foreign]}))
        with pytest.raises(ValueError, match=r"json must have an image and a category of the file for every .* id 99$"):
            tasks.Objects(tmp_path / "objects", "train2017", 2, False, lambda *sample: sample)
    for damage in (path.read_text()[:100], "[]"):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"data: .*instances_train2017.json cannot be read: "):
            tasks.Objects(tmp_path / "objects", "train2017", 2, False, lambda *sample: sample)


def test_a_checkpoint_that_is_none(scenes, tmp_path):
    recipe = tasks.TaskRecipe("semantic_fpn", 2, 2, 1e-3, 1e-4, size=32, steps=1, model_args=TINY)
    torch.save({"identity": {}}, tmp_path / "foreign.pt")
    foreign = (tmp_path / "foreign.pt").read_bytes()
    for damage, message in ((b"", "last.pt is damaged"), (foreign[:100], "last.pt is damaged"), (foreign, "task was None when")):
        (tmp_path / "last.pt").write_bytes(damage)
        with pytest.raises(ValueError, match=f"resume: .*{message}"):
            tasks.train_task(recipe, scenes, tmp_path, torch.device("cpu"), 0)


def test_numbers_without_a_point(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{FIT}\nlr: 1e-4")
    assert tasks.load_task_recipe(str(tmp_path / "recipe.yaml")).lr == 1e-4
    assert tasks.load_task_recipe("coco_retinanet", ["lr=2e-4", "weights=spanet_small.pth"]).weights == "spanet_small.pth"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: semantic_fpn\nspeed: 3", "unknown key speed, the nearest known one is seed"),
        ("task: semantic_fpn", "recipe: num_classes, batch_size, lr, weight_decay, size must be given"),
        ("- 3", "must hold `key: value` lines, got a list"),
        (f"{FIT}\nlr: high", "lr must be of type float, got 'high'"),
        (f"{FIT}\nbatch_size: -1", "batch_size must be at least 1, got -1"),
        (f"{FIT}\nsize: 2", "size must be at least 3, got 2"),
        (f"{FIT}\nsteps: 1.5", "steps must be of type int, got 1.5"),
        (f"{FIT}\nmilestones: [8, late]", "milestones must be a list of epochs, got [8, 'late']"),
        ("task: pose\nnum_classes: 2\nbatch_size: 2\nlr: 0.1\nweight_decay: 0\nsize: 32\nsteps: 2", "task must be one of semantic_fpn,"),
        ("task: retinanet\nnum_classes: 2\nbatch_size: 2\nlr: 0.1\nweight_decay: 0\nsize: 32", "either steps or epochs must be"),
        ("task: retinanet\nnum_classes: 2\nbatch_size: 2\nlr: 0.1\nweight_decay: 0\nsize: 32\nsteps: 2", "there is no "),
        ("task: semantic_fpn\nnum_classes: 2\nbatch_size: 2\nlr: 0.1\nweight_decay: 0\nsize: 32\nsteps: 2", "there is no "),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    arguments = ["train-task", tmp_path / "recipe.yaml", "--data", tmp_path / "nothing", "--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["spanet", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()
