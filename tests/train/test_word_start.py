"""The projector's first lesson: what a token shows is where its word is."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_model, make_processor
from PIL import Image
from torch.nn import functional as F

from granulon.hub.inference import load_model
from granulon.hub.manifest import write_manifest
from granulon.train import word_start
from granulon.train.word_start import majority, word_targets

TEXTS = ["red", "blue", "green"]
COLOURS = [(200, 30, 30), (30, 30, 200), (30, 160, 30)]
SIDE, GRID = 24, 6  # of make_processor's images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and pictures whose left half has another colour than the right one."""
    folder, random = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    model = make_model(tie_word_embeddings=True)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    write_manifest(folder / "model", {"vision": {"source": "v"}, "text": {"source": "t"}})
    (folder / "scenes").mkdir()
    patches = []
    for number in range(60):
        left, right = random.choice(3, 2, replace=False)
        pixels = np.zeros((SIDE, SIDE, 3)) + COLOURS[left]
        pixels[:, SIDE // 2 :] = COLOURS[right]
        pixels += random.normal(0, 12, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "scenes" / f"{number:02}.jpg", quality=95)
        patches.append(np.repeat(np.array([[left] * 3 + [right] * 3]), GRID, 0).ravel())
    np.save(folder / "scenes-patches.npy", np.array(patches, np.int16))
    (folder / "scenes-texts.json").write_text(json.dumps(TEXTS))
    return folder


def test_tokens_of_new_pictures_are_nearest_to_the_words_for_what_they_show(folder):
    options = ["--model", folder / "model", "--scenes", folder / "scenes", "--output", folder / "start"]
    word_start.main([*map(str, options), "--steps", "300", "--batch_size", "64"])
    before, after = load_model(folder / "model"), load_model(folder / "start")
    processor = make_processor()
    target_WE = word_targets(after, processor, TEXTS)
    for model, right in ((before, False), (after, True)):
        hits = []
        for number, colour in enumerate(COLOURS):
            noise = np.random.default_rng(number).normal(0, 12, (SIDE, SIDE, 3))
            picture = Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8))
            pixel_values = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            visual = model.explain(pixel_values, granularity="coarse")
            tokens = visual.image_hidden_states[0, : GRID * GRID]
            near = (
                F.normalize(tokens - target_WE.mean(0), dim=-1) @ F.normalize(target_WE - target_WE.mean(0), dim=-1).T
            )
            hits.append((near.argmax(-1) == number).float().mean().item())
        assert (np.mean(hits) > 0.8) == right
    gap = (tokens.norm(dim=-1).mean() / target_WE.norm(dim=-1).mean()).item()
    assert 0.5 < gap < 2, "tokens are as long as words"
    for name, value in before.state_dict().items():
        if "multi_modal_projector" not in name:
            assert torch.equal(value, after.state_dict()[name]), f"{name} changed"
    manifest = json.loads((folder / "start" / "granulon_manifest.json").read_text())
    assert manifest["training"][-1]["stage"] == "words"


def test_patches_of_another_grid_are_refused(folder, tmp_path):
    scenes = shutil.copytree(folder / "scenes", tmp_path / "scenes")
    shutil.copy(folder / "scenes-texts.json", tmp_path)
    np.save(tmp_path / "scenes-patches.npy", np.zeros((60, 25), np.int16))
    with pytest.raises(SystemExit, match="36 patches of an image and the scenes name 25"):
        word_start.main(
            ["--model", str(folder / "model"), "--scenes", str(scenes), "--output", str(tmp_path / "start")]
        )


def test_images_without_patches_are_refused(folder, tmp_path):
    np.save(folder / "scenes-patches.npy", np.load(folder / "scenes-patches.npy")[:-1])
    options = ["--model", folder / "model", "--scenes", folder / "scenes", "--output", tmp_path / "start"]
    with pytest.raises(SystemExit, match="60 images and patches of 59"):
        word_start.main(list(map(str, options)))


def test_a_token_is_named_by_the_majority_of_its_patches():
    assignment = torch.tensor([[0, 0, 0, 1, -1]])
    text, share = majority(assignment, torch.tensor([[2, 2, 1, 0, 1]]), tokens=3, texts=3)
    assert text[0, :2].tolist() == [2, 0] and share[0].tolist() == pytest.approx([2 / 3, 1, 0])


def test_of_a_word_of_several_tokens_the_first_weighs_most():
    model, processor = make_model(), make_processor()
    ids = processor.tokenizer(" red", add_special_tokens=False)["input_ids"]
    shares = torch.tensor([12, 6, 4, 3]) / 25
    expected = shares @ model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(word_targets(model, processor, ["red"])[0], expected)
