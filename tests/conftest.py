"""Shared fixtures. No test needs a network, a GPU or the folder shared/ beside the checkout."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # transformers compiles its quantizers; eager is the reference
# Triton kernels run in its interpreter, which it must know before it is imported; 0 is for a machine with a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.config import ModelConfig
from bitnet.training.cli import main as fit

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

SENTENCES = (
    "The small dog ran over the green hill and sat down beside the river.",
    "A girl named Ann found a red ball in the garden, and she was glad.",
    "\u201cWhere is my hat?\u201d asked the old man; nobody knew, not even the cat.",
    "In winter the days are short, the nights are long, and the fire is warm.",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread is faster on small matrices; prepared tokens go to a folder of this test run."""
    torch.set_num_threads(1)
    os.environ["BITNET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def docstrings_are_parsed_once() -> Iterator[None]:
    """Every command line reads the sources of all classes that it can make, a third of what a short run takes."""
    read = AttributeDocstrings.get_attr_docs
    found: dict[object, dict[str, Any]] = {}

    def kept(self: AttributeDocstrings, component: object) -> dict[str, Any]:
        if component not in found:
            found[component] = read(self, component)
        return found[component]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeDocstrings, "get_attr_docs", kept)
        yield


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """Runs of later tests depend on both: sums on the number of threads, logging on the other processes."""
    yield
    assert torch.get_num_threads() == 1
    assert not torch.distributed.is_initialized()


class Recorded(TorchDispatchMode):
    """The operators that run in this block, as they are named: ``aten.mul.Tensor``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def story_text(documents: int, seed: int = 0) -> str:
    """Documents of shuffled sentences between separators."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(documents):
        order = torch.randint(len(SENTENCES), (6,), generator=generator).tolist()
        texts.append("\n".join(SENTENCES[i] for i in order))
    return "\n<|endoftext|>\n".join(texts)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 60 short documents."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text(story_text(60), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three text files."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(3):
        (folder / f"part{i}.txt").write_text(story_text(20, seed=i), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64)


def tiny_options(text: Path, folder: Path) -> list[str]:
    """Options of a run that takes a second."""
    return [
        *("fit", "--config", "overlays/smoke", f"--data.path={text}"),
        *(f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"),
    ]


@pytest.fixture(scope="session")
def run_fit() -> Callable[..., None]:
    """Train in this process by the command line; fails the test when the exit code is not 0."""

    def run(text: Path, folder: Path, *options: str) -> None:
        assert fit([*tiny_options(text, folder), *options]) == 0

    return run


@pytest.fixture(scope="session")
def finished_run(stories: Path, tmp_path_factory: pytest.TempPathFactory, run_fit: Callable[..., None]) -> Path:
    """Folder of a ternary run of 30 steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_fit(stories, folder, "--trainer.max_steps=30", "--model.optim.lr=1e-2")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts beside the checkout; tests that want them are skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real texts at {SHARED}")
    return SHARED
