"""Run by the demo in a separate process, which loads the model's folder without this package."""

import json
import sys
import time
from pathlib import Path
from statistics import median

from transformers import pipeline

ASKED = (("said", "image"), ("said_of_other", "other_image"), ("said_without", None))  # columns of answer and image
GENERATE = {"max_new_tokens": 12, "do_sample": False, "visual_view": "auto"}
TIMED = 7  # questions asked one by one


def chat(image: str | None, question: str) -> list[dict]:
    picture = [] if image is None else [{"type": "image", "path": image}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]


def main(model: str, file: Path):
    rows = json.loads(file.read_text())
    pipe = pipeline("image-text-to-text", model=model, trust_remote_code=True)
    for column, image in ASKED:
        asked = [row for row in rows if image is None or image in row]
        chats = [chat(image and row[image], row["question"]) for row in asked]
        generate = GENERATE if image else {key: value for key, value in GENERATE.items() if key != "visual_view"}
        options = {"batch_size": 32, "generate_kwargs": generate, "return_full_text": False}
        said = pipe(text=chats, **options) if chats else []
        for row, found in zip(asked, said, strict=True):
            row[column] = found[0]["generated_text"].strip()
    seconds = []
    for row in rows:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        start = time.perf_counter()
        inputs = pipe.processor.apply_chat_template(chat(row["image"], row["question"]), **options)
        inputs = inputs.to(dtype=pipe.model.dtype)
        if len(seconds) < TIMED:
            pipe.model.generate(**inputs, **GENERATE | {"max_new_tokens": 1})
            seconds.append(time.perf_counter() - start)
        seen = pipe.model.explain(**inputs).describe("auto")[0]
        row |= {"level": seen["granularity"]["name"], "view": seen["view"], "tokens": seen["tokens"]}
    file.write_text(json.dumps({"rows": rows, "first_token_seconds": median(seconds)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
