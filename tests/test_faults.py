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
    for fault in faults.FAULTS:
        assert fault.tests, fault.name
        for test in fault.tests:
            file, _, function = test.partition("::")
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not function or function in known, f"{fault.name}: {test}"


def test_the_table_is_up_to_date() -> None:
    page = faults.README.read_text(encoding="utf-8")
    assert faults.with_table(page) == page, "run python tests/faults.py --table"
