"""What the frozen tower says is kept: the same tokens and losses as without a cache, whatever happens to its files."""

import json
import logging

import pytest
import torch
from conftest import make_image, make_model, make_processor
from test_trainer import PARTS, loss_and_gradients, make_rows, make_trainer

from granulon.train.vision_cache import VisionCache


def pixels(count=4):
    images = [make_image(seed) for seed in range(count)]
    return make_processor().image_processor(images, return_tensors="pt")["pixel_values"]


def counted(model):
    """The model, and the numbers of images that its tower is asked about."""
    asked, tower_says = [], model.model._vision
    model.model._vision = lambda values, **kwargs: asked.append(len(values)) or tower_says(values, **kwargs)
    return model, asked


def cached(folder, **options):
    model, asked = counted(make_model())
    return model, VisionCache(model.model, folder, **options).attach(), asked


def same(first, second):
    for name in ("image_hidden_states", "cluster_map", "cluster_scores"):
        torch.testing.assert_close(first[name], second[name], atol=0, rtol=0)


def test_images_go_through_the_tower_once_and_come_back_bit_for_bit(tmp_path):
    plain = make_model().encode(pixels(), granularity="fine")
    model, cache, asked = cached(tmp_path)
    first, second = (model.encode(pixels(), granularity="fine") for _ in range(2))
    twice = model.encode(pixels()[[0, 0, 3]], granularity="fine")
    same(plain, first)
    same(plain, second)
    same(twice, {name: plain[name][[0, 0, 3]] for name in ("image_hidden_states", "cluster_map", "cluster_scores")})
    assert asked == [4]
    later, _, asked = cached(tmp_path)
    same(plain, later.encode(pixels(), granularity="fine"))
    assert asked == []


def test_losses_and_gradients_are_those_without_the_cache(tmp_path):
    rows = make_rows()
    without = loss_and_gradients(make_trainer(tmp_path, rows), rows)
    for _ in ("written", "read"):
        trainer = make_trainer(tmp_path, rows, vision_cache=str(tmp_path / "cache"))
        parts, loss, gradients = loss_and_gradients(trainer, rows)
        assert loss.item() == pytest.approx(without[1].item(), rel=1e-6)
        assert [parts[part] for part in PARTS] == pytest.approx([without[0][part] for part in PARTS], rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, without[2][name], atol=1e-6, rtol=1e-5)
    assert trainer.granulon._vision.misses == 0, "the second trainer reads what the first has written"


def test_in_bfloat16_the_losses_stay_close(tmp_path):
    rows = make_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts, loss, _ = loss_and_gradients(make_trainer(tmp_path, rows), rows)
        cached_run = make_trainer(tmp_path, rows, vision_cache=str(tmp_path / "cache"))
        cached_parts, cached_loss, _ = loss_and_gradients(cached_run, rows)
    assert cached_loss.item() == pytest.approx(loss.item(), rel=1e-3)
    assert [cached_parts[part] for part in PARTS] == pytest.approx([parts[part] for part in PARTS], rel=1e-3)


@pytest.mark.parametrize("cut", [2, 60, 100_000])
def test_what_a_kill_cut_off_is_asked_again(tmp_path, cut):
    plain = make_model().encode(pixels(), granularity="fine")
    model, cache, _ = cached(tmp_path)
    model.encode(pixels(), granularity="fine")
    (data,), (index,) = (list(cache.folder.glob(f"*{suffix}")) for suffix in (".bin", ".jsonl"))
    file = index if cut < 1000 else data
    content = file.read_bytes()
    file.write_bytes(content[: max(len(content) - cut, len(content) // 2)])
    model, _, asked = cached(tmp_path)
    same(plain, model.encode(pixels(), granularity="fine"))
    assert asked and sum(asked) < 4


def test_two_processes_write_and_read_one_cache(tmp_path):
    plain = make_model().encode(pixels(), granularity="fine")
    (first, one, _), (second, two, _) = (cached(tmp_path, process=number) for number in range(2))
    first.encode(pixels()[:2], granularity="fine")
    second.encode(pixels()[1:], granularity="fine")
    assert one.own != two.own and len(list(one.folder.glob("*.bin"))) == 2
    model, _, asked = cached(tmp_path)
    same(plain, model.encode(pixels(), granularity="fine"))
    assert asked == []


def test_another_picture_processor_tower_layer_or_dtype_finds_nothing(tmp_path):
    model, cache, asked = cached(tmp_path)
    model.encode(pixels())
    model.encode(pixels() + 1e-3)
    assert asked == [4, 4]
    folders = {cache.folder}
    for other in (
        make_model(seed=1),
        make_model(vision_feature_layer=-2),
        make_model().bfloat16(),
        make_model("clip"),
    ):
        folders.add(VisionCache(other.model, tmp_path).folder)
    assert len(folders) == 5


def test_a_full_disk_ends_the_writing_and_not_the_training(tmp_path, monkeypatch, caplog):
    model, cache, asked = cached(tmp_path)
    cache.folder.chmod(0o500)
    monkeypatch.setattr(cache, "folder", tmp_path / "gone")  # as good as full, for root too
    plain = make_model().encode(pixels(), granularity="fine")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            same(plain, model.encode(pixels(), granularity="fine"))
    assert asked == [4, 4] and len(caplog.records) == 1 and "cannot grow" in caplog.text


def test_a_tower_that_trains_is_refused(tmp_path):
    model = make_model()
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze the tower or turn the cache off"):
        VisionCache(model.model, tmp_path)


def test_lines_that_are_no_entries_are_left_out(tmp_path):
    model, cache, _ = cached(tmp_path)
    model.encode(pixels())
    (index,) = cache.folder.glob("*.jsonl")
    lines = index.read_text().splitlines()
    index.write_text("\n".join(["[]", "{", json.dumps({"key": "x"}), *lines]))
    model, _, asked = cached(tmp_path)
    model.encode(pixels())
    assert asked == []
