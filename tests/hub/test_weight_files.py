# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Bytes of the files that transformers would load, and of no others."""

from pathlib import Path

from transformers import PreTrainedModel

from optimum_ssm.hub.weight_files import file_bytes


def test_weight_files_are_counted_as_transformers_loads_them(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path / "one")
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert file_bytes(tmp_path / "one") == size > sum(p.numel() * 4 for p in tiny_mamba.parameters())
    (tmp_path / "one" / "pytorch_model.bin").write_bytes(b"never loaded")
    assert file_bytes(tmp_path / "one") == size
    (tmp_path / "one" / "model.safetensors").unlink()
    assert file_bytes(tmp_path / "one") == len(b"never loaded")


def test_shards_are_summed_without_their_index(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and file_bytes(tmp_path) == sum(shard.stat().st_size for shard in shards)


def test_without_weight_files_there_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"another name")
    assert file_bytes(tmp_path) is None
