"""The projector's first lesson: a token that shows a zebra points to where the language model keeps the word "zebra".

    python -m granulon.train.word_start --model build/base --scenes build/cutouts/train --output build/start

A new projector writes noise into the language model, which takes tens of thousands of answers to find out that there
is something to read. Where it is known what the patches show (train/data/cutouts.py writes it), the projector can be
fitted without the language model, in minutes: features are centred and scaled once, and every token, semantic or
pixel, is drawn to the word embedding of what most of its patches show, and away from all else. A semantic token also
says in words where it lies and how large it is, so that places can be asked for.

Shapes by suffix: S scenes, N patches, K tokens of a level, M training tokens, D vision width, E text width, W texts.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from granulon.hub.files import atomic_folder
from granulon.hub.inference import load_model, load_processor, open_image
from granulon.hub.manifest import append_training_record, read_manifest, write_manifest

from .vision_cache import VisionCache

PIXEL_TOKENS = 16  # of every scene, drawn at random
PLACE_WORDS = ("top", "bottom", "left", "right", "small", "big")  # pairs, of a cluster's row, column and size
PLACE_WEIGHT = 0.3  # of each pair beside the word for what a token shows
SMALLEST = 5.5  # minus the logarithm of the share of an image that is as small as can be: a patch of 16 x 16
SHARPNESS = 20.0  # of the softmax over texts, whose logits are cosines


def word_targets(model, processor, texts: list[str]) -> Tensor:
    """The mean word embedding of each text (W,E), fp32; its first token, which begins an answer, counts most."""
    words = model.get_input_embeddings().weight.detach().float()
    ids = processor.tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    shares = [torch.tensor([1 / place for place in range(1, len(row) + 1)]) for row in ids]
    return torch.stack([share @ words[row] / share.sum() for row, share in zip(ids, shares, strict=True)])


def place_targets(geometry_M5: Tensor, place_6E: Tensor) -> Tensor:
    """Where clusters lie and how large they are, as mixtures of the words for it: (M,5) and (6,E) give (M,E)."""
    row_M, column_M, size_M = geometry_M5[:, 0], geometry_M5[:, 1], 1 + 2 * geometry_M5[:, 4] / SMALLEST
    towards_M3 = torch.stack([row_M, column_M, size_M], dim=1).clamp(-1, 1)
    weight_M6 = torch.stack([(1 - towards_M3) / 2, (1 + towards_M3) / 2], dim=2).flatten(1)  # (M,3,2) -> (M,6)
    return PLACE_WEIGHT * weight_M6 @ place_6E


def majority(assignment_SN: Tensor, text_SN: Tensor, tokens: int, texts: int) -> tuple[Tensor, Tensor]:
    """The text that most patches of each token show (S,K), and their share of its patches; 0 without patches."""
    index = assignment_SN.clamp_min(0) * texts + text_SN
    votes = torch.zeros(len(index), tokens * texts).scatter_add_(1, index, (assignment_SN >= 0).float())
    votes_SKW = votes.unflatten(1, (tokens, texts))
    most_SK, text_SK = votes_SKW.max(-1)
    return text_SK, most_SK / votes_SKW.sum(-1).clamp_min(1)


@torch.no_grad()
def collect(model, processor, images: list[Path], text_SN: Tensor, texts: int, batch: int = 32) -> dict[int, tuple]:
    """Inputs of the projector and what they show: by level, and by -1 for pixel tokens, (features, geometry, text,
    share of the patches) of all tokens, (M,D), (M,5) or None, (M,), (M,)."""
    granulon, found = model.model, {level: [] for level in (-1, *range(len(model.config.granularities)))}
    at_random = torch.Generator().manual_seed(0)
    for start in tqdm(range(0, len(images), batch), desc="features"):
        pictures = [open_image(str(path)) for path in images[start : start + batch]]
        text = text_SN[start : start + batch]
        vision = granulon._vision(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
        if vision.features.shape[1] != text.shape[1]:
            raise ValueError(
                f"the model makes {vision.features.shape[1]} patches of an image and the scenes name {text.shape[1]}; "
                "assemble it for images of their size"
            )
        relation = granulon._relation(vision)
        for level, entry in enumerate(model.config.granularities):
            made = granulon.aggregation(
                vision.features, relation, entry["stride"], entry["clusters"], grid=vision.grid, top_k=entry["keep"]
            )
            shown, share = majority(made.assignment.flatten(1), text, made.tokens.shape[1], texts)
            used = share > 0
            found[level].append((made.tokens[used].bfloat16(), made.geometry[used], shown[used], share[used]))
        some = torch.randint(text.shape[1], (len(pictures), PIXEL_TOKENS), generator=at_random)
        shown = text.gather(1, some).flatten()
        features = vision.features.gather(1, some[..., None].expand(-1, -1, vision.features.shape[-1])).flatten(0, 1)
        found[-1].append((features.bfloat16(), None, shown, torch.ones(len(shown))))
    return {
        level: tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        for level, parts in found.items()
    }


def fit(projector, tokens: dict[int, tuple], target_WE: Tensor, place_6E: Tensor, steps, batch, rate) -> float:
    """Fit the projector; the share of tokens, at the end of training, whose nearest text is the one they show."""
    features = torch.cat([part[0] for part in tokens.values()]).float()
    mean_D, scale_D = features.mean(0), features.std(0)
    centre_E = target_WE.mean(0)
    direction_WE, scale = F.normalize(target_WE - centre_E, dim=-1), target_WE.norm(dim=-1).mean()
    with torch.no_grad():  # what the projector reads is centred and scaled, once
        projector.linear_1.reset_parameters()
        projector.linear_2.reset_parameters()
        projector.linear_1.weight.div_(scale_D)
        projector.linear_1.bias.sub_(projector.linear_1.weight @ mean_D)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    right, at_random = 0.0, torch.Generator().manual_seed(0)
    for step in (bar := tqdm(range(steps), desc="words")):
        loss, hits, count = 0.0, 0.0, 0
        for level, (features, geometry, shown, share) in tokens.items():
            some = torch.randint(len(features), (batch,), generator=at_random)
            level_1 = torch.full((1,), max(level, 0))
            placed = None if geometry is None else geometry[some].unsqueeze(0)
            token_ME = projector(features[some].float().unsqueeze(0), level_1, placed)[0]
            cosine_MW = F.normalize(token_ME - centre_E, dim=-1) @ direction_WE.T
            apart_M = F.cross_entropy(SHARPNESS * cosine_MW, shown[some], reduction="none")
            target_ME = target_WE[shown[some]]
            if placed is not None:
                target_ME = target_ME + place_targets(placed[0], place_6E)
            near_M = ((token_ME - target_ME) ** 2).sum(-1) / scale**2
            loss = loss + ((apart_M + near_M) * share[some]).mean()
            hits, count = hits + (cosine_MW.argmax(-1) == shown[some]).sum().item(), count + batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right = 0.98 * right + 0.02 * hits / count if step else hits / count
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.3f}", refresh=False)
    return right


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder whose projector is new")
    parser.add_argument(
        "--scenes", type=Path, required=True, help="folder of images with -patches.npy and -texts.json"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--vision_cache", help="folder that keeps what the tower says of each image")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=256, help="tokens of each kind in a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = load_model(options.model)
    processor = load_processor(options.model, model.config)
    if options.vision_cache:
        VisionCache(model.model, options.vision_cache).attach()
    images = sorted(options.scenes.glob("*.jpg"))
    patches = torch.from_numpy(np.load(f"{options.scenes}-patches.npy")).long()
    texts = json.loads(Path(f"{options.scenes}-texts.json").read_text())
    if len(images) != len(patches):
        sys.exit(f"{options.scenes} has {len(images)} images and patches of {len(patches)}; write the scenes again")
    try:
        tokens = collect(model, processor, images, patches, len(texts))
    except ValueError as error:
        sys.exit(f"{options.model}: {error}")
    projector = model.model.multi_modal_projector
    targets = (word_targets(model, processor, words) for words in (texts, PLACE_WORDS))
    right = fit(projector.float(), tokens, *targets, options.steps, options.batch_size, options.learning_rate)
    print(f"{right:.3f} of the training tokens are nearest to the words for what they show", file=sys.stderr)
    with atomic_folder(Path(options.output)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_manifest(folder, read_manifest(options.model))
        append_training_record(folder, ("granulon", "torch", "transformers"), stage="words", rows=len(images))


if __name__ == "__main__":
    main()
