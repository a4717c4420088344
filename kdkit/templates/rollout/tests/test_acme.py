from __future__ import annotations

from kdkit.api import RolloutEngine, RolloutModel
from kdkit.testing.conformance import RolloutConformance
from kdkit.testing.fakes import FakeBuildContext

from kdkit_acme import plugin

(SPEC,) = plugin.kdkit_rollouts()


class TestRollouts(RolloutConformance):
    def build(self, model: RolloutModel) -> RolloutEngine:
        engine: RolloutEngine = SPEC.build(SPEC.params(), FakeBuildContext(), model)
        return engine
