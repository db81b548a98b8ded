"""What the licences of the parts require of a published checkpoint: rules that refuse it or add what is needed.

This follows the licences as of its writing, and is no legal advice. The licence of a part is the one that its own card
declared when it was assembled (granulon_manifest.json), else the known licence of its family, else the one that the
publisher gives (`--licences`).
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from .manifest import ROOT, read_manifest

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
FAMILIES = {  # for parts whose card declares nothing: how their name begins, and the licence of their weights
    "facebook/dinov2": "apache-2.0",
    "openai/clip": "mit",
    "google/siglip": "apache-2.0",
    "qwen/qwen2.5-1.5b": "apache-2.0",
}
# In the name of a model, also of a local copy: matches "Llama-3.2-3B-tuned", but not "ollama/qwen".
LLAMA = re.compile(r"(?<![a-z])llama(?:-?(\d(?:\.\d)?))?")
NON_COMMERCIAL = re.compile(r"(?<![a-z])(nc|non[^a-z]*commercial)(?![a-z])")


class LicenceError(ValueError):
    """Publishing would violate a licence; the message names the licence, the reason and the remedy."""


@dataclass(frozen=True)
class Part:
    """The vision or the text part: where its weights come from, and their licence."""

    name: str
    source: str
    licence: str

    @property
    def is_llama(self) -> bool:
        return self.licence.startswith("llama")


@dataclass(frozen=True)
class Terms:
    """What the licences require."""

    licences: dict[str, str]  # of "vision" and "text"
    metadata: dict[str, str]  # entries of the card's front matter
    notices: list[str]  # lines of NOTICE
    credits: list[str]  # sentences for the card
    warnings: list[str]  # the same


def terms(
    folder: Path, repo_id: str, licences: dict[str, str] | None = None, outputs_of: list[str] | None = None
) -> Terms:
    """
    What a published checkpoint needs, or why it must not be published.

    Args:
        folder: the checkpoint, with its manifest and the licence files of its parts in `licences/`.
        licences: "vision", "text" and training data sources (as the manifest names them) to an identifier of the Hub;
            for a part only if its card declares none.
        outputs_of: models on whose outputs it was trained, besides those in the manifest and the controller's report.

    Raises:
        LicenceError: a licence is unknown or forbids it.
        ValueError: the manifest is missing or incomplete.
    """
    manifest, licences = read_manifest(folder), licences or {}
    parts = [_part(name, manifest[name], licences.get(name)) for name in ("vision", "text")]
    for part in parts:
        if part.licence not in OPEN:
            _check_agreement(part, Path(folder))
    teachers = sorted({*(outputs_of or []), *_annotators(manifest, Path(folder))})
    _check_llama_name(parts, teachers, repo_id)
    return Terms(
        licences={part.name: part.licence for part in parts},
        metadata=_metadata(parts),
        notices=[LLAMA_NOTICE.format(name=_llama_name(part.licence)) for part in parts if part.is_llama],
        credits=_credits(parts, teachers),
        warnings=_warnings(parts, manifest, licences),
    )


def _part(name: str, entry: dict, given: str | None) -> Part:
    source = entry.get("source") or "an unnamed model"
    declared = _licence_by_name(source) or entry.get("license")
    if isinstance(declared, list):  # several on a card: the first that is not open
        declared = next((licence for licence in declared if licence not in OPEN), *declared[:1] or [None])
    if declared in ("other", "unknown"):
        declared = entry.get("license_name")
    if declared is None:
        declared = next((known for start, known in FAMILIES.items() if source.lower().startswith(start)), None)
    licence = (declared or given or "").lower()
    if not licence:
        unknown = f"unknown licence of the {name} part, {source} ({entry.get('model_type')}): its card declares none"
        raise LicenceError(f"{unknown}. If it is your own model, give one with --licences {name}=apache-2.0")
    if given and given.lower() != licence:
        found = f"the {name} part, {source}, is licensed under {licence}"
        raise LicenceError(f"{found}, which --licences {name}={given} cannot change: leave it out")
    return Part(name, source, licence)


def _licence_by_name(source: str) -> str | None:
    """The licence of DINOv3 and Llama weights, recognised by their name, also in a local copy."""
    name = source.lower().rstrip("/").rpartition("/")[2]
    if name.startswith("dinov3"):
        return DINOV3
    llama = LLAMA.search(name)
    return f"llama{llama[1]}" if llama and llama[1] else None


def _check_agreement(part: Part, folder: Path):
    """The DINOv3 and the Llama licence, among others, require a copy of the agreement beside the weights."""
    place = folder / "licences" / part.name
    if not any(file.stat().st_size for file in place.glob("LICEN[CS]E*")):
        found = f"the {part.name} part, {part.source}, is licensed under {part.licence}"
        remedy = f"put it into {place}/LICENSE (its own repository has it)"
        raise LicenceError(f"{found}, which requires a copy of the agreement beside the weights: {remedy}")


def _check_llama_name(parts: list[Part], teachers: list[str], repo_id: str):
    """Llama's licence: the name of a model with Llama's weights, or trained on its outputs, begins with Llama."""
    reasons = [f"its language model is {part.source}" for part in parts if part.is_llama]
    reasons += [f"it was trained on outputs of {name}" for name in teachers if LLAMA.search(name.lower())]
    name = repo_id.rpartition("/")[2]
    if reasons and not name.startswith("Llama"):
        required = f"the name {name} must begin with Llama, as Llama's licence requires"
        raise LicenceError(f"{required}, since {' and '.join(reasons)}: call it Llama-{name}")


def _metadata(parts: list[Part]) -> dict[str, str]:
    """The card's licence: the strictest of the parts; both if none of them is open."""
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
        lines.append("built with DINOv3; derived models may be distributed under the DINOv3 licence only")
    return lines + [f"trained on outputs of {name}" for name in teachers]


