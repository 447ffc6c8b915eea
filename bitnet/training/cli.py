"""The ``fit`` command as it is typed: options, shipped configs and one-line errors; ``FitCLI`` does the work.

``main()`` is train.py and ``bitnet fit``. Config files given by name (``--config tiny``) are found among the shipped
ones. ``parse_config`` reads a config for other commands.
"""

import inspect
import os
import pkgutil
import sys
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import jsonargparse
import yaml

from bitnet.training.without_triton import triton_unseen_without_gpu

with triton_unseen_without_gpu():
    from lightning.pytorch.cli import LightningArgumentParser

from bitnet.config import ModelConfig, OptimConfig
from bitnet.data.datamodule import TokenDataModule
from bitnet.errors import SaidByFirstProcess, UserError, of_the_machine
from bitnet.parse_errors import explain, of_jsonargparse
from bitnet.recipes import RECIPES, BitNet, Recipe
from bitnet.training.fit_cli import FitCLI
from bitnet.training.interruption import Interrupted, ended_by_signals
from bitnet.training.lit import LitBitNet
from bitnet.training.run_folder import is_first_process
from bitnet.training.shipped import base_of, resolve_configs
from bitnet.training.trainer_checks import of_lightning

DEFAULT_CONFIG = "tiny"


class OneLineParser(LightningArgumentParser):
    """Refuses bad input with one line that names the key, the value and the nearest valid key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, self._known_keys()))

    def _known_keys(self) -> set[str]:
        keys: set[str] = set()
        for action in self._actions:
            keys.update(option.lstrip("-") for option in action.option_strings)
            for subparser in getattr(action, "_name_parser_map", {}).values():
                keys |= subparser._known_keys()
        return keys | {f"model.recipe.{key}" for kind in RECIPES.values() for key in inspect.signature(kind).parameters}


def report_error(error: BaseException) -> int:
    """Print a ``UserError`` as one line; return the exit code."""
    if isinstance(error, SaidByFirstProcess):
        return 2
    print(f"error: {error}", file=sys.stderr)
    return 2


def quiet() -> None:
    """Leave out the notices of libraries that a user of this command can do nothing about."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        "Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        "LightningCLI's args parameter is intended to run.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def make_cli(args: list[str], run: bool = True, kind: type[FitCLI] = FitCLI) -> FitCLI:
    """Parse ``args`` (with the subcommand first when ``run``) and, when ``run``, train."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    quiet()
    return kind(
        LitBitNet,
        TokenDataModule,
        save_config_callback=None,
        seed_everything_default=0,
        parser_class=OneLineParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
        run=run,
    )


class _ParseOnly(FitCLI):
    """Reads configs as ``fit`` does, and stops there."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _set_seed(self) -> None:
        pass


def _parsed(args: list[str]) -> FitCLI:
    return make_cli(resolve_configs([*base_of(args, DEFAULT_CONFIG), *args]), run=False, kind=_ParseOnly)


@dataclass(frozen=True, kw_only=True)
class ParsedConfig:
    """A config that has been read and checked, with model config and recipe built."""

    model: ModelConfig
    recipe: Recipe
    optim: OptimConfig
    loss_chunk: int | None
    activation_checkpointing: bool
    data: dict[str, Any]
    trainer: dict[str, Any]


def plain_config(args: list[str]) -> dict[str, Any]:
    """What ``fit`` with ``--config NAME`` and options would leave in config.yaml. Raises ``UserError`` as it would."""
    cli = _parsed(args)
    return dict(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False)))


def parse_config(args: list[str]) -> ParsedConfig:
    """Read ``--config NAME`` and options as ``fit`` would. Raises ``UserError`` as ``fit`` would."""
    config = _parsed(args).config
    recipe = config.model.recipe
    kind = pkgutil.resolve_name(recipe.class_path) if recipe else BitNet  # it may be somebody's own
    return ParsedConfig(
        model=ModelConfig(**config.model.config.as_dict()),
        recipe=kind(**recipe.init_args.as_dict()) if recipe else BitNet(),
        optim=OptimConfig(**config.model.optim.as_dict()),
        loss_chunk=config.model.loss_chunk,
        activation_checkpointing=config.model.activation_checkpointing,
        data=config.data.as_dict(),
        trainer=config.trainer.as_dict(),
    )


def main(args: list[str] | None = None) -> int:
    """Run ``fit``; return the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0].startswith("-"):  # there is one subcommand; nobody need name it
        args = ["fit", *args]
    try:
        with ended_by_signals():
            base = [] if {"--help", "-h"} & set(args) else base_of(args, DEFAULT_CONFIG)
            make_cli(resolve_configs([args[0], *base, *args[1:]]))
    except Interrupted as end:
        if is_first_process():
            print(end, file=sys.stderr)
        return end.exit_code
    except Exception as error:
        known = error if isinstance(error, UserError) else None
        known = known or of_the_machine(error) or of_lightning(error) or of_jsonargparse(error)
        if debug or known is None:
            raise
        return report_error(known)
    return 0
