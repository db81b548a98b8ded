"""`granulon-publish` with the real client: readers see the old version or the new one, and it loads as the model."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import HfApi, ModelCard
from published_files import changed_manifest, contents, make_adapter, make_checkpoint, save_parts
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import modeling_granulon
from granulon.hub import publish as module
from granulon.hub.assemble import assemble
from granulon.hub.licences import terms
from granulon.hub.manifest import read_manifest
from granulon.hub.package import make_package
from granulon.hub.publish import PublishArguments, PublishError, run

REPO = "jinlab/granulon-qwen1.5b"
CODE = {file.name: file.read_bytes() for file in Path(modeling_granulon.__file__).parent.glob("*.py")}
CODE.pop("__init__.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("publish") / "checkpoint")


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    return make_adapter(checkpoint, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(autouse=True)
def without_xet(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(tmp_path):
    with FakeHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def unverified(monkeypatch):
    """Without the new processes, which other tests are about."""
    monkeypatch.setattr(module, "cold_load", lambda *arguments: (torch.zeros(1), ""))
    monkeypatch.setattr(module, "assemble_published", lambda *arguments: "")


def publish(hub, folder, token="hf_owner", **settings):
    settings = {"repo_id": REPO, "licences": ["rows.json=cc-by-4.0"], **settings}
    run(PublishArguments(folder=str(folder), **settings), HfApi(endpoint=hub.endpoint, token=token))


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


def test_the_published_files_are_code_weights_and_metadata_and_nothing_of_the_run(checkpoint, hub, unverified):
    publish(hub, checkpoint)
    files = hub.files(REPO)
    assert {name: files[name] for name in CODE} == CODE
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert files == hub.files(REPO, "v0.1.0")
    assert set(files) == {
        *CODE, ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "granulon_manifest.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", ".eval_results/pope.yaml", "LICENSE.md", "granulon_release.json",
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


def test_large_files_are_uploaded_in_parts(checkpoint, hub, unverified):
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


def states(hub):
    repo = hub.repos.get(("model", REPO))
    return None if repo is None else hub.files(REPO), repo and "refs/tags/v2" in repo.refs


FAULTS = ("cut", 400, "lost reply")


def assert_atomic_with_a_failure(checkpoint, newer, folder, fault, number):
    """The first state stays visible or the new one is; the same command then ends in the new one."""
    with FakeHub(folder) as hub:
        publish(hub, checkpoint)
        old, new = hub.files(REPO), None
        hub.log.clear()
        hub.fail_at, hub.fault = number, fault
        try:
            publish(hub, newer, revision="v2")
        except PublishError as error:
            assert "again" in str(error) or "unchanged" in str(error), str(error)
        assert hub.failed is not None, "nothing failed"
        seen, tagged = states(hub)
        hub.fail_at = hub.fault = None
        uploaded = list(hub.uploaded)
        publish(hub, newer, revision="v2")
        new = hub.files(REPO)
        assert seen in (old, new), f"a mix is visible after {hub.failed} failed with {fault}"
        assert not tagged or seen == new
        assert hub.files(REPO, "v2") == new and hub.files(REPO, "v0.1.0") == old
        required = terms(newer, REPO, {"rows.json": "cc-by-4.0"})
        package = make_package(newer, "model", required, REPO, "v2")
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
    with FakeHub(tmp_path / "counted") as hub:
        publish(hub, checkpoint)
        hub.log.clear()
        publish(hub, newer, revision="v2")
        return len(hub.log)


@pytest.fixture
def impatient(monkeypatch):
    """The client waits between its own attempts; here it need not."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)


