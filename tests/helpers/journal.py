"""A pytest plugin (`-p journal`): a JSON line in $JOURNAL when a test begins and one when it ended,
so that a run which is cut off tells which test it was in and what it had shown before.
"""

import json
import os


def _write(**facts):
    with open(os.environ["JOURNAL"], "a") as file:
        file.write(json.dumps(facts) + "\n")


def pytest_collection_finish(session):
    _write(collected=len(session.items))


def pytest_runtest_logstart(nodeid):
    _write(begun=nodeid)


def pytest_runtest_logreport(report):
    """Set-up and tear-down only where they decide the outcome."""
    if report.when == "call" or not report.passed:
        seconds = round(report.duration, 3)
        text = report.longreprtext if report.failed else ""
        _write(ended=report.nodeid, outcome=report.outcome, seconds=seconds, text=text)
