"""What licences require: each rule accepts what follows it and refuses the rest, with reason and remedy."""

import json

import pytest

from granulon.hub.licences import DINOV3_LINK, LicenceError, licence_text, terms

DINOV3 = {"source": "facebook/dinov3-vitl16-pretrain-lvd1689m", "revision": "a", "model_type": "dinov3_vit",
          "license": "other", "license_name": "dinov3-license"}  # fmt: skip
QWEN = {"source": "Qwen/Qwen2.5-1.5B-Instruct", "revision": "b", "model_type": "qwen2", "license": "apache-2.0"}
LLAMA = {"source": "meta-llama/Llama-3.2-3B-Instruct", "revision": "c", "model_type": "llama", "license": "llama3.2"}
CLIP = {"source": "openai/clip-vit-large-patch14", "revision": "d", "model_type": "clip_vision_model"}
OWN = {"source": "mine", "revision": None, "model_type": "dinov3_vit", "license": None}


@pytest.fixture
def checkpoint(tmp_path):
    def make(vision, text, agreements=("vision", "text"), training=(), annotators=()):
        manifest = {"vision": vision, "text": text, "training": list(training)}
        (tmp_path / "granulon_manifest.json").write_text(json.dumps(manifest))
        for part in agreements:
            (tmp_path / "licences" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "licences" / part / "LICENSE.md").write_text("the agreement")
        if annotators:
            (tmp_path / "controller_report.json").write_text(json.dumps({"annotators": list(annotators)}))
        return tmp_path

    return make


def test_parts_under_open_licences_are_published_under_apache(checkpoint):
    found = terms(checkpoint(CLIP, QWEN, agreements=()), "me/granulon")
    assert found.metadata == {"license": "apache-2.0"} and not found.notices and not found.warnings
    assert "vision part: openai/clip-vit-large-patch14, under mit" in found.credits


def test_dinov3_makes_the_licence_its_own_with_name_and_link(checkpoint):
    found = terms(checkpoint(DINOV3, QWEN, agreements=("vision",)), "me/granulon")
    assert found.metadata == {"license": "other", "license_name": "dinov3-license", "license_link": DINOV3_LINK}
    assert any("DINOv3 licence only" in line for line in found.credits)


@pytest.mark.parametrize("part, vision, text", [("vision", DINOV3, QWEN), ("text", CLIP, LLAMA)])
def test_without_a_copy_of_the_agreement_nothing_is_published(checkpoint, part, vision, text):
    with pytest.raises(LicenceError, match=f"copy of the agreement.*licences/{part}/LICENSE"):
        terms(checkpoint(vision, text, agreements=()), "me/Llama-granulon")


def test_an_empty_agreement_is_none(checkpoint):
    folder = checkpoint(DINOV3, QWEN)
    (folder / "licences" / "vision" / "LICENSE.md").write_text("")
    with pytest.raises(LicenceError, match="copy of the agreement"):
        terms(folder, "me/granulon")


def test_llama_brings_its_notice_and_built_with_llama(checkpoint):
    found = terms(checkpoint(CLIP, LLAMA), "me/Llama-granulon-3b")
    assert found.metadata == {"license": "llama3.2"}
    assert found.notices == [
        "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
        "Reserved."
    ]
    assert "**Built with Llama**" in found.credits


@pytest.mark.parametrize("name", ["me/granulon-llama3b", "me/llama-granulon", "Llama/granulon"])
def test_what_holds_llama_has_a_name_that_begins_with_llama(checkpoint, name):
    with pytest.raises(LicenceError, match="must begin with Llama.*call it Llama-"):
        terms(checkpoint(CLIP, LLAMA), name)


