# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The state-spaces layout: what is recognised, what is refused, and that loading and exporting change no bit."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from optimum_ssm.errors import CheckpointError, ConfigurationError
from optimum_ssm.hub.original_checkpoints import convert_config, is_original_config, load_original
from optimum_ssm.hub.original_export import export_original


MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"

# config.json of state-spaces/mamba-130m and of state-spaces/mamba2-130m
MAMBA_130M = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
MAMBA_130M |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
MAMBA2_130M = MAMBA_130M | {"d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}}
MAMBA2_130M |= {"pad_vocab_size_multiple": 16, "tie_embeddings": True}


def tiny_mamba(**changes: Any) -> MambaForCausalLM:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8} | changes
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**config)).eval()


def tiny_mamba2(**changes: Any) -> Mamba2ForCausalLM:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8, "n_groups": 1}
    config |= {"num_heads": 8, "head_dim": 8, "chunk_size": 16, "tie_word_embeddings": True} | changes
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(**config)).eval()


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": tiny_mamba,
    "mamba-untied": lambda: tiny_mamba(tie_word_embeddings=False, use_bias=True, use_conv_bias=False),
    "mamba-pruned": lambda: tiny_mamba(state_size=3, intermediate_size=32, time_step_rank=1),
    "mamba2": tiny_mamba2,
    "mamba2-untied": lambda: tiny_mamba2(tie_word_embeddings=False, n_groups=2, time_step_limit=(0.01, 0.5)),
    "mamba2-pruned": lambda: tiny_mamba2(state_size=3, expand=1, num_heads=4),
}
SSM2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 16}  # of tiny_mamba2


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def original_of(model: PreTrainedModel, directory: Path, **changes: Any) -> dict[str, Any]:
    """Write what mamba_ssm's save_pretrained would: the state dict of the tied model holds both names."""
    directory.mkdir()
    tensors = {name.replace("embeddings.", "embedding."): tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, directory / "pytorch_model.bin")
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "pad_vocab_size_multiple": 8, "ssm_cfg": {"d_state": 8}}
    return config | changes


def assert_same_model(one: PreTrainedModel, two: PreTrainedModel) -> None:
    """Same class, every parameter and the logits bit for bit, and tied alike."""
    assert type(one) is type(two) and not two.training
    state, other = one.state_dict(), two.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    ids = torch.randint(0, one.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)
    assert (two.lm_head.weight is two.backbone.embeddings.weight) == one.config.tie_word_embeddings


