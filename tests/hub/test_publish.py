"""`granulon-publish` with the real client: readers see the old state or the new, and what they load is the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stand_in import HubStandIn
from huggingface_hub import HfApi, ModelCard
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2ForCausalLM
from trl import ModelConfig

import modeling_granulon
from granulon.hub import publish as module
from granulon.hub.assemble import assemble
from granulon.hub.eval_results import weights_sha256
from granulon.hub.package import make_package
from granulon.hub.publish import PublishArguments, PublishError, run
from granulon.hub.assemble import assemble_tiny
from granulon.train.stages import lora_config

REPO = "jinlab/granulon-qwen1.5b"
CODE = {file.name: file.read_bytes() for file in Path(modeling_granulon.__file__).parent.glob("*.py")}
CODE.pop("__init__.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = assemble_tiny(tmp_path_factory.mktemp("publish") / "checkpoint")
    manifest = json.loads((folder / "granulon_manifest.json").read_text())
    for part in ("vision", "text"):
        manifest[part] |= {"license": "apache-2.0"}
    entry = {"stage": "sft", "recipe": "tiny-cpu", "settings": {"data": ["/home/me/secret/rows.json"]}, "rows": 7}
    manifest["training"] = [entry | {"base": "/home/me/base", "steps": 3, "seed": 0, "processes": 1}]
    (folder / "granulon_manifest.json").write_text(json.dumps(manifest))
    (folder / "optimizer.pt").write_bytes(b"of a run")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / ".eval_results").mkdir()
    result = [{"dataset": {"id": "lmms-lab/POPE", "task_id": "pope"}, "value": 0.5, "notes": "made up for a test"}]
    (folder / ".eval_results" / "pope.yaml").write_text(json.dumps(result))
    return folder


@pytest.fixture(autouse=True)
def without_xet(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(tmp_path):
    with HubStandIn(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def unverified(monkeypatch):
    """Without the fresh processes, which other tests are about."""
    monkeypatch.setattr(module, "cold_load", lambda *arguments: (torch.zeros(1), ""))
    monkeypatch.setattr(module, "put_together", lambda *arguments: "")


def publish(hub, folder, token="hf_owner", **settings):
    settings = {"repo_id": REPO, "data_licence": ["rows.json=cc-by-4.0"], **settings}
    run(PublishArguments(folder=str(folder), **settings), HfApi(endpoint=hub.endpoint, token=token))


def package_of(folder, revision="v0.1.0", **told):
    return make_package(folder, "model", module.terms(folder, REPO, **told), REPO, revision)


LOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
name = "jinlab/granulon-qwen1.5b"
model = AutoModel.from_pretrained(name, trust_remote_code=True)
AutoProcessor.from_pretrained(name, trust_remote_code=True)
pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "image": Image.linear_gradient("L").convert("RGB")},
                                     {"type": "text", "text": "What is it?"}]}]
answer = pipe(text=chat, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
print(json.dumps([type(model).__name__, answer]))
"""