def test_what_was_trained_on_outputs_of_llama_has_a_name_that_begins_with_llama(checkpoint):
    folder = checkpoint(CLIP, QWEN, annotators=["meta-llama/Llama-3.3-70B-Instruct"])
    with pytest.raises(LicenceError, match="trained on outputs of meta-llama/Llama-3.3-70B-Instruct"):
        terms(folder, "me/granulon")
    assert "**Built with Llama**" in terms(folder, "me/Llama-granulon").credits
    with pytest.raises(LicenceError, match="trained on outputs of Llama-4"):
        terms(checkpoint(CLIP, QWEN), "me/granulon", outputs_of=["Llama-4"])
    assert terms(checkpoint(CLIP, QWEN, annotators=["gpt"]), "me/granulon").credits[-1] == "trained on outputs of gpt"


def test_dinov3_with_llama_is_licensed_under_both(checkpoint):
    found = terms(checkpoint(DINOV3, LLAMA), "me/Llama-granulon")
    assert found.metadata == {
        "license": "other", "license_name": "dinov3-license-and-llama3.2", "license_link": "LICENSE.md"
    }  # fmt: skip


def test_a_part_of_unknown_licence_is_refused_until_its_owner_gives_one(checkpoint):
    folder = checkpoint(OWN, QWEN)
    with pytest.raises(LicenceError, match="vision part, mine .dinov3_vit.*--licences vision=apache-2.0"):
        terms(folder, "me/granulon")
    assert terms(folder, "me/granulon", licences={"vision": "apache-2.0"}).metadata == {"license": "apache-2.0"}


def test_a_declared_licence_cannot_be_changed(checkpoint):
    folder = checkpoint(DINOV3, QWEN)
    with pytest.raises(LicenceError, match="under dinov3-license, which --licences vision=mit cannot change"):
        terms(folder, "me/granulon", licences={"vision": "mit"})
    assert terms(folder, "me/granulon", licences={"vision": "dinov3-license"}).metadata["license"] == "other"


def test_known_names_have_known_licences_where_the_card_declares_none(checkpoint):
    undeclared = {**DINOV3, "license": None, "license_name": None}
    with pytest.raises(LicenceError, match="dinov3-license, which requires a copy"):
        terms(checkpoint(undeclared, QWEN, agreements=()), "me/granulon")


@pytest.mark.parametrize("source", ["Llama-3.2-3B-Instruct", "models/Llama-3.2-3B", "someone/Llama-3.2-3B-tuned"])
def test_a_copy_of_llama_is_llama_whatever_is_said_of_it(checkpoint, source):
    for declared in (None, "apache-2.0", "llama3.2"):
        folder = checkpoint(CLIP, {**LLAMA, "source": source, "license": declared})
        with pytest.raises(LicenceError, match="must begin with Llama"):
            terms(folder, "me/granulon")
        assert terms(folder, "me/Llama-granulon").metadata == {"license": "llama3.2"}
    with pytest.raises(LicenceError, match="licensed under llama3.2"):
        terms(folder, "me/Llama-granulon", licences={"text": "apache-2.0"})


def test_a_copy_of_dinov3_is_dinov3_whatever_is_said_of_it(checkpoint):
    part = {**OWN, "source": "weights/dinov3-vitl16-pretrain-lvd1689m", "license": "apache-2.0"}
    assert terms(checkpoint(part, QWEN), "me/granulon").metadata["license_name"] == "dinov3-license"


@pytest.mark.parametrize(
    "declared, name",
    [
        ("llama3.2", "Llama 3.2"),
        ("llama3", "Meta Llama 3"),
        ("llama2", "Llama 2"),
        ("llama-3.1-community", "Llama 3.1"),
    ],
)
def test_the_notice_names_the_version(checkpoint, declared, name):
    found = terms(checkpoint(CLIP, {**LLAMA, "source": "a/b", "license": declared}), "me/Llama-granulon")
    assert found.notices[0].startswith(f"{name} is licensed under the {name} Community License, Copyright (c) Meta")


@pytest.mark.parametrize("file", ["NOTICE", "LICENSE", "licences/vision/NOTICE", "licences/vision/USE_POLICY.md"])
def test_another_text_does_not_count_as_a_copy_of_the_agreement(checkpoint, file):
    folder = checkpoint(DINOV3, QWEN, agreements=("text",))
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("something else")
    with pytest.raises(LicenceError, match="copy of the agreement"):
        terms(folder, "me/granulon")


