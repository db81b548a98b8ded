"""Stand-ins for the cut-out photographs."""

import numpy as np
import pytest
from PIL import Image

from granulon.train.data import cutouts


@pytest.fixture
def stamps(tmp_path, monkeypatch):
    """A square in a colour of its own for every stamp and letter."""
    random = np.random.default_rng(0)
    known = [f"{cutout.stamp}.png" for held_out in (False, True) for cutout in cutouts.cutouts(held_out)]
    for name in known + list(cutouts.SIGNS.values()):
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (60, 60), (*random.integers(0, 255, 3).tolist(), 255)).save(path)
    monkeypatch.setattr(cutouts, "STAMPS", tmp_path / "stamps")
    cutouts.stamp.cache_clear()
    yield
    cutouts.stamp.cache_clear()
