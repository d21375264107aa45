"""The runbook and the alerts agree."""

import re

import pytest
from promql import DEPLOY, alerts, check, series
from test_metrics import METRICS

RUNBOOK = (DEPLOY.parent / "docs" / "runbook.md").read_text()


def test_the_runbook_has_a_section_for_each_alert_and_no_other():
    sections = re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[1:]
    written = {section.split("\n")[0]: section for section in sections if section.startswith("MoeCluster")}
    assert written.keys() == {alert["alert"] for alert in alerts()}
    for name, section in written.items():
        for part in ("**Users**", "**Confirm**", "**Do**", "**Tried**"):
            assert part in section, f"{name}: no {part}"


@pytest.mark.parametrize("expression", re.findall(r"^    promql: (.*)$", RUNBOOK, flags=re.MULTILINE))
def test_the_runbooks_expressions_ask_for_what_exists(expression):
    check(expression, series(METRICS))
