"""An encoder and a language model become a Granulon checkpoint folder: `granulon-assemble`."""

import json
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, logging
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.vision_features import patch_size_of

from .chat_template import with_image_parts
from .provenance import versions

MANIFEST = "granulon_manifest.json"
# What is fetched of a repository: weights in one format, and what describes them.
FILES = [
    "*.json",
    "model*.safetensors",
    "trainable.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
# What granulon-publish --trainable_only uploads: the weights that are nobody else's.
TRAINABLE, TRAINED = "trainable.safetensors", ("model.multi_modal_projector.", "model.granularity_controller.")
LICENCE_FILES = ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# Tokens that mean an image, else the ones set aside for such a use; both have a row in the embedding already.
IMAGE_TOKENS = ["<|image_pad|>", "<|image|>", "<image>"]
RESERVED_TOKEN = re.compile(r"<\|?(reserved|unused)\w*\d+\|?>")
PAD_TOKEN = "<|finetune_right_pad_id|>"  # Llama 3's own, which its tokenizer does not name


@dataclass
class AssembleArguments:
    output: str = field(metadata={"help": "folder to write; must not exist yet"})
    vision: str | None = field(default=None, metadata={"help": "encoder: a folder, or a Hub id (ID or ID@REVISION)"})
    text: str | None = field(
        default=None, metadata={"help": "language model: a folder, or a Hub id with chat template"}
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
        """A local folder as it is, anything else from the Hub (or its cache)."""
        folder = Path(source).expanduser()
        if folder.is_dir():
            return cls(folder, folder.resolve().name)
        repo_id, _, revision = str(source).partition("@")
        try:
            folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=FILES))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source} is no folder here and not to be had: {_first_line(error)}") from error
        return cls(folder, repo_id, folder.name)

    def config(self):
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.name} has no config.json: it is not a transformers model")
        return AutoConfig.from_pretrained(self.folder)

    def describe(self, config):
        """What the manifest says of this source; the licence is what its model card declares."""
        card = self.folder / "README.md"
        declared = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
        licence = {key: declared.get(key) for key in ("license", "license_name", "license_link")}
        return {"source": self.name, "revision": self.revision, "model_type": config.model_type, **licence}


def assemble(vision, text, output, image_size=None, trained=None):
    """
    Write a Granulon checkpoint whose tower and language model have the weights of two existing models, and whose
    projector, gains and controller are new.

    Args:
        vision: encoder (of a CLIP or SigLIP pair the image half), a folder or Hub id.
        text: causal language model with a chat template, a folder or Hub id.
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

    vision_config, text_config = vision.config(), text.config()
    vision_config = getattr(vision_config, "vision_config", vision_config)  # of a CLIP or SigLIP pair
    tokenizer, image_token = _tokenizer_with_placeholder(text)
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    rows = text_config.vocab_size = max(getattr(text_config, "vocab_size", 0), image_token_id + 1)
    trained = Source.fetch(trained) if trained else None
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

    tower = _load(AutoModel, vision, config=vision_config)
    language_model = _load(AutoModelForCausalLM, text)
    if language_model.get_input_embeddings().num_embeddings < rows:
        language_model.resize_token_embeddings(rows, mean_resizing=False)
    model = join(config, tower, language_model)
    if trained:
        _load_trained(model, trained)
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), image_token_id]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id

    with complete_or_absent(output) as folder:
        model.save_pretrained(folder)
        config.dtype = language_model.dtype  # what "auto" loads; saving took the tower's
        for part in (config.vision_config, config.text_config):
            part.name_or_path = ""  # a folder of this machine; the manifest tells the source
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _copy_licences({"vision": vision, "text": text}, folder)
        manifest = {
            "versions": versions("granulon", "transformers", "torch"),
            "vision": vision.describe(vision_config),
            "text": text.describe(text_config),
            "image_token": image_token,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return output


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
    """Projector, gains and controller, all of them and nothing else, into a model of the dtype that they go with."""
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
    A Granulon around an encoder and a causal language model that are in memory already; they are not copied.

    Args:
        config (`GranulonConfig`): made for these two.
        tower, language_model (`PreTrainedModel`): the encoder and the language model with its head.

    Returns:
        `GranulonForConditionalGeneration`: with a new projector and controller, in the language model's dtype.
    """
    with torch.device("meta"):
        model = GranulonForConditionalGeneration(config)
    model.model.vision_tower = tower
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
    """The language model's tokenizer, ready to write images and batches, and the token that stands for an image."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(text.folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{text.name} has no tokenizer that loads: {_first_line(error)}") from error
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


@contextmanager
def complete_or_absent(output):
    """A folder to write to that becomes `output` at the end, or vanishes if anything fails before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_licences(sources, folder):
    """Licences ask to be passed on with the weights."""
    for part, source in sources.items():
        for file in (file for pattern in LICENCE_FILES for file in source.folder.glob(pattern)):
            target = folder / "licences" / part / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _first_line(error):
    return str(error).strip().partition("\n")[0]


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
