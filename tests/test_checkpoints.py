"""Checkpoints: every published layout in, both ways out, and what does not fit changes nothing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage
import timm
import torch
from published import PublishedSPANet
from typer.testing import CliRunner

import spanet
from spanet.checkpoint import load_checkpoint, model_of, published_state, read_state, save_checkpoint
from spanet.cli import app
from spanet.evaluate import load_classifier
from spanet.macs import count_macs
from spanet.recipe import Recipe, build

TINY = {"depths": (1, 1, 2, 1), "dims": (12, 14, 16, 18), "num_classes": 5}
MASK = "network.2.0.token_mixer.sps.1.filter"


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("spanet_small", **TINY | kwargs)


def published(image=(224, 224), dense=False):
    torch.manual_seed(7)
    return PublishedSPANet(TINY["depths"], TINY["dims"], image, TINY["num_classes"], dense).state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    "flat": lambda state: state,
    "of another size": lambda state: published((96, 160)),
    "without masks": lambda state: {key: value for key, value in state.items() if not key.endswith(".filter")},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": "spanet_small", "args": argparse.Namespace(lr=1e-3)},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "module": lambda state: prefixed(state, "module."),
    "state_dict, module": lambda state: {"state_dict": prefixed(state, "module.")},
    "a detector's": lambda state: {"state_dict": prefixed(state, "backbone.") | {"neck.conv.weight": torch.ones(3)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["timm", "timm pretrained", "spanet", "features"])
def test_published_layouts(layout, way, tmp_path):
    state, file = published(), tmp_path / "published.pth"
    torch.save(LAYOUTS[layout](state), file)
    if way == "timm":
        model = tiny(checkpoint_path=file)
    elif way == "timm pretrained":
        model = tiny(pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 5})
    elif way == "spanet":
        model = tiny()
        load_checkpoint(model, file)
    else:
        model = tiny(features_only=True, out_indices=(0, 1, 2))
        load_checkpoint(model, file)
        model = model.model
        assert not model.state_dict().keys() & {"network.6.0.norm1.weight", "head.weight", "norm6.weight"}
    loaded = model.state_dict()
    assert len(loaded) > 50
    for key, value in loaded.items():
        if way != "features" or key in state:
            assert torch.equal(value, state[key]), key


def test_dense_layouts(tmp_path):
    state, file = published(dense=True), tmp_path / "detector.pth"
    torch.save({"state_dict": prefixed(state, "backbone."), "meta": {"epoch": 12}}, file)
    model = tiny(features_only=True)
    load_checkpoint(model, file)
    assert model.model.state_dict().keys() == {key for key in state if not key.endswith(".filter")}
    assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())
    refused(tiny(), file, "lacks head.bias, head.weight, norm.bias, norm.weight, unlike this model")


def test_pretrained_for_other_classes_and_channels(tmp_path):
    state, file = published(), tmp_path / "published.pth"
    torch.save(state, file)
    model = tiny(pretrained=True, num_classes=9, in_chans=1, pretrained_cfg_overlay={"file": str(file), "num_classes": 5})
    assert model.head.weight.shape == (9, 18)
    assert torch.allclose(model.patch_embed.proj.weight, state["patch_embed.proj.weight"].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(model.network[6][0].mlp.fc2.weight, state["network.6.0.mlp.fc2.weight"])


def test_export_for_the_published_code(tmp_path):
    model = timm.create_model("spanet_small")
    save_checkpoint(model, tmp_path / "ours.pth")
    state = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert len(state) == 644
    with torch.device("meta"):
        theirs = PublishedSPANet((4, 4, 12, 4), (64, 128, 320, 512))
    theirs.load_state_dict(state, strict=True, assign=True)
    for index, size in zip((0, 2, 4, 6), (56, 28, 14, 7), strict=True):
        assert state[f"network.{index}.0.token_mixer.sps.2.filter"].shape == (1, size, size)
    assert state["network.0.0.token_mixer.sps.0.filter"][0, 28, 26:31].tolist() == pytest.approx([1 / 3, 0.7, 0.7, 0.7, 1 / 3])
    assert timm.create_model("spanet_small", checkpoint_path=tmp_path / "ours.pth").state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dense", [False, True])
def test_there_and_back(suffix, dense, tmp_path):
    model, other = tiny(1, features_only=dense), tiny(2, features_only=dense)
    save_checkpoint(model.to(memory_format=torch.channels_last), tmp_path / f"model{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"model{suffix}"]
    load_checkpoint(other, tmp_path / f"model{suffix}")
    found = model_of(read_state(tmp_path / f"model{suffix}"))
    for key, value in (model.model if dense else model).state_dict().items():
        assert torch.equal((other.model if dense else other).state_dict()[key], value)
        assert torch.equal(found.state_dict()[key], value)


def refused(model, source, match):
    """Loading raises one error of that text, and leaves the model as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        load_checkpoint(model, source) if not isinstance(source, dict) else model.load_state_dict(source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_masks_that_disagree():
    state = published()
    other_radius = {key: value.roll(1, -1) if key == MASK else value for key, value in state.items()}
    refused(tiny(), other_radius, f"{MASK}.* is not the mask of lam=0.8, radius=2")
    refused(tiny(radii=(2, 1, 1, 1)), state, r"network\.2\.0\.token_mixer\.sps\.0\.filter.* radius=1")
    refused(tiny(lams=(0.7, 0.8, 0.6)), state, r"sps\.2\.filter.* lam=0.6")
    refused(tiny(boundary="paper"), state, r"sps\.0\.filter.* boundary=None")
    refused(tiny(), state | {"network.0.0.token_mixer.sps.3.filter": state[MASK]}, r"network\.0\.0\.token_mixer\.sps\.3\.filter")
    # the last stage is wrong: the first is not loaded either
    wrong = state | {"network.6.0.token_mixer.sps.2.filter": torch.full((1, 7, 7), 0.5)}
    refused(tiny(), wrong, r"network\.6\.0\.token_mixer\.sps\.2\.filter")


def test_states_that_do_not_fit(tmp_path):
    state, model = published(), tiny()
    refused(model, state | {"head.weight": torch.zeros(6, 18)}, r"head.weight must have shape \(5, 18\), got \(6, 18\)")
    refused(model, state | {"head.weight": "weights"}, r"head.weight must have shape \(5, 18\), got str")
    refused(model, state | {"tail.weight": torch.zeros(6)}, "has tail.weight, unlike")
    refused(
        model, {key: value for key, value in state.items() if key != "network.4.1.mlp.fc2.bias"}, r"lacks network\.4\.1\.mlp\.fc2\.bias"
    )
    deeper = timm.create_model("spanet_small", **TINY | {"depths": (1, 1, 3, 1)})
    refused(deeper, state, r"lacks network\.4\.2\.mlp\.fc1\.bias, .* more, unlike this model")
    torch.save(state, tmp_path / "small.pth")
    refused(deeper, tmp_path / "small.pth", r"small\.pth: SPANet: the state lacks network\.4\.2")
    refused(model, {"state_dict": {"features.0.weight": torch.ones(1)}}, "lacks .* and has features.0.weight")
    with pytest.raises(ValueError, match="holds no SPANet"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="not of a SPANet: it lacks"):
        model_of({"features.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="not of a SPANet: a weight has too few dimensions"):
        model_of(dict.fromkeys(state, torch.tensor(1.0)))


class Payload:
    def __reduce__(self):
        return print, ("code of a checkpoint runs",)


def test_files_that_cannot_be_read(tmp_path, capsys):
    state, model = published(), tiny()
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "short.pth").write_bytes(whole[:size])
        refused(model, tmp_path / "short.pth", r"short\.pth cannot be read as a checkpoint: ")
    tensors = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    (tmp_path / "short.safetensors").write_bytes(tensors[: len(tensors) // 2])
    refused(model, tmp_path / "short.safetensors", r"short\.safetensors cannot be read as a checkpoint: ")
    torch.save({"state_dict": state, "extra": Payload()}, tmp_path / "code.pth")
    refused(model, tmp_path / "code.pth", r"code\.pth cannot be read as a checkpoint: .* holds code, which is not run")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload()))
    refused(model, tmp_path / "pickle.pth", r"pickle\.pth cannot be read as a checkpoint: ")
    assert "code of a checkpoint runs" not in capsys.readouterr().out
    for content in ([1, 2], {"epoch": 3}, {}):
        torch.save(content, tmp_path / "other.pth")
        refused(model, tmp_path / "other.pth", r"other\.pth (cannot be read|holds no state dict)")
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load_checkpoint(model, tmp_path / "none.pth")


def test_failed_writing_keeps_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tiny(1), tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tiny(2), tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_hub(tmp_path):
    kwargs = TINY | {"radii": (3, 2, 1, 1), "lams": (0.6, 0.9)}
    model = spanet.SPANet(**kwargs)
    model.save_pretrained(tmp_path / "mixin")
    again = spanet.SPANet.from_pretrained(tmp_path / "mixin")
    assert again.network[0][0].token_mixer.radius == 3
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    model = tiny(3)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=TINY)
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_convert(tmp_path):
    torch.save({"state_dict": published()}, tmp_path / "in.pth")
    for source, target in (("in.pth", "ours.safetensors"), ("ours.safetensors", "back.pth")):
        result = CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / target)], catch_exceptions=False)
        assert result.exit_code == 0
    assert safetensors.torch.load_file(tmp_path / "ours.safetensors").keys() == tiny().state_dict().keys()
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == published().keys()
    assert all(torch.allclose(value, back[key], atol=1e-7) for key, value in published().items())


