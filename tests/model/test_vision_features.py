"""Vision towers of every supported kind: their features, their relation map, and that they are left as they were."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from modeling_granulon import vision_features as module
from modeling_granulon.vision_features import (
    RelationMap,
    check_tower,
    feature_width_of,
    patch_grid,
    patch_size_of,
    vision_features,
)

VIT = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 4}
SIZED = {**VIT, "image_size": 24}
WIDE = {"intermediate_size": 40}
CONFIGS = {
    "dinov3_vit": DINOv3ViTConfig(**SIZED, **WIDE, num_register_tokens=4),
    "dinov3_vit_gated": DINOv3ViTConfig(**SIZED, **WIDE, num_register_tokens=4, use_gated_mlp=True),
    "dinov3_convnext": DINOv3ConvNextConfig(
        hidden_sizes=[4, 8, 12, 36], depths=[1, 1, 1, 1], layer_scale_init_value=1.0
    ),
    "dinov2": Dinov2Config(**SIZED, mlp_ratio=2),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**SIZED, mlp_ratio=2, num_register_tokens=4),
    "clip": CLIPVisionConfig(**SIZED, **WIDE),
    "siglip": SiglipVisionConfig(**SIZED, **WIDE),
    "siglip2": Siglip2VisionConfig(**VIT, **WIDE, num_patches=36),
}
PREFIX = {
    "dinov3_vit": 5,
    "dinov3_vit_gated": 5,
    "dinov3_convnext": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "clip": 1,
    "siglip": 0,
    "siglip2": 0,
}
ATTENTIVE = [name for name in CONFIGS if name != "dinov3_convnext"]
GRIDS = {"trained": (6, 6), "wide": (4, 9), "larger": (7, 8)}

every_tower = pytest.mark.parametrize("name", CONFIGS)
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def make_tower(name, attention="sdpa", dtype=torch.float32):
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    implementation = {} if name == "dinov3_convnext" else {"attn_implementation": attention}
    tower = AutoModel.from_config(CONFIGS[name], **implementation).eval()
    for parameter in tower.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return tower.to(dtype)


def make_images(name, grid, images=2, seed=1):
    size = patch_size_of(CONFIGS[name])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, grid[0] * size, grid[1] * size, generator=generator)


def run_alone(name, tower, pixels, **kwargs):
    """The tower called as its own documentation says."""
    if name == "siglip2":
        patches = [convert_image_to_patches(image.numpy(), VIT["patch_size"]) for image in pixels]
        pixels = torch.stack([torch.from_numpy(image).contiguous() for image in patches])
        grid = kwargs.pop("grid")
        mask = torch.ones(pixels.shape[:2], dtype=torch.long)
        return tower(pixels, pixel_attention_mask=mask, spatial_shapes=torch.tensor([grid] * len(pixels)), **kwargs)
    if name in ("clip", "siglip") and kwargs["grid"] != GRIDS["trained"]:
        kwargs["interpolate_pos_encoding"] = True
    kwargs.pop("grid")
    return tower(pixels, **kwargs)


def make_relation(grid=(5, 6), images=3, heads=3, prefix=2):
    torch.manual_seed(2)
    patches = grid[0] * grid[1]
    return RelationMap(
        torch.randn(images, heads, patches, 8), torch.randn(images, heads, prefix + patches, 8), 0.5, grid
    )


def averaging_matrix(grid, stride):
    """K (N, M): cell of each patch in row-major order, columns sum to 1."""
    columns = -(-grid[1] // stride)
    cells = [row // stride * columns + column // stride for row in range(grid[0]) for column in range(grid[1])]
    matrix = F.one_hot(torch.tensor(cells)).float()
    return matrix / matrix.sum(0)


def hooks_of(tower):
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in tower.modules()]


@every_tower
@every_grid
def test_features_are_the_last_hidden_state_without_prefix(name, grid):
    tower, pixels = make_tower(name), make_images(name, grid)
    seen = vision_features(tower, pixels)
    expected = run_alone(name, tower, pixels, grid=grid).last_hidden_state
    assert expected.shape[1] == PREFIX[name] + grid[0] * grid[1]
    assert seen.grid == patch_grid(tower.config, pixels) == grid
    assert seen.features.shape == (2, grid[0] * grid[1], feature_width_of(tower.config))
    torch.testing.assert_close(seen.features, expected[:, PREFIX[name] :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ATTENTIVE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_grid
def test_relation_equals_the_eager_attention(name, attention, grid):
    pixels, patches = make_images(name, grid), grid[0] * grid[1]
    eager = run_alone(name, make_tower(name, "eager"), pixels, grid=grid, output_attentions=True).attentions[-1]
    expected = eager.mean(1)[:, -patches:, -patches:]
    expected = expected / expected.sum(-1, keepdim=True)
    assert expected.max() > 3 / patches
    relation = vision_features(make_tower(name, attention), pixels).relation.profiles()
    torch.testing.assert_close(relation, expected, rtol=0, atol=1e-6)


def test_relation_without_attention_is_the_softmax_of_the_cosine():
    seen = vision_features(make_tower("dinov3_convnext"), make_images("dinov3_convnext", (2, 3)))
    cosine = F.cosine_similarity(seen.features[:, :, None], seen.features[:, None], dim=-1)
    torch.testing.assert_close(seen.relation.profiles(), cosine.softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scratch", [1, 500, 2**20])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7])
def test_profiles_are_the_attention_summed_over_columns_however_it_is_cut(stride, scratch, monkeypatch):
    relation = make_relation()
    weights = (relation.scale * relation.query @ relation.key.mT).softmax(-1).mean(1)[..., 2:]
    weights = weights / weights.sum(-1, keepdim=True)
    sums = (averaging_matrix(relation.grid, stride) > 0).float()
    monkeypatch.setitem(module.SCRATCH, "cpu", scratch)
    profiles = relation.profiles(stride)
    assert profiles.dtype == torch.float32
    torch.testing.assert_close(profiles, weights @ sums, rtol=0, atol=1e-6)
    torch.testing.assert_close(profiles.sum(-1), torch.ones(3, 30))


def test_only_the_images_asked_for_in_the_order_asked_for():
    relation = make_relation()
    torch.testing.assert_close(relation.profiles(2, torch.tensor([2, 0])), relation.profiles(2)[[2, 0]])


def test_the_whole_map_is_never_held_when_its_columns_are_summed(monkeypatch):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    relation = make_relation(grid=(32, 32), images=1)
    monkeypatch.setitem(module.SCRATCH, "cpu", 2**17)
    with Watch():
        relation.profiles(2)
    assert 0 < largest <= 2**18  # a quarter of N x N: the profiles themselves, or the weights held at a time


def test_attention_that_goes_to_registers_alone_leaves_no_nan():
    relation = make_relation()
    relation.key[:, :, :2] = 1e4 * relation.key[:, :, :2].abs()
    relation.query.abs_()
    assert relation.profiles(2).isfinite().all()


@every_tower
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_towers_take_full_precision_images(name, dtype):
    pixels = make_images(name, (4, 9))
    half, full = vision_features(make_tower(name, dtype=dtype), pixels), vision_features(make_tower(name), pixels)
    assert half.features.dtype == dtype
    assert half.relation.profiles(2).dtype == torch.float32
    assert F.cosine_similarity(half.features.float(), full.features, dim=-1).mean() > 0.99
    torch.testing.assert_close(half.relation.profiles().sum(-1), torch.ones(2, 36))


def test_autocast_does_not_reach_the_relation():
    relation = make_relation()
    with torch.autocast("cpu", torch.bfloat16):
        inside = relation.profiles(2)
    assert inside.equal(relation.profiles(2))


@pytest.mark.parametrize("name", ATTENTIVE)
@pytest.mark.parametrize("layer", [-2, 0, 3])
def test_other_layers_give_features_of_the_hidden_states_and_the_same_relation(name, layer):
    tower, pixels = make_tower(name), make_images(name, (6, 6))
    seen = vision_features(tower, pixels, layer=layer)
    hidden = run_alone(name, tower, pixels, grid=(6, 6), output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    torch.testing.assert_close(seen.features, hidden[layer][:, -36:], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.relation.profiles(), vision_features(tower, pixels).relation.profiles())


@every_tower
def test_an_image_does_not_depend_on_its_batch(name):
    tower, pixels = make_tower(name), make_images(name, (4, 5), images=3)
    together = vision_features(tower, pixels)
    for index in range(3):
        alone = vision_features(tower, pixels[index : index + 1])
        torch.testing.assert_close(alone.features[0], together.features[index], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            alone.relation.profiles(2)[0], together.relation.profiles(2)[index], rtol=0, atol=1e-6
        )


@every_tower
def test_the_tower_is_left_as_it_was(name):
    tower, pixels = make_tower(name), make_images(name, (3, 3))
    before, weights = hooks_of(tower), {key: value.clone() for key, value in tower.state_dict().items()}
    vision_features(tower, pixels)
    assert hooks_of(tower) == before
    last = [part for part in tower.modules() if not list(part.children())][-1]
    trap = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vision_features(tower, pixels)
    trap.remove()
    assert hooks_of(tower) == before
    assert all(value.equal(weights[key]) for key, value in tower.state_dict().items())


def test_threads_that_share_a_tower_get_their_own_relation():
    tower = make_tower("dinov3_vit")
    images = [make_images("dinov3_vit", grid, seed=seed) for seed, grid in enumerate([(6, 6), (4, 9)])]
    expected = [vision_features(tower, pixels).relation.profiles() for pixels in images]
    meeting = threading.Barrier(2, timeout=20)

    def meet(*_):
        meeting.wait()

    # Both threads stand inside the last layer, hooks set, before its projections run, and again after them.
    attention = tower.model.layer[-1].attention
    attention.q_proj.register_forward_pre_hook(meet)
    attention.o_proj.register_forward_hook(meet)
    found = [None, None]

    def work(index):
        with torch.no_grad():
            found[index] = vision_features(tower, images[index]).relation.profiles()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference)


def test_a_compiled_tower_gives_the_same_relation_each_time():
    plain, compiled = make_tower("dinov3_vit"), make_tower("dinov3_vit")
    compiled.compile(backend="eager")
    compiled(make_images("dinov3_vit", (3, 4)))  # traced without the hooks
    for seed in range(3):
        pixels = make_images("dinov3_vit", (3, 4), seed=seed)
        seen, expected = vision_features(compiled, pixels), vision_features(plain, pixels)
        torch.testing.assert_close(seen.relation.profiles(2), expected.relation.profiles(2))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    tower, pixels = make_tower("dinov2"), make_images("dinov2", (3, 4))
    expected = vision_features(tower, pixels).relation.profiles()
    tower.gradient_checkpointing_enable()
    with torch.enable_grad():
        tower.train()
        assert vision_features(tower, pixels).relation.profiles().equal(expected)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("dinov3_vit", (1, 3, 24, 26), "24 x 26 pixels, which patches of 4 x 4"),
        ("dinov3_convnext", (1, 3, 48, 64), "48 x 64 pixels, which patches of 32 x 32"),
        ("siglip2", (1, 3, 26, 24), "26 x 24 pixels"),
        ("clip", (3, 24, 24), r"shape \(3, 24, 24\), expected \(images, 3, height, width\)"),
        ("dinov2", (1, 1, 24, 24), r"shape \(1, 1, 24, 24\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        vision_features(make_tower(name), torch.zeros(shape))


@pytest.mark.parametrize(
    "config, layer, message",
    [
        (ViTConfig(), -1, "model_type 'vit'; supported are dinov3_vit, dinov3_convnext, dinov2"),
        (CLIPConfig(), -1, "pass its vision_config"),
        (CONFIGS["dinov3_convnext"], -2, "only -1"),
        (CONFIGS["dinov3_vit"], -5, "layer is -5, but the tower has 3 layers"),
        (CONFIGS["dinov3_vit"], 4, "layer is 4"),
    ],
)
def test_towers_and_layers_that_cannot_be_used_are_refused(config, layer, message):
    with pytest.raises(ValueError, match=message):
        check_tower(config, layer)


@every_tower
def test_patch_size_and_width_follow_from_the_config(name):
    check_tower(CONFIGS[name])
    assert patch_size_of(CONFIGS[name]) == (32 if name == "dinov3_convnext" else 4)
    assert feature_width_of(CONFIGS[name]) == 36
