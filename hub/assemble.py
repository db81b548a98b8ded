"""Make a Granulon checkpoint folder of an encoder and a language model: `granulon-assemble`."""

import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, logging
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.configuration_granulon import TEXT_MODELS
from modeling_granulon.vision_features import patch_size_of

from .chat_template import with_image_parts
from .parts import (
    KNOWN_PARTS,
    SourceUnavailable,
    complete_or_absent,
    download_snapshot,
    fetch_gguf,
    fetch_part,
    first_line,
    read_origin,
)
from .manifest import versions

MANIFEST = "granulon_manifest.json"
# What granulon-publish --trainable_only uploads: the weights that come from neither part.
TRAINABLE, TRAINED = "trainable.safetensors", ("model.multi_modal_projector.", "model.granularity_controller.")
LICENCE_FILES = ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# Tokens that mean an image, else the ones set aside for such a use; both have a row in the embedding already.
IMAGE_TOKENS = ["<|image_pad|>", "<|image|>", "<image>"]
RESERVED_TOKEN = re.compile(r"<\|?(reserved|unused)\w*\d+\|?>")
_KNOWN = ", ".join(KNOWN_PARTS)
PAD_TOKEN = "<|finetune_right_pad_id|>"  # Llama 3's own, which its tokenizer does not name


@dataclass
class AssembleArguments:
    output: str = field(metadata={"help": "folder to write; must not exist yet"})
    vision: str | None = field(
        default=None, metadata={"help": f"encoder: a folder, a Hub id (ID or ID@REVISION), or a known part ({_KNOWN})"}
    )
    text: str | None = field(
        default=None, metadata={"help": "language model with chat template: the same, or a GGUF file"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side of the square the images are resized to; the encoder's own by default"}
    )
    trained: str | None = field(
        default=None,
        metadata={"help": "projector, gains and controller that were published alone: a folder, or a Hub id"},
    )
    tiny: bool = field(
        default=False, metadata={"help": "a small random model instead of --vision and --text, offline"}
    )


@dataclass
class Source:
    """A model's folder, and where it came from."""

    folder: Path
    name: str
    revision: str | None = None

    @classmethod
    def fetch(cls, source):
        """
        A local folder, a known part, a GGUF file (converted), or a repository of the Hub or its cache.

        Raises:
            ValueError: not found in any of these, a damaged or unsupported file.
        """
        folder = Path(source).expanduser()
        if folder.is_file() and folder.suffix == ".gguf":
            return cls.of_folder(fetch_gguf(folder, TEXT_MODELS), folder.name)
        if not folder.is_dir() and str(source) in KNOWN_PARTS:
            folder = fetch_part(str(source))
        if folder.is_dir():
            return cls.of_folder(folder, folder.resolve().name)
        repo_id, _, revision = str(source).partition("@")
        try:
            folder = download_snapshot(repo_id, revision or None)
        except SourceUnavailable as error:
            raise ValueError(
                f"{source} was not found locally or on the Hub ({error}); give a folder, a GGUF file, a Hub id or one "
                f"of {_KNOWN}"
            ) from error
        return cls(folder, repo_id, folder.name)

    @classmethod
    def of_folder(cls, folder, name):
        """A folder under the name and revision that it has on the Hub, if it says so, else under `name`."""
        origin = read_origin(folder)
        return cls(folder, origin.get("repo_id") or name, origin.get("revision"))

    def config(self):
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.name} has no config.json: it is not a transformers model")
        return AutoConfig.from_pretrained(self.folder)

    def describe(self, config):
        """The manifest's entry: the licence that the model card declares, the origin that origin.json states."""
        card = self.folder / "README.md"
        declared = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
        licence = {key: declared.get(key) for key in ("license", "license_name", "license_link")}
        origin = read_origin(self.folder) or None
        entry = {"source": self.name, "revision": self.revision, "model_type": config.model_type}
        return {**entry, **licence, "origin": origin}


