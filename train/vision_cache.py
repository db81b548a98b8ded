"""What a frozen tower says of images, kept on disk: no image goes through the tower twice.

The cache stands between the model and its tower. It knows an image by the SHA-256 of its processed pixels, so that an
altered picture or another image processor finds nothing, and its folder is named after the tower's weights, feature
layer and dtype. Every process appends to files of its own and reads those of all: features, then the relation map with
summed columns, then a line in the index. A kill leaves at most an entry without a line, which nothing reads.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from modeling_granulon.vision_features import COLUMN_STRIDE, VisionFeatures, patch_grid

logger = logging.getLogger(__name__)


@dataclass
class StoredRelation:
    """The relation map of cached images, in place of `RelationMap`: `profiles_INC` (I,N,C) fp32."""

    profiles_INC: torch.Tensor

    def profiles(self, column_stride: int = COLUMN_STRIDE) -> torch.Tensor:
        if column_stride != COLUMN_STRIDE:
            raise ValueError(f"the cache holds columns summed over {COLUMN_STRIDE}, not over {column_stride}, patches")
        return self.profiles_INC


class VisionCache:
    """
    Keeps the features (N,D) and relation maps (N,C) of images below `folder`.

    Args:
        model: a `GranulonModel` whose tower is frozen; from `attach` on its tower is asked through the cache.
        folder: shared by all runs; each tower has a folder of its own in it.
        process: number of this process, which names the files it writes.

    Raises:
        ValueError: the tower is being trained.
    """

    def __init__(self, model, folder: str | Path, process: int = 0):
        tower = model.vision_tower
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("vision_cache keeps what a frozen tower says; freeze the tower or turn the cache off")
        self.model, self.tower_says = model, model._vision
        self.dtype = tower.dtype
        self.folder = Path(folder) / tower_key(tower, model.config.vision_feature_layer)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.own, self.entries, self.maps = f"{process}-{os.getpid()}", {}, {}
        self.misses = 0
        self.writes = True
        for index in sorted(self.folder.glob("*.jsonl")):
            self._read_index(index)

    def attach(self) -> "VisionCache":
        """Ask the cache before the tower from now on."""
        self.model._vision = self
        return self

    def __call__(self, pixel_values: torch.Tensor, **kwargs) -> VisionFeatures:
        """As `GranulonModel._vision`, of images (I,3,h,w); images that are not there go through the tower."""
        if kwargs:
            return self.tower_says(pixel_values, **kwargs)
        keys = [_key(image) for image in pixel_values]
        new = [place for place, key in enumerate(keys) if key not in self.entries and key not in keys[:place]]
        self.misses += len(new)
        fresh = {}
        if new:
            with torch.autocast(pixel_values.device.type, enabled=False):  # what is kept depends on the tower alone
                seen = self.tower_says(pixel_values[new])
            features, profiles = seen.features.detach(), seen.relation.profiles(COLUMN_STRIDE)
            fresh = {keys[place]: (features[i], profiles[i]) for i, place in enumerate(new)}
            self._append(fresh)
        found = [fresh[key] if key in fresh else self._read(key) for key in keys]
        features, profiles = (torch.stack(part).to(pixel_values.device) for part in zip(*found, strict=True))
        grid = patch_grid(self.model.config.vision_config, pixel_values)
        return VisionFeatures(features, grid, StoredRelation(profiles), {})

    def _append(self, fresh: dict):
        """Write entries and then their lines; a full disk ends the writing, not the training."""
        if not self.writes:
            return
        try:
            data_file, index_file = (self.folder / f"{self.own}{suffix}" for suffix in (".bin", ".jsonl"))
            with data_file.open("ab") as data, index_file.open("a") as index:
                for key, (features, profiles) in fresh.items():
                    line = {"key": key, "file": self.own, "offset": data.tell()}
                    line |= {"features": list(features.shape), "profiles": list(profiles.shape)}
                    for part in (features, profiles):
                        data.write(part.contiguous().cpu().view(torch.uint8).numpy().tobytes())
                    data.flush()
                    index.write(json.dumps(line) + "\n")
                    index.flush()
                    self.entries[key] = line
        except OSError as error:
            self.writes = False
            logger.warning("the vision cache %s cannot grow (%s); training goes on without", self.folder, error)

    def _read(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        line = self.entries[key]
        name, start, parts = line["file"], line["offset"], []
        for part, dtype in (("features", self.dtype), ("profiles", torch.float32)):
            stop = start + int(np.prod(line[part])) * dtype.itemsize
            if name not in self.maps or len(self.maps[name]) < stop:
                self.maps[name] = np.memmap(self.folder / f"{name}.bin", np.uint8, "r")
            values = torch.from_numpy(np.array(self.maps[name][start:stop])).view(dtype)
            parts.append(values.reshape(line[part]))
            start = stop
        return tuple(parts)

    def _read_index(self, index: Path):
        """The complete lines of an index whose entries the data file holds."""
        data = index.with_suffix(".bin")
        size = data.stat().st_size if data.exists() else 0
        for text in index.read_text().splitlines():
            try:
                line = json.loads(text)
                needed = int(np.prod(line["features"])) * self.dtype.itemsize + int(np.prod(line["profiles"])) * 4
            except (ValueError, KeyError, TypeError):  # a line that was cut off
                continue
            if line["offset"] + needed <= size:
                self.entries.setdefault(line["key"], line)


def tower_key(tower, layer: int) -> str:
    """Names a tower by its weights and what is read from it."""
    key = hashlib.sha256(f"{tower.config.model_type} {layer} {tower.dtype} {COLUMN_STRIDE}".encode())
    for name, value in sorted(tower.state_dict().items()):
        key.update(name.encode())
        key.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return f"{tower.config.model_type}-{key.hexdigest()[:16]}"


def _key(image: torch.Tensor) -> str:
    shape = "x".join(map(str, image.shape)).encode()
    return hashlib.sha256(shape + image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
