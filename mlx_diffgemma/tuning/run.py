"""A whole fine-tuning run: options from a YAML file and the command line, data, training, output.

An adapter folder holds adapter_config.json, adapters.safetensors (the newest weights), one
NNNNNNN_adapters.safetensors for each checkpoint, state.safetensors to resume from, losses.csv and
losses.png.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import yaml
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import build_schedule

from mlx_diffgemma.checkpoint.fingerprint import fingerprint
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import (
    check_folder,
    expand_path,
    make_folder,
    read_json,
    read_text,
    replacing,
    write_text,
)
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.safetensors import write_tensors
from mlx_diffgemma.tuning.adapters import (
    CONFIG,
    MARK,
    WEIGHTS,
    AdapterOptions,
    model_fingerprint,
    prepare,
    put_weights,
    read_weights,
    write_config,
)
from mlx_diffgemma.tuning.data import Split, load_splits
from mlx_diffgemma.tuning.memory import check_training_memory
from mlx_diffgemma.tuning.objective import Objective
from mlx_diffgemma.tuning.trainer import Report, Trainer, TrainingOptions
from mlx_diffgemma.values import Values

OPTIMIZERS = {
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "muon": optimizers.Muon,
    "sgd": optimizers.SGD,
    "adafactor": optimizers.Adafactor,
}
STATE = "state.safetensors"
LOSSES = "losses.csv"
PLOT = "losses.png"


@dataclass(frozen=True)
class TuningOptions:
    """The options of ``mlx-diffgemma lora``, under mlx-lm's names.

    Each of ``PARTS`` has its own class: TrainingOptions, AdapterOptions and the terms of the
    objective.
    """

    data: str = "data"
    adapter_path: str = "adapters"
    optimizer: str = "adam"
    optimizer_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rate: float = 1e-5
    lr_schedule: Mapping[str, Any] | None = None
    max_seq_length: int = 2048
    mask_prompt: bool = False
    allow_control_tokens: bool = False
    canvas_weight: float = 1.0
    causal_weight: float = 1.0
    self_conditioning_probability: float = 0.5
    resume_adapter_file: str | None = None
    test: bool = False
    training: TrainingOptions = field(default_factory=TrainingOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], source: str = "options") -> TuningOptions:
        """Read flat names, as in mlx-lm's YAML.

        Args:
            given: values by option name; null counts as absent.
            source: the name of the file, for errors.

        Returns:
            The options.

        Raises:
            UserError: a name is unknown, or a value is of another kind or out of range.
        """
        tuning, training, adapter = cls.read(given, source)
        return cls(
            **tuning, training=TrainingOptions(**training), adapter=AdapterOptions(**adapter)
        )

    @staticmethod
    def read(given: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
        """Read the values of each part in ``PARTS``, by name.

        The ranges of the values are not checked here.

        Args:
            given: As in ``from_mapping``.
            source: As in ``from_mapping``.

        Raises:
            UserError: As ``from_mapping``, apart from the ranges.
        """
        known = sorted({f.name for kind in PARTS for f in fields(kind)} - {"training", "adapter"})
        for name, value in given.items():
            if name not in known and not _changes_nothing(name, value):
                raise UserError(f"{source}: unknown option {name!r}; known are {', '.join(known)}.")
        return [Values(given, source).kinds_of(kind) for kind in PARTS]

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(
                f"Unknown optimizer {self.optimizer!r}; use one of {', '.join(OPTIMIZERS)}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.max_seq_length < 1:
            raise UserError(f"max_seq_length must be at least 1, got {self.max_seq_length}.")
        if (
            self.training.grad_checkpoint
            and self.adapter.fine_tune_type != "full"
            and self.adapter.lora_parameters["dropout"]
        ):
            raise UserError(
                "grad_checkpoint computes layers twice, and dropout would differ the second time; leave one of them "
                "out."
            )

    @property
    def objective(self) -> Objective:
        return Objective(
            self.canvas_weight,
            self.causal_weight,
            self.self_conditioning_probability,
            mask_prompt=self.mask_prompt,
        )

    def flat(self) -> dict[str, Any]:
        """The options of this class by name, without those of its parts."""
        names = [f.name for f in fields(self) if f.name not in ("training", "adapter")]
        return {name: getattr(self, name) for name in names}

    def build_optimizer(self) -> optimizers.Optimizer:
        """Make the optimiser.

        Raises:
            UserError: The optimiser does not take the schedule or an argument.
        """
        try:
            self._made_optimizer().update(nn.Linear(2, 2), {"weight": mx.ones((2, 2))})
            return self._made_optimizer()
        except (
            ArithmeticError,
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"lr_schedule or optimizer_config cannot be used: {error}.") from None

    def _made_optimizer(self) -> optimizers.Optimizer:
        rate = build_schedule(dict(self.lr_schedule)) if self.lr_schedule else self.learning_rate
        return OPTIMIZERS[self.optimizer](
            learning_rate=rate, **self.optimizer_config.get(self.optimizer, {})
        )


PARTS = (TuningOptions, TrainingOptions, AdapterOptions)
# Options of mlx-lm's YAML that have no meaning here, with the values that have no effect; () stands
# for any value.
MLX_LM: dict[str, tuple[Any, ...]] = {
    "clear_cache_threshold": (),
    "project_name": (),
    "config": (),
    "report_to": ("",),
    "test_batches": (-1,),
    "trust_remote_code": (False,),
}


def _changes_nothing(name: str, value: Any) -> bool:
    return name in MLX_LM and (value is None or not MLX_LM[name] or value in MLX_LM[name])


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number; YAML 1.1 reads it as text, because it has no decimal point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UserError: The file is missing or does not hold a mapping.
    """
    path = expand_path(path)
    text = read_text(path)
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is nested too deeply"
        raise UserError(f"{path} is not valid YAML ({reason}).") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold options by name, one a line, such as `iters: 100`.")
    return dict(content)