def assemble(vision, text, output, image_size=None, trained=None):
    """
    Write a Granulon checkpoint whose tower and language model have the weights of two existing models, and whose
    projector, gains and controller are new.

    Args:
        vision: encoder (of a CLIP or SigLIP pair the image half): a folder, a Hub id, or a short name of a known part.
        text: causal language model with a chat template: the same, or a GGUF file.
        output: folder to write. It appears when it is complete; if anything fails, nothing of it stays.
        image_size (`int`): pixels per side of the model's images, a multiple of the patch size.
        trained: what `granulon-publish --trainable_only` published: its levels and settings, and the weights of
            projector, gains and controller, in place of new ones; its dtype, and the size of its images.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: output that exists, a source that is not found, not supported or incomplete, a size that the
            patches do not divide.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; delete it or choose another folder")
    vision, text = Source.fetch(vision), Source.fetch(text)
    trained = Source.fetch(trained) if trained else None

    config, processor = _config_and_processor(vision, text, image_size, trained)
    model = _joined_model(config, vision, text)
    if trained:
        _load_trained(model, trained)
    generation = model.generation_config
    generation.suppress_tokens = [*(generation.suppress_tokens or []), config.image_token_id]
    if generation.pad_token_id is None:
        generation.pad_token_id = processor.tokenizer.pad_token_id

    with complete_or_absent(output) as folder:
        model.save_pretrained(folder)
        config.dtype = model.lm_head.weight.dtype  # what "auto" loads; saving took the tower's
        for part in (config.vision_config, config.text_config):
            part.name_or_path = ""  # a local folder's; the manifest names the source
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _copy_licences({"vision": vision, "text": text}, folder)
        manifest = {
            "versions": versions("granulon", "transformers", "torch"),
            "vision": vision.describe(config.vision_config),
            "text": text.describe(config.text_config),
            "image_token": processor.image_token,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return output


def _config_and_processor(vision, text, image_size, trained):
    """What follows from the two sources' descriptions alone: nothing large is loaded before it is checked."""
    vision_config, text_config = vision.config(), text.config()
    vision_config = getattr(vision_config, "vision_config", vision_config)  # of a CLIP or SigLIP pair
    tokenizer, image_token = _tokenizer_with_placeholder(text)
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    text_config.vocab_size = max(getattr(text_config, "vocab_size", 0), image_token_id + 1)
    settings = _own_settings(trained) if trained else {}
    config = GranulonConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=image_token_id, **settings
    )
    processor = GranulonProcessor(
        _image_processor(vision, vision_config, image_size or (_own_side(trained) if trained else None)),
        tokenizer,
        patch_size=patch_size_of(vision_config),
        num_semantic_tokens=config.max_semantic_tokens,
        image_token=image_token,
    )
    return config, processor


def _joined_model(config, vision, text):
    """The two sources' weights in one model, with a row of the embedding for the placeholder."""
    tower = _load(AutoModel, vision, config=config.vision_config)
    language_model = _load(AutoModelForCausalLM, text)
    rows = config.text_config.vocab_size
    if language_model.get_input_embeddings().num_embeddings < rows:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            language_model.resize_token_embeddings(rows, mean_resizing=False)
    return join(config, tower, language_model)


def _own_settings(trained):
    """Granulon's own part of the configuration of what was trained: levels, constants, projector."""
    settings, _ = GranulonConfig.get_config_dict(trained.folder)
    parts = ("vision_config", "text_config", "image_token_id", "architectures", "auto_map", "dtype", "model_type")
    return {key: value for key, value in settings.items() if key not in parts and not key.startswith("transformers")}


def _own_side(trained):
    """Pixels per side of the images of what was trained."""
    file = trained.folder / "processor_config.json"
    if not file.is_file():
        raise ValueError(f"{trained.name} has no processor_config.json, which says how large its images are")
    return json.loads(file.read_text())["image_processor"]["size"]["height"]


