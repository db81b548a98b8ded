"""Make a Granulon checkpoint folder from an encoder and a language model: `granulon-assemble`."""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    logging,
)
from transformers.hf_argparser import HfArg
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.configuration_granulon import TEXT_MODELS
from modeling_granulon.vision_features import patch_size_of

from .files import atomic_folder, check_is_new
from .manifest import LICENCE_FILES, MANIFEST, read_manifest, versions, write_manifest
from .parts import KNOWN_PARTS, SourceUnavailable, download_snapshot, fetch_gguf, fetch_part, read_origin
from .text import first_line

# The weights that come from neither of the two models, which granulon-publish --trainable_only uploads. Adapters of
# the language model may be among them: pairs of ADAPTER_ENDINGS, and in the file's header what scales their product.
TRAINABLE = "trainable.safetensors"
TRAINABLE_WEIGHTS = ("model.multi_modal_projector.", "model.granularity_controller.")
ADAPTER_ENDINGS, ADAPTER_SCALE = (".lora_A.weight", ".lora_B.weight"), "adapter_scale"
LARGEST_IMAGE = 4096  # pixels per side
# Tokens that stand for an image, else tokens reserved for later use; the embedding has a row for both already.
IMAGE_TOKENS = ["<|image_pad|>", "<|image|>", "<image>"]
RESERVED_TOKEN = re.compile(r"<\|?(reserved|unused)\w*\d+\|?>")
PAD_TOKEN = "<|finetune_right_pad_id|>"  # of Llama 3, whose tokenizer does not name it
# Put before a chat template, this replaces messages whose content is a list of text and image parts by messages whose
# content is a string. Other lists stay as they are, a tool may return them. Text parts become separate lines, so that
# two of them cannot join into a control token. The final line break leaves Jinja in the state in which a template
# begins. vLLM takes image parts in their place because of the loop over message['content'].
FLATTEN_CONTENT = package_files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_KNOWN = ", ".join(KNOWN_PARTS)


@dataclass
class AssembleArguments:
    output: str = HfArg(help="folder to write; it must not exist yet")
    vision: str | None = HfArg(default=None, help=f"encoder: a folder, a Hub id (ID or ID@REVISION), or {_KNOWN}")
    text: str | None = HfArg(default=None, help="language model with a chat template: the same, or a GGUF file")
    image_size: int | None = HfArg(default=None, help="side of the square images in pixels; by default the encoder's")
    trained: str | None = HfArg(
        default=None,
        help="trained parts: a folder or Hub id; it names encoder and language model if they are not given",
    )
    tiny: bool = HfArg(default=False, help="write a small random model, offline, instead of --vision and --text")


@dataclass
class Source:
    """A model's folder, and where it came from."""

    folder: Path
    name: str
    revision: str | None = None

    @classmethod
    def fetch(cls, source: str | Path) -> "Source":
        """
        Find a model: a local folder, a known part, a GGUF file (converted), or a repository of the Hub or its cache.

        Raises:
            ValueError: not found in any of these, a damaged or unsupported file.
        """
        folder = Path(source).expanduser()
        if folder.is_file() and folder.suffix == ".gguf":
            folder = fetch_gguf(folder, TEXT_MODELS)
        elif not folder.is_dir() and str(source) in KNOWN_PARTS:
            folder = fetch_part(str(source))
        if folder.is_dir():
            origin = read_origin(folder)
            name = origin.get("repo_id") or origin.get("file") or folder.resolve().name
            return cls(folder, name, origin.get("revision"))
        repo_id, _, revision = str(source).partition("@")
        try:
            folder = download_snapshot(repo_id, revision or None)
        except SourceUnavailable as error:
            remedy = f"give a folder, a GGUF file, a Hub id or one of {_KNOWN}"
            raise ValueError(f"{source} was not found locally or on the Hub ({error}); {remedy}") from error
        return cls(folder, repo_id, folder.name)

    def config(self) -> PretrainedConfig:
        """The configuration; raises `ValueError` if there is none."""
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.name} has no config.json: it is not a transformers model")
        return AutoConfig.from_pretrained(self.folder)

    def describe(self, config: PretrainedConfig) -> dict:
        """The manifest's entry: the licence that the model card declares, the origin that origin.json states."""
        card = self.folder / "README.md"
        declared = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
        licence = {key: declared.get(key) for key in ("license", "license_name", "license_link")}
        entry = {"source": self.name, "revision": self.revision, "model_type": config.model_type}
        return {**entry, **licence, "origin": read_origin(self.folder) or None}


