"""The order of a streamed run: barriers, probes, and how long each value lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphprune.streaming.core.sites import Group, Site, first_reads


@dataclass(frozen=True, slots=True)
class Probe:
    """A place where a group's statistic sees a value.

    Attributes:
        group: the group.
        site: the first of its sites that reads the value.
        sums: each weight that reads it, and the name of the value that its product is added to;
            None where the product goes elsewhere than straight into a sum. Empty unless asked for.
    """

    group: Group
    site: Site
    sums: tuple[tuple[str, str | None], ...] = ()

    @property
    def seen(self) -> list[str]:
        """Names of the values that it looks at."""
        names = (self.site.reads, self.site.chosen, *(other for _, other in self.sums))
        return [name for name in names if name is not None]


class Schedule:
    """When everything happens; places are positions in the graph's order of operators.

    A barrier is a place: what comes before it has run for every sample, what is there hasn't. The
    operators from one barrier to the next are a partition, one for each group.

    Attributes:
        places: value name to the place of the operator that computes it.
        barriers: the place of every group's treatment, in order of the groups.
        probes: place to the probes there, which happen before the operator of that place runs.
        uses: name of a value that waits for its readers to the places of the last operator and the
            last probe that read it.
    """

    uses: Mapping[str, tuple[int, int]]

    def __init__(
        self,
        groups: Iterable[Group],
        places: Mapping[str, int],
        others: Mapping[str, str] | None,
    ) -> None:
        """The barriers and probes of some groups.

        Args:
            groups: what is treated.
            places: see `Schedule`.
            others: name of a product to that of the value that it is added to; None where no probe
                looks at these.
        """
        self.places = places
        self.barriers: list[int] = []
        self.probes: dict[int, list[Probe]] = {}
        for group in groups:
            first = first_reads(group.sites, places)
            self.barriers.append(max(first.values()))
            for key, place in first.items():
                same = [s for s in group.sites if (s.reads, s.chosen) == key]
                sums = [(s.parameter, others.get(s.node)) for s in same if others is not None]
                self.probes.setdefault(place, []).append(Probe(group, same[0], tuple(sums)))

    def partition(self, group: int) -> tuple[int, int]:
        """The places of the barrier before a group's, and of its own."""
        return (0, *self.barriers)[group], self.barriers[group]

    def probes_in(self, start: int, end: int) -> list[tuple[int, Probe]]:
        """The probes from after one barrier to the next, in order, with their places."""
        places = [*range(start + 1, end), end]
        return [(place, probe) for place in places for probe in self.probes.get(place, ())]

    def held(self, place: int) -> frozenset[str]:
        """Names of the values that live across a barrier."""
        return frozenset(
            name
            for name, (node, probe) in self.uses.items()
            if self.places[name] < place and (node >= place or probe > place)
        )

    def last_uses(
        self, values: Iterable[str], reads: Iterable[tuple[int, Iterable[str]]]
    ) -> dict[str, tuple[int, int]]:
        """The `uses` of some values.

        Args:
            values: their names.
            reads: place of each operator that runs, and what it reads.
        """
        found = {name: [self.places[name], -1] for name in values}
        seen = [(p, n) for p, probes in self.probes.items() for one in probes for n in one.seen]
        operands = ((place, name) for place, names in reads for name in names)
        for kind, pairs in enumerate((operands, seen)):
            for place, name in pairs:
                if name in found:
                    found[name][kind] = max(found[name][kind], place)
        return {name: (node, probe) for name, (node, probe) in found.items()}
