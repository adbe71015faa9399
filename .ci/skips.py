"""A pytest plugin for CI: no test is skipped but for a reason that is listed here."""

import re

import pytest

ALLOWED = re.compile(
    "GPU|CUDA|GLUE|data|browser|Chromium|triton|ptrace|FSDP2|SmolLM2",
    flags=re.IGNORECASE,
)
wrong: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr)
        if not ALLOWED.search(reason):
            wrong.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if wrong:
        print(
            "\nskipped for a reason that .ci/skips.py does not list:", *wrong, sep="\n"
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
