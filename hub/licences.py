"""What the licences of the parts ask of whoever publishes a checkpoint, as rules that refuse or add what is needed.

This follows the licences as they stood when it was written, and is no legal advice. What a part stands under is what
its own card declared when it was assembled (granulon_manifest.json), else what its family is known to stand under,
else what the publisher says (`--vision_licence`, `--text_licence`).
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from .assemble import MANIFEST
from .manifest import ROOT

LICENCE = "LICENSE.md"

DINOV3, DINOV3_LINK = "dinov3-license", "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
LLAMA_NOTICE = (
    "{name} is licensed under the {name} Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
OPEN = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause")
OPEN_DATA = (
    *OPEN, "cc0-1.0", "pddl", "odc-by", "odbl", "cdla-permissive-1.0", "cdla-permissive-2.0",
    *(f"cc-by{kind}-{version}" for kind in ("", "-sa") for version in ("2.0", "2.5", "3.0", "4.0")),
)  # fmt: skip
FAMILIES = {  # of a part whose card declares nothing: known names' beginnings to the licence of their weights
    "facebook/dinov2": "apache-2.0",
    "openai/clip": "mit",
    "google/siglip": "apache-2.0",
    "qwen/qwen2.5-1.5b": "apache-2.0",
}
# Names that no statement changes, of a local copy too: "Llama-3.2-3B-tuned", but not "ollama/qwen".
LLAMA = re.compile(r"(?<![a-z])llama(?:-?(\d(?:\.\d)?))?")
AGREEMENT = "LICEN[CS]E*"


class LicenceError(ValueError):
    """Publishing would violate a licence; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Part:
    """One of "vision" and "text": where its weights come from, and what they stand under."""

    name: str
    source: str
    revision: str | None
    licence: str

    @property
    def is_llama(self) -> bool:
        return self.licence.startswith("llama")


@dataclass(frozen=True)
class Terms:
    """What the licences come to: metadata of the card, lines for NOTICE, sentences for the card, warnings."""

    metadata: dict[str, str]
    notices: list[str]
    credits: list[str]
    warnings: list[str]


def terms(
    folder: Path,
    repo_id: str,
    *,
    stated: dict[str, str] | None = None,
    data_licences: dict[str, str] | None = None,
    outputs_of: list[str] | None = None,
) -> Terms:
    """
    What has to go with a checkpoint, or why it must not be published.

    Args:
        folder: the checkpoint, with its manifest and the licence files of its parts in `licences/`.
        repo_id: the name it is to have.
        stated: "vision" and "text" to a licence (an identifier of the Hub), where the parts declare none.
        data_licences: what was trained on (a source as the manifest names it) to its licence.
        outputs_of: models whose outputs were trained on, beyond those that the folder's reports name.

    Raises:
        LicenceError: see the rules below.
    """
    manifest = read_manifest(folder)
    parts = [_part(name, manifest, stated or {}) for name in ("vision", "text")]
    for part in parts:
        if part.licence not in OPEN:
            _need_agreement(part, folder)
    teachers = sorted({*(outputs_of or []), *_annotators(manifest, folder)})
    _need_llama_name(parts, teachers, repo_id)
    return Terms(
        metadata=_metadata(parts),
        notices=[LLAMA_NOTICE.format(name=_llama_name(part.licence)) for part in parts if part.is_llama],
        credits=_credits(parts, teachers),
        warnings=_part_warnings(parts) + _data_warnings(manifest, data_licences or {}),
    )


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint; raises `LicenceError` where its parts cannot be known."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise LicenceError(
            f"{folder} has no {MANIFEST}, so that nobody knows whose weights are in it: publish what "
            "granulon-assemble or granulon-train wrote, with that file"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not all(isinstance(manifest.get(part), dict) for part in ("vision", "text")):
        raise LicenceError(f"{path} does not say what the vision tower and the language model are; restore it")
    return manifest


def _part(name: str, manifest: dict, stated: dict[str, str]) -> Part:
    entry = manifest[name]
    source = entry.get("source") or "an unnamed model"
    declared = _by_name(source) or _strictest(entry.get("license"))
    if declared in ("other", "unknown"):
        declared = entry.get("license_name")
    if declared is None:
        declared = next((of for start, of in FAMILIES.items() if source.lower().startswith(start)), None)
    licence = (declared or stated.get(name) or "").lower()
    if declared and stated.get(name, licence).lower() != licence:
        raise LicenceError(
            f"the {name} part, {source}, stands under {licence}, which a statement to the contrary ({stated[name]}) "
            f"does not change: leave --{name}_licence out"
        )
    if not licence:
        raise LicenceError(
            f"nobody knows what the {name} part, {source} ({entry.get('model_type')}), stands under: its card "
            f"tells no licence. Ask its makers, or, if they are your own, say so with --{name}_licence apache-2.0"
        )
    return Part(name, source, entry.get("revision"), licence)


def _by_name(source: str) -> str | None:
    """The licence of DINOv3 and Llama weights, which their names tell wherever a copy of them lies."""
    name = source.lower().rstrip("/").rpartition("/")[2]
    if name.startswith("dinov3"):
        return DINOV3
    llama = LLAMA.search(name)
    return f"llama{llama[1]}" if llama and llama[1] else None


