"""Run transformers' own common tests on the Granulon classes: `python tests/conformance/run.py [pytest options]`.

Prints what passed, what failed, and every skip with its reason. The exit status is pytest's: 0 if nothing failed.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import transformers
import upstream
from suite import SKIPS


class Report:
    """Collects the outcome of each test and prints the account at the end."""

    def __init__(self):
        self.outcomes = {}
        self.reasons = {}

    def pytest_runtest_logreport(self, report):
        subtest = isinstance(report, pytest.SubtestReport)  # its test counts, and has failed if a subtest has
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif not subtest and (report.when == "call" or report.skipped):
            self.outcomes.setdefault(report.nodeid, report.outcome)
        if report.skipped and not subtest:
            self.reasons[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_terminal_summary(self, terminalreporter):
        by_reason = defaultdict(list)
        for test, reason in self.reasons.items():
            by_reason[reason].append(test.rpartition("::")[2])
        for title, ours in (("skipped here", True), ("skipped by transformers' own conditions", False)):
            terminalreporter.section(title)
            for reason, tests in sorted(by_reason.items()):
                if (reason in SKIPS.values()) == ours:
                    terminalreporter.write_line(f"{reason}: {', '.join(sorted(set(tests)))}")
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        terminalreporter.section(f"conformance with transformers {transformers.__version__}")
        terminalreporter.write_line(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


if __name__ == "__main__":
    upstream.fetch()
    suite = Path(__file__).with_name("suite.py")
    # The repository's own options would deselect by mark.
    options = [str(suite), "--override-ini=addopts=", "--quiet", "--tb=short", *sys.argv[1:]]
    sys.exit(pytest.main(options, plugins=[Report()]))