def assemble(
    vision, text, output, image_size: int | None = None, trained=None, settings: dict | None = None, chat_template=None
) -> Path:
    """
    Write a Granulon checkpoint, and return its folder: tower and language model have the weights of two existing
    models, projector, gains and controller are new.

    Args:
        vision: encoder (of a CLIP or SigLIP pair the image half): a folder, a Hub id, or the name of a known part;
            None for the one that `trained` was trained with.
        text: causal language model with a chat template: the same, or a GGUF file.
        output: folder to write. It appears when it is complete; after an error nothing is left of it.
        image_size: pixels per side of the model's images, a multiple of the patch size.
        trained: trained parts, a folder or a Hub id that `granulon-publish --trainable_only` wrote. Levels, settings,
            dtype, image size, chat template and the weights of projector, gains and controller are taken from it, and
            its adapters are merged into the language model.
        settings: values of the configuration that differ from the defaults.
        chat_template: Jinja of a text model, in place of the language model's own.

    Raises:
        ValueError: an output that exists, a source that is not found, not supported or incomplete, an image size that
            is not a multiple of the patch size, trained parts of other models.
    """
    output = Path(output).expanduser()
    check_is_new(output)  # before anything large is loaded
    trained = Source.fetch(trained) if trained else None
    given, manifest = {"vision": vision, "text": text}, {}
    if trained and ((trained.folder / MANIFEST).is_file() or None in given.values()):
        manifest = read_manifest(trained.folder)
    sources = {part: Source.fetch(name or _source_of(manifest[part])) for part, name in given.items()}
    for part, found in sources.items() if manifest else ():
        _check_trained_on(manifest[part], found, trained)
    vision, text = sources["vision"], sources["text"]

    config, processor = _config_and_processor(vision, text, image_size, trained, settings or {}, chat_template)
    model = _combined_model(config, vision, text)
    if trained:
        _load_trained(model, trained)
    generation = model.generation_config
    generation.suppress_tokens = [*(generation.suppress_tokens or []), config.image_token_id]
    if generation.pad_token_id is None:
        generation.pad_token_id = processor.tokenizer.pad_token_id

    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        config.dtype = model.lm_head.weight.dtype  # the dtype that "auto" loads; saving has set the tower's
        for part in (config.vision_config, config.text_config):
            part.name_or_path = ""  # the path of a local folder; the manifest names the source
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _copy_licences(sources, folder)
        about = {"versions": versions("granulon", "transformers", "torch"), "image_token": processor.image_token}
        parts = {"vision": vision.describe(config.vision_config), "text": text.describe(config.text_config)}
        write_manifest(folder, about | parts | {key: manifest[key] for key in ("training",) if key in manifest})
    return output


def _config_and_processor(vision: Source, text: Source, image_size, trained: Source | None, settings, chat_template):
    """Configuration and processor, from the two models' configurations; checked before weights are loaded."""
    vision_config, text_config = vision.config(), text.config()
    vision_config = getattr(vision_config, "vision_config", vision_config)  # of a CLIP or SigLIP pair
    own_template = trained.folder / "chat_template.jinja" if trained else None
    tokenizer, image_token = _tokenizer_with_placeholder(text, chat_template)
    if own_template and own_template.is_file():
        tokenizer.chat_template = own_template.read_text(encoding="utf-8")
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    text_config.vocab_size = max(getattr(text_config, "vocab_size", 0), image_token_id + 1)
    trained_settings, trained_size = _trained_settings(trained) if trained else ({}, None)
    own = {"vision_config": vision_config, "text_config": text_config, "image_token_id": image_token_id}
    config = GranulonConfig(**own, **trained_settings | settings)
    processor = GranulonProcessor(
        _image_processor(vision, vision_config, trained_size if image_size is None else image_size),
        tokenizer,
        patch_size=patch_size_of(vision_config),
        num_semantic_tokens=config.max_semantic_tokens,
        image_token=image_token,
    )
    return config, processor


def _combined_model(config: GranulonConfig, vision: Source, text: Source) -> GranulonForConditionalGeneration:
    """
    The weights of both models in one, without a copy, with a row of the embedding for the placeholder; projector and
    controller are new, in the language model's dtype.
    """
    tower = _load(AutoModel, vision, config=config.vision_config)
    language_model = _load(AutoModelForCausalLM, text)
    rows = config.text_config.vocab_size
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        if language_model.get_input_embeddings().num_embeddings < rows:
            language_model.resize_token_embeddings(rows, mean_resizing=False)
            torch.manual_seed(0)  # projector and controller are the same with and without new rows
        for part in filter(None, (model.model.multi_modal_projector, model.model.granularity_controller)):
            part.to_empty(device="cpu").apply(model._init_weights).to(language_model.dtype)
    model.model.vision_tower = tower.requires_grad_(False)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    return model


