# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""From a pruned model to the Hub and back, with the real client against a local server, in a process of its own."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .local_hub import LocalHub


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from optimum_ssm import CheckpointError, SSMPruner
from tests.conftest import tiny_model

work, results = Path(sys.argv[1]), {}
tiny_model("mamba2").save_pretrained(work / "base")
(work / "base" / "README.md").write_text("---\\nlicense: mit\\n---\\n# Base\\n")
pruner = SSMPruner.from_pretrained(work / "base", {"method": "magnitude", "sparsity": 0.5, "targets": ["in_proj", "A_log"]})
pruner.prune()
pruner.save_pretrained(work / "local")
ids = torch.arange(48).reshape(2, 24)
logits = pruner.model(ids).logits


def attempt(name, **kwargs):
    try:
        results[name] = pruner.push_to_hub(**kwargs)
    except CheckpointError as error:
        results[name] = f"CheckpointError: {error}"


attempt("first", repo_id="tester/private", private=True, commit_message="Half of it")
attempt("public", repo_id="short-name", private=False)
attempt("branch", repo_id="tester/private", revision="half")
attempt("branch again", repo_id="tester/private", revision="half", max_shard_size="20KB")
attempt("request", repo_id="tester/private", create_pr=True, max_shard_size="20KB", commit_message="Please take it")
attempt("shards", repo_id="tester/in-shards", max_shard_size="20KB")
attempt("one file", repo_id="tester/in-shards")
attempt("wrong token", repo_id="tester/refused", token="hf_wrong")
attempt("wrong name", repo_id="a/b/c")

back = SSMPruner.from_pretrained("tester/private")
results["report"] = back.report == pruner.report
results["masks"] = all(torch.equal(back.masks[name], mask) for name, mask in pruner.masks.items())
results["pulled"] = torch.equal(back.model(ids).logits, logits)
results["license"] = back.license
results["branch pulled"] = torch.equal(SSMPruner.from_pretrained("tester/private", revision="half").model(ids).logits, logits)
plain = AutoModelForCausalLM.from_pretrained("tester/private", revision="refs/pr/1")
results["plain"] = torch.equal(plain(ids).logits, logits)

