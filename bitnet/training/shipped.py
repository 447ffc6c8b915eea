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
    found = [(i + 1, "", args[i + 1]) for i, arg in enumerate(args[:-1]) if arg in ("--config", "-c")]
    for before in ("--config=", "-c="):
        found += [(i, before, arg.removeprefix(before)) for i, arg in enumerate(args) if arg.startswith(before)]
    return found


def resolve_configs(args: list[str]) -> list[str]:
    """Replace the names behind --config by paths."""
    out = list(args)
    for i, before, name in _configs_of(args):
        out[i] = f"{before}{find_config(name)}"
    return out


def base_of(args: list[str], base: str) -> list[str]:
    """``--config base``, if ``args`` name no config, or shipped overlays only: they change another. Goes before all
    other options, or it would undo them."""
    shipped = shipped_configs().items()  # overlays/smoke has a model of its own
    overlays = {path.resolve() for name, path in shipped if name.startswith("overlays/") and name != "overlays/smoke"}
    named = (find_config(name).resolve() for _, _, name in _configs_of(args))
    return ["--config", str(find_config(base))] if all(path in overlays for path in named) else []
