"""What importing the package does to a process, and what it leaves to be loaded later."""

import os
import subprocess
import sys

import pytest


def printed(code: str, **environment: str) -> str:
    """Return what a Python process prints, where neither policy nor spin count is set but these."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("before", "environment", "policy"),
    [
        ("", {}, "passive"),
        ("", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("", {"GOMP_SPINCOUNT": "1000"}, "None"),
        ("import sys; sys.modules['torch'] = sys", {}, "None"),  # too late: it has been read
    ],
)
def test_threads_sleep_where_nobody_says_otherwise(before, environment, policy):
    code = f"{before}\nimport os, atomeq\nprint(os.environ.get('OMP_WAIT_POLICY'))"
    assert printed(code, **environment) == policy


def test_a_potential_is_loaded_without_the_compiler():
    """Its import takes longer than torch's own."""
    code = (
        "import sys, atomeq\natomeq.load_potential('cu-pbe')\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'lightning'} & set(sys.modules)))"
    )
    assert printed(code) == "[]"