def _trained_settings(trained: Source) -> tuple[dict, int]:
    """Levels, constants and projector settings of a trained model; pixels per side of its images."""
    settings, _ = GranulonConfig.get_config_dict(trained.folder)
    other = ("vision_config", "text_config", "image_token_id", "architectures", "auto_map", "dtype", "model_type")
    file = trained.folder / "processor_config.json"
    if not file.is_file():
        raise ValueError(f"{trained.name} has no processor_config.json, which holds the size of its images")
    kept = {key: value for key, value in settings.items() if key not in other and not key.startswith("transformers")}
    return kept, json.loads(file.read_text())["image_processor"]["size"]["height"]


def _source_of(part: dict) -> str:
    """The known part, or the repository and revision, that trained parts name as one of their models."""
    known = [name for name, entry in KNOWN_PARTS.items() if entry.repo_id == part["source"]]
    return (known or ["@".join(filter(None, (part["source"], part.get("revision"))))])[0]


def _check_trained_on(part: dict, found: Source, trained: Source):
    """Raises ValueError for a model of another kind, or of the Hub under another name, than `trained` names."""
    config = found.config()
    kind = getattr(config, "vision_config", config).model_type
    other_name = "/" in found.name and found.name.lower() != part["source"].lower()
    if other_name or kind != part["model_type"]:
        was = f"{trained.name} was trained with {part['source']} ({part['model_type']})"
        raise ValueError(f"{was}, not with {found.name} ({kind}); leave the name out to get what it was trained with")


def _load_trained(model: GranulonForConditionalGeneration, trained: Source):
    """Cast the model to the trained dtype, load projector, gains and controller, and merge the adapters."""
    weights, scale = {}, 1.0
    if (trained.folder / TRAINABLE).is_file():
        with safe_open(trained.folder / TRAINABLE, "pt") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}
            scale = float((stored.metadata() or {}).get(ADAPTER_SCALE, 1))
    first, second = ADAPTER_ENDINGS
    adapters = {name.removesuffix(first) for name in weights if name.endswith(first)}
    pairs = {name: (weights.pop(name + first), weights.pop(name + second, None)) for name in sorted(adapters)}
    state = model.state_dict()
    expected = {name: value.shape for name, value in state.items() if name.startswith(TRAINABLE_WEIGHTS)}
    expected |= {name: getattr(state.get(f"{name}.weight"), "shape", None) for name in pairs}
    found = {name: value.shape for name, value in weights.items()}
    found |= {name: None if b is None else torch.Size((len(b), a.shape[1])) for name, (a, b) in pairs.items()}
    if found != expected or None in found.values():
        wrong = sorted(
            n for n in expected.keys() | found.keys() if not found.get(n) or expected.get(n) != found.get(n)
        )
        names = f"{', '.join(wrong[:2])}, {len(wrong)} in all, are missing or have another shape"
        raise ValueError(f"{trained.name} does not fit these two models ({names}): use those that its card names")
    model.to(GranulonConfig.from_pretrained(trained.folder).dtype).load_state_dict(weights, strict=False)
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            weight = model.get_submodule(name).weight
            weight.copy_(weight.float() + scale * b.float() @ a.float())


def with_image_parts(template: str | dict[str, str], image_token: str) -> str | dict[str, str]:
    """
    Make a text model's chat template, or several by name, accept `[{"type": "image"}, {"type": "text", "text": ...}]`
    as content; content that is a string renders exactly as before. `image_token` stands for an image.
    """
    if isinstance(template, dict):
        return {name: with_image_parts(entry, image_token) for name, entry in template.items()}
    return FLATTEN_CONTENT.replace("IMAGE_TOKEN", repr(image_token)) + template


