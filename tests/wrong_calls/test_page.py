"""The figures in docs/reliability.md are those of a whole run, with the classes that there are."""

import re

from tests.wrong_calls.conftest import PAGE
from tests.wrong_calls.test_wrong_calls import GROUPS, targets_of


def test_page_has_figures_of_a_run():
    text = PAGE.read_text()
    calls, classes = re.findall(r"([\d,]+)\s+calls\s+of.*?([\d,]+)\s+classes", text, re.DOTALL)[0]
    assert int(calls.replace(",", "")) >= 5000
    assert int(classes) == len(
        {each.name for g in GROUPS for t in targets_of(g) for _, each in t.all_mistakes}
    )
