"""JUnit XML: a list of checks as continuous integration reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from xml.etree import ElementTree

_ELEMENTS = {"fail": "failure", "undecided": "skipped"}


class Case(NamedTuple):
    """One check: its name, "pass", "fail" or "undecided", and what to say unless it passed."""

    name: str
    outcome: str
    message: str


def to_junit(
    command: str, figures: Iterable[tuple[str, str]], cases: Iterable[Case], output: str = ""
) -> str:
    """A suite of test cases.

    Args:
        command: whose checks they are.
        figures: properties of the suite.
        output: further text.
    """
    cases = list(cases)
    outcomes = [case.outcome for case in cases]
    suite = ElementTree.Element(
        "testsuite",
        name=f"zaya-convert {command}",
        tests=str(len(cases)),
        failures=str(outcomes.count("fail")),
        skipped=str(outcomes.count("undecided")),
        errors="0",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in figures:
        ElementTree.SubElement(properties, "property", name=name, value=value)
    classname = f"zaya_convert.{command.replace('-', '_')}"
    for name, outcome, message in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
        if outcome in _ELEMENTS:
            ElementTree.SubElement(case, _ELEMENTS[outcome], message=message)
    if output:
        ElementTree.SubElement(suite, "system-out").text = output
    ElementTree.indent(suite)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, "unicode") + "\n"
    )