def test_a_failure_in_the_middle_leaves_the_old_version_or_the_new(
    checkpoint, newer, tmp_path, requests, unverified, impatient
):
    for number in range(0, requests, 5):
        fault = FAULTS[number // 5 % 3]
        assert_atomic_with_a_failure(checkpoint, newer, tmp_path / f"{number}", fault, number)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_request_fails_readers_see_the_old_version_or_the_new(
    checkpoint, newer, tmp_path, requests, unverified, impatient, fault
):
    failed = [
        assert_atomic_with_a_failure(checkpoint, newer, tmp_path / f"{number}", fault, number)
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


def test_a_different_model_never_reaches_main(checkpoint, newer, hub, monkeypatch):
    monkeypatch.setattr(module, "cold_load", lambda work, api, source, *more: (torch.zeros(1), source))
    with pytest.raises(PublishError, match="differs from .*main is unchanged"):
        publish(hub, checkpoint)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert "refs/tags/v0.1.0" not in hub.repos["model", REPO].refs


def test_a_model_that_does_not_load_never_reaches_main(checkpoint, hub, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(PublishError, match="does not load in a new process"):
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
def test_files_of_an_earlier_version_are_deleted(checkpoint, older, hub, unverified):
    publish(hub, checkpoint)
    repo, new = hub.repos["model", REPO], hub.files(REPO)
    record = json.loads(new["granulon_release.json"])
    record["files"][older] = [hashlib.sha256(b"old").hexdigest(), hashlib.sha1(b"blob 3\0old").hexdigest()]
    beside = {older: hub.store(b"old"), "picture.jpg": hub.store(b"theirs"), "notes/a.txt": hub.store(b"theirs")}
    beside |= {"granulon_release.json": hub.store(json.dumps(record).encode())}
    repo.commit("refs/heads/main", repo.resolve("main").files | beside, "an earlier release, and what is not ours")
    publish(hub, checkpoint, revision="v0.1.1")
    newest = hub.files(REPO, "v0.1.1")
    assert newest.keys() - new.keys() == {"picture.jpg", "notes/a.txt"} and new.keys() - newest.keys() == set()


@pytest.mark.parametrize("path", [*OLDER, "config.json", "README.md", "model.safetensors"])
def test_what_no_release_wrote_is_neither_overwritten_nor_deleted(checkpoint, path, hub, unverified, capsys):
    theirs = {path: b"theirs", "picture.jpg": b"theirs"}
    hub.make_repo(REPO, files=theirs)
    with pytest.raises(PublishError, match=f"no release of this command wrote.*: {re.escape(path)}. .*--replace"):
        publish(hub, checkpoint)
    assert hub.files(REPO) == {".gitattributes": hub.files(REPO)[".gitattributes"], **theirs}
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"}
    publish(hub, checkpoint, replace=True)
    assert f"replacing in {REPO}: {path}" in capsys.readouterr().err
    files = hub.files(REPO)
    assert files["picture.jpg"] == b"theirs" and files.get(path) != b"theirs"


def test_a_card_that_was_edited_on_the_hub_is_not_overwritten(checkpoint, newer, hub, unverified):
    publish(hub, checkpoint)
    repo = hub.repos["model", REPO]
    repo.commit("refs/heads/main", repo.resolve("main").files | {"README.md": hub.store(b"my words")}, "edited")
    with pytest.raises(PublishError, match="changed since: README.md"):
        publish(hub, newer, revision="v2")
    assert hub.files(REPO)["README.md"] == b"my words"
    publish(hub, newer, revision="v2", replace=True)
    assert hub.files(REPO)["README.md"] != b"my words"


def test_a_commit_in_between_is_not_overwritten(checkpoint, hub, unverified):
    hub.make_repo(REPO)

    def interfere(method, path):
        if method == "POST" and path.endswith("/commit/main"):
            hub.before = None
            repo = hub.repos["model", REPO]
            repo.commit("refs/heads/main", {"theirs.txt": hub.store(b"theirs")}, "theirs")

    hub.before = interfere
    with pytest.raises(PublishError, match="412.*there was another commit in the meantime"):
        publish(hub, checkpoint)
    assert set(hub.files(REPO)) == {"theirs.txt"}
    publish(hub, checkpoint)
    assert {"model.safetensors", "theirs.txt"} <= set(hub.files(REPO))


@pytest.mark.parametrize("token", ["hf_wrong", False])
def test_a_wrong_token_is_explained(checkpoint, hub, token):
    with pytest.raises(PublishError, match="401.*hf auth login"):
        publish(hub, checkpoint, token=token)
    assert not hub.repos


def test_a_repository_of_another_account_is_refused(checkpoint, hub):
    hub.make_repo(REPO, files={"README.md": b"theirs"})
    with pytest.raises(PublishError, match="of other, who may not write to jinlab/.*your own, or use --create_pr"):
        publish(hub, checkpoint, token="hf_other")
    assert hub.log == [("GET", "/api/whoami-v2")]
    assert hub.files(REPO)["README.md"] == b"theirs" and "model.safetensors" not in hub.files(REPO)


def test_a_repository_that_is_gated_is_explained(checkpoint, hub):
    hub.make_repo(REPO, gated=True)
    with pytest.raises(PublishError, match="gated: accept its conditions"):
        publish(hub, checkpoint, token="hf_other", create_pr=True)


def test_an_adapter_whose_base_is_gated_is_refused_before_anything_is_sent(adapter, hub):
    hub.make_repo("other/base", gated=True)
    with pytest.raises(PublishError, match="refuses other/base .*gated: accept its conditions"):
        publish(hub, adapter, base_model="other/base@abc", repo_id="jinlab/adapter")
    assert ("model", "jinlab/adapter") not in hub.repos


def test_an_unreachable_hub_is_explained(checkpoint, tmp_path, impatient):
    with FakeHub(tmp_path / "hub") as hub:
        pass
    with pytest.raises(PublishError, match="connection to the Hub broke"):
        publish(hub, checkpoint)


def test_a_pull_request_changes_neither_main_nor_tags_and_is_opened_once(checkpoint, hub, unverified, capsys):
    hub.make_repo(REPO)
    for _ in range(2):
        publish(hub, checkpoint, token="hf_other", create_pr=True)
    repo = hub.repos["model", REPO]
    assert set(repo.refs) == {"refs/heads/main", "refs/pr/1"} and set(hub.files(REPO)) == {".gitattributes"}
    assert "model.safetensors" in hub.files(REPO, "refs/pr/1")
    assert capsys.readouterr().out.count("/discussions/1") == 2


def test_a_private_repository_is_private(checkpoint, hub, unverified):
    publish(hub, checkpoint, private=True)
    assert hub.repos["model", REPO].private


def test_a_public_repository_is_not_taken_for_a_private_one(checkpoint, hub, unverified):
    hub.make_repo(REPO)
    with pytest.raises(PublishError, match="exists and is public: --private .* in its settings"):
        publish(hub, checkpoint, private=True)
    assert {method for method, _ in hub.log} == {"GET"}
    hub.repos["model", REPO].private = True
    publish(hub, checkpoint, private=True)
    assert "model.safetensors" in hub.files(REPO)


def test_a_dry_run_shows_what_would_change_and_changes_nothing(checkpoint, newer, hub, unverified, capsys):
    def shown(path):
        return next(line.split()[0] for line in printed.splitlines() if line.endswith(f" {path}"))

    publish(hub, checkpoint, dry_run=True, space="jinlab/granulon")
    printed = capsys.readouterr().out
    assert "main, tagged v0.1.0" in printed and printed.count("which would be created") == 2
    assert shown("model.safetensors") == shown("app.py") == "+"
    publish(hub, checkpoint, space="jinlab/granulon")
    repo = hub.repos["model", REPO]
    beside = {"README.md": hub.store(b"my words"), "old.bin": hub.store(b"theirs"), "a.png": hub.store(b"theirs")}
    repo.commit("refs/heads/main", repo.resolve("main").files | beside, "edited")
    hub.log.clear()
    publish(hub, newer, dry_run=True, revision="v2", space="jinlab/granulon", token=False)
    printed = capsys.readouterr().out
    assert shown("model.safetensors") == "~" and shown("README.md") == "~!" and shown("old.bin") == "-!"
    assert shown("config.json") == shown("app.py") == "=" and " a.png" not in printed
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"}


def test_a_dry_run_without_the_hub_says_so(checkpoint, tmp_path, impatient, capsys):
    with FakeHub(tmp_path / "hub") as hub:
        pass
    publish(hub, checkpoint, dry_run=True)
    assert "not compared: the connection to the Hub broke" in capsys.readouterr().out


def test_llama_and_dinov3_are_named_and_their_agreements_are_published(checkpoint, tmp_path, hub, unverified):
    folder = shutil.copytree(checkpoint, tmp_path / "llama")
    changed_manifest(
        folder,
        text={"source": "meta-llama/Llama-3.2-3B-Instruct", "license": "llama3.2", "revision": "c"},
        vision={"source": "facebook/dinov3-vitl16", "license": "other", "license_name": "dinov3-license"},
    )
    for part in ("vision", "text"):
        (folder / "licences" / part).mkdir(parents=True)
        (folder / "licences" / part / "LICENSE").write_text(f"agreement of the {part} part")
    publish(hub, folder, repo_id="jinlab/Llama-granulon")
    files = hub.files("jinlab/Llama-granulon")
    assert b"Llama 3.2 Community License" in files["NOTICE"]
    assert files["licences/vision/LICENSE"] == b"agreement of the vision part"
    card = files["README.md"]
    assert b"Built with Llama" in card and b"license_name: dinov3-license-and-llama3.2" in card
    with pytest.raises(ValueError, match="must begin with Llama"):
        publish(hub, folder)


@pytest.mark.parametrize("missing", ["model.safetensors", "granulon_manifest.json"])
def test_an_incomplete_folder_is_refused_before_anything_is_sent(checkpoint, hub, tmp_path, missing):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        publish(hub, folder)
    assert not hub.repos


def test_links_are_not_followed(checkpoint, hub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    for name in ("LICENSE", "vocab.txt", "licences"):
        folder = shutil.copytree(checkpoint, tmp_path / f"with-{name}")
        if name == "licences":
            (tmp_path / "elsewhere/text").mkdir(parents=True)
            (tmp_path / "elsewhere/text/LICENSE").write_text("a key")
            (folder / "licences").symlink_to(tmp_path / "elsewhere")
        else:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(secret)
        try:
            publish(hub, folder, dry_run=True)
        except ValueError as error:
            assert f"has links ({name}" in str(error)
        else:
            assert name == "licences", "a link to a folder is not walked into"
    assert not hub.repos


def test_shards_outside_the_index_and_an_index_that_leads_outside_are_refused(checkpoint, hub, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "shards")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="do not agree on model-00001-of-00002.safetensors .*older saves"):
        publish(hub, folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="do not agree on ../outside.safetensors"):
        publish(hub, folder)
    assert not hub.repos


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"repo_id": "granulon"}, "repo_id is granulon; expected OWNER/NAME"),
        ({"repo_id": "a/b/c"}, "--repo_id a/b/c: "),
        ({"repo_id": "jinlab/has space"}, "--repo_id jinlab/has space: "),
        ({"repo_id": "../jinlab"}, "--repo_id"),
        ({"space": "granulon"}, "--space is granulon; expected OWNER/NAME"),
        ({"space": "other/granulon"}, "who may not write to other/granulon: choose a Space of your own"),
        *(
            ({"revision": tag}, "cannot be a tag")
            for tag in ("", "main", "a b", "a..b", "-x", "x.lock", "x/", "a~1", "a:b", "HEAD")
        ),
    ],
)
def test_names_are_checked_before_the_folder_is_read(settings, message, checkpoint, hub, monkeypatch):
    monkeypatch.setattr(module, "make_package", lambda *_: pytest.fail("read the folder"))
    with pytest.raises(PublishError, match=message):
        publish(hub, checkpoint, **settings)
    assert not hub.repos