def convert(source, target):
    return CliRunner().invoke(app, ["convert", str(source), str(target)])


def test_convert_goes_by_the_recipe_of_the_file(tmp_path):
    """Radii, lams and boundary of a run are in its metadata, which stays in a safetensors file; what assumes them says so."""
    arguments = TINY | {"radii": (3, 3, 1, 1), "lams": (0.5, 0.6, 0.9), "boundary": "paper"}
    recipe = Recipe(model_args={key: value for key, value in arguments.items() if key != "num_classes"})
    classes = [str(i) for i in range(TINY["num_classes"])]
    model = timm.create_model("spanet_small", **arguments)
    metadata = {"run": json.dumps({"recipe": asdict(recipe), "classes": classes})}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "best.safetensors", metadata)
    for source, target in (("best.safetensors", "same.safetensors"), ("same.safetensors", "out.pth")):
        result = convert(tmp_path / source, tmp_path / target)
        assert result.exit_code == 0, result
        assert "assumed" not in result.output
    with safetensors.safe_open(tmp_path / "same.safetensors", "pt") as file:
        assert file.metadata() == metadata
    written, wanted = torch.load(tmp_path / "out.pth", weights_only=True), published_state(model)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(value, written[key]) for key, value in wanted.items())
    safetensors.torch.save_file(tiny().state_dict(), tmp_path / "plain.safetensors")
    assert "the published ones are assumed" in convert(tmp_path / "plain.safetensors", tmp_path / "plain.pth").output


