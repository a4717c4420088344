from __future__ import annotations

import hashlib
import random
from pathlib import Path

from kdkit.models.chat import Encoded


def make_rows(count: int = 8, *, seed: int = 0, vocab: int = 259) -> list[Encoded]:
    """Rows of unequal length; ids include the pad id, so that a mask made from ids would show."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        length, prompt = rng.randint(4, 19), rng.randint(1, 3)
        ids = tuple(rng.choice([258, rng.randrange(vocab)]) for _ in range(length))
        rows.append(Encoded(f"row-{index}", ids, tuple(t >= prompt for t in range(length))))
    return rows


class FakeContext:
    """What the loop uses of a stage context; ``stop_at`` asks for a stop after that many steps."""

    def __init__(self, root: Path, *, seed: int = 17, stop_at: int | None = None) -> None:
        self.seed, self.device, self.name, self.recipe = seed, "cpu", "stage", "recipe"
        self.out, self.checkpoints, self.run_dir = root / "out", root / "checkpoints", root / "run"
        self.stop_at = stop_at
        self.logs: list[str] = []
        self.values: list[tuple[int, dict[str, float]]] = []

    def seed_for(self, purpose: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()[:8], "big") % 2**63

    def precision(self, requested: str) -> str:
        return "fp32"

    def log(self, message: str) -> None:
        self.logs.append(message)

    def progress(self, step: int, total: int, **values: float) -> None:
        pass

    def metrics(self, values, *, step: int) -> None:
        self.values.append((step, dict(values)))

    def stopping(self) -> bool:
        return self.stop_at is not None and bool(self.values) and self.values[-1][0] >= self.stop_at
