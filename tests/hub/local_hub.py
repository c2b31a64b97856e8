# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A Hub of models in memory on 127.0.0.1, so that tests push to and pull from it with the real huggingface_hub client.

It speaks the endpoints behind create_repo, upload_folder and create_commit (regular and LFS files, branches, pull
requests), model_info, the file tree, downloads and whoami, as huggingface_hub 1.33 and 2.4 use them without Xet.
Anyone reads a public repository; a private one, and every write, needs the token. It knows no data sets, tags, folder
deletions, chunked bodies, storage server, ranges or .gitattributes: every file is kept as it was sent.
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
    oid: str
    message: str
    description: str
    tree: dict[str, File]  # all files after the commit, not only those that it touched


@dataclass
class Repo:
    """A repository; `refs` maps "main", branch names and "refs/pr/1" to their commits, the empty root first."""

    private: bool
    refs: dict[str, list[Commit]]
    lfs: dict[str, bytes | None] = field(default_factory=dict)  # by sha256; None: announced, not yet uploaded


class HubError(Exception):
    """An answer that is an error; the client tells the kinds of 404 apart by `code`."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", url: str = "") -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message, "url": url}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}


class LocalHub:
    """The server as a context manager, for a pytest fixture as it is: `with LocalHub() as hub: yield hub`.

    While it is open the client of this process is kept from Xet and offline mode, which it would otherwise take from
    the environment; both settings come back at the end. Everything else goes by `endpoint` and `token`.
    """

    token, user = "hf_local", "tester"

    def __init__(self) -> None:
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
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        return {**os.environ, **hub, **online, "HF_HOME": str(home)}

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
_LFS_SUFFIXES, _LFS_SIZE = (".safetensors", ".bin", ".pt", ".png", ".jpg", ".parquet", ".gz"), 1 << 20
_ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/repos/create": "create_repo",
    "POST /api/validate-yaml": "validate_yaml",
    f"GET /api/models/{_REPO}(/revision/{_REV})?": "info",
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
    wbufsize = 1 << 16  # header and body in one packet: each answer is 40 ms faster

    def log_message(self, *_: object) -> None:
        """Silent: a test that wants to know reads hub.requests."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.rfile.read(int(self.headers.get("Content-Length", 0)))
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
        if given is not None and given != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        private = repo_id in self.hub.repos and self.hub.repos[repo_id].private
        # an LFS upload needs none: as at the signed address of a storage server, only announced contents are taken
        if given is None and (private or name == "whoami" or self.command == "POST") and name != "lfs_put":
            raise HubError(401, "Invalid username or password.", "RepoNotFound" if private else "")

    def whoami(self) -> Any:
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": auth}

    def create_repo(self) -> Any:
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or self.hub.user}/{wish['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(409, f"You already created the model repo {repo_id}", url=url)
        root = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", "", {})
        self.hub.repos[repo_id] = Repo(wish.get("visibility") == "private", {"main": [root]})
        return {"url": url, "name": repo_id}

    def validate_yaml(self) -> Any:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(front.group(1) if front else "")
        except yaml.YAMLError as error:
            raise HubError(400, f"Invalid metadata: {error}".replace("\n", " ")) from error
        return {"errors": [], "warnings": []}

    def info(self, repo_id: str, revision: str = "main") -> Any:
        head, private = self.hub.history(repo_id, revision)[-1], self.hub.repo(repo_id).private
        return {"id": repo_id, "sha": head.oid, "private": private, "siblings": [{"rfilename": p} for p in head.tree]}

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
        if revision in self.hub.repo(repo_id).refs:
            raise HubError(409, f"Reference {revision} already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self.hub.repo(repo_id).refs[revision] = list(self.hub.history(repo_id, start))
        return {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        tree, answer = self.hub.history(repo_id, revision)[-1].tree, []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(_LFS_SUFFIXES) or file["size"] > _LFS_SIZE
            answer.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            answer[-1]["oid"] = tree[file["path"]].oid if file["path"] in tree else None
        return {"files": answer}

    def lfs_batch(self, repo_id: str) -> Any:
        repo, objects = self.hub.repo(repo_id), []
        for wish in json.loads(self.body)["objects"]:
            objects.append({"oid": wish["oid"], "size": wish["size"]})
            if repo.lfs.setdefault(wish["oid"], None) is None:
                objects[-1]["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{repo_id}/{wish['oid']}"}}
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
            if repo.lfs.get(value["oid"]) is None:
                raise HubError(400, f"The content of {value['path']} was not uploaded")
            tree[value["path"]] = File(repo.lfs[value["oid"]], lfs=True)
        elif key == "deletedFile":
            tree.pop(value["path"])
        elif key != "header":
            raise HubError(400, f"Unknown operation {key}")

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        head = self.hub.history(repo_id, revision)[-1]
        if path not in head.tree:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit=head.oid)
        return head.tree[path].data, {"ETag": f'"{head.tree[path].oid}"', "X-Repo-Commit": head.oid}
