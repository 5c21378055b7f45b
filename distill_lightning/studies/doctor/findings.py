"""What was found, in plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: what was looked at.
        found: what there is, in words and numbers.
        key: of the configuration, where to change what is wrong; empty: all is well.
        way_out: what to do there.
    """

    check: str
    found: str
    key: str = ""
    way_out: str = ""

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to change."""
        return not self.key


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        findings: in the order of the checks; a check may have several.
    """

    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to change."""
        return all(finding.is_well for finding in self.findings)

    @property
    def wrong(self) -> list[Finding]:
        """What is to be changed."""
        return [finding for finding in self.findings if not finding.is_well]

    def rows(self) -> list[list[str]]:
        """A header, and a row for each finding: the check, what was found, ``"ok"`` or the key to change."""
        rows = [[one.check, one.found, "ok" if one.is_well else one.key] for one in self.findings]
        return [["check", "found", "change"], *rows]

    def advice(self) -> list[str]:
        """A line for each thing that is wrong: the key, and what to do there."""
        return [f"{finding.key}: {finding.way_out}" for finding in self.wrong]
