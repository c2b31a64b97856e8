# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The card: metadata that the Hub reads, and a text that claims neither more nor less than what was done."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from jinja2 import Template, UndefinedError
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner
from optimum_ssm.hub.model_card import is_hub_id, write_card


MEASURED = {
    "dense": {"perplexity": 34.56789, "dataset": "evaluation.txt", "window": 1024, "windows": 8,
              "protocol": "evaluation.txt, 8 windows of 1,024 tokens"},
    "pruned": {"perplexity": 38.1, "dataset": "wikitext2 test", "window": 512, "windows": 4,
               "protocol": "wikitext2 test, 4 windows of 512 tokens"},
}  # fmt: skip


def card_of(pruner: SSMPruner, folder: Path, license: str | None = None) -> ModelCard:
    """The card of what a pruner did, as huggingface_hub reads it."""
    folder.mkdir(exist_ok=True)
    path = folder / "README.md"
    write_card(path, pruner.model, pruner._done, pruner.report, license, "pruning.png")
    return ModelCard.load(path)


def pruned(model: PreTrainedModel, *passes: dict[str, object], name: str = "owner/mamba-small") -> SSMPruner:
    pruner = SSMPruner(
        model, pruning_config=[{"method": "magnitude", "sparsity": 0.5, **options} for options in passes]
    )
    pruner.report.model = name
    pruner.prune()
    return pruner


def test_metadata_of_a_model_from_the_hub(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], tmp_path: Path
) -> None:
    data = {"dataset": token_ids(), "seq_len": 24}
    pruner = pruned(tiny_mamba, {}, {"method": "wanda", "targets": ["conv1d"], **data})
    pruner.report.passes[1].config["dataset"] = pruner._done[1].dataset = "wikitext2"
    pruner.report.perplexity = MEASURED
    values = card_of(pruner, tmp_path, license="apache-2.0").data
    assert (values.library_name, values.pipeline_tag, values.license) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert (values.base_model, values.to_dict()["base_model_relation"]) == ("owner/mamba-small", "finetune")
    assert values.tags == ["optimum-ssm", "pruned", "sparse", "mamba", "magnitude", "wanda"]
    assert values.datasets == ["Salesforce/wikitext"], "only what was read, under its name on the Hub"


