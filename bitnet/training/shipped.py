"""Configs that come with the library, found by name."""

from pathlib import Path

from bitnet.errors import UserError, did_you_mean


def config_folders() -> list[Path]:
    """Where shipped configs lie: in the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def shipped_configs() -> dict[str, Path]:
    """Name -> file, as in ``tiny`` and ``overlays/bf16``."""
    found: dict[str, Path] = {}
    for folder in config_folders():
        for file in sorted(folder.rglob("*.yaml")):
            found.setdefault(str(file.relative_to(folder).with_suffix("")), file)
    return found


def find_config(name: str) -> Path:
    """The file ``name``, or the shipped config of that name (with or without configs/ and .yaml)."""
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"--config {name}: not a text file; a YAML config is needed.") from error
        return Path(name)
    shipped = shipped_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short]
    known = ", ".join(sorted(shipped))
    raise UserError(
        f"--config {name}: no such file, and no shipped config.{did_you_mean(short, shipped)} Shipped: {known}."
    )


def _configs_of(args: list[str]) -> list[tuple[int, str, str]]:
    """Where a config is named in ``args``: index, what stands before the name there, and the name."""
    apart = [(i + 1, "", args[i + 1]) for i, arg in enumerate(args[:-1]) if arg in ("--config", "-c")]
    return apart + [
        (i, "--config=", arg.removeprefix("--config=")) for i, arg in enumerate(args) if arg.startswith("--config=")
    ]


def resolve_configs(args: list[str]) -> list[str]:
    """Replace the names behind --config by paths."""
    out = list(args)
    for i, before, name in _configs_of(args):
        out[i] = f"{before}{find_config(name)}"
    return out


def with_base(args: list[str], base: str) -> list[str]:
    """``args`` with ``--config base`` behind the subcommand, if they name no config with a model of its own."""
    files = [find_config(name) for _, _, name in _configs_of(args)]
    if any(file.parent.name != "overlays" or file.stem == "smoke" for file in files):
        return args
    return [args[0], "--config", str(find_config(base)), *args[1:]]  # first, or it would undo the other options