def check_target(options: TuningOptions, resume: bool) -> Path:
    """The folder of the adapter, checked before anything is loaded.

    Raises:
        UserError: The folder cannot be written, or it is not the folder of a run.
    """
    folder = expand_path(options.adapter_path)
    check_folder(folder, ours=(STATE, WEIGHTS, CONFIG))
    if (folder / STATE).exists():
        if not resume:
            raise UserError(
                f"{folder} holds a run already; continue it with --resume, or give another --adapter-path."
            )
    elif (folder / WEIGHTS).exists() or (
        (folder / CONFIG).exists() and MARK not in read_json(folder / CONFIG)
    ):
        raise UserError(
            f"{folder} holds an adapter already, and no run to go on with; give another --adapter-path."
        )
    return folder


def _identity(options: TuningOptions, model: DiffusionGemma) -> dict[str, Any]:
    """The options that decide the result, by name, except those that the trainer knows."""
    return {
        "model": fingerprint(model),
        "learning_rate": options.learning_rate,
        "lr_schedule": options.lr_schedule,
        "optimizer_config": options.optimizer_config.get(options.optimizer),
        "fine_tune_type": options.adapter.fine_tune_type,
        "lora_parameters": {**options.adapter.lora_parameters, "keys": options.adapter.keys},
    }


def _load_data(
    model: DiffusionGemma, tokenizer: TokenizerWrapper, options: TuningOptions
) -> dict[str, Split]:
    """Read the data, with at least train.jsonl.

    Raises:
        UserError: The data cannot be used, or ``canvas_length`` is too large for the model.
    """
    length = options.training.canvas_length
    if length is not None and length > model.config.canvas_length:
        raise UserError(
            f"canvas_length {length} exceeds the {model.config.canvas_length} positions this checkpoint was made "
            "for."
        )
    splits = load_splits(
        expand_path(options.data),
        tokenizer,
        model.config.generation.eos_token_ids[0],
        options.max_seq_length,
        options.allow_control_tokens,
    )
    if "train" not in splits:
        raise UserError(f"{options.data} has no train.jsonl.")
    return splits


def _longest(splits: Mapping[str, Split]) -> int:
    """The tokens of the longest example."""
    return max(example.ids.size for split in splits.values() for example in split.examples)


