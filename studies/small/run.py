"""`make train-small`: train granulon-small from the parts to the release; resumes if interrupted.

    python -m studies.small.run --output build/train-small

Photographed scenes are written, DINOv2-small and SmolLM2-135M-Instruct assembled, the projector is fitted to words,
projector and adapters are trained on questions (recipe sft-small), and the controller on what every level answers.
Each stage has a folder and is skipped once that is complete. Last come the trained parts alone: OUTPUT/release.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from granulon.hub.assemble import (
    ADAPTER_ENDINGS,
    ADAPTER_SCALE,
    CHAT_TEMPLATE,
    TRAINABLE,
    TRAINABLE_WEIGHTS,
    assemble,
)
from granulon.hub.files import atomic_folder
from granulon.hub.inference import load_model, load_processor
from granulon.hub.parts import fetch_part
from granulon.train import sft, word_start
from granulon.train.controller.fit import save_with_controller, tables, train_controller
from granulon.train.controller.measure import measure_rows
from granulon.train.data import cutouts
from granulon.train.data.rows import load_rows
from granulon.train.vision_cache import VisionCache
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES

LEVELS = [{**level, "view": "semantic"} for level in DEFAULT_GRANULARITIES]
MEASURED = 4000  # training questions whose answers are scored at every level, for the controller
TOKEN_COST = 0.005  # nats that an image token costs, so that of two levels that answer as well the coarser is chosen
ADAPTER_PREFIX = "base_model.model."


@contextmanager
def stage(title: str, folder: Path) -> Iterator[bool]:
    """Whether the stage that writes `folder` has to run; prints its name and how long it took."""
    start, todo = time.perf_counter(), not folder.exists()
    print(f"== {title}{'' if todo else ': done before'}", flush=True)
    yield todo
    if todo:
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/train-small"))
    parser.add_argument("--max_steps", type=int, default=-1, help="of every stage, to check that all of them run")
    options = parser.parse_args(argv)
    output, few = options.output, options.max_steps
    scenes, cache = output / "scenes", output / "vision_cache"
    with stage("scenes", scenes / "phrasings.jsonl"):
        for rows in cutouts.write(scenes):
            print(f"   {rows}")
    with stage("assembling", output / "base") as todo:
        if todo:
            parts = [fetch_part(name) for name in ("dinov2-small", "smollm2-135m-instruct")]
            assemble(*parts, output / "base", settings={"granularities": LEVELS}, chat_template=CHAT_TEMPLATE)
    with stage("projector: words", output / "words") as todo:
        if todo:
            steps = ["--steps", str(few)] if few > 0 else []
            folders = ["--model", output / "base", "--scenes", scenes / "train", "--output", output / "words"]
            word_start.main([*map(str, folders), "--vision_cache", str(cache), *steps])
    with stage("projector and adapters: questions (recipe sft-small)", output / "sft" / "adapter") as todo:
        if todo:
            train_on_questions(output, few)
    with stage("controller: the levels that answer", output / "model") as todo:
        if todo:
            train_on_levels(output, few)
    with stage("trained parts alone", output / "release") as todo:
        if todo:
            write_release(output, output / "release")
    print(f"granulon-assemble --trained {output / 'release'} --output {output / 'assembled'}")


def train_on_questions(output: Path, max_steps: int):
    data = f"{{path: {output}/scenes/train.jsonl, image_folder: {output}/scenes}}"
    recipe = output / "sft-small.yaml"
    steps = f"max_steps: {max_steps}\n" if max_steps > 0 else ""
    recipe.write_text(
        f"base: sft-small\nmodel_name_or_path: {output}/words\noutput_dir: {output}/sft\ndata: [{data}]\n"
        f"vision_cache: {output}/vision_cache\n{steps}use_cpu: {not torch.cuda.is_available()}\n"
    )
    sft.main(["--config", str(recipe), "--resume", "true"])


def train_on_levels(output: Path, limit: int):
    """The controller learns at which level the model's own answers are likeliest, by its own words."""
    merged = output / "sft" / "model"
    model = load_model(merged)
    processor = load_processor(merged, model.config)
    VisionCache(model.model, output / "vision_cache").attach()
    source = {"path": str(output / "scenes/train.jsonl"), "image_folder": str(output / "scenes")}
    rows = load_rows([source], processor, seed=0, quarantine=output / "quarantine.jsonl", levels=cutouts.LEVELS)
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: limit if limit > 0 else MEASURED]
    measured = measure_rows(
        model, processor, (rows[number] for number in some.tolist()), batch_size=32, cost_per_token=TOKEN_COST
    )
    report = train_controller(model, processor, list(measured))
    print(tables(report))
    save_with_controller(merged, model.model.granularity_controller, report, output / "model")


def write_release(output: Path, folder: Path):
    """Projector, gains, controller and adapters in bfloat16, with what says where they came from."""
    model = output / "model"
    weights = {
        name: value for file in model.glob("model*.safetensors") for name, value in load_file(file).items()
        if name.startswith(TRAINABLE_WEIGHTS)
    }  # fmt: skip
    with safe_open(output / "sft/adapter/adapter_model.safetensors", "pt") as adapter:
        for name in adapter.keys():
            if name.endswith(ADAPTER_ENDINGS):
                weights[name.removeprefix(ADAPTER_PREFIX)] = adapter.get_tensor(name)
    settings = json.loads((output / "sft/adapter/adapter_config.json").read_text())
    header = {"format": "pt", ADAPTER_SCALE: str(settings["lora_alpha"] / settings["r"])}
    with atomic_folder(folder) as draft:
        save_file({name: value.bfloat16().contiguous() for name, value in weights.items()}, draft / TRAINABLE, header)
        for name in ("config.json", "processor_config.json", "chat_template.jinja", "granulon_manifest.json"):
            shutil.copyfile(model / name, draft / name)


if __name__ == "__main__":
    main()