def test_annotators_are_kept_by_the_stages_that_follow(checkpoint):
    """The next stage does not save the report; the manifest is kept."""
    taught = {"stage": "controller", "annotators": ["meta-llama/Llama-3.3-70B-Instruct"], "settings": {"data": []}}
    folder = checkpoint(CLIP, QWEN, training=[taught, {"stage": "sft", "settings": {"data": []}}])
    with pytest.raises(LicenceError, match="trained on outputs of meta-llama/Llama-3.3-70B-Instruct"):
        terms(folder, "me/granulon")
    assert terms(checkpoint(CLIP, QWEN, training=[{"stage": "x", "annotators": None}]), "me/granulon")
    assert terms(checkpoint(CLIP, QWEN, training=[{**taught, "annotators": ["ollama/qwen2.5"]}]), "me/granulon")


def test_a_part_for_non_commercial_use_is_warned_of(checkpoint):
    for licence in ("cc-by-nc-4.0", "CC BY NC 4.0", "noncommercial"):
        found = terms(checkpoint({**CLIP, "source": "a/b", "license": licence}, QWEN), "me/granulon")
        assert found.warnings == [f"The vision part, `a/b`, is for non-commercial use ({licence.lower()})."]


def test_a_card_with_several_licences_counts_as_the_strictest(checkpoint):
    part = {**CLIP, "source": "a/b", "license": ["mit", "cc-by-nc-4.0"]}
    assert terms(checkpoint(part, QWEN), "me/granulon").metadata["license_name"] == "cc-by-nc-4.0"
    part["license"] = ["mit", "apache-2.0"]
    assert terms(checkpoint(part, QWEN), "me/granulon").metadata == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    "licence, warned",
    [
        ("", "is not known"), ("other", "is not known"), ("CC BY NC 4.0", "non-commercial"),
        ("noncommercial", "non-commercial"), ("my-own-terms", "check what it allows"), ("cc-by-4.0", None),
        ("mit", None),
    ],
)  # fmt: skip
def test_data_are_warned_of_unless_their_licence_is_known_to_be_open(checkpoint, licence, warned):
    folder = checkpoint(CLIP, QWEN, training=[{"stage": "sft", "settings": {"data": "some/data"}}])
    warnings = terms(folder, "me/granulon", licences={"some/data": licence}).warnings
    assert len(warnings) == (warned is not None) and all(warned in line and "`some/data`" in line for line in warnings)


def test_the_licence_file_names_every_part_and_has_the_licence_of_the_code(checkpoint):
    found = terms(checkpoint(DINOV3, LLAMA), "me/Llama-granulon")
    text = licence_text(found, ["licences/vision/LICENSE.md"])
    assert "facebook/dinov3-vitl16" in text and "meta-llama/Llama-3.2" in text
    assert "(licences/vision/LICENSE.md)" in text and "Apache License" in text and "TERMS AND CONDITIONS" in text


def test_data_that_are_unknown_or_non_commercial_are_warned_of(checkpoint):
    run = {"stage": "sft", "settings": {"data": [{"path": "a/open"}, "a/unknown", {"path": "a/closed"}]}}
    folder = checkpoint(CLIP, QWEN, training=[run])
    found = terms(folder, "me/granulon", licences={"a/open": "cc-by-4.0", "a/closed": "cc-by-nc-4.0"})
    assert found.warnings == [
        "The training data `a/closed` are for non-commercial use (cc-by-nc-4.0).",
        "The licence of the training data `a/unknown` is not known.",
    ]


@pytest.mark.parametrize("content", [None, "{}", '{"vision": {}}'])
def test_without_a_manifest_nothing_is_published(tmp_path, content):
    if content:
        (tmp_path / "granulon_manifest.json").write_text(content)
    with pytest.raises(ValueError, match="granulon_manifest.json"):
        terms(tmp_path, "me/granulon")
