"""Ask a Granulon about an image, and see its level and clusters: `granulon-ask`."""

import json
import sys
import urllib.request
from dataclasses import dataclass, field

from transformers import AutoConfig, HfArgumentParser, TextStreamer

from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor, load_rgb

from .visualize import draw_clusters

MAX_BYTES = 50_000_000  # of a downloaded image
TIMEOUT = 20  # seconds without an answer from its server


@dataclass
class AskArguments:
    model: str = field(metadata={"help": "a Granulon: a folder, or a Hub id"})
    image: str = field(metadata={"help": "a file, or an http(s) address"})
    granularity: str | None = field(
        default=None, metadata={"help": "level by name or index; by default the controller reads it off the question"}
    )
    view: str = field(
        default="full",
        metadata={
            "help": "which image tokens are read; auto is what the level says",
            "choices": ["full", "pixel", "semantic", "auto"],
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer"})
    picture: str | None = field(default=None, metadata={"help": "write the image with its clusters to this file"})


def open_image(source):
    """
    The image of a file or an http(s) address, as `load_rgb` gives it.

    Raises:
        ValueError: if it cannot be fetched, is larger than `MAX_BYTES`, or is no usable image.
    """
    if not source.startswith(("http://", "https://")):
        return load_rgb(source)
    # urllib: a size limit and a timeout are enough, and it does not depend on the Hub client's version.
    request = urllib.request.Request(source, headers={"User-Agent": "granulon-ask"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            data = response.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{source} cannot be fetched: {error}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{source} is larger than {MAX_BYTES} bytes; download and shrink it first")
    return load_rgb(data)


def load_model(name):
    """Model, on the accelerator if there is one, and processor, from this package's own code.

    Raises:
        ValueError: if there is another kind of model, or none.
    """
    try:
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except OSError as error:
        raise ValueError(f"{name} is no model: {str(error).strip().partition(chr(10))[0]}") from error
    if model_type != "granulon":
        raise ValueError(f"{name} is a {model_type} model, not a granulon")
    model = GranulonForConditionalGeneration.from_pretrained(name, device_map="auto").eval()
    return model, GranulonProcessor.from_pretrained(name)


def question_inputs(model, processor, image, question):
    """The prompt of a question about an image, as the model takes it and on its device."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device, dtype=model.dtype)


def prompt_of(inputs):
    """The text of the processor's output: what `generate` needs besides the images that `encode` has read."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def text_tokens(config, inputs):
    """Text tokens of each prompt, without padding and image tokens (`list[int]`)."""
    slots_B = (inputs["input_ids"] == config.image_token_id).sum(-1)
    return (inputs["attention_mask"].sum(-1) - slots_B).tolist()


def level_of(config, name):
    """
    The index of a level that is given by name or index, also by an index as text; None for None.

    Raises:
        ValueError: the model has no such level.
    """
    if name is None:
        return None
    if not config.granularities:
        raise ValueError(f"granularity is {name!r}, but this model has no levels; leave it out")
    return config.granularity_index(int(name) if str(name).isdecimal() else name)


def ask(model, processor, image, question, granularity=None, view="full", max_new_tokens=256, stream=False):
    """
    Answer a question about an image.

    Args:
        image (`PIL.Image.Image`): RGB.
        granularity (`str` or `int`): a level of the model, or None for the controller's choice.
        view (`str`): "full", "pixel", "semantic" or "auto".
        stream (`bool`): print what is read, to stderr, and the answer while it is written, to stdout.

    Returns:
        `dict`: answer, granularity (name, chosen_by, probabilities), view, tokens (pixel, semantic, text), clusters
        (number, score, share), and for drawing cluster_map (H, W), None for a model without levels.

    Raises:
        ValueError: an unknown level or view.
    """
    inputs = question_inputs(model, processor, image, question)
    visual = model.explain(**inputs, granularity=level_of(model.config, granularity))
    (seen,) = visual.describe(view)
    (clusters,) = seen.pop("images")
    (text,) = text_tokens(model.config, inputs)
    result = {**seen, "tokens": {**seen["tokens"], "text": text}, **clusters}
    if stream:
        print(_summary(result), file=sys.stderr, flush=True)
    output = model.generate(
        **prompt_of(inputs),
        visual=visual,
        visual_view=view,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
    )
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"answer": answer.strip(), **result}


def _summary(result):
    """What was chosen and read, in one line."""
    tokens, level = result["tokens"], result["granularity"]
    read = f"{tokens['pixel']} pixel + {tokens['semantic']} semantic + {tokens['text']} text tokens"
    if level is None:
        return read
    odds = level["probabilities"]
    said = f" ({', '.join(f'{name} {share:.0%}' for name, share in odds.items())})" if odds else ""
    return f"{level['name']}, chosen by the {level['chosen_by']}{said}; {read}"


def main():
    if any(word.partition("=")[0] == "--batch" for word in sys.argv[1:]):
        from .batch import main as answer_many  # which reads this module

        return answer_many()
    parser = HfArgumentParser(AskArguments, description=__doc__)
    parser.add_argument("question", help="what you want to know about the image")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the answer")
    arguments, rest = parser.parse_args_into_dataclasses()
    try:
        image = open_image(arguments.image)
        model, processor = load_model(arguments.model)
        result = ask(
            model,
            processor,
            image,
            rest.question,
            arguments.granularity,
            arguments.view,
            arguments.max_new_tokens,
            stream=not rest.json,
        )
        cluster_map = result.pop("cluster_map")
        if arguments.picture:
            if cluster_map is None:
                raise ValueError("this model has no levels of granularity, so there are no clusters to draw")
            lines = [rest.question, result["answer"], _summary(result)]
            draw_clusters(image, cluster_map, result["clusters"], lines).save(arguments.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-ask: {error}")
    if rest.json:
        print(json.dumps({"question": rest.question, "image": arguments.image, **result}, ensure_ascii=False))


if __name__ == "__main__":
    main()
