"""The built-in aligned loss fulfils the suite, against its formula written a second time."""

from __future__ import annotations

from typing import ClassVar

import torch

import kdkit
from kdkit.testing.conformance import AlignedLossConformance


def sorted_distance(p, q):
    """Every entry is compared with the one of the same rank, or with 0."""
    width = max(len(p), len(q))
    ranked = [torch.cat([x.sort(descending=True).values, x.new_zeros(width - len(x))]) for x in (p, q)]
    return (ranked[0] - ranked[1]).abs().sum()


class ULD(AlignedLossConformance):
    params: ClassVar = {}
    temperature = 1.0

    def build(self):
        return kdkit.build("loss", "uld", **self.params)

    def further(self, p, labels):
        value = p[0]
        for row, token in list(zip(p, labels, strict=True))[1:]:
            value = value * row[token]
        return value

    def reference(self, student, teacher, student_labels, teacher_labels):
        p, q = (torch.softmax(z / self.temperature, -1) for z in (student, teacher))
        return sorted_distance(self.further(p, student_labels), self.further(q, teacher_labels))


class TestJoint(ULD):
    pass


class TestAtAnotherTemperature(ULD):
    params: ClassVar = {"temperature": 2.0}
    temperature = 2.0


class TestFirst(ULD):
    params: ClassVar = {"merge": "first"}

    def further(self, p, labels):
        return p[0]
