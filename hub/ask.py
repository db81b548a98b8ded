"""Ask a Granulon about an image, and see how it looked: `granulon-ask`."""

import json
import sys
import urllib.request
from dataclasses import dataclass, field

from transformers import AutoConfig, HfArgumentParser, TextStreamer

from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor, load_rgb

from .overlay import draw_clusters

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
        ValueError: if it cannot be had, is larger than `MAX_BYTES`, or is no usable image.
    """
    if not source.startswith(("http://", "https://")):
        return load_rgb(source)
    # urllib, because it needs no more than a limit and a timeout and is there with any version of the Hub's client.
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


def ask(model, processor, image, question, granularity=None, view="full", max_new_tokens=256, stream=False):
    """
    Answer a question about an image.

    Args:
        image (`PIL.Image.Image`): RGB.
        granularity (`str` or `int`): a level of the model, or None for the controller's choice.
        view (`str`): "full", "pixel", "semantic" or "auto".
        stream (`bool`): print what is read, to stderr, and the answer while it is written, to stdout.

    Returns:
        `dict`: answer, granularity (name, probabilities, chosen_by), view, tokens (pixel, semantic, text), clusters
        (number, score, share), and for drawing cluster_map (H, W), -1 where dropped.

    Raises:
        ValueError: an unknown level or view.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device, dtype=model.dtype)
    if granularity is not None and granularity.isdecimal():
        granularity = int(granularity)
    seen = model.explain(**inputs, granularity=granularity)
    result = _describe(model.config, inputs, seen, granularity, view)
    if stream:
        print(_summary(result), file=sys.stderr, flush=True)
    if seen.granularity_logits is None and seen.granularity_index is not None:
        granularity = seen.granularity_index  # a level drawn at random is drawn once
    prompt_length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        granularity=granularity,
        visual_view=view,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
    )
    answer = processor.decode(output[0, prompt_length:], skip_special_tokens=True)
    return {"answer": answer.strip(), **result}


def _describe(config, inputs, seen, granularity, view):
    """Everything of the result that is known before the answer."""
    slots = int((inputs["input_ids"] == config.image_token_id).sum())
    text = int(inputs["attention_mask"].sum()) - slots
    pixel = slots - config.max_semantic_tokens
    if seen.granularity_index is None:  # the plain encoder: no levels, no clusters
        tokens = {"pixel": pixel, "semantic": 0, "text": text}
        return {"granularity": None, "view": "pixel", "tokens": tokens, "clusters": [], "cluster_map": None}

    names = config.granularity_names
    level = int(seen.granularity_index[0])
    probabilities = None
    if seen.granularity_logits is not None:
        probabilities = dict(zip(names, seen.granularity_logits[0].float().softmax(-1).tolist()))
    chosen_by = "request" if granularity is not None else "controller" if probabilities else "configuration"
    view = config.granularities[level]["view"] if view == "auto" else view
    kept = int(seen.semantic_mask[0].sum())
    cluster_map = seen.cluster_map[0].cpu().numpy()
    clusters = [
        {"number": index + 1, "score": score, "share": float((cluster_map == index).mean())}
        for index, score in enumerate(seen.cluster_scores[0, :kept].tolist())
    ]
    return {
        "granularity": {"name": names[level], "chosen_by": chosen_by, "probabilities": probabilities},
        "view": view,
        "tokens": {
            "pixel": 0 if view == "semantic" else pixel,
            "semantic": 0 if view == "pixel" else kept,
            "text": text,
        },
        "clusters": clusters,
        "cluster_map": cluster_map,
    }


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
            scores = [cluster["score"] for cluster in result["clusters"]]
            lines = [rest.question, result["answer"], _summary(result)]
            draw_clusters(image, cluster_map, scores, lines).save(arguments.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-ask: {error}")
    if rest.json:
        print(json.dumps({"question": rest.question, "image": arguments.image, **result}, ensure_ascii=False))


if __name__ == "__main__":
    main()
