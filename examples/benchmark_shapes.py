# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What does cutting states or heads buy in speed and memory, at the size of a published model?

The models have random weights of a published shape and are made on the device, so no checkpoint is needed: speed and
memory do not depend on the values. Every --pruned names the structural axes and sizes of one model, the same in all
blocks; the model is cut to them as pruning would do it.

    python examples/benchmark_shapes.py --shape mamba2-2.7b --pruned state=64 head=64 state=64,head=64
    python examples/benchmark_shapes.py --shape mamba-2.8b --pruned state=8 --phases decode
    python examples/benchmark_shapes.py --shape mamba2-130m --layers 2 --batch-sizes 1 2 --prompt-length 64 --new-tokens 4
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PreTrainedModel

from optimum_ssm.evaluation.benchmark import PHASES, benchmark
from optimum_ssm.evaluation.benchmark_facts import SCANS
from optimum_ssm.families import family_of
from optimum_ssm.surgery.cut import cut


# Hidden size and blocks of the checkpoints published under state-spaces/; expand 2, convolution 4, tied embeddings.
MAMBA = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
MAMBA2 = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
SHAPES = [*(f"mamba-{size}" for size in MAMBA), *(f"mamba2-{size}" for size in MAMBA2)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True, help="published shape of the dense model")
    parser.add_argument(
        "--pruned",
        nargs="+",
        default=["state=half"],
        metavar="SIZES",
        help="what is left in each pruned model: state=64, channel=3840 (Mamba), head=64 (Mamba-2), several joined by "
        "commas, state=64,head=64; half stands for half of it; default: state=half",
    )
    parser.add_argument("--layers", type=int, help="use only so many blocks")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-length", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--scan", default="auto", choices=SCANS)
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("-o", "--output", type=Path, help="directory for the table, JSON, CSV and picture")
    return parser.parse_args()


def dense_config(shape: str, layers: int | None) -> MambaConfig | Mamba2Config:
    """The configuration of a published shape."""
    kind, _, size = shape.partition("-")
    hidden, published = (MAMBA if kind == "mamba" else MAMBA2)[size]
    common = {"hidden_size": hidden, "num_hidden_layers": layers or published, "tie_word_embeddings": True}
    if kind == "mamba":
        return MambaConfig(vocab_size=50280, state_size=16, **common)
    return Mamba2Config(vocab_size=50288, state_size=128, head_dim=64, num_heads=hidden // 32, n_groups=1, **common)


def build(config: MambaConfig | Mamba2Config, sizes: str, device: str, dtype: str) -> PreTrainedModel:
    """A model with random weights, made on the device and cut to `sizes`, such as `state=64,head=64`."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    family = family_of(model)
    for name, _, value in (part.partition("=") for part in sizes.split(",") if part):
        for _, block in family.blocks(model):
            axes = family.axes(block)
            if name not in axes:
                sys.exit(f"error: {sizes!r} names no axis of {', '.join(axes)}")
            units, groups = axes[name].units, axes[name].groups
            kept = units // 2 if value == "half" else int(value) if value.isdigit() else 0
            if not 1 <= kept <= units or kept % groups:
                sys.exit(f"error: {name}={value} must lie between {groups} and {units}, a multiple of {groups}")
            removed = torch.arange(units // groups).repeat(groups) >= kept // groups
            cut(family, block, axes[name], removed)
    return model


def main() -> None:
    arguments = parse_arguments()
    transformers.logging.set_verbosity_error()
    dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    dense = dense_config(arguments.shape, arguments.layers)
    wanted = {"dense": ""} | {sizes: sizes for sizes in arguments.pruned}
    models = {name: build(dense, sizes, arguments.device, dtype) for name, sizes in wanted.items()}
    report = benchmark(
        models,
        arguments.batch_sizes,
        arguments.prompt_length,
        arguments.new_tokens,
        arguments.repeats,
        phases=arguments.phases,
        scan=arguments.scan,
        cuda_graph=not arguments.no_cuda_graph,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"{arguments.shape}, {dense.num_hidden_layers} blocks, random weights\n\n{report}")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        picture = find_spec("matplotlib") is not None
        report.write(arguments.output, picture=picture)
        print(f"saved to {arguments.output}" + ("" if picture else " without a picture: matplotlib is not installed"))


if __name__ == "__main__":
    main()