def assert_refused(message: str, directory: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_original(directory, config)
    assert "\n" not in str(caught.value)


def test_recognition() -> None:
    assert is_original_config(MAMBA_130M) and is_original_config(MAMBA2_130M)
    assert not is_original_config(MambaConfig().to_dict())
    assert not is_original_config({"d_model": 768, "vocab_size": 50277})
    assert not is_original_config(MAMBA_130M | {"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="d_model and n_layer"):
        convert_config(MambaConfig().to_dict())


def test_published_configs() -> None:
    mamba, mamba2 = convert_config(MAMBA_130M), convert_config(MAMBA2_130M)
    assert (mamba.model_type, mamba2.model_type) == ("mamba", "mamba2")
    assert (mamba.vocab_size, mamba2.vocab_size) == (50280, 50288)
    assert (mamba.hidden_size, mamba.num_hidden_layers, mamba.state_size, mamba.expand) == (768, 24, 16, 2)
    assert (mamba.time_step_rank, mamba.intermediate_size, mamba.conv_kernel) == (48, 1536, 4)
    assert (mamba2.state_size, mamba2.num_heads, mamba2.head_dim, mamba2.n_groups) == (128, 24, 64, 1)
    assert (mamba2.chunk_size, mamba2.time_step_limit) == (256, (0.0, float("inf")))
    for config in (mamba, mamba2):
        assert config.tie_word_embeddings is True and config.residual_in_fp32 is True
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)


def test_defaults_and_ssm_cfg() -> None:
    bare = convert_config({"d_model": 40, "n_layer": 1})
    assert (bare.vocab_size, bare.time_step_rank, bare.tie_word_embeddings) == (50280, 3, True)
    assert convert_config({"d_model": 40, "n_layer": 1, "vocab_size": 48}).vocab_size == 48
    ssm = {"layer": "Mamba1", "d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False}
    config = convert_config({"d_model": 40, "n_layer": 1, "ssm_cfg": ssm, "tie_embeddings": False})
    assert (config.state_size, config.conv_kernel, config.expand, config.time_step_rank) == (4, 3, 3, 5)
    assert (config.use_bias, config.use_conv_bias, config.tie_word_embeddings) == (True, False, False)
    ssm = {"layer": "Mamba2", "headdim": 20, "ngroups": 2, "d_ssm": 80, "dt_limit": [0, 1.5], "chunk_size": 64}
    config = convert_config({"d_model": 40, "n_layer": 1, "ssm_cfg": ssm | {"rmsnorm": True, "dt_min": 0.01}})
    assert (config.num_heads, config.head_dim, config.n_groups, config.chunk_size) == (4, 20, 2, 64)
    assert config.time_step_limit == (0.0, 1.5)


REFUSED = [
    ({"attn_layer_idx": [3, 9]}, "attn_layer_idx = [3, 9]", "[]"),
    ({"d_intermediate": 1024}, "d_intermediate = 1024", "0"),
    ({"rms_norm": False}, "rms_norm = False", "True"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "layer = 'Mamba3'", "Mamba1, Mamba2"),
    ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim = True", "False"),
    ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm = False", "True"),
    ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate = True", "False"),
    ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 768}}, "d_ssm = 768", "1536"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 100}}, "headdim = 100", "1536"),
    ({"ssm_cfg": {"layer": "Mamba2", "ngroups": 5}}, "ngroups = 5", "24"),
    ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": 1.0}}, "dt_limit = 1.0", "time step"),
    ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 4}}, "dt_rank = 4", "headdim"),
    ({"ssm_cfg": {"headdim": 64}}, "headdim = 64", "dt_rank"),
    ({"ssm_cfg": {"expand": 1.5}}, "expand = 1.5", "a positive integer"),
    ({"ssm_cfg": {"d_state": 0}}, "d_state = 0", "a positive integer"),
    ({"ssm_cfg": {"dt_rank": "half"}}, "dt_rank = 'half'", "a positive integer"),
    ({"ssm_cfg": ["Mamba2"]}, "ssm_cfg = ['Mamba2']", "an object"),
    ({"n_layer": True}, "n_layer = True", "a positive integer"),
    ({"vocab_size": "50277"}, "vocab_size = '50277'", "a positive integer"),
    ({"tie_embeddings": 1}, "tie_embeddings = 1", "true, false"),
    ({"bidirectional": True}, "bidirectional = True", "d_model"),
]


