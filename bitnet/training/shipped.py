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


def resolve_configs(args: list[str]) -> list[str]:
    """Replace the names behind --config by paths."""
    out = list(args)
    for i, arg in enumerate(out):
        if arg in ("--config", "-c") and i + 1 < len(out):
            out[i + 1] = str(find_config(out[i + 1]))
        elif arg.startswith("--config="):
            out[i] = f"--config={find_config(arg.removeprefix('--config='))}"
    return out
