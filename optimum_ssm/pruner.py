# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`SSMPruner`: load, prune, evaluate, save, push. A facade: the work is done in the rooms behind it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from .calibration.data import calibration_blocks
from .calibration.offload import tie_again
from .calibration.ranks import Ranks, check_model, current_ranks, own_device_map
from .configuration import SSMPrunerConfig, parse_recipe
from .digest import digest
from .errors import CheckpointError, ConfigurationError
from .evaluation.perplexity import measure_perplexity
from .families import family_for, family_of
from .hub.checkpoint import LOCATION, is_weight_file, load_license, load_model, load_settings, load_tokenizer, save
from .ops.backend import chosen_backend
from .passes.pipeline import run_pass
from .passes.plan import make_plan
from .passes.resume import Shards
from .report import PruningReport
from .report_rows import masks_from_weights, model_report, origin, record_weights
from .report_units import record_units
from .surgery.settle import settle


logger = logging.get_logger(__name__)


class SSMPruner:
    """Prunes a state-space language model in place and keeps the account of it.

    Args:
        model (`PreTrainedModel`): a model of a supported family (`MambaForCausalLM`, `Mamba2ForCausalLM`).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed to calibrate and evaluate on text.
        pruning_config (`SSMPrunerConfig`, list, or path, *optional*): what `prune()` does when it is given nothing: one
            config, a list of them (a recipe), or a YAML or JSON file.

    Attributes:
        report (`PruningReport`): every parameter of the model, removed or kept with its reason.
        masks (`dict[str, Tensor]`): for every pruned parameter a bool tensor in main memory, `True` = removed.

    Raises:
        ConfigurationError: the model's family is not supported, or the recipe is refused.

    Example:
        ```python
        config = SSMPrunerConfig(method="sparsessm", sparsity=0.5, dataset="wikitext2")
        pruner = SSMPruner.from_pretrained("state-spaces/mamba-130m", pruning_config=config)
        print(pruner.prune())
        pruner.save_pretrained("mamba-130m-sparse")
        ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, pruning_config: Any = None):
        if not isinstance(model, PreTrainedModel):
            raise ConfigurationError(
                f"model must be a transformers model, got {type(model).__name__}; load one with SSMPruner.from_pretrained"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.pruning_config = parse_recipe(pruning_config) if pruning_config is not None else None
        self.family = family_of(model)
        tie_again(model)
        self.report: PruningReport = model_report(model, self.family)
        self.masks: dict[str, Tensor] = {}
        self.license: str | None = None
        self._done: list[SSMPrunerConfig] = []
        self._unfinished: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        pruning_config: Any = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> SSMPruner:
        """Load a model to prune, or one that was pruned with this library, with its report.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or directory; checkpoints in the original
                `state-spaces/*` format are converted.
            pruning_config: as in the constructor.
            tokenizer (*optional*): default: the one beside the model.
            **kwargs: passed to transformers' `from_pretrained`: `device_map`, `dtype`, `revision`, `token`,
                `max_memory`, `cache_dir`, `local_files_only`, …

        Raises:
            CheckpointError: the checkpoint is not found, cannot be read, or holds a model that cannot be expressed.
            ConfigurationError: as in the constructor.
        """
        source = os.fspath(pretrained_model_name_or_path)
        recipe = parse_recipe(pruning_config) if pruning_config is not None else None  # refuse it before loading
        location = {name: kwargs[name] for name in LOCATION if name in kwargs}
        asked = next((config.max_memory for config in recipe or () if config.max_memory is not None), None)
        if asked is not None and "max_memory" not in kwargs:
            kwargs = {"device_map": "auto", **kwargs, "max_memory": asked}
        if "device_map" in kwargs and "max_memory" not in kwargs:
            kwargs["device_map"] = own_device_map(kwargs["device_map"], current_ranks())
        model, raw = load_model(source, check=family_for, **kwargs)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, raw, **location)
        pruner = cls(model, tokenizer, recipe)
        pruner.report.model = origin(source)
        settings = load_settings(source, **location)
        if settings is not None:
            pruner._done, pruner.report = settings
            pruner.masks = masks_from_weights(model, pruner.family, pruner.report, pruner._done)
            gone = sum(int(mask.count_nonzero()) for mask in pruner.masks.values())
            if gone != pruner.report.masked:
                logger.warning(
                    f"{source}: its report says that {pruner.report.masked:,} entries are zeros, its weights say {gone:,}; "
                    "they were changed since, or kept entries are zero"
                )
        pruner.license = load_license(source, **location)
        return pruner

    def prune(self, pruning_config: Any = None) -> PruningReport:
        """Prune the model in place, pass after pass; every pass is checked before the first one starts.

        Where `accelerate launch` or `torchrun` started several processes, all of them call this, each with the whole model
        on its own device: they share the calibration text and the solves, and end with the same weights and masks.

        Args:
            pruning_config: a config, a list, or a path; default: what the constructor was given.

        Returns:
            `PruningReport`: also kept as `self.report`, summed over all passes so far.

        Raises:
            ConfigurationError: nothing says what to prune, a pass does not fit the model, or the environment variable
                `OPTIMUM_SSM_SCAN` names no backend.
            CalibrationError: the calibration text or its activations cannot be used.
            CheckpointError: the last call ended with an exception after weights may have changed; `resume_from` holds
                something else, or finished blocks of another run.
        """
        self._check_finished()
        recipe = parse_recipe(pruning_config) if pruning_config is not None else self.pruning_config
        if recipe is None:
            raise ConfigurationError("nothing to prune by: pass an SSMPrunerConfig to prune() or to the constructor")
        ranks = current_ranks()
        with ranks.one_voice():
            chosen_backend()  # a pass that scans nothing would never ask what OPTIMUM_SSM_SCAN says
            check_model(self.model, ranks)
            return self._passes(recipe, ranks)

    def _passes(self, recipe: list[SSMPrunerConfig], ranks: Ranks) -> PruningReport:
        tie_again(self.model)  # it may have been run since
        plans = [make_plan(self.model, self.family, config) for config in recipe]
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        texts = [calibration_blocks(p.config, self.tokenizer, vocabulary) if p.needs_text else None for p in plans]
        ranks.same("settings", [config.to_dict() for config in recipe])
        ranks.same("calibration texts", [None if ids is None else digest(ids) for ids in texts])
        for number, (config, ids) in enumerate(zip(recipe[1:], texts[1:]), start=len(self._done) + 2):
            Shards.check_ahead(config, number, self.model, ids, ranks)
        for number, (config, plan, ids) in enumerate(zip(recipe, plans, texts)):
            start = time.perf_counter()
            if any(earlier.structured for earlier in recipe[:number]):
                plan = self._plan_anew(config, number)  # shapes are not what they were
            logger.info(f"{config.method}: {len(plan.tasks)} {'blocks' if config.structured else 'weights'} matched")
            shards = Shards.of_pass(config, len(self._done) + 1, self.model, ids, self.masks, ranks)
            blocks: list = []

            def changing(method: str = config.method) -> None:
                self._unfinished = method

            run_pass(
                self.model,
                self.family,
                plan,
                ids,
                blocks.append,
                self.masks,
                ranks,
                shards,
                before_change=changing,
                dense_entries=self.report.parameters,
            )
            if config.structured:
                settle(self.model, self.family)
            self._unfinished = None
            tokens = 0 if ids is None else ids.numel()
            seconds = time.perf_counter() - start + shards.earlier_seconds
            if config.structured:
                record_units(self.report, self.masks, plan, blocks, tokens, seconds, self.model)
            else:
                record_weights(self.report, self.masks, plan, blocks, tokens, seconds)
            done = self.report.passes[-1]
            done.earlier_blocks, done.earlier_seconds = shards.finished, shards.earlier_seconds
            if not done.removed and config.sparsity:
                logger.warning(
                    f"{config.method} at sparsity {config.sparsity:g} removed nothing new: the sparsity is the share that "
                    "is gone after the pass, and so much was gone before"
                )
            self._done.append(config)
            self.report.perplexity.pop("pruned", None)  # it was that of a model which is no more
        return self.report

    def _plan_anew(self, config: SSMPrunerConfig, done: int) -> Any:
        """The plan of a pass that fitted the whole model, on what `done` passes have left of it."""
        try:
            return make_plan(self.model, self.family, config)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"pass {done + 1} of the recipe does not fit what the passes before it, which stay done, have left: {error}"
            ) from error

    def evaluate(self, dataset: Any = "wikitext2", *, stage: str | None = None, **kwargs: Any) -> float:
        """Perplexity per token of the model as it is now; it goes into the report and the card.

        Args:
            dataset, **kwargs: as in `optimum_ssm.evaluation.perplexity.measure_perplexity`.
            stage (`str`, *optional*): name in the report; default `"pruned"` after a pass, `"dense"` before.

        Raises:
            ConfigurationError, CalibrationError: as in `measure_perplexity`.
            CheckpointError: the last `prune()` ended half way.
        """
        self._check_finished()
        stage = stage or ("pruned" if self.report.passes else "dense")
        found = measure_perplexity(self.model, self.tokenizer, dataset, **kwargs)
        self.report.perplexity[stage] = found.to_dict()
        return found.perplexity

    def sparsity_callback(self) -> TrainerCallback:
        """A callback for transformers' `Trainer` that keeps removed entries removed while the others are tuned.

        Returns:
            `TrainerCallback`: `Trainer(pruner.model, …, callbacks=[pruner.sparsity_callback()])`.

        Raises:
            ConfigurationError: nothing was removed yet.
            CheckpointError: the last `prune()` ended half way.
        """
        from .training.masks import SparsityCallback, masks_of  # brings the Trainer, which is slow to import

        self._check_finished()
        callback = SparsityCallback(masks_of(self))
        self.report.perplexity.pop("pruned", None)  # the model is about to change
        return callback

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        overwrite: bool = False,
        remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write model, tokenizer, settings, report, card and picture; the directory appears whole or not at all.

        Plain `AutoModelForCausalLM.from_pretrained` loads it, unless the report says that it needs `import optimum_ssm`.

        Of several processes one writes and the others wait, so all of them must call this.

        Args:
            save_directory (`str` or `os.PathLike`): new or empty, unless `overwrite`.
            overwrite (`bool`): replace a directory that holds something.
            remote_code (`bool`): where no stock class can load the result, put its modelling code beside the weights, so
                that `trust_remote_code=True` loads it without optimum_ssm.
            **kwargs: passed to the model's `save_pretrained`, such as `max_shard_size`.

        Raises:
            CheckpointError: the directory is not empty or cannot be written, or the last `prune()` ended half way.
        """
        self._check_finished()
        kwargs |= {"overwrite": overwrite, "remote_code": remote_code}
        current_ranks().on_main(lambda: self._save(save_directory, **kwargs))

    def _save(self, directory: str | os.PathLike, **kwargs: Any) -> None:
        """`save_pretrained` in the one process that writes."""
        save(directory, self.model, self.tokenizer, self._done, self.report, license=self.license, **kwargs)
        for path in dict.fromkeys(config.resume_from for config in self._done if config.resume_from is not None):
            logger.warning(f"the model is saved; the finished blocks in resume_from={path!r} are not needed any more")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload pruned model",
        token: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, card included, in one commit; other weight files there are deleted.

        Args:
            repo_id (`str`): `owner/name`; made if it does not exist.
            private (`bool`, *optional*): visibility of a new repository.
            revision (`str`, *optional*): branch; made if it does not exist.
            create_pr (`bool`): open a pull request instead of committing.
            commit_message (`str`): message of the commit.
            token (`str`, *optional*): access token; default: the one that is logged in.
            **kwargs: as in `save_pretrained`.

        Returns:
            `str`: address of the commit or the pull request.

        Raises:
            CheckpointError: the Hub refused the upload or cannot be reached, or the last `prune()` ended half way.
        """
        self._check_finished()
        kwargs |= {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
        return current_ranks().on_main(lambda: self._push(repo_id, commit_message=commit_message, **kwargs))

    def _push(
        self,
        repo_id: str,
        private: bool | None,
        revision: str | None,
        create_pr: bool,
        commit_message: str,
        token: str | None,
        **kwargs: Any,
    ) -> str:
        """`push_to_hub` in the one process that writes."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repo_id.split("/")[-1]
            self._save(folder, **kwargs)
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None and not create_pr:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                # upload_folder may split a large upload into several commits; create_commit never does
                files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
                # weights of an earlier push in other shards would be found first, or beside ours
                stale = [
                    n for n in api.list_repo_files(repo_id, revision=revision) if is_weight_file(n) and n not in files
                ]
                operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
                done = api.create_commit(
                    repo_id=repo_id,
                    operations=operations + [CommitOperationDelete(name) for name in stale],
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                )
            except Exception as error:  # also those of the HTTP client, which huggingface_hub has changed before
                raise CheckpointError(f"cannot push to {repo_id}: {' '.join(str(error).split())}") from error
        return done.pr_url or done.commit_url

    def _check_finished(self) -> None:
        if self._unfinished is not None:
            raise CheckpointError(
                f"the pass {self._unfinished!r} ended half way: the weights no longer match the report. Load the model again"
            )