def _tokenizer_with_placeholder(text: Source, chat_template: str | None = None) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer with image placeholder, padding token and a chat template for images; and the placeholder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(text.folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{text.name} has no tokenizer that loads: {first_line(error)}") from error
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if tokenizer.chat_template is None:
        raise ValueError(f"{text.name} has no chat template; take the instruction-tuned version of this model")
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    known = [token for token in IMAGE_TOKENS if token in special]
    reserved = [token for token in special if RESERVED_TOKEN.fullmatch(token)]
    image_token = [*known, *reserved, "<image>"][0]
    if image_token not in special:
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD_TOKEN if PAD_TOKEN in special else tokenizer.eos_token
    tokenizer.chat_template = with_image_parts(tokenizer.chat_template, image_token)
    return tokenizer, image_token


def _image_processor(vision: Source, vision_config, image_size: int | None) -> ViTImageProcessorPil:
    """
    The encoder's mean, std, interpolation and input size, in the one image processor that needs no torchvision.

    The whole image is resized to a square: a centre crop would hide what a question may be about.
    """
    own, nested = vision.folder / "preprocessor_config.json", vision.folder / "processor_config.json"
    if own.is_file():
        settings = json.loads(own.read_text())
    elif nested.is_file():
        settings = json.loads(nested.read_text())["image_processor"]
    else:
        raise ValueError(f"{vision.name} has no preprocessor_config.json, which holds the normalisation of its images")
    side = _input_side(settings, vision_config) if image_size is None else image_size
    patch = patch_size_of(vision_config)
    if not patch <= side <= LARGEST_IMAGE:
        raise ValueError(f"image_size is {side}; expected {patch} (one patch) to {LARGEST_IMAGE} pixels")
    if side % patch:
        remedy = f"choose an image_size of {side // patch * patch} or {(side // patch + 1) * patch}"
        raise ValueError(f"images of {side} x {side} pixels do not divide into patches of {patch}; {remedy}")
    names = ("image_mean", "image_std", "resample", "rescale_factor")
    kept = {name: settings[name] for name in names if settings.get(name) is not None}
    return ViTImageProcessorPil(size={"height": side, "width": side}, do_convert_rgb=True, **kept)


def _input_side(settings: dict, vision_config) -> int:
    """Pixels per side that the encoder expects, in any of the forms that image processors use."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if size is None:  # SigLIP2 with a budget of patches
        size = round(vision_config.num_patches**0.5) * vision_config.patch_size
    return size


def _load(auto_class, source: Source, **kwargs) -> PreTrainedModel:
    """Load a model in the dtype of its weights; a ValueError if one is missing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else transformers warns of the other half of a CLIP pair
    try:
        model, report = auto_class.from_pretrained(source.folder, dtype="auto", output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        names = f"{', '.join(absent[:3])} ({len(absent)} in all)"
        raise ValueError(f"the weights of {source.name} are incomplete: {names}")
    return model


def _copy_licences(sources: dict[str, Source], folder: Path):
    """Copy the licence files of both models: their licences require a copy beside the weights."""
    for part, source in sources.items():
        for file in (file for pattern in LICENCE_FILES for file in source.folder.glob(pattern)):
            target = folder / "licences" / part / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def byte_tokenizer(chat_tokens=tuple(CHAT_TOKENS)) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and the chat tokens: it encodes any text and needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens(
        {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": list(chat_tokens)}
    )
    return tokenizer


def assemble_tiny(output: str | Path) -> Path:
    """
    Assemble a complete Granulon of a few MB from a small random encoder and language model, offline and in seconds;
    its folder. The global random state does not change.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        vision, text = Path(folder, "tiny-dinov3"), Path(folder, "tiny-qwen2")
        encoder = AutoConfig.for_model(
            "dinov3_vit", image_size=64, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_register_tokens=4,
        )  # fmt: skip
        AutoModel.from_config(encoder).save_pretrained(vision)
        ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(vision)
        tokenizer = byte_tokenizer()
        decoder = AutoConfig.for_model(
            "qwen2", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(decoder).save_pretrained(text)
        tokenizer.save_pretrained(text)
        return assemble(vision, text, output)


def main():
    parser = HfArgumentParser(AssembleArguments, description=__doc__)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}; granulon-assemble --help lists those there are")
        others = [name for name in ("vision", "text", "image_size", "trained") if getattr(arguments, name) is not None]
        if arguments.tiny and others:
            raise ValueError(f"--tiny makes a model of its own; omit {', '.join(f'--{name}' for name in others)}")
        if arguments.tiny:
            output = assemble_tiny(arguments.output)
        elif arguments.trained or (arguments.vision and arguments.text):
            options = {"image_size": arguments.image_size, "trained": arguments.trained}
            output = assemble(arguments.vision, arguments.text, arguments.output, **options)
        else:
            raise ValueError("give --vision and --text, --trained, or --tiny")
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-assemble: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
