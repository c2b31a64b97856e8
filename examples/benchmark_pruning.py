# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where does the time of a pruning run go, and how far is each phase from what the machine could do?

The model has random weights of a published shape and the calibration text is random token ids, so neither a checkpoint
nor a dataset is needed: time and memory do not depend on the values. Bounds are operations over the rates of matrix
products, and bytes over the bandwidth, all measured in the same run.

    python examples/benchmark_pruning.py --shape mamba-2.8b --method sparsessm --batch-size 8
    python examples/benchmark_pruning.py --shape mamba2-2.7b --method wanda --model-on cpu --offload cpu
    python examples/benchmark_pruning.py --shape mamba-130m --layers 2 --samples 4 --seq-len 256 --grow
    torchrun --nproc-per-node 2 examples/benchmark_pruning.py --shape mamba-2.8b --layers 8 --digest
"""

import argparse
import gc
import hashlib
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from benchmark_shapes import SHAPES, dense_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ssm import OptimumSSMError, SSMPrunerConfig
from optimum_ssm.calibration.ranks import current_ranks
from optimum_ssm.evaluation.pruning_benchmark import PruningTimes, growth_table, time_pruning
from optimum_ssm.evaluation.pruning_bounds import Rates, measure_rates
from optimum_ssm.recipes import load_recipe, recipe_names


GROWTH = {
    "first": (1, 1, 1),
    "tokens x 2": (2, 1, 1),
    "tokens x 4": (4, 1, 1),
    "blocks x 2": (1, 2, 1),
    "width x 2": (1, 1, 2),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True, help="published shape of the model")
    parser.add_argument("--layers", type=int, help="use only so many blocks")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--method", default="sparsessm", help="default: sparsessm")
    what.add_argument("--recipe", help=f"name or file of a recipe; the library's: {', '.join(recipe_names())}")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="weights to prune; default: the method's own")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=128, help="calibration blocks (default: 128)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a block (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--offload", choices=["device", "cpu", "disk"], help="where activations are kept")
    parser.add_argument(
        "--model-on",
        choices=["device", "cpu"],
        default="device",
        help="cpu: blocks are brought to the device one by one",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--save", action="store_true", help="also save the pruned model into a temporary directory")
    parser.add_argument("--digest", action="store_true", help="also print a hash of the pruned weights")
    parser.add_argument("--grow", action="store_true", help="time and memory against tokens, blocks and width")
    arguments = parser.parse_args()
    try:
        recipe_of(arguments)  # before anything is measured
    except OptimumSSMError as error:
        parser.exit(2, f"error: {error}\n")
    return arguments


def build(arguments: argparse.Namespace, blocks: int = 1, width: int = 1) -> PreTrainedModel:
    """The model with random weights, made on the device, `blocks` times as deep and `width` times as wide."""
    config = dense_config(arguments.shape, arguments.layers)
    sizes = {"num_hidden_layers": config.num_hidden_layers * blocks, "hidden_size": config.hidden_size * width}
    if config.model_type == "mamba2":
        sizes["num_heads"] = config.num_heads * width
    values = config.to_dict()
    for derived in ("intermediate_size", "time_step_rank"):  # the class computes them from the hidden size
        values.pop(derived, None)
    config = type(config).from_dict(values | sizes)
    torch.manual_seed(0)
    dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    return model.to("cpu") if arguments.model_on == "cpu" else model


def recipe_of(arguments: argparse.Namespace) -> list[SSMPrunerConfig]:
    places = {"offload": arguments.offload, "device": arguments.device if arguments.model_on == "cpu" else None}
    if arguments.recipe is not None:
        recipe = load_recipe(arguments.recipe, sparsity=arguments.sparsity, batch_size=arguments.batch_size)
        return [SSMPrunerConfig.from_dict({**config.to_dict(), **places}) for config in recipe]
    options = {"sparsity": arguments.sparsity, "targets": arguments.targets, "batch_size": arguments.batch_size}
    return [SSMPrunerConfig(method=arguments.method, **options, **places)]


def run(
    arguments: argparse.Namespace, rates: Rates, samples: int, blocks: int = 1, width: int = 1
) -> tuple[PreTrainedModel, PruningTimes]:
    """Prune a fresh model."""
    model = build(arguments, blocks, width)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (samples, arguments.seq_len), generator=generator)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model, time_pruning(model, recipe_of(arguments), ids, rates)


def save(model: PreTrainedModel) -> str:
    """Time of writing the model, beside that of writing as many bytes to the same disk."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model.save_pretrained(folder)
        written = time.perf_counter() - start
        start = time.perf_counter()
        piece = bytes(2**26)
        with open(Path(folder) / "plain", "wb", buffering=0) as file:
            for _ in range(-(-size // len(piece))):
                file.write(piece)
        plain = time.perf_counter() - start
    return f"save_pretrained: {written:.2f} s for {size / 1e9:.2f} GB; as many plain bytes: {plain:.2f} s"


def digest(model: PreTrainedModel) -> str:
    """A hash of every parameter, bit for bit: removed entries, and what became of the others."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(memoryview(parameter.detach().cpu().contiguous().view(torch.uint8).numpy()))
    return found.hexdigest()[:16]


def main() -> None:
    arguments = parse_arguments()
    ranks = current_ranks()  # several processes join here; each has a GPU of its own
    say = print if ranks.main else lambda *_, **__: None
    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rates = measure_rates(device, dtype)
    name += f" x {ranks.count}" if ranks.count > 1 else ""
    say(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}\n{rates}", flush=True)
    what = arguments.recipe or arguments.method
    say(
        f"{arguments.shape}, {what}, {arguments.samples} x {arguments.seq_len} tokens, batches of {arguments.batch_size}\n"
    )
    few = max(ranks.count, min(arguments.samples, arguments.batch_size))
    run(argparse.Namespace(**{**vars(arguments), "layers": 1}), rates, few)  # what is compiled once, is now
    if not arguments.grow:
        model, times = run(arguments, rates, arguments.samples)
        say(times.table(), flush=True)
        if arguments.digest:
            print(f"process {ranks.index}: pruned weights {digest(model)}", flush=True)
        if arguments.save and ranks.main:
            print(save(model))
        return
    runs = []
    for label, (tokens, blocks, width) in GROWTH.items():
        model, times = run(arguments, rates, arguments.samples * tokens, blocks, width)
        sizes = model.config.num_hidden_layers, model.config.hidden_size
        runs.append((label, arguments.samples * tokens * arguments.seq_len, *sizes, times))
        del model
    say(growth_table(runs), flush=True)


if __name__ == "__main__":
    try:
        main()
    except OptimumSSMError as error:
        sys.exit(f"error: {error}")
