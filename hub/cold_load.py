"""Script of granulon-publish: load a model in a new process with transformers alone, without this package.

    python cold_load.py OUTPUT SOURCE [REVISION [ADAPTER [REVISION]]]

Loads a model as any user does (pipeline, Auto classes, remote code), asks about a generated image, and writes logits
and answer to OUTPUT. SOURCE and ADAPTER are repositories, each at its revision, or folders, whose revision is "".
"""

import sys

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

QUESTION = "What is in the picture?"


def main(output: str, source: str, revision: str = "", adapter: str = "", adapter_revision: str = ""):
    where = {"trust_remote_code": True, "revision": revision or None}
    pipe = pipeline("image-text-to-text", model=source, **where)
    model, processor = pipe.model, pipe.processor
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, revision=adapter_revision or None)
        processor = AutoProcessor.from_pretrained(adapter, trust_remote_code=True, revision=adapter_revision or None)
    image = Image.linear_gradient("L").convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, dtype=model.dtype)
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    answer = pipe(text=chat, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    del pipe, model
    if not adapter:
        classes = (AutoModel, AutoModelForImageTextToText)
        assert all(type(kind.from_pretrained(source, **where)).__name__.startswith("Granulon") for kind in classes)
    save_file({"logits": logits.contiguous()}, output, {"answer": answer})


if __name__ == "__main__":
    main(*sys.argv[1:])