def _strictest(declared: str | list[str] | None) -> str | None:
    """A card may declare several licences: the first that is not open."""
    if isinstance(declared, list):
        return next((licence for licence in declared if licence not in OPEN), *declared[:1] or [None])
    return declared


def _need_agreement(part: Part, folder: Path):
    """The DINOv3 and the Llama licence, among others, want a copy of the agreement to travel with the weights."""
    place = Path(folder) / "licences" / part.name
    if not any(file.stat().st_size for file in place.glob(AGREEMENT)):
        raise LicenceError(
            f"the {part.name} part, {part.source}, stands under {part.licence}, which asks for a copy of the "
            f"agreement beside the weights: put it into {place}/LICENSE (its own repository has it)"
        )


def _need_llama_name(parts: list[Part], teachers: list[str], repo_id: str):
    """Llama's licence: what holds Llama, or was trained on what Llama said, has a name that begins with Llama."""
    reasons = [f"its language model is {part.source}" for part in parts if part.is_llama]
    reasons += [f"it was trained on outputs of {name}" for name in teachers if LLAMA.search(name.lower())]
    name = repo_id.rpartition("/")[2]
    if reasons and not name.startswith("Llama"):
        raise LicenceError(
            f"the name {name} must begin with Llama, as Llama's licence asks, since {' and '.join(reasons)}: call it "
            f"Llama-{name}"
        )


def _metadata(parts: list[Part]) -> dict[str, str]:
    """The card's licence: that of the strictest part; where there are two of these, both, told in the folder."""
    strict = sorted({part.licence for part in parts if part.licence not in OPEN})
    if not strict:
        return {"license": "apache-2.0"}
    if strict == [DINOV3]:
        return {"license": "other", "license_name": DINOV3, "license_link": DINOV3_LINK}
    if len(strict) == 1 and strict[0].startswith("llama"):
        return {"license": strict[0]}
    return {"license": "other", "license_name": "-and-".join(strict), "license_link": LICENCE}


def _credits(parts: list[Part], teachers: list[str]) -> list[str]:
    lines = [f"{part.name} part: {part.source}, under {part.licence}" for part in parts]
    if any(part.is_llama for part in parts) or any(LLAMA.search(name.lower()) for name in teachers):
        lines.append("**Built with Llama**")
    if any(part.licence == DINOV3 for part in parts):
        lines.append("built with DINOv3; what is made of it may be passed on under the DINOv3 licence alone")
    return lines + [f"trained on outputs of {name}" for name in teachers]


def _data_warnings(manifest: dict, data_licences: dict[str, str]) -> list[str]:
    sources = {public_name(entry) for run in manifest.get("training", []) for entry in data_of(run)}
    warnings = []
    for source in sorted(sources):
        licence = data_licences.get(source, "").lower()
        if licence in ("", "unknown", "other"):
            warnings.append(f"The licence of the training data `{source}` is not known.")
        elif _is_non_commercial(licence):
            warnings.append(f"The training data `{source}` are for non-commercial use ({licence}).")
        elif licence not in OPEN_DATA:
            warnings.append(f"The training data `{source}` stand under {licence}: see what it allows.")
    return warnings


def _part_warnings(parts: list[Part]) -> list[str]:
    return [
        f"The {part.name} part, `{part.source}`, is for non-commercial use ({part.licence})."
        for part in parts
        if _is_non_commercial(part.licence)
    ]


def _is_non_commercial(licence: str) -> bool:
    words = re.split(r"[^a-z]+", licence.lower())
    return "nc" in words or "noncommercial" in words or "non commercial" in " ".join(words)


def data_of(run: dict) -> list:
    """The sources of a training as its manifest names them."""
    data = run.get("settings", {}).get("data") or []
    return [data] if isinstance(data, str | dict) else data


def public_name(entry) -> str:
    """A source as the world may know it: how the folders of this machine are called is nobody's business."""
    text = entry["path"] if isinstance(entry, dict) else str(entry)
    return Path(text).name if text.startswith(("/", "~", "./", "../")) else text


def _annotators(manifest: dict, folder: Path) -> set[str]:
    """Models that labelled what the controller was trained on, as its training tells, or its report."""
    path = Path(folder) / "controller_report.json"
    told = [*manifest.get("training", []), json.loads(path.read_text()) if path.is_file() else {}]
    return {name for entry in told for name in entry.get("annotators") or []}


def _llama_name(licence: str) -> str:
    """What Meta calls the model of a licence such as llama3.2 or llama-3.2-community-license."""
    version = LLAMA.search(licence)[1] or ""
    return {"3": "Meta Llama 3"}.get(version, f"Llama {version}".rstrip())


def licence_text(terms: Terms, agreements: list[str]) -> str:
    """
    LICENSE.md of a package: the code under Apache-2.0, whose text it holds, and where the parts' agreements are.

    Args:
        agreements: paths in the package.
    """
    own = distribution("granulon").read_text("licenses/LICENSE") or (ROOT / "LICENSE").read_text(encoding="utf-8")
    parts = [*(f"- {line}" for line in terms.credits), *(f"- agreement: [{path}]({path})" for path in agreements)]
    return "\n".join(
        ["# Licences", "", "The weights hold parts of others and stand under their licences:", "", *parts, ""]
        + ["The code in this repository stands under the Apache License 2.0:", "", "```", own.rstrip(), "```", ""]
    )