def _warnings(parts: list[Part], manifest: dict, licences: dict[str, str]) -> list[str]:
    warnings = [
        f"The {part.name} part, `{part.source}`, is for non-commercial use ({part.licence})."
        for part in parts
        if NON_COMMERCIAL.search(part.licence)
    ]
    sources = {public_name(entry) for run in manifest.get("training", []) for entry in training_data(run)}
    for source in sorted(sources):
        licence = licences.get(source, "").lower()
        if licence in ("", "unknown", "other"):
            warnings.append(f"The licence of the training data `{source}` is not known.")
        elif NON_COMMERCIAL.search(licence):
            warnings.append(f"The training data `{source}` are for non-commercial use ({licence}).")
        elif licence not in OPEN_DATA:
            warnings.append(f"The training data `{source}` are licensed under {licence}: check what it allows.")
    return warnings


def training_data(run: dict) -> list:
    """The data sources of an entry of the manifest's training."""
    data = run.get("settings", {}).get("data") or []
    return [data] if isinstance(data, str | dict) else data


def public_name(entry) -> str:
    """The name of a data source without the folders of this machine."""
    text = entry["path"] if isinstance(entry, dict) else str(entry)
    return Path(text).name if text.startswith(("/", "~", "./", "../")) else text


def _annotators(manifest: dict, folder: Path) -> set[str]:
    """Models that labelled the controller's training data, from the manifest and the controller's report."""
    report = folder / "controller_report.json"
    entries = [*manifest.get("training", []), json.loads(report.read_text()) if report.is_file() else {}]
    return {name for entry in entries for name in entry.get("annotators") or []}


def _llama_name(licence: str) -> str:
    """Meta's name for the model of a licence such as llama3.2 or llama-3.2-community-license."""
    version = LLAMA.search(licence)[1] or ""
    return "Meta Llama 3" if version == "3" else f"Llama {version}".rstrip()


def licence_text(terms: Terms, agreements: list[str]) -> str:
    """LICENSE.md of a package: the Apache License for the code, and links to `agreements`, paths in the package."""
    own = distribution("granulon").read_text("licenses/LICENSE") or (ROOT / "LICENSE").read_text(encoding="utf-8")
    lines = [*terms.credits, *(f"agreement: [{path}]({path})" for path in agreements)]
    parts = "\n".join(f"- {line}" for line in lines)
    return (
        f"# Licences\n\nThe weights contain models of others and are licensed under their licences:\n\n{parts}\n\n"
        f"The code in this repository is licensed under the Apache License 2.0:\n\n```\n{own.rstrip()}\n```\n"
    )
