"""The built-in losses of hidden states fulfil the suite, against formulas written a second time."""

from __future__ import annotations

from typing import ClassVar

import kdkit
from kdkit.testing.conformance import RepresentationLossConformance


class MSE(RepresentationLossConformance):
    params: ClassVar = {}

    def build(self):
        return kdkit.build("loss", "hidden-mse", **self.params)

    def reference(self, student, teacher):
        return sum(((own - its) ** 2).sum(-1) / its.shape[-1] for own, its in zip(student, teacher, strict=True))


class Cosine(RepresentationLossConformance):
    params: ClassVar = {}

    def build(self):
        return kdkit.build("loss", "hidden-cosine", **self.params)

    def reference(self, student, teacher):
        pairs = zip(student, teacher, strict=True)
        lengths = [((own * own).sum(-1).sqrt(), (its * its).sum(-1).sqrt(), (own * its).sum(-1)) for own, its in pairs]
        return sum(1 - product / mine / other for mine, other, product in lengths)


class TestMSE(MSE):
    pass


class TestMSEWithoutAProjector(MSE):
    params: ClassVar = {"projector": "none"}
    widths_differ = False


class TestMSEOfChosenLayers(MSE):
    params: ClassVar = {"layers": [[0, 0], [2, 5], [-1, -1], [-3, -6]]}


class TestCosine(Cosine):
    widths_differ = False


class TestCosineWithAProjector(Cosine):
    params: ClassVar = {"projector": "linear", "layers": "even"}
