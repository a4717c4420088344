"""Does a quantizer write a model that loads, say how large it is, and leave nothing behind when it fails?

Subclass :class:`QuantizerConformance` in a test file, say how the quantizer is built, and run pytest:

    class TestMine(QuantizerConformance):
        def build(self):
            return kdkit.build("quantizer", "my-plugin/mine", bits=4)

The models are tiny and random: that proves that files are right, and nothing about quality.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import pytest
import torch

from kdkit.api.artifacts import Model
from kdkit.api.data import Example, QuantizedInfo
from kdkit.api.errors import ConformanceError, KdkitError
from kdkit.models.load import load_model, load_tokenizer, token_fingerprint
from kdkit.models.locate import check_directory, fingerprint, model_format
from kdkit.models.quantized.tensors import weight_bytes
from kdkit.testing.tiny import save_tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from kdkit.api.protocols import Quantizer

__all__ = ["PretendContext", "QuantizerConformance"]

_MARK: Final = "qzvxkj"
"""Letters that no model file has by chance."""
_IDS: Final = torch.arange(3, 35).unsqueeze(0)
_WRITABLE: Final = 16 * 1024


@dataclass(kw_only=True)
class PretendContext:
    """A ``StageContext`` of a stage that is alone in the world.

    Attributes:
        fails: Raise ``OSError`` in the middle of the work: at the first progress.
        stops: A signal has come already.
        lines: What was logged.
    """

    out: Path
    checkpoints: Path
    run_dir: Path
    name: str = "quantize"
    recipe: str = "conformance"
    seed: int = 0
    offline: bool = True
    device: str = "cpu"
    fails: bool = False
    stops: bool = False
    lines: list[str] = field(default_factory=list)

    def log(self, message: str, /) -> None:
        self.lines.append(message)

    def progress(self, step: int, total: int, /, **values: float) -> None:
        if self.fails:
            raise _MidwayError
        if not 0 <= step <= total or not all(isinstance(value, int | float) for value in values.values()):
            raise ConformanceError(f"progress({step}, {total}, {values}) is no progress")

    def metrics(self, values: Mapping[str, float], /, *, step: int) -> None:
        del values, step

    def stopping(self) -> bool:
        return self.stops

    def seed_for(self, purpose: str, /) -> int:
        return len(purpose)

    def precision(self, requested: str, /) -> Literal["bf16", "fp32"]:
        return "bf16" if requested == "bf16" else "fp32"

    def resolve(self, ref: Any, /) -> Any:
        raise ConformanceError(f"a quantizer resolves nothing: {ref}")

    def build(self, component: Any, /, *args: Any) -> Any:
        raise ConformanceError(f"a quantizer builds nothing: {component} {args}")

    def load(self, component: Any, /) -> Any:
        raise ConformanceError(f"a quantizer loads no data: {component}")


class _MidwayError(Exception):
    pass


class QuantizerConformance:
    """What every quantizer must fulfil.

    Attributes:
        calibrated: It looks at rows (``QuantizerSpec.needs_calibration``).
        tolerance: Largest difference of a logit, relative to the largest logit of the tiny model.
    """

    calibrated: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.5

    def build(self) -> Quantizer:
        """The quantizer under test."""
        raise NotImplementedError

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """A tiny Llama with grouped key and value heads, and its tokenizer."""
        return save_tiny_model(tmp_path / "source")

    def quantized(self, source: Path, work: Path, **changes: Any) -> tuple[Path, QuantizedInfo]:
        """Quantise ``source`` with a context of its own below ``work``; the directory, and what is said of it."""
        ctx = _context(work, **changes)
        return ctx.out / "model", self._with(ctx, source)

    def _with(self, ctx: PretendContext, source: Path) -> QuantizedInfo:
        rows = [Example(id=str(i), prompt=f"{_MARK} {i} " * 8, completion=f"{_MARK} {i} " * 24) for i in range(16)]
        return self.build().quantize(source, rows if self.calibrated else [], ctx.out / "model", ctx)

    def test_what_it_writes_loads_and_is_the_same_model(self, source: Path, tmp_path: Path) -> None:
        """Logits are near the original's, and the tokenizer is the same."""
        out, _ = self.quantized(source, tmp_path / "work")
        check_directory(out)
        exact, model = (_load(path) for path in (source, out))
        with torch.no_grad():
            want, got = exact(_IDS).logits, model(_IDS).logits
        gap = float((got - want).abs().max() / want.abs().max())
        if not gap <= self.tolerance:
            raise ConformanceError(f"logits differ by {gap:.2f} of the largest, more than tolerance = {self.tolerance}")
        theirs, ours = (token_fingerprint(load_tokenizer(Model(path=path))) for path in (source, out))
        if theirs != ours:
            raise ConformanceError("the tokenizer is another one")

    def test_its_size_is_what_lies_on_the_disk(self, source: Path, tmp_path: Path) -> None:
        """``bytes_on_disk`` counts the weight files, which are smaller than those of the model."""
        out, info = self.quantized(source, tmp_path / "work")
        if info.bytes_on_disk != weight_bytes(out):
            raise ConformanceError(f"bytes_on_disk is {info.bytes_on_disk}, on the disk are {weight_bytes(out)}")
        if info.bytes_on_disk >= weight_bytes(source):
            raise ConformanceError(f"{weight_bytes(source)} bytes became {info.bytes_on_disk}")
        if info.bits < 1 or not (info.group_size == -1 or info.group_size > 0):
            raise ConformanceError(f"bits {info.bits} and group_size {info.group_size} are none")
        odd = {name for name, error in info.layer_errors.items() if not 0 <= error < float("inf")}
        odd |= set(info.kept_rtn) - set(info.layer_errors)
        if odd:
            raise ConformanceError(f"error figures are not finite, or of other layers: {sorted(odd)}")

    def test_the_same_model_gives_the_same_files(self, source: Path, tmp_path: Path) -> None:
        """Nothing depends on the time, a path or an unseeded generator."""
        first, _ = self.quantized(source, tmp_path / "first")
        second, _ = self.quantized(source, tmp_path / "second")
        if fingerprint(first) != fingerprint(second):
            raise ConformanceError("two runs wrote different models")
        if _mentioning(str(tmp_path).encode(), first):
            raise ConformanceError("the files mention a path of this machine")

    def test_rows_of_calibration_stay_out(self, source: Path, tmp_path: Path) -> None:
        """No text that the quantizer looked at is in what it writes or says."""
        ctx = _context(tmp_path / "work")
        info = self._with(ctx, source)
        found = _mentioning(_MARK.encode(), ctx.out / "model")
        if found or any(_MARK in line for line in (*ctx.lines, *info.notes)):
            raise ConformanceError(f"text of calibration is in {found or 'what it says'}")

    def test_without_rows_it_refuses_or_needs_none(self, source: Path, tmp_path: Path) -> None:
        """Calibration without rows, or with rows without text, is an error of the person who runs it."""
        if not self.calibrated:
            pytest.skip("it looks at no rows")
        for number, rows in enumerate(([], [Example(id="0", prompt="", completion="")])):
            ctx = _context(tmp_path / f"work{number}")
            with _refusal("no rows"):
                self.build().quantize(source, rows, ctx.out / "model", ctx)
            _nothing_left(ctx)

    def test_a_quantized_model_is_refused(self, source: Path, tmp_path: Path) -> None:
        """Rounding what is rounded already loses twice."""
        out, _ = self.quantized(source, tmp_path / "first")
        if model_format(out) == "full":
            pytest.skip("it writes an ordinary model")
        with _refusal("a quantised model"):
            self.quantized(out, tmp_path / "second")
        _nothing_left(_context(tmp_path / "second"))

    def test_another_architecture_is_quantized_or_refused(self, tmp_path: Path) -> None:
        """GPT-2 has no linear layers in its blocks: they are convolutions with the same purpose."""
        from transformers import GPT2Config, GPT2LMHeadModel

        source = tmp_path / "gpt2"
        config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=64, eos_token_id=258)
        GPT2LMHeadModel(config).save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
        try:
            out, _ = self.quantized(source, tmp_path / "work")
        except KdkitError:
            _nothing_left(_context(tmp_path / "work"))
        else:
            _load(out)

    def test_a_full_disk_leaves_nothing(self, source: Path, tmp_path: Path) -> None:
        """A file that cannot be written to its end is an error of one line, and no half model stays."""
        with _refusal("a full disk"), _small_files():
            self.quantized(source, tmp_path / "work")
        _nothing_left(_context(tmp_path / "work"))

    def test_a_failure_half_way_leaves_nothing(self, source: Path, tmp_path: Path) -> None:
        """Whatever goes wrong in the middle of the work."""
        try:
            self.quantized(source, tmp_path / "work", fails=True)
        except _MidwayError:
            _nothing_left(_context(tmp_path / "work"))

    def test_a_signal_stops_it(self, source: Path, tmp_path: Path) -> None:
        """It ends at once with ``Stopped``, or finishes what it does; half a model is neither."""
        try:
            out, _ = self.quantized(source, tmp_path / "work", stops=True)
        except KdkitError:
            _nothing_left(_context(tmp_path / "work"))
        else:
            _load(out)


def _context(work: Path, **changes: Any) -> PretendContext:
    for name in ("out", "checkpoints", "run"):
        (work / name).mkdir(parents=True, exist_ok=True)
    return PretendContext(out=work / "out", checkpoints=work / "checkpoints", run_dir=work / "run", **changes)


def _load(path: Path) -> Any:
    return load_model(Model(path=path, format=model_format(path)), dtype=torch.float32)


def _mentioning(text: bytes, directory: Path) -> list[str]:
    return [file.name for file in sorted(directory.rglob("*")) if file.is_file() and text in file.read_bytes()]


def _nothing_left(ctx: PretendContext) -> None:
    left = sorted(path.name for path in ctx.out.iterdir())
    if left:
        raise ConformanceError(f"it failed and left {', '.join(left)}")


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    """The block has to raise a ``KdkitError`` of one line."""
    try:
        yield
    except KdkitError as error:
        if "\n" in error.what:
            raise ConformanceError(f"{what} is refused in more than one line") from error
        return
    raise ConformanceError(f"{what} was not refused")


@contextmanager
def _small_files() -> Iterator[None]:
    """No file can grow beyond 16 kB inside the block, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_WRITABLE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
