# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Prune a model from the Hub, measure it, save it, and push it if asked. Needs a GPU for models of billions.

    python examples/prune_mamba_hub.py --model state-spaces/mamba-2.8b --output mamba-2.8b-sparse \\
        --repo-id me/mamba-2.8b-sparse
"""

from argparse import ArgumentParser, Namespace

from optimum_ssm import OptimumSSMError, SSMPruner, SSMPrunerConfig


def main(args: Namespace) -> None:
    """One whole-model SparseSSM pass on WikiText-2 train, perplexity on its test split before and after."""
    config = SSMPrunerConfig(
        method=args.method,
        sparsity=args.sparsity,
        dataset="wikitext2",
        num_samples=args.num_samples,
        seq_len=args.seq_len,
    )
    pruner = SSMPruner.from_pretrained(
        args.model, pruning_config=config, device_map=args.device_map, dtype=args.dtype, revision=args.revision
    )
    pruner.evaluate("wikitext2", window=2048)
    pruner.prune()
    pruner.evaluate("wikitext2", window=2048)
    print(pruner.report)
    pruner.save_pretrained(args.output)
    print(f"saved to {args.output}")
    if args.repo_id is not None:
        print(f"pushed to {pruner.push_to_hub(args.repo_id, private=args.private)}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="state-spaces/mamba-2.8b", help="Hub id or directory")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--method", default="sparsessm", help="default: sparsessm")
    parser.add_argument("--sparsity", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration blocks (default: 128)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per block (default: 2048)")
    parser.add_argument("--dtype", default="auto", help="default: the checkpoint's")
    parser.add_argument("--device-map", default="auto", help="default: auto")
    parser.add_argument("--output", default="mamba-2.8b-sparse", help="directory of the result")
    parser.add_argument("--repo-id", help="push the result to this repository")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    try:
        main(parser.parse_args())
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