def test_model_index_holds_the_measured_perplexities(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    pruner = pruned(tiny_mamba, {})
    pruner.report.perplexity = MEASURED
    data = card_of(pruner, tmp_path).data
    assert data.model_name == "mamba-small pruned"
    found = [(result.metric_type, result.metric_value, result.dataset_name) for result in data.eval_results]
    assert found == [("perplexity", 34.5679, "evaluation.txt"), ("perplexity", 38.1, "wikitext2 test")]
    assert "dense, 8 windows of 1024 tokens" in data.eval_results[0].metric_name
    (index,) = data.to_dict()["model-index"]
    assert index["name"] == "mamba-small pruned" and len(index["results"]) == 2
    text = (tmp_path / "README.md").read_text()
    assert "| dense | 34.568 | evaluation.txt, 8 windows of 1,024 tokens |" in text
    assert "| pruned | 38.100 | wikitext2 test, 4 windows of 512 tokens |" in text


def test_without_a_measurement_none_is_claimed(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    card = card_of(pruned(tiny_mamba, {}), tmp_path)
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    assert "No perplexity was measured before this card was written." in card.text


@pytest.mark.parametrize("name", ["/data/models/mamba", "./models/mamba", "../mamba", "MambaForCausalLM", "a/b/c"])
def test_base_model_is_named_only_for_hub_ids(tiny_mamba: PreTrainedModel, tmp_path: Path, name: str) -> None:
    pruner = pruned(tiny_mamba, {}, name=name)
    pruner.report.perplexity = MEASURED
    card = card_of(pruner, tmp_path)
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    short = name.rsplit("/", 1)[-1]
    assert f"This is the local model `{short}`" in card.text and f"\n# {short}, pruned\n" in card.text
    assert card.data.model_name == f"{short} pruned"
    assert "huggingface.co" not in card.text and "/data/models" not in card.text


def test_a_directory_with_a_slash_at_its_end_still_has_a_name(
    tiny_mamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_mamba.save_pretrained(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    pruner = SSMPruner.from_pretrained("models/mine/", {"method": "magnitude", "sparsity": 0.5})
    pruner.prune()
    pruner.report.perplexity = MEASURED
    monkeypatch.chdir(tmp_path.parent)
    data = card_of(pruner, tmp_path / "out").data
    assert data.model_name == "mine pruned"
    assert data.base_model is None, "models/mine is no Hub id, wherever the card is written"


def test_names_of_the_hub_and_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("state-spaces/mamba-2.8b", "allenai/c4", "Salesforce/wikitext"):
        assert is_hub_id(name)
    for name in ("gpt2", "/a/b", "./a", "~/a", "a/b/c", "corpus/text.txt", "corpus/lines.JSONL", "corpus/t.parquet"):
        assert not is_hub_id(name)
    (tmp_path / "state-spaces" / "mamba-2.8b").mkdir(parents=True)
    assert not is_hub_id("state-spaces/mamba-2.8b"), "here this is a directory"


@pytest.mark.parametrize("recipe, sentences", [
    ([{"targets": ["A_log"]}], ["holds 38: its decay exp(-exp(A_log) dt) is 0"]),
    ([{"targets": ["A_log"], "memoryless_value": 60.5}], ["holds 60.5: its decay"]),
    ([{"targets": ["A_log"], "a_log_fill": "zero"}], ["holds 0: its decay is exp(-dt). The state is not gone"]),
    ([{"targets": ["in_proj"]}], []),
    ([{"targets": ["A_log"], "memoryless_value": 60}, {"targets": ["in_proj"]}], ["holds 60: its decay"]),
    ([{"targets": ["A_log"], "a_log_fill": "zero"}, {"targets": ["in_proj"]}], ["holds 0: its decay is exp(-dt)"]),
    ([{"targets": ["re:.*0.mixer.A_log"], "a_log_fill": "zero"}, {"targets": ["re:.*1.mixer.A_log"]}],
     ["holds 38: its decay", "holds 0: its decay is exp(-dt)"]),
])  # fmt: skip
def test_the_card_says_what_a_removed_a_log_entry_holds(
    tiny_mamba: PreTrainedModel, tmp_path: Path, recipe: list[dict[str, object]], sentences: list[str]
) -> None:
    """The fills that are really in the weights: not those of a pass that touched no A_log."""
    text = card_of(pruned(tiny_mamba, *recipe), tmp_path).text
    assert len(re.findall("A removed entry of `A_log`", text)) == len(sentences)
    for sentence in sentences:
        assert sentence in text


def test_the_fill_is_recognised_in_bfloat16(tiny_mamba2: PreTrainedModel, tmp_path: Path) -> None:
    pruner = pruned(tiny_mamba2.to(torch.bfloat16), {"targets": ["A_log"], "memoryless_value": 41.3})
    assert "holds 41.3: its decay" in card_of(pruner, tmp_path).text


def test_the_card_promises_no_speed_and_no_smaller_files(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    pruner = pruned(tiny_mamba, {"pattern": "2:4", "sparsity": None})
    text = " ".join(card_of(pruner, tmp_path).text.split())
    assert "the files are as large as the dense model's, and dense kernels run at the same speed" in text
    assert "nothing here was timed" in text
    assert (
        f"recurrent state of a sequence is as large as before ({pruner.report.recurrent_state_bytes:,} bytes)" in text
    )
    assert not re.search(r"\b(faster|speed-?up|accelerat|smaller)", text, re.IGNORECASE)


def test_the_text_is_complete(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    pruner = pruned(tiny_mamba, {"targets": ["in_proj", "x_proj.B"]}, {"method": "random", "targets": ["A_log"]})
    pruner.report.perplexity = MEASURED
    text = card_of(pruner, tmp_path).text
    report = pruner.report
    assert f"{report.pruned:,} of {report.parameters:,} parameters removed, {100 * report.sparsity:.2f} %" in text
    assert report.to_markdown() in text
    assert "![Removed share of every component in every block](pruning.png)" in text
    assert "Pass 1:\n" in text and "Pass 2:\n" in text and 'targets: ["in_proj", "x_proj.B"]' in text
    assert "AutoModelForCausalLM.from_pretrained" in text and "`MambaForCausalLM`" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert all(cell.strip() for cell in line.strip("|").split("|")), f"empty cell in {line!r}"
    assert "{{" not in text and "{%" not in text and "None" not in text and "\n\n\n\n" not in text


@pytest.mark.parametrize("variable", ["architecture", "version", "metadata", "table", "picture", "fills"])
def test_an_undefined_variable_is_an_error_and_not_an_empty_place(
    tiny_mamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    pruner, render = pruned(tiny_mamba, {}), Template.render
    without = lambda self, **values: render(self, **{k: v for k, v in values.items() if k != variable})  # noqa: E731
    monkeypatch.setattr(Template, "render", without)
    with pytest.raises(UndefinedError, match=f"'{variable}' is undefined"):
        card_of(pruner, tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_names_that_are_yaml_or_html_do_not_break_the_card(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    name = "owner/odd: [name] <b>'x\""
    pruner = pruned(tiny_mamba, {}, name=name)
    pruner.report.perplexity = {"pruned": {**MEASURED["pruned"], "dataset": "some: [text].txt"}}
    data = card_of(pruner, tmp_path).data
    assert data.base_model == name and data.eval_results[0].dataset_name == "some: [text].txt"


def test_a_card_of_an_unpruned_model(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    pruner = SSMPruner(tiny_mamba)
    pruner.report.perplexity = {"dense": MEASURED["dense"]}
    card = card_of(pruner, tmp_path)
    assert "Nothing was removed from its 19,936 parameters." in card.text and "\n## Parameters\n\n|" in card.text
    words = card.text.replace("ssm_pruner_config", "").replace("prunable", "")
    assert not re.search(r"prun|zeros|[Rr]emoved share|What was removed", words), words
    assert card.data.base_model is None and "prun" not in card.data.model_name
    assert card.data.tags == ["optimum-ssm", "mamba"]
    assert "\n\n\n\n" not in card.text and "{{" not in card.text


def test_a_tokenizer_is_shown_where_one_was_saved(tiny_mamba: PreTrainedModel, tmp_path: Path, assets: Path) -> None:
    without = card_of(pruned(tiny_mamba, {}), tmp_path / "without").text
    assert "AutoTokenizer" not in without and "No tokenizer was saved with it." in without
    assert 'AutoModelForCausalLM.from_pretrained("PATH_OR_REPO_ID")\n```' in without
    pruner = SSMPruner.from_pretrained(assets / "mamba-tiny", {"method": "magnitude", "sparsity": 0.5})
    pruner.save_pretrained(tmp_path / "with")
    text = (tmp_path / "with" / "README.md").read_text()
    assert text.count("AutoTokenizer") == 2 and "No tokenizer" not in text
