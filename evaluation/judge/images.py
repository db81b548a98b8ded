"""The images of a finished run's samples, as a judge gets them: found again in the task's data."""

import base64
import hashlib
import io
from pathlib import Path

from granulon.evaluation.engine import make_task, task_config
from granulon.evaluation.sample_rows import write_rows
from modeling_granulon import load_rgb


class Images:
    """
    Args:
        result: of the run.
        output: the folder of results, for rows that were made there.
        side: pixels of the longer side; larger images are made smaller.

    Raises:
        ValueError: the data cannot be had.
    """

    def __init__(self, result: dict, output: Path, side: int):
        self.name, self.side = result["task"]["name"], side
        replaced = write_rows(self.name, output / "rows") if result["settings"]["sample_rows"] else None
        self.task = make_task(task_config(self.name), replaced)

    def sha256(self, sample: dict) -> list[str]:
        """
        What the images of a sample are.

        Raises:
            ValueError: the data are not those that were answered.
        """
        docs = self.task.eval_docs
        if sample["id"] >= len(docs) or self.task.doc_to_text(docs[sample["id"]]) != sample["question"]:
            raise ValueError(
                f"the data of {self.name} have changed: sample {sample['id']} is another one than was answered; "
                "restore them, or judge by --sees reference"
            )
        return [hashlib.sha256(image).hexdigest() for image in self._files(sample["id"])]

    def data_urls(self, number: int) -> list[str]:
        return [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in self._files(number)]

    def _files(self, number: int) -> list[bytes]:
        files = []
        for image in self.task.doc_to_visual(self.task.eval_docs[number]):
            image = load_rgb(image)
            image.thumbnail((self.side, self.side))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        return files