@pytest.mark.parametrize(("mixer", "has_form"), [({"learnable": True}, True), ({"lams": ()}, False)])
def test_convert_of_other_mixers(tmp_path, mixer, has_form):
    recipe = Recipe(model_args={"depths": TINY["depths"], "dims": TINY["dims"]} | mixer)
    metadata = {"run": json.dumps({"recipe": asdict(recipe), "classes": [str(i) for i in range(TINY["num_classes"])]})}
    safetensors.torch.save_file(tiny(**mixer).state_dict(), tmp_path / "best.safetensors", metadata)
    result = convert(tmp_path / "best.safetensors", tmp_path / "out.pth")
    if has_form:
        again = tiny(learnable=True)
        load_checkpoint(again, tmp_path / "out.pth")
        before = safetensors.torch.load_file(tmp_path / "best.safetensors")
        assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())
        return
    error = str(result.exception)
    assert "out.pth: the published layout has no such form, *.safetensors has: " in error
    assert "\n" not in error
    assert not (tmp_path / "out.pth").exists()
    assert convert(tmp_path / "best.safetensors", tmp_path / "out.safetensors").exit_code == 0


def test_convert_of_no_file(tmp_path):
    for source in (tmp_path, tmp_path / "none.pth"):
        assert str(convert(source, tmp_path / "out.pth").exception) == f"{source}: no such file"


