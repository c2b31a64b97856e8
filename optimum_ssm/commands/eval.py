# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm eval MODEL`: perplexity of a checkpoint, with the protocol it was measured under."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from .base import SSMLeafCommand, add_loading_flags, add_perplexity_flags, loading_kwargs, perplexity_kwargs


class EvalCommand(SSMLeafCommand):
    """Measure perplexity."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Model, text and protocol."""
        parser.add_argument("model", help="Hub id or directory")
        parser.add_argument("--dataset", default="wikitext2", help="text: wikitext2, c4, a Hub id or a file")
        parser.add_argument("--dataset-name", help="configuration name of a Hub dataset")
        parser.add_argument("--split", default="test", help="split of a Hub dataset (default: test)")
        parser.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        add_perplexity_flags(parser)
        add_loading_flags(parser)

    def execute(self, args: Namespace) -> None:
        """Load, measure, print."""
        from ..calibration.ranks import current_ranks
        from ..errors import ConfigurationError
        from ..evaluation.perplexity import measure_perplexity
        from ..hub.checkpoint import LOCATION, load_model, load_tokenizer

        loading = loading_kwargs(args)
        model, raw = load_model(args.model, **loading)
        tokenizer = load_tokenizer(args.model, raw, **{k: v for k, v in loading.items() if k in LOCATION})
        if tokenizer is None:
            raise ConfigurationError(f"{args.model} has no tokenizer, so text cannot be evaluated")
        found = measure_perplexity(
            model,
            tokenizer,
            args.dataset,
            dataset_name=args.dataset_name,
            split=args.split,
            text_column=args.text_column,
            **perplexity_kwargs(args),
        )
        if current_ranks().main:  # under `accelerate launch` one process speaks
            print(
                json.dumps(found.to_dict()) if args.json else f"perplexity {found.perplexity:.4f} ({found.protocol})"
            )
