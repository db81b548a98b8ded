"""Run by the demo in a separate process, which loads the checkpoint folder without this package."""

import json
import sys
from pathlib import Path

from transformers import pipeline

ASKED = (  # the answer's column, the image's, and the image tokens that are read
    ("answer", "image", "full"),
    ("pixel_answer", "image", "pixel"),
    ("semantic_answer", "image", "semantic"),
    ("other_answer", "other_image", "full"),
)


def chat(image: str, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]


def main(output: Path):
    rows = json.loads((output / "questions.json").read_text())
    pipe = pipeline("image-text-to-text", model=str(output / "checkpoint"), trust_remote_code=True)
    for key, image, view in ASKED:
        chats = [chat(row[image], row["question"]) for row in rows]
        generate = {"max_new_tokens": 8, "do_sample": False, "visual_view": view}
        answers = pipe(text=chats, batch_size=64, generate_kwargs=generate, return_full_text=False)
        for row, answer in zip(rows, answers, strict=True):
            row[key] = answer[0]["generated_text"].strip()
    for row in rows:
        inputs = pipe.processor.apply_chat_template(
            chat(row["image"], row["question"]), tokenize=True, return_dict=True, return_tensors="pt"
        )
        row["chosen"] = pipe.model.explain(**inputs).describe()[0]["granularity"]["name"]
    (output / "answers.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