@dataclass
class Run:
    """A run that is ready to start; ``splits`` says which examples were left out."""

    options: TuningOptions
    trainer: Trainer
    splits: dict[str, Split]
    folder: Path
    resumed: bool

    @classmethod
    def prepare(
        cls,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        options: TuningOptions,
        model_name: str,
        resume: bool = False,
        ignore_memory: bool = False,
    ) -> Run:
        """Check everything, put the adapter on the model, and make the folder.

        Args:
            model: The base model; the adapter is put on it.
            tokenizer: Its tokenizer.
            options: The options of the run.
            model_name: The name of the base model in the adapter's config.
            resume: Continue the run in the folder, if there is one.
            ignore_memory: Do not check whether the run fits the memory of this machine.

        Returns:
            A run that is ready to start.

        Raises:
            UserError: Data, options or the adapter's folder cannot be used, or the run does not fit
                the memory.
        """
        folder = check_target(options, resume)
        splits = _load_data(model, tokenizer, options)
        mx.random.seed(options.training.seed)
        base = model_fingerprint(model)
        identity = _identity(options, model)
        prepare(model, options.adapter)
        if not ignore_memory:
            check_training_memory(model, _longest(splits), options.training)
        trainer = Trainer(
            model,
            splits["train"].examples,
            splits["valid"].examples if "valid" in splits else (),
            options.objective,
            options.training,
            options.build_optimizer(),
            identity=identity,
        )
        if resume and (folder / STATE).exists():
            trainer.restore(folder / STATE)
        elif options.resume_adapter_file:
            path = expand_path(options.resume_adapter_file)
            trainable = dict(tree_flatten(model.trainable_parameters()))
            put_weights(model, trainable, read_weights(path), path)
        make_folder(folder)
        write_config(
            folder,
            base,
            len(model.layers),
            options.adapter,
            model=model_name,
            **options.flat(),
            **vars(options.training),
        )
        return cls(options, trainer, splits, folder, resume and trainer.iteration > 0)

    def start(self, on_report: Callable[[Report], None] | None = None) -> None:
        """Train to the end.

        A checkpoint is written every ``save_every`` iterations, and losses.csv with every report.
        """
        self.trainer.run(on_report, self.save)
        self.write_losses()

    def save(self) -> None:
        weights = dict(tree_flatten(self.trainer.model.trainable_parameters()))
        write_tensors(self.folder / f"{self.trainer.iteration:07d}_adapters.safetensors", weights)
        write_tensors(self.folder / WEIGHTS, weights)
        self.trainer.save(self.folder / STATE)
        self.write_losses()

    def test(self) -> Report:
        """The mean losses over test.jsonl, always under the same noise.

        Raises:
            UserError: There is no test.jsonl.
        """
        if "test" not in self.splits:
            raise UserError(f"{self.options.data} has no test.jsonl.")
        training = replace(self.options.training, val_batches=-1)
        tester = Trainer(
            self.trainer.model,
            self.trainer.train,
            self.splits["test"].examples,
            self.trainer.objective,
            training,
            self.trainer.optimizer,
            self.trainer.iteration,
        )
        return tester.validate(0.0)

    def write_losses(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [f.name for f in fields(Report)])
        writer.writeheader()
        writer.writerows(vars(report) for report in self.trainer.reports)
        write_text(self.folder / LOSSES, text.getvalue())

    def plot(self) -> Path | None:
        """Write losses.png, if matplotlib is installed."""
        try:
            import matplotlib
        except ImportError:
            return None
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(11, 4))
        for axis, name in zip(axes, ("canvas", "causal"), strict=True):
            for valid, style in ((False, "-"), (True, "o-")):
                chosen = [report for report in self.trainer.reports if report.valid == valid]
                axis.plot(
                    [r.iteration for r in chosen],
                    [getattr(r, name) for r in chosen],
                    style,
                    label="valid" if valid else "train",
                )
            axis.set(xlabel="iteration", ylabel="nats", title=f"{name} loss", yscale="log")
            axis.legend()
        figure.tight_layout()
        path = self.folder / PLOT
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format="png")
        plt.close(figure)
        return path
