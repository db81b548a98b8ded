"""The images of a finished run's samples, read again from the task's data for the judge."""

import base64
import hashlib
import io
from pathlib import Path

from granulon.evaluation.engine import make_task, task_config, with_commit
from granulon.evaluation.sample_rows import write_rows
from granulon.hub.inference import open_image


class Images:
    """
    Args:
        result: of the run.
        output: the folder of results, which also holds generated sample rows.
        side: pixels of the longer side; larger images are scaled down.

    Raises:
        ValueError: the data were not found.
    """

    def __init__(self, result: dict, output: Path, side: int):
        self.name, self.side = result["task"]["name"], side
        config = task_config(self.name, result["settings"]["protocol"])
        config = with_commit(config, result.get("data", {}).get("revision"))
        rows = write_rows(self.name, config, output) if result["settings"]["sample_rows"] else None
        self.task = make_task(config, rows)

    def sha256(self, sample: dict) -> list[str]:
        """
        The hash of each image of a sample.

        Raises:
            ValueError: the data are not those that were answered.
        """
        docs = self.task.eval_docs
        if sample["id"] >= len(docs) or self.task.doc_to_text(docs[sample["id"]]) != sample["question"]:
            raise ValueError(
                f"the data of {self.name} changed since the run: sample {sample['id']} has another question; restore "
                "the data, or judge with --sees reference"
            )
        return [hashlib.sha256(image).hexdigest() for image in self._jpegs(sample["id"])]

    def data_urls(self, number: int) -> list[str]:
        """The images of sample `number` as data URLs."""
        return [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in self._jpegs(number)]

    def _jpegs(self, number: int) -> list[bytes]:
        files = []
        for image in self.task.doc_to_visual(self.task.eval_docs[number]):
            image = open_image(image)
            image.thumbnail((self.side, self.side))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        return files