def test_convert_refuses_in_one_line(tmp_path):
    torch.save(published() | {MASK: torch.ones(1, 28, 28)}, tmp_path / "in.pth")
    command = [sys.executable, "-m", "spanet", "convert", str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("spanet: ")
    assert MASK in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


def test_info():
    result = CliRunner().invoke(app, ["info"], catch_exceptions=False)
    for figure in ("28,605,096", "4.606G", "99,718,312", "15.775G"):
        assert figure in result.stdout


def test_a_deeper_state_where_that_is_allowed():
    deeper = timm.create_model("spanet_small", **TINY | {"depths": [depth + 1 for depth in TINY["depths"]]})
    model, state = tiny(), published_state(deeper)
    with pytest.raises(ValueError, match="has network"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    assert torch.equal(model.network[0][0].token_mixer.proj_in.weight, state["network.0.0.token_mixer.proj_in.weight"])


def test_published_state_needs_the_published_form():
    with pytest.raises(ValueError, match="no lams"):
        published_state(tiny(lams=()))


def test_macs_of_plain_layers():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, 2, 1, groups=2), torch.nn.Flatten(), torch.nn.Linear(6 * 16, 10))
    assert count_macs(model, torch.zeros(3, 4, 8, 8)) == 3 * (6 * 2 * 9 * 16 + 960)


def run_file(path, **model_args):
    """best.safetensors of a run of tiny models, whose classes have names that look like markup."""
    recipe = Recipe(model_args={"depths": TINY["depths"], "dims": TINY["dims"]} | model_args)
    classes = [f"[b]{i}[/x]" for i in range(TINY["num_classes"])]
    model = tiny(**model_args)
    safetensors.torch.save_file(model.state_dict(), path, {"run": json.dumps({"recipe": asdict(recipe), "classes": classes})})
    return model, classes


def test_a_run_tells_its_model_whatever_name_is_given(tmp_path):
    model, classes = run_file(tmp_path / "best.safetensors", boundary="paper", lams=[0.5, 0.6, 0.9])
    for name in (None, "spanet_small"):
        found, found_classes, _ = load_classifier(tmp_path / "best.safetensors", name)
        assert found_classes == classes
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(found.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"model: must be spanet_small, which .* is of, got spanet_base"):
        load_classifier(tmp_path / "best.safetensors", "spanet_base")


def test_a_head_of_any_size_is_read(tmp_path):
    model = timm.create_model("spanet_small", num_classes=2)
    save_checkpoint(model, tmp_path / "two.pth")
    assert load_classifier(tmp_path / "two.pth", "spanet_small")[0].num_classes == 2


def test_names_are_no_markup(tmp_path):
    run_file(tmp_path / "best.safetensors")
    photograph = Path(skimage.__file__).parent / "data" / "chelsea.png"
    shown = CliRunner().invoke(app, ["predict", str(photograph), "--checkpoint", str(tmp_path / "best.safetensors"), "--size", "32"])
    assert "[b]0[/x]" in shown.output


@pytest.mark.parametrize("change", ["lams", "array", "classes", "no classes"])
def test_a_changed_model_comes_back_from_the_hub_s_format(tmp_path, change):
    options = {"lams": {"lams": torch.tensor([0.1, 0.2, 0.3])}, "array": {"radii": np.array([3, 3, 3, 3])}}
    model = tiny(**options.get(change, {}))
    if change == "classes":
        model.reset_classifier(3)
    elif change == "no classes":
        model.reset_classifier(0, "")
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(x), model.eval()(x))


def test_a_pruned_model_is_not_written_as_a_whole_one(tmp_path):
    for dense, indices in ((False, 2), (True, 1)):
        model = tiny(dense=dense)
        model.prune_intermediate_layers([indices])
        with pytest.raises(ValueError, match="save_pretrained writes what arguments make, not a pruned network"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
    headless = tiny()
    headless.prune_intermediate_layers([-1])
    headless.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(spanet.SPANet.from_pretrained(tmp_path).eval().forward_features(x), headless.eval().forward_features(x))


def test_what_is_no_file_is_not_replaced(tmp_path):
    model = tiny()
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(OSError, match=r"pipe\.safetensors: it is not a file"):
        save_checkpoint(model, tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("target.safetensors")
    save_checkpoint(model, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "target.safetensors").is_file()


def test_a_boundary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="model_args must have values, got none for boundary"):
        build(Recipe(model_args={"boundary": None}), 10)