def _load_trained(model, trained):
    """Load projector, gains and controller, exactly these, into a model that is cast to their dtype first."""
    weights = load_file(trained.folder / TRAINABLE) if (trained.folder / TRAINABLE).is_file() else {}
    wanted = {name: value.shape for name, value in model.state_dict().items() if name.startswith(TRAINED)}
    found = {name: value.shape for name, value in weights.items()}
    if found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{trained.name} does not fit these parts ({', '.join(odd[:2])}, {len(odd)} in all): take the encoder and "
            "the language model that its card names"
        )
    model.to(GranulonConfig.from_pretrained(trained.folder).dtype).load_state_dict(weights, strict=False)


def join(config, tower, language_model):
    """
    Put a loaded encoder and a loaded causal language model into one Granulon, without copying their weights.

    Args:
        config (`GranulonConfig`): made for these two.
        tower, language_model (`PreTrainedModel`): the encoder and the language model with its head.

    Returns:
        `GranulonForConditionalGeneration`: with a new projector and controller, in the language model's dtype.
    """
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config)
    model.model.vision_tower = tower.requires_grad_(False)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for part in (model.model.multi_modal_projector, model.model.granularity_controller):
            if part is not None:
                part.to_empty(device="cpu").apply(model._init_weights).to(language_model.dtype)
    model.generation_config = language_model.generation_config
    return model


def _tokenizer_with_placeholder(text):
    """The tokenizer with image placeholder, padding token and a chat template for images; and the placeholder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(text.folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{text.name} has no tokenizer that loads: {first_line(error)}") from error
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


def _image_processor(vision, vision_config, image_size):
    """
    The encoder's own mean, std, interpolation and input size in the one image processor that runs without torchvision.

    The whole image is resized to a square: a centre crop would hide what a question may be about.
    """
    own, nested = vision.folder / "preprocessor_config.json", vision.folder / "processor_config.json"
    if own.is_file():
        settings = json.loads(own.read_text())
    elif nested.is_file():
        settings = json.loads(nested.read_text())["image_processor"]
    else:
        raise ValueError(f"{vision.name} has no preprocessor_config.json, which says how its images are normalised")
    side = image_size or _input_side(settings, vision_config)
    patch = patch_size_of(vision_config)
    if side % patch:
        raise ValueError(
            f"images of {side} x {side} pixels do not divide into patches of {patch}; "
            f"choose an image_size of {side // patch * patch} or {(side // patch + 1) * patch}"
        )
    kept = {key: settings.get(key) for key in ("image_mean", "image_std", "resample", "rescale_factor")}
    kept = {key: value for key, value in kept.items() if value is not None}
    return ViTImageProcessorPil(size={"height": side, "width": side}, do_convert_rgb=True, **kept)


def _input_side(settings, vision_config):
    """Pixels per side that the encoder expects, from any of the forms that image processors use."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if size is None:  # SigLIP2 with a budget of patches
        size = round(vision_config.num_patches**0.5) * vision_config.patch_size
    return size


def _load(auto_class, source, **kwargs):
    """A model with all of its weights, in the dtype they are stored in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the other half of a CLIP pair is left out on purpose
    try:
        model, report = auto_class.from_pretrained(source.folder, dtype="auto", output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ValueError(
            f"the weights of {source.name} are incomplete: {', '.join(absent[:3])} ({len(absent)} in all)"
        )
    return model


def _copy_licences(sources, folder):
    """Copy the parts' licence files: licences ask for a copy beside the weights."""
    for part, source in sources.items():
        for file in (file for pattern in LICENCE_FILES for file in source.folder.glob(pattern)):
            target = folder / "licences" / part / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def main():
    (arguments,) = HfArgumentParser(AssembleArguments, description=__doc__).parse_args_into_dataclasses()
    try:
        if arguments.tiny:
            from .tiny import assemble_tiny

            output = assemble_tiny(arguments.output)
        elif arguments.vision and arguments.text:
            output = assemble(
                arguments.vision, arguments.text, arguments.output, arguments.image_size, arguments.trained
            )
        else:
            raise ValueError("give --vision and --text, or --tiny")
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-assemble: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
