"""A fake Hub in a thread for the real `huggingface_hub` client: repositories, branches, tags, pull requests and LFS.

    with FakeHub(folder) as hub:
        subprocess.run(..., env=hub.environment(token, home))

It stores contents by their hash, and every request in `log`. `fail_at` makes one request fail: with a status, or with
the connection cut in the middle of the body. A commit is atomic, as on the Hub.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PART = 200_000  # bytes of one part of an LFS upload
LFS_FROM = 10_000  # bytes; as the Hub does, weights are LFS at any size
WEIGHTS = (".safetensors", ".bin", ".pt", ".png")
USERS = {"hf_owner": "jinlab", "hf_other": "other"}  # token to name
DATE = "2026-01-01T00:00:00.000Z"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    oid: str
    parent: str | None
    files: dict  # path -> sha256
    title: str


@dataclass
class Repo:
    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)  # refs/heads/main -> oid
    discussions: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        revision = unquote(revision)
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return self.commits.get(next((self.refs[name] for name in names if name in self.refs), revision))

    def commit(self, ref: str, files: dict, title: str) -> Commit:
        parent = self.refs.get(ref)
        text = json.dumps([len(self.commits), parent, sorted(files.items()), title])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, files, title)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


class Refused(Exception):
    """An answer other than 2xx: status, message, and the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None, **more):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class FakeHub:
    """Attributes: repos by (kind, name); log, (method, path) of all requests; uploaded, the hashes of LFS contents."""

    def __init__(self, folder: Path):
        self.blobs = Path(folder) / "blobs"
        self.blobs.mkdir(parents=True)
        self.repos, self.log, self.uploaded = {}, [], []
        self.parts = defaultdict(dict)
        self.fail_at, self.fault = None, None
        self.failed = None  # the request that was made to fail
        self.lock = threading.RLock()
        self.before = None  # called with (method, path) before each request, under the lock

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str | None, home: Path) -> dict:
        """Environment of a process that uses this Hub, with an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a revision."""
        commit = self.repos[kind, name].resolve(revision)
        return {path: (self.blobs / sha).read_bytes() for path, sha in commit.files.items()}

    def make_repo(self, name: str, kind: str = "model", files: dict | None = None, **settings) -> Repo:
        repo = self.repos[kind, name] = Repo(kind, name, **settings)
        start = {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}
        repo.commit(
            "refs/heads/main", {path: self.store(content) for path, content in start.items()}, "initial commit"
        )
        return repo

    def store(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.blobs / sha).write_bytes(content)
        return sha

    def handle(self, request):
        path = urlsplit(request.path)
        with self.lock:
            number = len(self.log)
            self.log.append((request.command, path.path))
            if self.before:
                self.before(request.command, path.path)
        length = int(request.headers.get("Content-Length") or 0)
        fault = self.fault if number == self.fail_at else None
        if fault is not None:
            self.failed = (request.command, path.path)
        if fault == "cut":  # half the body is read, then the connection is closed
            request.rfile.read(length // 2)
            request.close_connection = True
            request.connection.close()
            return
        body = self._chunked(request) if "chunked" in request.headers.get("Transfer-Encoding", "") else None
        body = request.rfile.read(length) if body is None else body
        try:
            if isinstance(fault, int):
                raise Refused(fault, "made to fail")
            with self.lock:
                reply = self.route(request.command, path.path, parse_qs(path.query), request.headers, body)
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            reply = error.status, headers, json.dumps({"error": str(error), **error.more}).encode()
        self._send(request, *reply)
        if fault == "lost reply":
            return

    def _chunked(self, request) -> bytes:
        body = b""
        while size := int(request.rfile.readline().split(b";")[0], 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    def _send(self, request, status: int, headers: dict, body: bytes):
        if self.fault == "lost reply" and self.failed == (request.command, urlsplit(request.path).path):
            request.close_connection = True
            request.connection.close()
            return
        request.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def route(self, method: str, path: str, query: dict, headers, body: bytes):
        user = self._user(headers)
        for verb, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verb.split():
                found = action(self, user, query, body, *map(unquote, match.groups()))
                if isinstance(found, tuple):
                    return found
                return 200, {}, json.dumps({} if found is None else found).encode()
        raise Refused(404, f"the fake Hub has no {method} {path}")

    def _user(self, headers) -> str | None:
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repo(self, kind: str, name: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get((kind.removesuffix("s"), name))
        owner = name.partition("/")[0]
        if repo is None or (repo.private and user != owner):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if repo.gated and user != owner:
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        if write and user is None:
            raise Refused(401, "Unauthorized")
        if write and user != owner:
            raise Refused(403, f"Forbidden: {user} may not write to {name}")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # What the endpoints do; `kind` is models, datasets or spaces.

    def whoami(self, user, query, body):
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, user, query, body):
        request = json.loads(body)
        owner, kind = request.get("organization") or user, request.get("type", "model")
        name = f"{owner}/{request['name']}"
        if user is None:
            raise Refused(401, "Unauthorized")
        url = f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.repos:
            raise Refused(409, "You already created this model repo", url=url)
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        self.make_repo(name, kind, private=request.get("visibility") == "private" or bool(request.get("private")))
        return {"url": url, "name": name}

    def info(self, user, query, body, kind, name, revision="main"):
        repo = self._repo(kind, name, user)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {
            "id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": [],
            "gated": repo.gated, "downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE,
        }  # fmt: skip

    def auth_check(self, user, query, body, kind, name):
        self._repo(kind, name, user)

    def refs(self, user, query, body, kind, name):
        repo = self._repo(kind, name, user)
        listed = defaultdict(list)
        for ref, oid in repo.refs.items():
            group = "branches" if "heads" in ref else "tags" if "tags" in ref else "pullRequests"
            listed[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid})
        return {"branches": [], "tags": [], "converts": [], "pullRequests": [], **listed}

    def tree(self, user, query, body, kind, name, revision):
        commit = self._commit(self._repo(kind, name, user), revision)
        return [self._entry(path, sha) for path, sha in sorted(commit.files.items())]

    def paths_info(self, user, query, body, kind, name, revision):
        commit = self._commit(self._repo(kind, name, user), revision)
        request = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        return [self._entry(path, commit.files[path]) for path in request if path in commit.files]

    def _entry(self, path: str, sha: str) -> dict:
        content = (self.blobs / sha).read_bytes()
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_lfs(path, len(content)):
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
        return entry

    def preupload(self, user, query, body, kind, name, revision):
        repo = self._repo(kind, name, user, write="create_pr" not in query)
        commit = self._commit(repo, revision)
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if sha := commit.files.get(file["path"]):
                entry["oid"] = sha if mode == "lfs" else git_oid((self.blobs / sha).read_bytes())
            files.append(entry)
        return {"files": files}

    def lfs_batch(self, user, query, body, name):
        objects = []
        for entry in json.loads(body)["objects"]:
            sha, size = entry["oid"], entry["size"]
            if not (self.blobs / sha).exists():
                upload = {"href": f"{self.endpoint}/lfs/{sha}"}
                if size > PART:
                    count = -(-size // PART)
                    urls = {str(part + 1): f"{self.endpoint}/lfs/{sha}/{part + 1}" for part in range(count)}
                    upload = {
                        "href": f"{self.endpoint}/lfs/{sha}/complete",
                        "header": {"chunk_size": str(PART), **urls},
                    }
                entry = entry | {"actions": {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs/verify"}}}
            objects.append(entry)
        return {"transfer": "multipart", "objects": objects}

    def lfs_put(self, user, query, body, sha):
        self._keep(sha, body)

    def lfs_part(self, user, query, body, sha, number):
        self.parts[sha][int(number)] = body
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def lfs_complete(self, user, query, body, sha):
        parts = json.loads(body)["parts"]
        self._keep(sha, b"".join(self.parts[sha][part["partNumber"]] for part in parts))

    def _keep(self, sha: str, content: bytes):
        if hashlib.sha256(content).hexdigest() != sha:
            raise Refused(400, "the content is not what its hash says")
        self.store(content)
        self.uploaded.append(sha)

    def lfs_verify(self, user, query, body):
        request = json.loads(body)
        file = self.blobs / request["oid"]
        if not file.exists() or file.stat().st_size != request["size"]:
            raise Refused(404, "no such object")

    def make_commit(self, user, query, body, kind, name, revision):
        pull = "create_pr" in query
        repo = self._repo(kind, name, user, write=not pull)
        parent = self._commit(repo, revision)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (self.blobs / value["oid"]).exists():
                    raise Refused(400, f"LFS pointer of {value['path']} points to nothing")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            elif line["key"] == "deletedFolder":
                files = {path: sha for path, sha in files.items() if not path.startswith(value["path"])}
        ref = f"refs/heads/{revision}" if f"refs/heads/{revision}" in repo.refs else revision
        if pull:
            number = len(repo.discussions) + 1
            repo.discussions[number], ref = header["summary"], f"refs/pr/{number}"
            repo.refs[ref] = parent.oid
        commit = repo.commit(ref, files, header["summary"])
        reply = {"commitUrl": f"{self.endpoint}/{name}/commit/{commit.oid}", "commitOid": commit.oid, "success": True}
        return reply | ({"pullRequestUrl": f"{self.endpoint}/{name}/discussions/{number}"} if pull else {})

    def make_branch(self, user, query, body, kind, name, branch):
        repo = self._repo(kind, name, user, write=True)
        if f"refs/heads/{branch}" in repo.refs:
            raise Refused(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repo.refs[f"refs/heads/{branch}"] = self._commit(repo, start).oid

    def drop_branch(self, user, query, body, kind, name, branch):
        self._repo(kind, name, user, write=True).refs.pop(f"refs/heads/{branch}")

    def make_tag(self, user, query, body, kind, name, revision):
        repo, tag = self._repo(kind, name, user, write=True), json.loads(body)["tag"]
        if f"refs/tags/{tag}" in repo.refs:
            raise Refused(409, "Tag reference exists already")
        repo.refs[f"refs/tags/{tag}"] = self._commit(repo, revision).oid

    def validate(self, user, query, body):
        text = json.loads(body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", text, re.S)
        data = yaml.safe_load(head[1]) if head else {}
        wrong = [name for name in ("license",) if data and not isinstance(data.get(name, ""), str)]
        if wrong:
            return 400, {}, json.dumps({"errors": [{"message": f"{wrong} is no text"}], "warnings": []}).encode()
        return {"errors": [], "warnings": []}

    def set_variable(self, user, query, body, name):
        request = json.loads(body)
        repo = self._repo("spaces", name, user, write=True)
        repo.variables[request["key"]] = request["value"]
        return {key: {"value": value} for key, value in repo.variables.items()}

    def drop_variable(self, user, query, body, name):
        repo = self._repo("spaces", name, user, write=True)
        repo.variables.pop(json.loads(body)["key"])
        return {key: {"value": value} for key, value in repo.variables.items()}

    def get_variables(self, user, query, body, name):
        return {key: {"value": value} for key, value in self._repo("spaces", name, user).variables.items()}

    def resolve(self, user, query, body, name, revision, path):
        kind = "models"
        for prefix in ("datasets/", "spaces/"):
            if name.startswith(prefix):
                kind, name = prefix.strip("/"), name.removeprefix(prefix)
        commit = self._commit(self._repo(kind, name, user), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            error = {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, error, b""
        sha = commit.files[path]
        content = (self.blobs / sha).read_bytes()
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if is_lfs(path, len(content)):
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content)), "ETag": f'"{sha}"'}
        else:
            headers["ETag"] = f'"{git_oid(content)}"'
        return 200, headers, content


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(WEIGHTS) or size > LFS_FROM and path.endswith("tokenizer.json"))


KIND, NAME, REST = "(models|datasets|spaces)", "([^/]+/[^/]+)", "(.+)"
ROUTES = [
    ("GET", "/api/whoami-v2", FakeHub.whoami),
    ("POST", "/api/repos/create", FakeHub.create),
    ("POST", "/api/validate-yaml", FakeHub.validate),
    ("GET", f"/api/{KIND}/{NAME}", FakeHub.info),
    ("GET", f"/api/{KIND}/{NAME}/revision/([^/]+)", FakeHub.info),
    ("GET", f"/api/{KIND}/{NAME}/auth-check", FakeHub.auth_check),
    ("GET", f"/api/{KIND}/{NAME}/refs", FakeHub.refs),
    ("GET", f"/api/{KIND}/{NAME}/tree/([^/]+)", FakeHub.tree),
    ("POST", f"/api/{KIND}/{NAME}/paths-info/([^/]+)", FakeHub.paths_info),
    ("POST", f"/api/{KIND}/{NAME}/preupload/([^/]+)", FakeHub.preupload),
    ("POST", f"/api/{KIND}/{NAME}/commit/([^/]+)", FakeHub.make_commit),
    ("POST", f"/api/{KIND}/{NAME}/branch/([^/]+)", FakeHub.make_branch),
    ("DELETE", f"/api/{KIND}/{NAME}/branch/([^/]+)", FakeHub.drop_branch),
    ("POST", f"/api/{KIND}/{NAME}/tag/([^/]+)", FakeHub.make_tag),
    ("GET", f"/api/spaces/{NAME}/variables", FakeHub.get_variables),
    ("POST", f"/api/spaces/{NAME}/variables", FakeHub.set_variable),
    ("DELETE", f"/api/spaces/{NAME}/variables", FakeHub.drop_variable),
    ("POST", r"/(?:datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", FakeHub.lfs_batch),
    ("POST", "/lfs/verify", FakeHub.lfs_verify),
    ("POST", "/lfs/([0-9a-f]{64})/complete", FakeHub.lfs_complete),
    ("PUT", "/lfs/([0-9a-f]{64})/([0-9]+)", FakeHub.lfs_part),
    ("PUT", "/lfs/([0-9a-f]{64})", FakeHub.lfs_put),
    ("GET HEAD", r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", FakeHub.resolve),
]