child = SSMPruner.from_pretrained("tester/short-name", {"method": "magnitude", "sparsity": 0.75})
child.prune()
child.save_pretrained(work / "child")
from_hub = SSMPruner.from_pretrained("tester/dense", {"method": "magnitude", "sparsity": 0.5})
from_hub.save_pretrained(work / "from_hub")
for name, kwargs in (("no token", {"token": False}), ("no revision", {"revision": "nowhere"})):
    try:
        SSMPruner.from_pretrained("tester/private", cache_dir=work / "other", **kwargs)
    except CheckpointError as error:
        results[name] = f"CheckpointError: {error}"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def hub(assets: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.api().create_repo("tester/dense")
        hub.api().upload_folder(
            repo_id="tester/dense", folder_path=assets / "mamba-tiny", ignore_patterns=["tokenizer*"]
        )
        yield hub


@pytest.fixture(scope="module")
def results(hub: LocalHub, work: Path) -> dict[str, Any]:
    """What happened in the one subprocess that all tests of this file look at."""
    env = hub.env(work / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(work)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_commit_holds_everything_that_save_pretrained_writes(
    hub: LocalHub, results: dict[str, Any], work: Path
) -> None:
    (commit,) = hub.commits("tester/private")
    assert commit.message == "Half of it"
    assert results["first"] == f"{hub.endpoint}/tester/private/commit/{commit.oid}"
    assert hub.files("tester/private").keys() == contents(work / "local").keys()
    for name, data in contents(work / "local").items():
        if name != "pruning.png":
            assert hub.files("tester/private")[name] == data, name


def test_the_card_is_ours(hub: LocalHub, results: dict[str, Any]) -> None:
    text = hub.files("tester/private")["README.md"].decode()
    assert "# base, pruned" in text and "holds 38: its decay" in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "mit" and "optimum-ssm" in metadata["tags"] and "base_model" not in metadata


def test_visibility_is_what_was_asked_for(hub: LocalHub, results: dict[str, Any]) -> None:
    assert hub.repo("tester/private").private
    assert not hub.repo("tester/short-name").private, "a name without an owner becomes the user's"
    assert results["public"].startswith(f"{hub.endpoint}/tester/short-name/commit/")


def test_a_revision_is_a_branch_that_is_made_where_it_is_missing(hub: LocalHub, results: dict[str, Any]) -> None:
    assert len(hub.commits("tester/private")) == 1, "main stays as it was"
    first, last = hub.commits("tester/private", "half")
    assert results["branch again"].endswith(last.oid) and first.message == "Half of it"
    assert any("00001-of-" in name for name in hub.files("tester/private", "half")), "keywords reach save_pretrained"
    assert "model.safetensors" in hub.files("tester/private")


@pytest.mark.parametrize("repo_id, revision, single", [
    ("tester/private", "half", False), ("tester/private", "refs/pr/1", False), ("tester/in-shards", "main", True),
])  # fmt: skip
def test_weights_of_an_earlier_push_in_another_shape_are_gone(
    hub: LocalHub, results: dict[str, Any], repo_id: str, revision: str, single: bool
) -> None:
    """transformers would take a model.safetensors that lies beside newer shards."""
    weights = {name for name in hub.files(repo_id, revision) if name.startswith("model")}
    assert (weights == {"model.safetensors"}) if single else ("model.safetensors" not in weights and len(weights) > 2)
    assert "config.json" in hub.files(repo_id, revision)


def test_a_pull_request_gives_its_address(hub: LocalHub, results: dict[str, Any]) -> None:
    assert results["request"] == f"{hub.endpoint}/tester/private/discussions/1"
    assert hub.commits("tester/private", "refs/pr/1")[-1].message == "Please take it"


@pytest.mark.parametrize("name, message", [
    ("wrong token", "cannot push to tester/refused: .*401 .*Invalid credentials"),
    ("wrong name", "cannot push to a/b/c: Repo id must be in the form"),
    ("no token", "tester/private cannot be reached: "),
    ("no revision", "tester/private cannot be reached: .*nowhere"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_line(results: dict[str, Any], name: str, message: str) -> None:
    assert re.match(f"CheckpointError: {message}", results[name]) and "\n" not in results[name]


def test_nothing_is_made_with_a_wrong_token(hub: LocalHub, results: dict[str, Any]) -> None:
    assert sorted(hub.repos) == ["tester/dense", "tester/in-shards", "tester/private", "tester/short-name"]


@pytest.mark.parametrize("claim", ["pulled", "branch pulled", "plain", "report", "masks"])
def test_what_comes_back_is_what_was_pushed(results: dict[str, Any], claim: str) -> None:
    """Bit-equal logits through SSMPruner from main and a branch, through AutoModel from a pull request; the account."""
    assert results[claim] is True


def test_the_licence_is_read_from_the_card_on_the_hub(results: dict[str, Any]) -> None:
    assert results["license"] == "mit"


def test_a_model_of_the_hub_is_named_as_base_model(hub: LocalHub, results: dict[str, Any], work: Path) -> None:
    metadata = yaml.safe_load((work / "from_hub" / "README.md").read_text().split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("tester/dense", "finetune")
    text = (work / "from_hub" / "README.md").read_text()
    assert "[tester/dense](https://huggingface.co/tester/dense)" in text
    assert not (work / "from_hub" / "tokenizer.json").exists(), "there was none"


def test_a_pruned_model_that_is_pruned_again_still_names_its_dense_one(results: dict[str, Any], work: Path) -> None:
    report = json.loads((work / "child" / "report.json").read_text())
    assert report["model"] == "./base" and len(report["passes"]) == 2


UNREACHABLE = """
import sys
from optimum_ssm import CheckpointError, SSMPruner
from tests.conftest import tiny_model

try:
    SSMPruner(tiny_model("mamba")).push_to_hub("tester/pruned", token="hf_local")
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    with LocalHub() as hub:
        env = hub.env(tmp_path) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", UNREACHABLE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot push to tester/pruned: ") and len(done.stdout.splitlines()) == 1