@pytest.mark.parametrize(("change", "offender", "supported"), REFUSED, ids=[offender for _, offender, _ in REFUSED])
def test_refused_configs(change: dict[str, Any], offender: str, supported: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_config(MAMBA_130M | change)
    message = str(caught.value)
    assert offender in message and supported in message.split("supported:")[1] and "\n" not in message


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("name", TINY)
def test_round_trip(name: str, safe: bool, tmp_path: Path) -> None:
    model, directory = TINY[name](), tmp_path / "out"
    assert export_original(model, directory, safe_serialization=safe) == directory
    weights = "model.safetensors" if safe else "pytorch_model.bin"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["out", "config.json", weights])
    back = load_original(directory, read_config(directory))
    assert_same_model(model, back)
    assert back.name_or_path == back.config.name_or_path == str(directory)
    back.save_pretrained(tmp_path / "again")
    assert_same_model(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_exported_files_are_what_mamba_ssm_reads(tmp_path: Path) -> None:
    export_original(tiny_mamba(), tmp_path / "1")
    tensors = torch.load(tmp_path / "1" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embedding.weight"]), "its loading is strict"
    assert tensors["lm_head.weight"].data_ptr() == tensors["backbone.embedding.weight"].data_ptr(), "stored once"
    first_release = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"}
    assert read_config(tmp_path / "1").keys() == first_release | {"pad_vocab_size_multiple"}
    export_original(tiny_mamba(), tmp_path / "2", safe_serialization=True)
    assert "lm_head.weight" not in load_file(tmp_path / "2" / "model.safetensors")
    sliced = tiny_mamba(num_hidden_layers=1)
    weight = torch.zeros(1 << 20)[: 32 * 64].view(32, 64)
    sliced.backbone.layers[0].mixer.out_proj.weight = torch.nn.Parameter(weight)
    export_original(sliced, tmp_path / "3")
    assert (tmp_path / "3" / "pytorch_model.bin").stat().st_size < 1 << 20, "a view is written without its base"


def test_layout_of_mamba_ssm_with_padding_and_dtype(tmp_path: Path) -> None:
    model = tiny_mamba().to(torch.bfloat16)
    config = original_of(model, tmp_path / "in")
    assert_same_model(model, load_original(tmp_path / "in", config))
    wide = load_original(str(tmp_path / "in"), config, dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.lm_head.weight, model.lm_head.weight.float())
    more = r"backbone.embedding.weight is \[64, 32\].*vocab_size: 64 by the tensors, 72 by config.json"
    assert_refused(more, tmp_path / "in", config | {"vocab_size": 65})


def test_auto_dtype_is_the_embeddings_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_mamba().to(torch.float16)
    for block in model.backbone.layers:
        block.mixer.A_log.data = block.mixer.A_log.data.float()  # as mamba_ssm keeps it
    export_original(model, tmp_path / "mixed", safe_serialization=True)  # sorts fp32 to the front of the file
    with caplog.at_level("WARNING", logger="optimum_ssm.hub.original_checkpoints"):
        assert load_original(tmp_path / "mixed", read_config(tmp_path / "mixed"), dtype="auto").dtype == torch.float16
        assert "torch.float32 are cast to torch.float16" in caplog.text


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
def test_sharded(safe: bool, tmp_path: Path) -> None:
    model = tiny_mamba2()
    config = original_of(model, tmp_path / "in", ssm_cfg=SSM2)
    tensors = torch.load(tmp_path / "in" / "pytorch_model.bin", weights_only=True)
    (tmp_path / "in" / "pytorch_model.bin").unlink()
    stem, kind = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    names = sorted(tensors.keys() - {"lm_head.weight"})
    parts = {f"{stem}-0000{i + 1}-of-00002.{kind}": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        (save_file if safe else torch.save)({key: tensors[key] for key in keys}, tmp_path / "in" / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "in" / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    assert_same_model(model, load_original(tmp_path / "in", config))
    (tmp_path / "in" / file).unlink()
    assert_refused(f"{file} cannot be read", tmp_path / "in", config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mamba",
            {"ssm_cfg": {"d_state": 4}},
            r"mixer.A_log is \[64, 8\].*\[64, 4\] by config.json; d_state: 8 .* 4 by",
        ),
        ("mamba", {"ssm_cfg": {"d_state": 8, "dt_rank": 3}}, r"x_proj.weight .*; dt_rank: 2 by the tensors, 3 by"),
        ("mamba", {"ssm_cfg": {"d_state": 8, "d_conv": 3}}, r"conv1d.weight is \[64, 1, 4\].*d_conv: 4 .* 3 by"),
        ("mamba", {"n_layer": 3}, r"backbone.layers.2.norm.weight is absent in .*, \[32\] by config.json"),
        ("mamba", {"n_layer": 1}, r"backbone.layers.1.norm.weight is \[32\] in .*, absent by config.json"),
        ("mamba", {"ssm_cfg": SSM2}, r"mixer.dt_bias is absent"),
        (
            "mamba-untied",
            {"ssm_cfg": {"d_state": 8, "bias": True, "conv_bias": False}},
            r"lm_head.weight is not backbone",
        ),
        ("mamba2", {"ssm_cfg": SSM2 | {"headdim": 16}}, r"number of heads: 8 by the tensors, 4 by config.json"),
        ("mamba2", {"ssm_cfg": SSM2 | {"ngroups": 2}}, r"ngroups \* d_state: 8 by the tensors, 16 by config.json"),
    ],
)
def test_tensors_that_contradict_the_config(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = original_of(TINY[name](), tmp_path / "in", **change)
    assert_refused(message, tmp_path / "in", config)


class Payload:
    """Unpickled with trust, it would create the file it was given."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", ["torch", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_unexecuted(protocol: str, tmp_path: Path) -> None:
    config = original_of(tiny_mamba(), tmp_path / "in")
    file, marker = tmp_path / "in" / "pytorch_model.bin", tmp_path / "executed"
    content = torch.load(file, weights_only=True) | {"extra": Payload(marker)}
    if protocol == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=protocol == "torch")
    assert_refused("more than tensors.*not executed.*safetensors", tmp_path / "in", config)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload is a real one"


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    config = original_of(tiny_mamba(), tmp_path / "in")
    file = tmp_path / "in" / "pytorch_model.bin"
    torch.save({"state_dict": torch.load(file, weights_only=True), "epoch": 3}, file)
    assert_refused("holds dict, int; supported: one dict", tmp_path / "in", config)
    torch.save(torch.zeros(2), file)
    assert_refused("pytorch_model.bin holds Tensor;", tmp_path / "in", config)
    (tmp_path / "in" / "model.safetensors").write_bytes(b"no header")
    assert_refused("model.safetensors cannot be read", tmp_path / "in", config)
    (tmp_path / "empty").mkdir()
    assert_refused("holds no weights; looked for model.safetensors", tmp_path / "empty", config)


@pytest.mark.parametrize("name", ["weights_only", "ignore_mismatched_sizes", "state_dict", "subfolder"])
def test_arguments_that_would_bypass_the_checks(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=name):
        load_original(tmp_path, MAMBA_130M, **{name: False})


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    odd = tiny_mamba()
    mixer = odd.backbone.layers[1].mixer
    mixer.A_log = torch.nn.Parameter(mixer.A_log[:, :6].clone())
    with torch.device("meta"):
        offloaded = tiny_mamba()
    cases = {
        "cannot export MambaModel": tiny_mamba().backbone,
        "intermediate_size = 48": tiny_mamba(intermediate_size=48),
        "hidden_act = 'gelu'": tiny_mamba(hidden_act="gelu"),
        "layer_norm_epsilon = 1e-06": tiny_mamba(layer_norm_epsilon=1e-6),
        "layers.1.mixer.A_log is \\[64, 6\\]": odd,
        "embeddings.weight is offloaded": offloaded,
    }
    for message, model in cases.items():
        with pytest.raises(CheckpointError, match=message):
            export_original(model, tmp_path / "out")
    assert not list(tmp_path.iterdir()), "nothing half-written stays"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="full is not empty"):
        export_original(tiny_mamba(), tmp_path / "full")


LARGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("mamba-24m", "mamba2-24m")]


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", *LARGER])
def test_trained_models(name: str, tmp_path: Path) -> None:
    if not (MODELS / name).is_dir():
        pytest.skip(f"the trained model {name} is not beside the repository, in ../shared/models")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name)
    export_original(model, tmp_path / "out")
    back = load_original(tmp_path / "out", read_config(tmp_path / "out"))
    assert back.dtype == model.dtype == torch.bfloat16
    for block in (*model.backbone.layers, *back.backbone.layers):
        block.mixer.chunk_size = 16  # Mamba-2 pads to whole chunks, and a chunk of 256 takes seconds on a CPU
    assert_same_model(model, back)