def test_long_steps_are_announced(checkpoint, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "HEARTBEAT", 0.5)
    publish(hub, checkpoint)
    said = capsys.readouterr().err
    assert "uploading" in said and "loading" in said and re.search(r"granulon-publish: \d+ s \.\.\.", said)


def test_the_space_gets_its_files_and_the_model_it_shows(checkpoint, hub, unverified):
    publish(hub, checkpoint, space="jinlab/granulon")
    files = hub.files("jinlab/granulon", kind="space")
    assert files["app.py"] == (module.SPACE / "app.py").read_bytes() and "examples/fine.jpg" in files
    front = ModelCard(files["README.md"].decode(), ignore_metadata_errors=True).data
    assert front.sdk == "gradio" and front.models == [REPO]
    assert hub.repos["space", "jinlab/granulon"].variables == {"MODEL_ID": REPO, "MODEL_REVISION": "v0.1.0"}
    commits = len(hub.repos["space", "jinlab/granulon"].commits)
    publish(hub, checkpoint, space="jinlab/granulon")
    assert len(hub.repos["space", "jinlab/granulon"].commits) == commits


def test_the_space_is_its_own_files_and_no_others_of_its_folder(tmp_path, monkeypatch):
    listed = subprocess.run(["git", "ls-files"], cwd=module.SPACE, capture_output=True, text=True)
    names = module.space_files()
    assert set(listed.stdout.split()) <= set(names), "a file of the Space would not be uploaded"
    monkeypatch.setattr(module, "SPACE", shutil.copytree(module.SPACE, tmp_path / "space"))
    for stray in (".env", "flagged.csv", "examples/mine.png", "app.py~", "build/app.py"):
        (module.SPACE / stray).parent.mkdir(exist_ok=True)
        (module.SPACE / stray).write_text("secret")
    assert module.space_files() == names


