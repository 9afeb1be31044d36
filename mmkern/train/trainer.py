"""transformers' Trainer with what vision-language training needs.

Everything else (distribution, precision, logging, the progress bar) is transformers'. What differs:
stages, named losses, parameter groups, the gradient cache, the order of the data from (seed,
epoch), and checkpoints that are whole and loaded strictly, so that a run that is killed at any
moment and resumed ends with the same bits.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.utils import logging

from mmkern.train import checkpoint
from mmkern.train.checkpoint import CheckpointError
from mmkern.train.gradient_cache import cached_step, split_batch
from mmkern.train.parameter_groups import parameter_groups
from mmkern.train.sampler import EpochBatchSampler, StreamBatches
from mmkern.train.stage import Stage

# transformers' methods that are overridden below, and the parameters relied on.
_HOOKS = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "get_train_dataloader": (),
    "create_optimizer": ("model",),
    "get_optimizer_cls_and_kwargs": ("args", "model"),
    "_run_epoch": (
        "epoch",
        "epochs_trained",
        "steps_trained_in_current_epoch",
        "resume_from_checkpoint",
    ),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "log": ("logs", "start_time"),
    "_get_output_dir": ("trial",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
}


class Trainer(transformers.Trainer):
    """Trains a stage.

    The model's forward takes the collator's batch as keywords and returns a mapping with ``loss``
    (and named losses), or features for the stage's objective. Scalars in the output are averaged
    over the logging window, over ranks too, and logged under their names. A forward that has a
    parameter ``group`` gets the process group when there are several ranks; a model with
    ``clamp_logit_scale_`` has it called after each optimizer step.

    Args:
        model: a ``PreTrainedModel`` or any module.
        args: transformers' arguments. Column removal, gathering of logits and the filter that
            hides NaN losses are switched off.
        stage: what is trained.
        train_dataset: map-style, with ``set_epoch`` or without; or iterable as
            :class:`mmkern.train.sampler.StreamBatches` wants it, giving each rank its own samples.
        batch_sampler: this rank's batches of indices, with ``set_epoch``; by default a random order
            of the data from (``args.seed``, epoch).
        options: transformers' further arguments (``eval_dataset``, ``data_collator``,
            ``callbacks``, ...).

    Raises:
        ImportError: the installed transformers lacks a method that is overridden here.
        ValueError: settings that would give a wrong loss or a run that cannot resume.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        stage: Stage | None = None,
        train_dataset: Any = None,
        batch_sampler: Any = None,
        **options: Any,
    ) -> None:
        check_hooks(transformers.Trainer)
        self.stage = stage or Stage()
        self._batch_sampler = batch_sampler
        self._aside: Path | None = None
        self._scalars: dict[str, Tensor] = {}
        self._steps_recorded = 0
        self._follow_epoch: list[Any] = []
        self._clock: float | None = None
        if args.n_gpu > 1:
            raise ValueError(
                f"Trainer: {args.n_gpu} GPUs in one process would each see a part of the batch as "
                "if it were all; start with torchrun, or set CUDA_VISIBLE_DEVICES to one"
            )
        if args.dataloader_persistent_workers:
            raise ValueError("Trainer: workers that persist would not learn of a new epoch")
        args.remove_unused_columns = False
        args.prediction_loss_only = True
        args.logging_nan_inf_filter = False
        args.dataloader_drop_last = True
        self.stage.apply(model)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **options)
        plain = self.accelerator.unwrap_model(model)
        # A forward with **kwargs does not mean that it divides by num_items_in_batch.
        self.model_accepts_loss_kwargs = bool(getattr(plain, "accepts_loss_kwargs", False))
        self._takes_group = "group" in inspect.signature(plain.forward).parameters
        if self.stage.gradient_cache_chunk and self.is_deepspeed_enabled:
            raise NotImplementedError("Trainer: the gradient cache does not run under DeepSpeed")
        self.add_callback(_ClampLogitScale())
        self.add_callback(_LogLastStep())

    @property
    def seconds(self) -> float:
        """Time spent training, before the run was resumed too (as far as it was logged)."""
        return self._logged_seconds if self._clock is None else time.perf_counter() - self._clock

    @property
    def _logged_seconds(self) -> float:
        return next((e["seconds"] for e in reversed(self.state.log_history) if "seconds" in e), 0.0)

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that share a batch; None in one process."""
        return dist.group.WORLD if self.args.world_size > 1 else None

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of (seed, epoch).

        Not prepared by accelerate, whose loaders shard again, repeat samples to even out the last
        batch, and on resuming do not tell the epoch to a sampler that they wrapped twice.
        """
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise ValueError("Trainer: training needs a train_dataset, got None")
        sampler = self._batch_sampler
        if isinstance(dataset, IterableDataset):
            if sampler is not None:
                raise ValueError("Trainer: an iterable data set takes no batch_sampler")
            workers = args.dataloader_num_workers
            dataset = StreamBatches(dataset, self._train_batch_size, workers)
            sampler = dataset.batch_sampler()
        elif sampler is None:
            sampler = EpochBatchSampler(
                len(dataset),
                self._train_batch_size,
                args.seed if args.data_seed is None else args.data_seed,
                rank=args.process_index,
                world_size=args.world_size,
            )
        self._follow_epoch = [dataset, sampler, self.data_collator]
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed when it was already done
            return None
        if self._clock is None:
            self._clock = time.perf_counter() - self._logged_seconds
        resumed = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
        for follower in self._follow_epoch:
            if isinstance(follower, StreamBatches):
                follower.begin(epoch, kwargs["steps_trained_in_current_epoch"] if resumed else 0)
            elif hasattr(follower, "set_epoch"):
                follower.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    # Optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of ``args.optim`` over the stage's parameter groups."""
        if self.optimizer is None:
            target = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = parameter_groups(target, self.args.learning_rate, self.stage.groups)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one batch, by chunks where the stage says so."""
        rows = self.stage.gradient_cache_chunk
        if rows is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        accumulation = self.current_gradient_accumulation_steps

        def encode(chunk: dict[str, Any]) -> dict[str, Tensor]:
            outputs = model(**chunk, return_loss=False)
            return {k: v for k, v in outputs.items() if isinstance(v, Tensor)}

        def loss(**features: Tensor) -> Tensor:
            return self._objective(features) / accumulation

        return cached_step(
            encode,
            loss,
            split_batch(inputs, rows),
            model=self.accelerator.unwrap_model(model),
            no_sync=lambda: self.accelerator.no_sync(model),
            autocast=self.accelerator.autocast,
            scaler=self.accelerator.scaler,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective of the model's features, or the (weighted) losses that it returns."""
        if self.stage.objective is not None:
            outputs = model(**inputs, return_loss=False)
            with self.accelerator.autocast():
                loss = self._objective(outputs)
            return (loss, {"loss": loss, **outputs}) if return_outputs else loss
        options: dict[str, Any] = {"group": self.group} if self._takes_group else {}
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            options["num_items_in_batch"] = num_items_in_batch
        outputs = model(**inputs, **options)
        loss = self._weighted(outputs)
        if "num_items_in_batch" in options and self.args.average_tokens_across_devices:
            # Those of all ranks, whose gradients are averaged.
            loss = loss * self.args.world_size
        self._record(outputs)
        return (loss, outputs) if return_outputs else loss

    def _objective(self, features: Mapping[str, Tensor]) -> Tensor:
        if self.stage.objective is None:
            raise ValueError("Trainer: the stage has no objective")
        self._record(features)
        return self.stage.objective(features, self.group)

    def _weighted(self, outputs: Mapping[str, Tensor]) -> Tensor:
        weights = self.stage.losses or {"loss": 1.0}
        missing = [name for name in weights if outputs.get(name) is None]
        if missing:
            raise ValueError(
                f"Trainer: the model's output lacks {', '.join(missing)}; it has "
                f"{', '.join(outputs)}"
            )
        return torch.stack([outputs[name] * weight for name, weight in weights.items()]).sum()

    # Logging

    def _record(self, outputs: Mapping[str, Any]) -> None:
        """Add the scalars of a training step's output to the window's sums, on the device."""
        if not self.model.training:
            return
        for name, value in outputs.items():
            if name != "loss" and isinstance(value, Tensor) and value.numel() == 1:
                total = self._scalars.get(name, 0.0)
                self._scalars[name] = total + value.detach().float().reshape(())
        self._steps_recorded += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the window's means of the output's scalars beside the loss.

        Raises:
            FloatingPointError: the loss is not finite. Going on would overwrite good checkpoints.
        """
        if "loss" in logs and self._scalars:
            means = torch.stack(list(self._scalars.values())) / self._steps_recorded
            means = self.accelerator.reduce(means, "mean")
            logs.update(zip(self._scalars, means.tolist(), strict=True))
            self._scalars, self._steps_recorded = {}, 0
        if "loss" in logs:
            logs["seconds"] = round(self.seconds, 3)
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            whole = checkpoint.complete_checkpoints(self.args.output_dir)
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; the last complete "
                f"checkpoint is {whole[-1] if whole else 'none'}"
            )

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; ``resume_from_checkpoint=True`` goes on from the last complete checkpoint.

        Raises:
            CheckpointError: nothing complete to resume from, a checkpoint without optimizer or
                random state, or an output directory that cannot hold the checkpoints.
        """
        run = self.args.output_dir
        if self.args.save_strategy != "no":
            kept = 1 + (self.args.save_total_limit or 1)
            checkpoint.require_space(run, kept * checkpoint.checkpoint_bytes(self.model))
        resume: str | None = None
        if resume_from_checkpoint:
            resume = str(resume_from_checkpoint)
            if resume_from_checkpoint is True:
                whole = checkpoint.complete_checkpoints(run)
                if not whole:
                    raise CheckpointError(f"no complete checkpoint to resume from in {run}")
                resume = str(whole[-1])
            self._check_resumable(Path(resume))
        self._clock = None
        result = super().train(resume, trial, ignore_keys_for_eval)
        if hasattr(self.train_dataset, "report_skipped"):
            self.train_dataset.report_skipped()  # of the last epoch
        return result

    def _check_resumable(self, directory: Path) -> None:
        if not checkpoint.is_complete(directory):
            raise CheckpointError(f"{directory} is not a complete checkpoint")
        if self._sharded:
            return
        absent = [n for n in ("optimizer.pt", "scheduler.pt") if not (directory / n).is_file()]
        if absent:
            raise CheckpointError(f"{directory} has no {' and no '.join(absent)}: cannot resume")
        rank = self.args.process_index
        own = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{rank}.pth"
        if not (directory / own).is_file():
            warnings.warn(
                f"{directory} was written by another number of processes: training goes on, but "
                "dropout differs from an uninterrupted run's",
                stacklevel=3,
            )

    @property
    def _sharded(self) -> bool:
        """Weights that only transformers and accelerate know how to write and read."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside, sync, rename; then rotate. See :mod:`mmkern.train.checkpoint`."""
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        aside = checkpoint.aside(run)
        if self.args.should_save:
            checkpoint.discard_unfinished(run)
        self.accelerator.wait_for_everyone()
        with checkpoint.clean_failure(aside, f"{run / name}"):
            with self._redirected(aside):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                if best is not None and Path(best).parent == aside:
                    self.state.best_model_checkpoint = str(run / name)
                    self.state.save_to_json(str(aside / name / checkpoint.STATE))
                checkpoint.publish(aside / name, run / name)
                aside.rmdir()
        if self.args.should_save:
            limit = self.args.save_total_limit
            checkpoint.rotate(run, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _redirected(self, directory: Path) -> Iterator[None]:
        self._aside = directory
        try:
            yield
        finally:
            self._aside = None

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Weights and configuration, under the names that the model itself has."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            bars = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()  # one would break into the trainer's own
            # Names on disk in an older layout could not be loaded back strictly.
            model.save_pretrained(directory, state_dict=state_dict, save_original_format=False)
            if bars:
                logging.enable_progress_bar()
        elif hasattr(model, "save_pretrained"):
            model.save_pretrained(directory, state_dict=state_dict)
        elif state_dict is None:
            save_model(model, str(directory / checkpoint.WEIGHTS))  # knows of tied weights
        else:
            save_file(state_dict, directory / checkpoint.WEIGHTS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        adapters = hasattr(target, "active_adapter") and not isinstance(target, PreTrainedModel)
        if self._sharded or adapters:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoint.load_strict(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _ClampLogitScale(TrainerCallback):
    """Bounds the temperature where the optimizer may have taken it out."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clamp: Callable[[], None] | None = getattr(kwargs["model"], "clamp_logit_scale_", None)
        if clamp is not None:
            clamp()


class _LogLastStep(TrainerCallback):
    """Logs what is left of the last window, so that the shortest run has a loss to tell."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


def check_hooks(parent: type) -> None:
    """Raise unless transformers' Trainer has the methods that are overridden here.

    Raises:
        ImportError: naming the method, its missing parameters and the versions that have it.
    """
    for name, parameters in _HOOKS.items():
        method = getattr(parent, name, None)
        known = inspect.signature(method).parameters if method is not None else {}
        lacking = [p for p in parameters if p not in known]
        if method is None or lacking:
            what = f"{name}({', '.join(lacking)})" if lacking else name
            raise ImportError(
                f"mmkern's Trainer overrides {parent.__name__}.{what}, which transformers "
                f"{transformers.__version__} does not have; install transformers>=5.17,<6"
            )
