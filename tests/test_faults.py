"""The planted faults of tests/faults.py still fit source and tests; whether each is caught, its command says."""

from __future__ import annotations

import ast
from pathlib import Path

import faults

TESTS = Path(faults.__file__).parent


def test_each_fault_has_a_place_and_is_python() -> None:
    for fault in faults.FAULTS:
        ast.parse(faults.planted(fault), fault.name)  # which raises where `old` does not occur once
        assert fault.old != fault.new, fault.name


def test_each_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in faults.FAULTS]
    assert len(set(names)) == len(names)


def test_the_tests_that_catch_them_are_there() -> None:
    files = {test.partition("::")[0] for fault in faults.FAULTS for test in fault.tests}
    known = {
        f"{file}::{node.name}"
        for file in files
        for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {test for fault in faults.FAULTS for test in fault.tests} <= known
    assert all(fault.tests for fault in faults.FAULTS)


def test_the_table_is_up_to_date() -> None:
    page = faults.README.read_text(encoding="utf-8")
    assert faults.with_table(page) == page, "run python tests/faults.py --table"