def test_a_space_is_refused_for_what_it_cannot_load_before_anything_is_sent(checkpoint, adapter, hub):
    for folder, settings, message in (
        (checkpoint, {"create_pr": True}, "loads a tag, and a pull request gets none"),
        (checkpoint, {"trainable_only": True}, "loads a whole model, but the folder is published as 'trainable'"),
        (adapter, {}, "loads a whole model, but the folder is published as 'adapter'"),
    ):
        with pytest.raises(PublishError, match=message):
            publish(hub, folder, space="jinlab/granulon", **settings)
    assert not hub.repos


def test_an_installation_without_the_space_is_refused_before_anything_is_sent(checkpoint, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPACE", tmp_path)
    with pytest.raises(PublishError, match="there is no Space"):
        publish(hub, checkpoint, space="jinlab/granulon")
    assert not hub.repos


def test_the_space_of_a_private_model_needs_a_token(checkpoint, hub, unverified, capsys):
    publish(hub, checkpoint, space="jinlab/granulon", private=True)
    assert "the secret HF_TOKEN" in capsys.readouterr().err
    assert hub.repos["space", "jinlab/granulon"].private


def test_a_public_space_does_not_show_a_private_model(checkpoint, hub, unverified):
    hub.make_repo("jinlab/granulon", kind="space")
    with pytest.raises(PublishError, match="jinlab/granulon exists and is public"):
        publish(hub, checkpoint, space="jinlab/granulon", private=True)
    assert not hub.repos["space", "jinlab/granulon"].variables


def test_the_space_shows_the_line_of_llama_while_it_shows_a_llama(checkpoint, hub, unverified):
    llama = {"repo_id": "jinlab/Llama-granulon", "outputs_of": ["meta-llama/Llama-3.3-70B-Instruct"]}
    publish(hub, checkpoint, space="jinlab/granulon", **llama)
    variables = hub.repos["space", "jinlab/granulon"].variables
    assert variables["MODEL_NOTICE"] == "Built with Llama"
    publish(hub, checkpoint, space="jinlab/granulon")
    assert variables == {"MODEL_ID": REPO, "MODEL_REVISION": "v0.1.0"}


def test_a_space_that_no_release_wrote_is_not_overwritten(checkpoint, hub, unverified):
    theirs = {"app.py": b"theirs", "data.csv": b"theirs"}
    hub.make_repo("jinlab/granulon", kind="space", files=theirs)
    with pytest.raises(PublishError, match="changed since: app.py. .*--replace"):
        publish(hub, checkpoint, space="jinlab/granulon")
    files = hub.files("jinlab/granulon", kind="space")
    assert {name: files[name] for name in theirs} == theirs and len(files) <= 3
    assert not hub.repos["space", "jinlab/granulon"].variables
    publish(hub, checkpoint, space="jinlab/granulon", replace=True)
    files = hub.files("jinlab/granulon", kind="space")
    assert files["app.py"] != b"theirs" and files["data.csv"] == b"theirs"


def test_files_that_an_earlier_space_had_are_deleted(checkpoint, hub, unverified, tmp_path, monkeypatch):
    own = module.SPACE
    monkeypatch.setattr(module, "SPACE", shutil.copytree(own, tmp_path / "space"))
    (module.SPACE / "older.py").write_text("old = 1")
    publish(hub, checkpoint, space="jinlab/granulon")
    assert "older.py" in hub.files("jinlab/granulon", kind="space")
    monkeypatch.setattr(module, "SPACE", own)
    publish(hub, checkpoint, space="jinlab/granulon")
    assert "older.py" not in hub.files("jinlab/granulon", kind="space")


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
    pins = {}
    for part, source in (("vision", "facebook/dinov2-base"), ("text", "Qwen/Qwen2.5-1.5B-Instruct")):
        repo = hub.make_repo(source, files=contents(folder.parent / part))
        pins[part] = {"source": source, "revision": repo.refs["refs/heads/main"]}
        repo.commit("refs/heads/main", {}, "another model since")
    training = [read_manifest(folder)["training"][0] | {"stage": "align"}]
    changed_manifest(folder, training=training, **pins)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 48, "width": 48}  # the tower's own is 64
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def test_projector_and_controller_are_published_without_the_two_models_and_make_the_same_model_again(
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


def test_projector_and_controller_are_assembled_in_a_new_process_before_they_are_published(checkpoint, hub, tmp_path):
    folder = trainable_of(checkpoint, tmp_path / "trained", hub)
    publish(hub, folder, trainable_only=True)
    assert "trainable.safetensors" in hub.files(REPO, "v0.1.0")


def test_projector_and_controller_that_cannot_be_assembled_are_not_published(checkpoint, hub, tmp_path):
    folder = trainable_of(checkpoint, tmp_path / "trained", hub)
    hub.repos["model", "facebook/dinov2-base"].gated = True
    with pytest.raises(PublishError, match="cannot be assembled with facebook/dinov2-base@.*main is unchanged"):
        publish(hub, folder, trainable_only=True)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_an_adapter_that_training_wrote_loads_on_its_pinned_base_and_answers_as_the_local_one(
    checkpoint, adapter, hub
):
    base = hub.make_repo("jinlab/base", files=contents(checkpoint))
    pinned = base.refs["refs/heads/main"]
    base.commit("refs/heads/main", {}, "another model since")
    publish(hub, adapter, base_model=f"jinlab/base@{pinned}", repo_id="jinlab/adapter")
    files = hub.files("jinlab/adapter", "v0.1.0")
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert {name for name in files if name.endswith(".py")} == {"image_io.py", "processing_granulon.py"}
    named = json.loads(files["adapter_config.json"])
    assert (named["base_model_name_or_path"], named["revision"]) == ("jinlab/base", pinned)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["jinlab/base"] and card.data.base_model_relation == "adapter"
    assert f'"jinlab/base", revision="{pinned}"' in card.text and "PeftModel.from_pretrained" in card.text
    assert "plain encoder" not in card.text and str(checkpoint).encode() not in b"".join(files.values())


def test_options_that_make_no_sense_are_refused(checkpoint, hub):
    with pytest.raises(PublishError, match="NAME=LICENCE"):
        publish(hub, checkpoint, licences=["mit"])
    with pytest.raises(PublishError, match="is not a folder"):
        publish(hub, "absent")
