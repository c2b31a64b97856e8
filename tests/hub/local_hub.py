# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A Hub of models in memory on 127.0.0.1, so that tests push to and pull from it with the real huggingface_hub client.

It speaks the endpoints behind create_repo, upload_folder and create_commit (regular and LFS files, branches, pull
requests), model_info, the file tree, downloads and whoami, as huggingface_hub 1.33 and 2.4 use them without Xet. Anyone
reads a public repository; a private one, and every write, needs the token. It knows no data sets, tags, redirects to
a storage server, ranges or .gitattributes: every file is kept as it was sent.
"""

import hashlib
import json
import os
import re
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import HfApi, constants


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub shows as etag: the sha256 of an LFS file, the git hash of another one."""
        header = b"" if self.lfs else f"blob {len(self.data)}\0".encode()
        return hashlib.new("sha256" if self.lfs else "sha1", header + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One commit and the whole tree as it leaves it."""

    oid: str
    message: str
    description: str
    tree: dict[str, File]


@dataclass
class Repo:
    """A repository; `refs` maps "main", branch names and "refs/pr/1" to their commits, the empty root first."""

    repo_id: str
    private: bool
    refs: dict[str, list[Commit]]
    lfs: dict[str, bytes | None] = field(default_factory=dict)  # by sha256; None: announced, not yet uploaded


class HubError(Exception):
    """An answer that is an error; the client tells the kinds of 404 apart by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.content = {"error": message, **more}


class LocalHub:
    """The server as a context manager, for a pytest fixture as it is: `with LocalHub() as hub: yield hub`.

    While it is open the client of this process is kept from Xet and offline mode, which it would otherwise take from
    the environment; both settings come back at the end. Everything else goes by `endpoint` and `token`.
    """

    token, user = "hf_local", "tester"

    def __init__(self, lfs_threshold: int = 1 << 20) -> None:
        self.lfs_threshold = lfs_threshold  # bytes; larger files and those of _BINARY go by LFS
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path), in the order of arrival
        self.lock = threading.Lock()

    def __enter__(self) -> "LocalHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self._settings = mock.patch.multiple(constants, HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False)
        self._settings.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.stop()
        self._server.shutdown()
        self._server.server_close()

    def api(self) -> HfApi:
        """A client of this server that may write."""
        return HfApi(endpoint=self.endpoint, token=self.token)

    def env(self, home: str | os.PathLike) -> dict[str, str]:
        """The environment of a subprocess whose Hub this is; `home` is its empty cache."""
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
        }
        return {
            **os.environ,
            **settings,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise HubError(404, f"Repository {repo_id} not found", "RepoNotFound")
        return self.repos[repo_id]

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits that clients made, oldest first; the root that create_repo makes is left out."""
        return self.history(repo_id, revision)[1:]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.history(repo_id, revision)[-1].tree.items()}

    def history(self, repo_id: str, revision: str) -> list[Commit]:
        """The commits up to a branch, a pull request or a commit hash."""
        refs = self.repo(repo_id).refs
        if revision in refs:
            return refs[revision]
        for commits in refs.values():
            for index, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[: index + 1]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


_REPO, _REV = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_BINARY = (".safetensors", ".bin", ".pt", ".png", ".jpg", ".parquet", ".gz")
_ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/repos/create": "create_repo",
    "POST /api/validate-yaml": "validate_yaml",
    f"GET /api/models/{_REPO}(/revision/{_REV})?": "info",
    f"GET /api/models/{_REPO}/refs": "refs",
    f"GET /api/models/{_REPO}/tree/{_REV}(/(?P<path>.+))?": "tree",
    f"POST /api/models/{_REPO}/branch/{_REV}": "create_branch",
    f"POST /api/models/{_REPO}/preupload/{_REV}": "preupload",
    f"POST /api/models/{_REPO}/commit/{_REV}": "commit",
    f"POST /{_REPO}[.]git/info/lfs/objects/batch": "lfs_batch",
    f"PUT /lfs/{_REPO}/(?P<oid>[0-9a-f]+)": "lfs_put",
    f"(GET|HEAD) /{_REPO}/resolve/{_REV}/(?P<path>.+)": "resolve",
}


class _Handler(BaseHTTPRequestHandler):
    """Each method named in _ROUTES gets the parts of the path and gives back JSON, or bytes with their headers."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass  # a test that wants to know reads hub.requests

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.read_body()
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            with self.hub.lock:
                status, headers, content = 200, {}, self.route(f"{self.command} {url.path}")
        except HubError as error:
            status, headers, content = error.status, error.headers, error.content
        if isinstance(content, tuple):
            content, headers = content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, request: str) -> Any:
        for pattern, name in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                self.authorise(name, parts.get("repo_id"))
                return getattr(self, name)(**parts)
        raise HubError(404, f"LocalHub has no endpoint {request}")

    def authorise(self, name: str, repo_id: str | None) -> None:
        """As the Hub does: a wrong token is refused everywhere, a missing one where a token is needed."""
        given = self.headers.get("Authorization")
        if name == "lfs_put":
            return  # as for the signed address of a storage server: only announced contents are taken
        if given is not None and given != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        private = repo_id in self.hub.repos and self.hub.repos[repo_id].private
        if given is None and (private or name == "whoami" or self.command == "POST"):
            raise HubError(401, "Invalid username or password.")

    def whoami(self) -> Any:
        token = {"displayName": "test", "role": "write"}
        return {
            "type": "user",
            "name": self.hub.user,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def create_repo(self) -> Any:
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or self.hub.user}/{wish['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise HubError(409, f"You already created the model repo {repo_id}", **url)
        root = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", "", {})
        self.hub.repos[repo_id] = Repo(repo_id, wish.get("visibility") == "private", {"main": [root]})
        return url

    def validate_yaml(self) -> Any:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(front.group(1) if front else "")
        except yaml.YAMLError as error:
            raise HubError(400, f"Invalid metadata: {error}".replace("\n", " ")) from error
        return {"errors": [], "warnings": []}

    def info(self, repo_id: str, revision: str = "main") -> Any:
        head = self.hub.history(repo_id, revision)[-1]
        files = [{"rfilename": path, "size": len(file.data), "blobId": file.oid} for path, file in head.tree.items()]
        private = self.hub.repo(repo_id).private
        return {"id": repo_id, "sha": head.oid, "private": private, "siblings": files, "tags": [], "downloads": 0}

    def refs(self, repo_id: str) -> Any:
        heads = [(name, commits[-1].oid) for name, commits in self.hub.repo(repo_id).refs.items()]
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
        requests = [{"name": name[5:], "ref": name, "targetCommit": oid} for name, oid in heads if "refs/pr/" in name]
        branches = [ref for ref in named if "refs/pr/" not in ref["name"]]
        return {"branches": branches, "converts": [], "tags": [], "pullRequests": requests}

    def tree(self, repo_id: str, revision: str, path: str = "") -> Any:
        folder, entries = f"{path}/" if path else "", {}
        for name, file in self.hub.history(repo_id, revision)[-1].tree.items():
            if not name.startswith(folder):
                continue
            inside, _, deeper = name[len(folder) :].partition("/")
            if deeper and self.query.get("recursive", ["false"])[0].lower() != "true":
                entries[inside] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder + inside}
                continue
            entries[name] = {"type": "file", "oid": file.oid, "size": len(file.data), "path": name}
            if file.lfs:
                entries[name]["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
        return list(entries.values())

    def create_branch(self, repo_id: str, revision: str) -> Any:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        if revision in self.hub.repo(repo_id).refs:
            raise HubError(409, f"Reference {revision} already exists")
        self.hub.repo(repo_id).refs[revision] = list(self.hub.history(repo_id, start))
        return {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        tree, answer = self.hub.history(repo_id, revision)[-1].tree, []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(_BINARY) or file["size"] > self.hub.lfs_threshold
            known = {"oid": tree[file["path"]].oid} if file["path"] in tree else {}
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append({"path": file["path"], **mode, **known})
        return {"files": answer}

    def lfs_batch(self, repo_id: str) -> Any:
        repo, objects = self.hub.repo(repo_id), []
        for wish in json.loads(self.body)["objects"]:
            objects.append({"oid": wish["oid"], "size": wish["size"]})
            if repo.lfs.setdefault(wish["oid"], None) is None:
                href = f"{self.hub.endpoint}/lfs/{repo_id}/{wish['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, repo_id: str, oid: str) -> Any:
        repo = self.hub.repo(repo_id)
        if oid not in repo.lfs or hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"The content is not the announced {oid}")
        repo.lfs[oid] = self.body
        return {}

    def commit(self, repo_id: str, revision: str) -> Any:
        repo, history = self.hub.repo(repo_id), self.hub.history(repo_id, revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", history[-1].oid) != history[-1].oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(history[-1].tree)
        for line in lines:
            self.apply(line["key"], line["value"], tree, repo)
        oid = hashlib.sha1(json.dumps([history[-1].oid, len(repo.refs), header]).encode() + self.body).hexdigest()
        commit = Commit(oid, header["summary"], header.get("description", ""), tree)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            repo.refs[f"refs/pr/{number}"] = [*history, commit]
            return answer | {"pullRequestUrl": f"{self.hub.endpoint}/{repo_id}/discussions/{number}"}
        if revision not in repo.refs:
            raise HubError(400, f"{revision} is no branch: commits go to a branch or a pull request")
        history.append(commit)
        return answer

    def apply(self, key: str, value: dict[str, Any], tree: dict[str, File], repo: Repo) -> None:
        if key == "file":
            tree[value["path"]] = File(b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            data = repo.lfs.get(value["oid"])
            if data is None:
                raise HubError(400, f"The content of {value['path']} was not uploaded")
            tree[value["path"]] = File(data, lfs=True)
        elif key == "deletedFile":
            if tree.pop(value["path"], None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
        elif key == "deletedFolder":
            for path in [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]:
                del tree[path]
        elif key != "header":
            raise HubError(400, f"Unknown operation {key}")

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        head = self.hub.history(repo_id, revision)[-1]
        if path not in head.tree:
            error = HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
            error.headers["X-Repo-Commit"] = head.oid
            raise error
        file = head.tree[path]
        return file.data, {"ETag": f'"{file.oid}"', "X-Repo-Commit": head.oid}
