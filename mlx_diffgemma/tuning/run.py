"""A whole fine-tuning run: options from a YAML file and the command line, data, training, files left behind.

An adapter folder holds adapter_config.json, adapters.safetensors (the newest), one NNNNNNN_adapters.safetensors a checkpoint,
state.safetensors to go on from, and losses.csv and losses.png.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import yaml
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import build_schedule

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.tuning.adapters import (
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
from mlx_diffgemma.tuning.state import write_safely
from mlx_diffgemma.tuning.trainer import Report, Trainer, TrainingOptions

OPTIMIZERS = {"adam": optimizers.Adam, "adamw": optimizers.AdamW, "muon": optimizers.Muon, "sgd": optimizers.SGD,
              "adafactor": optimizers.Adafactor}
STATE = "state.safetensors"


@dataclass(frozen=True)
class TuningOptions:
    """Options of ``mlx-diffgemma lora`` under mlx-lm's names; beyond these, those of TrainingOptions, AdapterOptions and the terms
    of the objective."""

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
    def from_mapping(cls, given: Mapping[str, Any]) -> TuningOptions:
        """Flat names, as in mlx-lm's YAML.  Errors: UserError naming what is unknown or out of range."""
        parts: dict[type, dict[str, Any]] = {cls: {}, TrainingOptions: {}, AdapterOptions: {}}
        places = {f.name: kind for kind in parts for f in fields(kind) if f.name not in ("training", "adapter")}
        for name, value in given.items():
            if name not in places:
                raise UserError(f"Unknown option {name!r}; known are {', '.join(sorted(places))}.")
            parts[places[name]][name] = value
        return cls(**parts[cls], training=TrainingOptions(**parts[TrainingOptions]),
                   adapter=AdapterOptions(**parts[AdapterOptions]))

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"Unknown optimizer {self.optimizer!r}; use one of {', '.join(OPTIMIZERS)}.")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.training.grad_checkpoint and self.adapter.fine_tune_type != "full" and self.adapter.lora_parameters["dropout"]:
            raise UserError("grad_checkpoint computes layers twice, and dropout would differ the second time; leave one of them "
                            "out.")

    @property
    def objective(self) -> Objective:
        return Objective(self.canvas_weight, self.causal_weight, self.self_conditioning_probability, mask_prompt=self.mask_prompt)

    def build_optimizer(self) -> optimizers.Optimizer:
        """Errors: UserError for a schedule or arguments the optimiser does not take."""
        try:
            rate = build_schedule(dict(self.lr_schedule)) if self.lr_schedule else self.learning_rate
            return OPTIMIZERS[self.optimizer](learning_rate=rate, **self.optimizer_config.get(self.optimizer, {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"lr_schedule or optimizer_config cannot be used: {error}.") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5, without a point, for text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of options.  Errors: UserError when it is missing or no mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold options, one a line.")
    return dict(content)


@dataclass
class Run:
    """A run that is ready to start; ``splits`` tells what was left out."""

    options: TuningOptions
    trainer: Trainer
    splits: dict[str, Split]
    folder: Path
    resumed: bool

    @classmethod
    def prepare(cls, model: DiffusionGemma, tokenizer: TokenizerWrapper, options: TuningOptions, model_name: str,
                resume: bool = False, ignore_memory: bool = False) -> Run:
        """Errors: UserError for data, options or an adapter folder that cannot be used, and for a run that does not fit the memory
        of this machine, unless ``ignore_memory``."""
        folder = Path(options.adapter_path)
        state = folder / STATE
        if state.exists() and not resume:
            raise UserError(f"{folder} holds a run already; go on with --resume, or give another --adapter-path.")
        length = options.training.canvas_length
        if length is not None and length > model.config.canvas_length:
            raise UserError(f"canvas_length {length} exceeds the {model.config.canvas_length} positions this checkpoint was made "
                            "for.")
        splits = load_splits(Path(options.data), tokenizer, model.config.generation.eos_token_ids[0], options.max_seq_length,
                             options.allow_control_tokens)
        if "train" not in splits:
            raise UserError(f"{options.data} has no train.jsonl.")
        mx.random.seed(options.training.seed)
        base = model_fingerprint(model)
        prepare(model, options.adapter)
        if not ignore_memory:
            longest = max(example.ids.size for split in splits.values() for example in split.examples)
            check_training_memory(model, longest, options.training)
        trainer = Trainer(model, splits["train"].examples, splits["valid"].examples if "valid" in splits else (),
                          options.objective, options.training, options.build_optimizer())
        if resume and state.exists():
            trainer.restore(state)
        elif options.resume_adapter_file:
            path = Path(options.resume_adapter_file)
            put_weights(model, dict(tree_flatten(model.trainable_parameters())), read_weights(path), path)
        folder.mkdir(parents=True, exist_ok=True)
        flat = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("training", "adapter")}
        write_config(folder, base, len(model.layers), options.adapter, model=model_name, **flat, **vars(options.training))
        return cls(options, trainer, splits, folder, resume and trainer.iteration > 0)

    def start(self, on_report: Callable[[Report], None] | None = None) -> None:
        """Train to the end, leaving a checkpoint every ``save_every`` and losses.csv with every report."""
        self.trainer.run(on_report, self.save)
        self.write_losses()

    def save(self) -> None:
        weights = dict(tree_flatten(self.trainer.model.trainable_parameters()))
        write_safely(self.folder / f"{self.trainer.iteration:07d}_adapters.safetensors", weights)
        write_safely(self.folder / WEIGHTS, weights)
        self.trainer.save(self.folder / STATE)
        self.write_losses()

    def test(self) -> Report:
        """Mean losses over test.jsonl, under fixed noise.  Errors: UserError when there is none."""
        if "test" not in self.splits:
            raise UserError(f"{self.options.data} has no test.jsonl.")
        training = replace(self.options.training, val_batches=-1)
        tester = Trainer(self.trainer.model, self.trainer.train, self.splits["test"].examples, self.trainer.objective, training,
                         self.trainer.optimizer, self.trainer.iteration)
        return tester.validate(0.0)

    def write_losses(self) -> None:
        with (self.folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Report)])
            writer.writeheader()
            writer.writerows(vars(report) for report in self.trainer.reports)

    def plot(self) -> Path | None:
        """losses.png, where matplotlib is installed."""
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
                axis.plot([r.iteration for r in chosen], [getattr(r, name) for r in chosen], style,
                          label="valid" if valid else "train")
            axis.set(xlabel="iteration", ylabel="nats", title=f"{name} loss", yscale="log")
            axis.legend()
        figure.tight_layout()
        figure.savefig(path := self.folder / "losses.png", dpi=110)
        plt.close(figure)
        return path
