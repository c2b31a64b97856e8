# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The local Hub is believed by other tests: the real client has to be content with it, and it has to be strict."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import MambaConfig, MambaForCausalLM

from optimum_ssm.errors import CheckpointError
from optimum_ssm.hub.original_checkpoints import load_original
from optimum_ssm.hub.original_export import export_original

from .local_hub import LocalHub


REPO = "tester/pruned"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.api().create_repo(REPO)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in small: text in one nested folder, and a binary that goes by LFS."""
    folder = tmp_path / "upload"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "mamba"}\n')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    (folder / "figures" / "a b.csv").write_text("layer,sparsity\n0,0.5\n")
    (folder / "model.safetensors").write_bytes(os.urandom(3 << 20))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_one_commit(hub: LocalHub, folder: Path) -> None:
    sent = hub.api().upload_folder(
        repo_id=REPO, folder_path=folder, commit_message="Prune", commit_description="50 % of A_log"
    )
    (commit,) = hub.commits(REPO)
    assert (commit.oid, commit.message, commit.description) == (sent.oid, "Prune", "50 % of A_log")
    assert hub.files(REPO) == contents(folder)
    assert [path for path, file in commit.tree.items() if file.lfs] == ["model.safetensors"]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert ("PUT", f"/lfs/{REPO}/{digest}") in hub.requests
    info = hub.api().model_info(REPO)
    assert info.sha == sent.oid and sorted(file.rfilename for file in info.siblings) == sorted(contents(folder))


def test_only_what_changed_is_sent_again(hub: LocalHub, folder: Path) -> None:
    hub.api().upload_folder(repo_id=REPO, folder_path=folder)
    hub.api().upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.commits(REPO)) == 1, "the client makes no empty commit when the Hub tells it what is there"
    (folder / "config.json").write_text("{}")
    hub.api().upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.commits(REPO)) == 2 and hub.files(REPO) == contents(folder)
    assert sum(method == "PUT" for method, _ in hub.requests) == 1


def test_download_gives_back_every_byte(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    hub.api().upload_folder(repo_id=REPO, folder_path=folder)
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    one = Path(hf_hub_download(REPO, "figures/a b.csv", **where))
    assert one.read_bytes() == (folder / "figures" / "a b.csv").read_bytes()
    everything = Path(snapshot_download(REPO, **where))
    assert everything.name == hub.commits(REPO)[0].oid and contents(everything) == contents(folder)
    assert sorted(hub.api().list_repo_files(REPO)) == sorted(contents(folder))
    top = {entry.path for entry in hub.api().list_repo_tree(REPO)}
    assert top == {"README.md", "config.json", "figures", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json", **where)


def test_old_commits_and_branches_stay_readable(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    api = hub.api()
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    api.create_branch(REPO, branch="half")
    (folder / "config.json").write_text("{}")
    api.upload_folder(repo_id=REPO, folder_path=folder, revision="half")
    assert len(hub.commits(REPO)) == 1 and len(hub.commits(REPO, "half")) == 2
    for revision, wanted in ((first.oid, b'{"model_type": "mamba"}\n'), ("half", b"{}")):
        path = hf_hub_download(REPO, "config.json", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path / "c")
        assert Path(path).read_bytes() == wanted
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=REPO, folder_path=folder, revision="nowhere")


def test_a_pull_request_leaves_main_alone(hub: LocalHub, folder: Path) -> None:
    sent = hub.api().upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)
    assert (sent.pr_num, sent.pr_revision) == (1, "refs/pr/1")
    assert hub.commits(REPO) == [] and hub.files(REPO) == {}
    assert len(hub.commits(REPO, "refs/pr/1")) == 1 and hub.files(REPO, "refs/pr/1") == contents(folder)
    assert hub.api().model_info(REPO, revision="refs/pr/1").sha == sent.oid
    assert hub.api().upload_folder(repo_id=REPO, folder_path=folder, create_pr=True).pr_num == 2


def test_commit_operations(hub: LocalHub) -> None:
    api = hub.api()
    head = api.create_commit(
        REPO, [CommitOperationAdd(name, b"x") for name in ("a/1", "a/2", "b")], commit_message="add"
    )
    api.create_commit(REPO, [CommitOperationDelete("a/1"), CommitOperationDelete("b")], commit_message="delete")
    assert hub.files(REPO) == {"a/2": b"x"}
    with pytest.raises(HfHubHTTPError, match="412"):
        stale = CommitOperationAdd("c", b"x")
        api.create_commit(REPO, [stale], commit_message="late", parent_commit=head.oid)
    with pytest.raises(ValueError, match="metadata"):
        card = CommitOperationAdd("README.md", b"---\na: [\n---\n")
        api.create_commit(REPO, [card], commit_message="card")
    assert len(hub.commits(REPO)) == 2


def test_wrong_lfs_content_is_refused(hub: LocalHub) -> None:
    oid = hashlib.sha256(b"announced").hexdigest()

    def put(body: bytes) -> int:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
        connection.request("PUT", f"/lfs/{REPO}/{oid}", body)
        return connection.getresponse().status

    assert put(b"announced") == 400, "never announced"
    hub.repo(REPO).lfs[oid] = None
    assert put(b"something else") == 400
    assert put(b"announced") == 200 and hub.repo(REPO).lfs[oid] == b"announced"
    missing = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    lines = [{"key": "header", "value": {"summary": "unbacked"}}, missing]
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    body = "\n".join(map(json.dumps, lines))
    connection.request("POST", f"/api/models/{REPO}/commit/main", body, {"Authorization": f"Bearer {hub.token}"})
    assert connection.getresponse().status == 400 and hub.commits(REPO) == []


def test_private_and_existing_repositories(hub: LocalHub, tmp_path: Path) -> None:
    api = hub.api()
    assert api.create_repo("someone/secret", private=True).repo_id == "someone/secret"
    assert hub.repo("someone/secret").private and not hub.repo(REPO).private
    assert api.model_info("someone/secret").private is True
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).model_info("someone/secret")
    assert api.create_repo("pruned", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/none", "config.json", endpoint=hub.endpoint, cache_dir=tmp_path)


def test_tokens(hub: LocalHub, folder: Path) -> None:
    assert hub.api().whoami()["name"] == "tester"
    wrong = HfApi(endpoint=hub.endpoint, token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        wrong.upload_folder(repo_id=REPO, folder_path=folder)
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.endpoint, token=False).create_repo("tester/anonymous")
    assert hub.commits(REPO) == [] and list(hub.repos) == [REPO]


def test_settings_of_the_process_come_back() -> None:
    before = (constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE)
    with LocalHub() as one, LocalHub() as two:
        assert one.endpoint != two.endpoint and constants.HF_HUB_DISABLE_XET and not constants.HF_HUB_OFFLINE
    assert (constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE) == before


IN_ANOTHER_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM
from optimum_ssm.hub.original_checkpoints import load_original
from optimum_ssm.hub.original_export import export_original

model = load_original(sys.argv[1], json.loads(sys.argv[2]), revision="main")
model.push_to_hub("tester/converted", private=True)
export_original(AutoModelForCausalLM.from_pretrained("tester/converted"), sys.argv[3])
"""


def test_transformers_and_our_loader_use_it_in_a_subprocess(hub: LocalHub, tmp_path: Path) -> None:
    """An original checkpoint comes from the Hub, goes back as a transformers one, and comes once more."""
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    export_original(model, tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    hub.api().upload_folder(repo_id=REPO, folder_path=tmp_path / "out")
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, REPO, config, str(tmp_path / "back")]
    env = hub.env(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert hub.repo("tester/converted").private and len(hub.commits("tester/converted")) == 1
    back = load_original(tmp_path / "back", json.loads(config)).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_our_loader_reads_the_cache_of_the_client(hub: LocalHub, tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    export_original(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    hub.api().upload_folder(repo_id=REPO, folder_path=tmp_path / "out")
    hf_hub_download(REPO, "pytorch_model.bin", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    cached = load_original(REPO, config, cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(cached.lm_head.weight, model.lm_head.weight) and cached.config.name_or_path == REPO
    with pytest.raises(CheckpointError, match="tester/other"):
        load_original("tester/other", config, cache_dir=tmp_path / "cache", local_files_only=True)
