# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Prune the embedded trained model by 50 % with SparseSSM and look at the result. Runs on a CPU in a few minutes.

python examples/quickstart.py
python examples/quickstart.py --model examples/assets/mamba2-tiny --method wanda --pattern 2:4
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ssm import OptimumSSMError, SSMPruner, SSMPrunerConfig, evaluate_perplexity


ASSETS = Path(__file__).parent / "assets"
PROMPT = "The history of the city began"


def main(args: Namespace) -> None:
    """Dense perplexity, pruning, pruned perplexity, saving, reloading with plain transformers, one sentence."""
    config = SSMPrunerConfig(
        method=args.method,
        sparsity=args.sparsity if args.pattern == "unstructured" else None,
        pattern=args.pattern,
        dataset=ASSETS / "wikitext-2" / "calibration.txt",
        num_samples=args.num_samples,
        seq_len=512,
    )
    text = str(ASSETS / "wikitext-2" / "evaluation.txt")
    protocol = {"window": 1024, "max_windows": 8}

    pruner = SSMPruner.from_pretrained(args.model, config, dtype="float32")
    dense = pruner.evaluate(text, **protocol)
    report = pruner.prune()
    pruned = pruner.evaluate(text, **protocol)
    print(f"\n{report}\n")
    pruner.save_pretrained(args.output, overwrite=True)

    model = AutoModelForCausalLM.from_pretrained(args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    reloaded = evaluate_perplexity(model, tokenizer, text, **protocol)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    print(f"perplexity  dense {dense:.3f}   pruned {pruned:.3f}   reloaded with AutoModelForCausalLM {reloaded:.3f}")
    print(f"generated   {tokenizer.decode(generated[0], skip_special_tokens=True)!r}")
    print(f"checkpoint  {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ASSETS / "mamba-tiny"), help="model to prune (default: mamba-tiny)")
    parser.add_argument("--method", default="sparsessm", help="default: sparsessm")
    parser.add_argument("--sparsity", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--pattern", default="unstructured", help="unstructured or N:M (default: unstructured)")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration blocks of 512 tokens (default: 32)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "quickstart")
    try:
        main(parser.parse_args())
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