def loaded(environment, folder=None):
    code = LOAD if folder is None else LOAD.replace('"jinlab/granulon-qwen1.5b"', repr(str(folder)))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_was_published_loads_anywhere_and_answers_as_the_local_model(checkpoint, hub, tmp_path):
    command = [sys.executable, "-m", "granulon.hub.publish", "--folder", checkpoint.name, "--repo_id", REPO]
    publisher = hub.environment("hf_owner", tmp_path / "publisher")
    done = subprocess.run(command, env=publisher, cwd=checkpoint.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"/{REPO}/tree/v0.1.0" in done.stdout and "hf_owner" not in done.stdout + done.stderr
    reader = hub.environment(None, tmp_path / "reader")
    online = loaded(reader)
    assert online[0] == "GranulonModel" and online == loaded(reader, checkpoint)
    sent = len(hub.log)
    assert loaded(reader | {"HF_HUB_OFFLINE": "1"}) == online
    assert len(hub.log) == sent


def test_the_published_files_are_the_packages_and_the_checkpoints_and_nothing_of_the_run(checkpoint, hub, unverified):
    publish(hub, checkpoint)
    files = hub.files(REPO)
    assert {name: files[name] for name in CODE} == CODE
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert files == hub.files(REPO, "v0.1.0")
    assert set(files) == {
        *CODE, ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "granulon_manifest.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", ".eval_results/pope.yaml", "LICENSE.md",
    }  # fmt: skip
    assert b"/home/me" not in b"".join(files.values())
    assert [name for name in hub.repos["model", REPO].refs if "publish-" in name] == [], "the branch is gone"


def test_a_second_publish_uploads_nothing(checkpoint, hub, unverified):
    publish(hub, checkpoint)
    hub.log.clear()
    before = dict(hub.repos["model", REPO].refs)
    publish(hub, checkpoint)
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"}
    assert hub.repos["model", REPO].refs == before


def test_large_files_go_in_parts_and_arrive_whole(checkpoint, hub, unverified):
    publish(hub, checkpoint)
    parts = [path for method, path in hub.log if method == "PUT" and path.count("/") == 3]
    assert len(parts) > 2
    assert len(hub.uploaded) == len(set(hub.uploaded))


@pytest.fixture
def newer(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "newer")
    weights = load_file(folder / "model.safetensors")
    weights["model.multi_modal_projector.gain_offsets"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def states(hub):
    repo = hub.repos.get(("model", REPO))
    return None if repo is None else hub.files(REPO), repo and "refs/tags/v2" in repo.refs


FAULTS = ("cut", 400, "lost reply")


def assert_whole_after_a_failure(checkpoint, newer, folder, fault, number):
    """The first state stays visible or the new one is; the same command then ends in the new one."""
    with HubStandIn(folder) as hub:
        publish(hub, checkpoint)
        old, new = hub.files(REPO), None
        hub.log.clear()
        hub.fail_at, hub.fault = number, fault
        try:
            publish(hub, newer, revision="v2")
        except PublishError as error:
            assert "again" in str(error) or "untouched" in str(error), str(error)
        assert hub.failed is not None, "nothing failed"
        seen, tagged = states(hub)
        hub.fail_at = hub.fault = None
        uploaded = list(hub.uploaded)
        publish(hub, newer, revision="v2")
        new = hub.files(REPO)
        assert seen in (old, new), f"a mix is visible after {hub.failed} failed with {fault}"
        assert not tagged or seen == new
        assert hub.files(REPO, "v2") == new and hub.files(REPO, "v0.1.0") == old
        package = package_of(newer, revision="v2", data_licences={"rows.json": "cc-by-4.0"})
        sent = {
            path: source if isinstance(source, bytes) else source.read_bytes()
            for path, source in package.files.items()
        }
        assert {path: new[path] for path in sent} == sent
        assert len(set(hub.uploaded[len(uploaded) :]) & set(uploaded)) == 0, "what was there was uploaded again"
        return hub.failed


@pytest.fixture
def requests(checkpoint, newer, tmp_path, unverified):
    """How many it takes to publish a new state over an old one."""
    with HubStandIn(tmp_path / "counted") as hub:
        publish(hub, checkpoint)
        hub.log.clear()
        publish(hub, newer, revision="v2")
        return len(hub.log)


@pytest.fixture
def impatient(monkeypatch):
    """The client waits between its own attempts; here it need not."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)


def test_a_failure_in_the_middle_leaves_the_old_state_or_the_new(
    checkpoint, newer, tmp_path, requests, unverified, impatient
):
    for number in range(0, requests, 5):
        fault = FAULTS[number // 5 % 3]
        assert_whole_after_a_failure(checkpoint, newer, tmp_path / f"{number}", fault, number)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_request_fails_readers_see_the_old_state_or_the_new(
    checkpoint, newer, tmp_path, requests, unverified, impatient, fault
):
    failed = [
        assert_whole_after_a_failure(checkpoint, newer, tmp_path / f"{number}", fault, number)
        for number in range(requests)
    ]
    assert {"GET", "POST", "PUT", "DELETE"} <= {method for method, _ in failed}


def test_a_branch_that_could_not_be_removed_is_removed_by_the_next_run(checkpoint, hub, unverified):
    def fail_the_removal(method, path):
        if method == "DELETE":
            hub.before, hub.fault, hub.fail_at = None, 400, len(hub.log) - 1

    hub.before = fail_the_removal
    with pytest.raises(PublishError, match="400: made to fail"):
        publish(hub, checkpoint)
    repo = hub.repos["model", REPO]
    assert any("publish-" in name for name in repo.refs)
    publish(hub, checkpoint)
    assert set(repo.refs) == {"refs/heads/main", "refs/tags/v0.1.0"}


def test_what_loads_as_another_model_never_reaches_main(checkpoint, newer, hub, monkeypatch):
    monkeypatch.setattr(module, "cold_load", lambda work, api, source, *more: (torch.zeros(1), source))
    with pytest.raises(PublishError, match="is another model than .*main is untouched"):
        publish(hub, checkpoint)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert "refs/tags/v0.1.0" not in hub.repos["model", REPO].refs


def test_what_does_not_load_never_reaches_main(checkpoint, hub, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(PublishError, match="does not load in a fresh process"):
        publish(hub, folder)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_a_tag_never_changes_what_it_names(checkpoint, newer, hub, unverified):
    publish(hub, checkpoint)
    before = hub.files(REPO)
    with pytest.raises(PublishError, match="tag v0.1.0 with other files.*--revision"):
        publish(hub, newer)
    assert hub.files(REPO) == before


OLDER = [
    "model-00001-of-00002.safetensors", "old_code.py", "x.bin", "adapter_config.json", "trainable.safetensors",
    ".eval_results/old.yaml", "NOTICE", "LICENSE", "USE_POLICY.md", "licences/text/LICENSE", "vocab.txt", "merges.txt",
    "controller_report.json", "controller_confusion.png",
]  # fmt: skip


@pytest.mark.parametrize("older", OLDER)
def test_what_an_earlier_state_left_does_not_speak_for_the_new(checkpoint, older, hub, unverified):
    publish(hub, checkpoint)
    repo, new = hub.repos["model", REPO], hub.files(REPO)
    beside = {older: hub.store(b"old"), "picture.jpg": hub.store(b"theirs"), "notes/a.txt": hub.store(b"theirs")}
    repo.commit("refs/heads/main", repo.resolve("main").files | beside, "an earlier state, and what is not ours")
    publish(hub, checkpoint, revision="v0.1.1")
    newest = hub.files(REPO, "v0.1.1")
    assert newest.keys() - new.keys() == {"picture.jpg", "notes/a.txt"} and new.keys() - newest.keys() == set()


def test_a_file_in_a_subfolder_is_not_taken_for_one_of_the_checkpoint(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    shutil.copytree(checkpoint, folder / "checkpoint-4")
    assert package_of(folder).files.keys() == package_of(checkpoint).files.keys()


def test_a_commit_in_between_is_not_overwritten(checkpoint, hub, unverified):
    hub.make_repo(REPO)

    def interfere(method, path):
        if method == "POST" and path.endswith("/commit/main"):
            hub.before = None
            repo = hub.repos["model", REPO]
            repo.commit("refs/heads/main", {"theirs.txt": hub.store(b"theirs")}, "theirs")

    hub.before = interfere
    with pytest.raises(PublishError, match="412.*somebody else committed in the meantime"):
        publish(hub, checkpoint)
    assert set(hub.files(REPO)) == {"theirs.txt"}
    publish(hub, checkpoint)
    assert "model.safetensors" in hub.files(REPO)


@pytest.mark.parametrize("token", ["hf_wrong", False])
def test_a_wrong_token_is_told(checkpoint, hub, token):
    with pytest.raises(PublishError, match="401.*hf auth login"):
        publish(hub, checkpoint, token=token)
    assert not hub.repos


def test_a_name_that_belongs_to_somebody_else_is_refused(checkpoint, hub):
    with pytest.raises(PublishError, match="403.*choose a name of your own, or offer the files by --create_pr"):
        publish(hub, checkpoint, token="hf_stranger")
    hub.make_repo(REPO, files={"README.md": b"theirs"})
    with pytest.raises(PublishError, match="403.*choose a name of your own"):
        publish(hub, checkpoint, token="hf_stranger")
    assert hub.files(REPO)["README.md"] == b"theirs" and "model.safetensors" not in hub.files(REPO)


def test_a_repository_that_is_gated_is_told(checkpoint, hub):
    hub.make_repo(REPO, gated=True)
    with pytest.raises(PublishError, match="gated: accept its conditions"):
        publish(hub, checkpoint, token="hf_stranger")


def test_an_adapter_whose_base_is_gated_is_told_before_anything_is_sent(adapter, hub):
    hub.make_repo("stranger/base", gated=True)
    with pytest.raises(PublishError, match="refuses stranger/base .*gated: accept its conditions"):
        publish(hub, adapter, adapter=True, base_model="stranger/base@abc", repo_id="jinlab/adapter")
    assert ("model", "jinlab/adapter") not in hub.repos


def test_a_hub_that_is_not_there_is_told(checkpoint, tmp_path, impatient):
    with HubStandIn(tmp_path / "hub") as hub:
        pass
    with pytest.raises(PublishError, match="connection to the Hub broke"):
        publish(hub, checkpoint)


def test_a_pull_request_changes_neither_main_nor_tags_and_is_opened_once(checkpoint, hub, unverified, capsys):
    hub.make_repo(REPO)
    for _ in range(2):
        publish(hub, checkpoint, token="hf_stranger", create_pr=True)
    repo = hub.repos["model", REPO]
    assert set(repo.refs) == {"refs/heads/main", "refs/pr/1"} and set(hub.files(REPO)) == {".gitattributes"}
    assert "model.safetensors" in hub.files(REPO, "refs/pr/1")
    assert capsys.readouterr().out.count("/discussions/1") == 2


def test_a_private_repository_is_private(checkpoint, hub, unverified):
    publish(hub, checkpoint, private=True)
    assert hub.repos["model", REPO].private


def test_what_is_public_is_not_published_over_as_if_it_were_private(checkpoint, hub, unverified):
    hub.make_repo(REPO)
    with pytest.raises(PublishError, match="everybody may read it: --private makes a new .* in its settings"):
        publish(hub, checkpoint, private=True)
    assert {method for method, _ in hub.log} == {"GET"}
    hub.repos["model", REPO].private = True
    publish(hub, checkpoint, private=True)
    assert "model.safetensors" in hub.files(REPO)


def test_a_dry_run_prints_what_would_go_where_and_sends_nothing(checkpoint, hub, capsys):
    publish(hub, checkpoint, dry_run=True, space="jinlab/granulon")
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "main, tagged v0.1.0" in printed and "app.py" in printed
    assert not hub.log


def test_the_card_tells_how_to_load_what_is_inside_and_validates(checkpoint):
    package = package_of(checkpoint)
    card = ModelCard(package.files["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0" and "custom_code" in card.data.tags
    assert f'model="{REPO}", revision="v0.1.0"' in card.text and "Not for clinical use" in card.text
    assert "| sft | tiny-cpu | rows.json | 7 | 3 | 0 | 1 |" in card.text
    assert "| lmms-lab/POPE | pope | 0.5 | made up for a test |" in card.text
    assert "| coarse | 2 | 6 | 5 |" in card.text and "2603.08800" in card.text
    assert "The licence of the training data" in card.text
    assert "{{" not in card.text and "{%" not in card.text


def test_what_the_evaluation_found_stands_on_the_card_and_in_its_own_file(checkpoint, hub, tmp_path, unverified):
    cell = {
        "entry": {"granularity": None, "view": "full", "overrides": {}},
        "task": {"name": "mmvp", "config": {"dataset_path": "lmms-lab-encoder/MMVP"}},
        "settings": {"limit": None, "sample_rows": False},
        "model": {"sha256": weights_sha256(checkpoint)},
        "metrics": {"pairs": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 150}},
        "not_computed": {},
        "finished_at": "2026-01-02T03:04:05+00:00",
    }
    (tmp_path / "results" / "runs" / "mmvp").mkdir(parents=True)
    (tmp_path / "results" / "runs" / "mmvp" / "result.json").write_text(json.dumps(cell))
    publish(hub, checkpoint, results=str(tmp_path / "results"))
    files = hub.files(REPO)
    assert b"lmms-lab-encoder/MMVP" in files[".eval_results/mmvp.yaml"] and ".eval_results/pope.yaml" in files
    row = "| lmms-lab-encoder/MMVP | mmvp.pairs | 0.25 | 95% interval 0.2000 to 0.3000, n = 150 |"
    assert row in files["README.md"].decode()


def test_llama_and_dinov3_are_named_and_their_papers_travel(checkpoint, tmp_path, hub, unverified):
    folder = shutil.copytree(checkpoint, tmp_path / "llama")
    manifest = json.loads((folder / "granulon_manifest.json").read_text())
    manifest["text"] |= {"source": "meta-llama/Llama-3.2-3B-Instruct", "license": "llama3.2", "revision": "c"}
    manifest["vision"] |= {"source": "facebook/dinov3-vitl16", "license": "other", "license_name": "dinov3-license"}
    (folder / "granulon_manifest.json").write_text(json.dumps(manifest))
    for part in ("vision", "text"):
        (folder / "licences" / part).mkdir(parents=True)
        (folder / "licences" / part / "LICENSE").write_text(f"agreement of the {part} part")
    publish(hub, folder, repo_id="jinlab/Llama-granulon")
    files = hub.files("jinlab/Llama-granulon")
    assert b"Llama 3.2 Community License" in files["NOTICE"]
    assert files["licences/vision/LICENSE"] == b"agreement of the vision part"
    assert (
        b"Built with Llama" in files["README.md"]
        and b"license_name: dinov3-license-and-llama3.2" in files["README.md"]
    )
    with pytest.raises(ValueError, match="must begin with Llama"):
        publish(hub, folder)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: cut_short(folder / "model.safetensors"), "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has no processor"),
        (
            lambda folder: (folder / "image_io.py").write_text("import os"),
            r"other code than this package \(image_io.py",
        ),
        (lambda folder: (folder / "evil.py").write_text("import os"), r"other code than this package \(evil.py"),
        (lambda folder: (folder / ".eval_results" / "x.yaml").write_text("a: ["), "does not hold evaluation results"),
        (lambda folder: (folder / "granulon_manifest.json").unlink(), "no granulon_manifest.json"),
    ],
)
def test_a_folder_that_is_not_whole_or_not_ours_is_refused_before_anything_is_sent(
    checkpoint, hub, tmp_path, damage, message
):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        publish(hub, folder)
    assert not hub.log


def test_no_folder_of_this_machine_is_named_in_what_is_published(checkpoint, tmp_path):
    save_parts(checkpoint, tmp_path)
    folder = assemble(tmp_path / "vision", tmp_path / "text", tmp_path / "assembled")
    assert str(tmp_path) not in (folder / "config.json").read_text()
    shutil.copy(checkpoint / "granulon_manifest.json", folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"):
        content = json.loads((folder / name).read_text()) | {"_name_or_path": str(tmp_path / "mine")}
        (folder / name).write_text(json.dumps(content))
    (folder / "controller_report.json").write_text(json.dumps({"corpus": [str(tmp_path / "seed.jsonl")]}))
    files = package_of(folder).files
    sent = {name: source if isinstance(source, bytes) else source.read_bytes() for name, source in files.items()}
    assert [name for name, content in sent.items() if str(tmp_path).encode() in content] == []
    assert json.loads(sent["controller_report.json"]) == {"corpus": ["seed.jsonl"]}
    assert sent["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_a_shard_that_is_absent_is_named(checkpoint, hub, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "sharded")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="lacks model-00002-of-00002.safetensors"):
        publish(hub, folder)


def test_the_space_gets_its_files_and_the_model_it_shows(checkpoint, hub, unverified):
    publish(hub, checkpoint, space="jinlab/granulon")
    files = hub.files("jinlab/granulon", kind="space")
    assert files["app.py"] == (module.SPACE / "app.py").read_bytes() and "examples/fine.png" in files
    front = ModelCard(files["README.md"].decode(), ignore_metadata_errors=True).data
    assert front.sdk == "gradio" and front.models == [REPO]
    assert hub.repos["space", "jinlab/granulon"].variables == {"MODEL_ID": REPO, "MODEL_REVISION": "v0.1.0"}
    commits = len(hub.repos["space", "jinlab/granulon"].commits)
    publish(hub, checkpoint, space="jinlab/granulon")
    assert len(hub.repos["space", "jinlab/granulon"].commits) == commits


def test_the_space_is_its_own_files_and_nothing_that_lies_beside_them(tmp_path, monkeypatch):
    listed = subprocess.run(["git", "ls-files"], cwd=module.SPACE, capture_output=True, text=True)
    names = module.space_files()
    assert set(listed.stdout.split()) <= set(names), "a file of the Space would not be uploaded"
    monkeypatch.setattr(module, "SPACE", shutil.copytree(module.SPACE, tmp_path / "space"))
    for stray in (".env", "flagged.csv", "examples/mine.jpg", "app.py~", "build/app.py"):
        (module.SPACE / stray).parent.mkdir(exist_ok=True)
        (module.SPACE / stray).write_text("secret")
    assert module.space_files() == names


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"create_pr": True}, "what a tag names, and a pull request gets none"),
        ({"adapter": True}, "shows a whole model, and --adapter publishes none"),
        ({"trainable_only": True}, "shows a whole model, and --trainable_only publishes none"),
    ],
)
def test_a_space_of_what_it_could_not_load_is_refused_before_anything_is_sent(checkpoint, hub, settings, message):
    with pytest.raises(PublishError, match=message):
        publish(hub, checkpoint, space="jinlab/granulon", **settings)
    assert not hub.log


def test_a_space_that_is_not_here_is_told_before_anything_is_sent(checkpoint, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPACE", tmp_path)
    with pytest.raises(PublishError, match="there is no Space"):
        publish(hub, checkpoint, space="jinlab/granulon")
    assert not hub.log


def test_the_space_of_a_private_model_is_told_to_need_a_token(checkpoint, hub, unverified, capsys):
    publish(hub, checkpoint, space="jinlab/granulon", private=True)
    assert "the secret HF_TOKEN" in capsys.readouterr().err
    assert hub.repos["space", "jinlab/granulon"].private


def test_a_public_space_does_not_show_a_private_model(checkpoint, hub, unverified):
    hub.make_repo("jinlab/granulon", kind="space")
    with pytest.raises(PublishError, match="jinlab/granulon is there already, and everybody may read it"):
        publish(hub, checkpoint, space="jinlab/granulon", private=True)
    assert not hub.repos["space", "jinlab/granulon"].variables


def test_the_space_shows_the_line_of_llama_while_it_shows_a_llama(checkpoint, hub, unverified):
    llama = {"repo_id": "jinlab/Llama-granulon", "outputs_of": ["meta-llama/Llama-3.3-70B-Instruct"]}
    publish(hub, checkpoint, space="jinlab/granulon", **llama)
    variables = hub.repos["space", "jinlab/granulon"].variables
    assert variables["MODEL_NOTICE"] == "Built with Llama"
    publish(hub, checkpoint, space="jinlab/granulon")
    assert variables == {"MODEL_ID": REPO, "MODEL_REVISION": "v0.1.0"}


def test_a_space_of_somebody_else_is_told_with_a_remedy_that_helps(checkpoint, hub, unverified):
    hub.make_repo("stranger/granulon", kind="space")
    with pytest.raises(PublishError, match="403.*choose a Space of your own with --space"):
        publish(hub, checkpoint, space="stranger/granulon")


def trainable_of(checkpoint, folder, hub):
    """As if encoder and language model came from the Hub, the latter in bfloat16, and the projector were trained."""
    folder = shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in weights:
        if "multi_modal_projector" in name or "granularity_controller" in name:
            weights[name] = torch.rand(weights[name].shape, generator=generator)
        elif "language_model" in name:
            weights[name] = weights[name].bfloat16().float()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_parts(folder, folder.parent)
    manifest = json.loads((folder / "granulon_manifest.json").read_text())
    for part, source in (("vision", "facebook/dinov2-base"), ("text", "Qwen/Qwen2.5-1.5B-Instruct")):
        repo = hub.make_repo(source, files=contents(folder.parent / part))
        manifest[part] |= {"source": source, "revision": repo.refs["refs/heads/main"]}
        repo.commit("refs/heads/main", {}, "another model since")
    manifest["training"][0]["stage"] = "align"
    (folder / "granulon_manifest.json").write_text(json.dumps(manifest))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 48, "width": 48}  # the tower's own is 64
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def save_parts(folder, target):
    """The encoder and the language model of a tiny checkpoint, as folders of their own."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model.model.vision_tower.save_pretrained(target / "vision")
    processor.image_processor.save_pretrained(target / "vision")
    text = Qwen2ForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.bfloat16().save_pretrained(target / "text")
    processor.tokenizer.save_pretrained(target / "text")


def test_what_was_trained_alone_holds_nobody_elses_weights_and_makes_the_same_model_again(
    checkpoint, hub, tmp_path, unverified
):
    folder = trainable_of(checkpoint, tmp_path / "trained", hub)
    publish(hub, folder, trainable_only=True)
    files = hub.files(REPO)
    pins = {part: json.loads(files["granulon_manifest.json"])[part]["revision"] for part in ("vision", "text")}
    command = (
        f"granulon-assemble --vision facebook/dinov2-base@{pins['vision']} --text Qwen/Qwen2.5-1.5B-Instruct@"
        f"{pins['text']} --trained {REPO}@v0.1.0"
    )
    assert "model.safetensors" not in files and command in files["README.md"].decode()
    (tmp_path / "fetched").mkdir()
    for name in ("trainable.safetensors", "config.json", "processor_config.json"):
        (tmp_path / "fetched" / name).write_bytes(files[name])
    names = load_file(tmp_path / "fetched" / "trainable.safetensors").keys()
    assert names and all("multi_modal_projector" in name or "granularity_controller" in name for name in names)
    again = assemble(tmp_path / "vision", tmp_path / "text", tmp_path / "again", trained=tmp_path / "fetched")
    before, after = (load_file(place / "model.safetensors") for place in (folder, again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (AutoProcessor.from_pretrained(place).image_processor.size for place in (folder, again))
    assert before == after


def test_what_was_trained_alone_is_put_together_in_a_fresh_process_before_it_is_published(checkpoint, hub, tmp_path):
    folder = trainable_of(checkpoint, tmp_path / "trained", hub)
    publish(hub, folder, trainable_only=True)
    assert "trainable.safetensors" in hub.files(REPO, "v0.1.0")


def test_what_nobody_could_put_together_is_not_published(checkpoint, hub, tmp_path):
    folder = trainable_of(checkpoint, tmp_path / "trained", hub)
    hub.repos["model", "facebook/dinov2-base"].gated = True
    with pytest.raises(PublishError, match="cannot be put together with facebook/dinov2-base@.*main is untouched"):
        publish(hub, folder, trainable_only=True)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_a_trained_language_model_is_not_left_out(checkpoint, hub, tmp_path):
    folder = trainable_of(checkpoint, tmp_path / "trained", hub)
    manifest = json.loads((folder / "granulon_manifest.json").read_text())
    manifest["training"][0]["stage"] = "sft"
    (folder / "granulon_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the language model was trained too"):
        publish(hub, folder, trainable_only=True)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """As granulon-train leaves one: a LoRA, the projector, processor and its code, and the base's manifest."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = get_peft_model(model, lora_config(model, ModelConfig(lora_r=4)))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name or "gain_offsets" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    shutil.copy(checkpoint / "granulon_manifest.json", folder)
    return folder


def test_an_adapter_that_training_wrote_loads_on_its_pinned_base_and_answers_as_the_local_one(
    checkpoint, adapter, hub
):
    base = hub.make_repo("jinlab/base", files=contents(checkpoint))
    pinned = base.refs["refs/heads/main"]
    base.commit("refs/heads/main", {}, "another model since")
    publish(hub, adapter, adapter=True, base_model=f"jinlab/base@{pinned}", repo_id="jinlab/adapter")
    files = hub.files("jinlab/adapter", "v0.1.0")
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert {name for name in files if name.endswith(".py")} == {"image_io.py", "processing_granulon.py"}
    named = json.loads(files["adapter_config.json"])
    assert (named["base_model_name_or_path"], named["revision"]) == ("jinlab/base", pinned)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["jinlab/base"] and card.data.base_model_relation == "adapter"
    assert f'"jinlab/base", revision="{pinned}"' in card.text and "PeftModel.from_pretrained" in card.text
    assert "plain encoder" not in card.text and str(checkpoint).encode() not in b"".join(files.values())


@pytest.mark.parametrize(
    "named, base, message",
    [
        ({}, None, "a folder of this machine: publish the base, and name it with --base_model"),
        ({"base_model_name_or_path": None}, None, "names no base: say what .* with --base_model OWNER/NAME@REVISION"),
        ({}, "jinlab/base", "nobody knows which revision of jinlab/base .* --base_model jinlab/base@REVISION"),
    ],
)
def test_an_adapter_whose_base_cannot_be_known_is_refused(adapter, hub, tmp_path, named, base, message):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | named
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        publish(hub, folder, adapter=True, base_model=base)
    assert not hub.log


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: cut_short(folder / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has no processor"),
        (lambda folder: (folder / "image_io.py").write_text("import os"), "other code than this package"),
        (lambda folder: (folder / "evil.py").write_text("import os"), "other code than this package"),
    ],
)
def test_an_adapter_that_is_not_whole_or_not_ours_is_refused(adapter, hub, tmp_path, damage, message):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        publish(hub, folder, adapter=True, base_model="jinlab/base@abc")
    assert not hub.log


def test_settings_that_make_no_sense_are_refused(checkpoint, hub):
    with pytest.raises(PublishError, match="SOURCE=LICENCE"):
        publish(hub, checkpoint, data_licence=["mit"])
    with pytest.raises(PublishError, match="is no folder"):
        publish(hub, "absent")
    assert os.path.isdir(checkpoint)
