"""Makes .venv and installs the fleet with all its parts into it. Needs Python 3.11, pip and venv, nothing else."""

# ruff: noqa: UP031, UP036 (a Python that is too old must read this, to say so)

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0"
EXTRAS = "edge,worker,export,server,postgres,plots,bench,dev"


def run(what, *command):
    """Says what is done in one line, and does it; a failure ends the script."""
    print("==> " + what, flush=True)
    status = subprocess.call([str(part) for part in command], cwd=str(ROOT))
    if status:
        sys.exit("%s failed (exit status %d); see above" % (what, status))


def main():
    if sys.version_info < (3, 11):
        sys.exit(
            "expected Python 3.11 or later, got %d.%d; name one: make PYTHON=python3.11 ..."
            % sys.version_info[:2]
        )
    python = VENV / "bin" / "python"
    if not python.exists():
        run(
            "making .venv (needs Python's venv, on Debian the package python3-venv)",
            sys.executable,
            "-m",
            "venv",
            VENV,
        )
    # An older pip takes minutes longer to find versions that fit together.
    run(
        "bringing .venv's pip up to date",
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--upgrade",
        "pip",
    )
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        install.append("--quiet")
    run("installing " + TORCH + ", the largest part", *install, TORCH)
    run(
        "installing the fleet, its models' tools and its tests",
        *install,
        "--editable",
        ".[" + EXTRAS + "]",
    )
    (VENV / ".installed").touch()


main()
