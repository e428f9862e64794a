"""Make .venv and install the fleet with all extras into it; needs Python 3.11, pip and venv."""

# ruff: noqa: UP031, UP036 (an older Python must be able to parse this and print the error)

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0"
EXTRAS = "edge,worker,export,server,postgres,plots,bench,dev"


def run(title, *command):
    """Print the title, run the command, and end the script when it fails."""
    print("==> " + title, flush=True)
    status = subprocess.call([str(part) for part in command], cwd=str(ROOT))
    if status:
        sys.exit("%s failed (exit status %d); see above" % (title, status))


def main():
    """Install everything."""
    if sys.version_info < (3, 11):
        sys.exit(
            "expected Python 3.11 or later, got %d.%d; name one: make PYTHON=python3.11 ..."
            % sys.version_info[:2]
        )
    python = VENV / "bin" / "python"
    if not python.exists():
        title = "making .venv (needs Python's venv, on Debian the package python3-venv)"
        run(title, sys.executable, "-m", "venv", VENV)
    # An older pip takes minutes longer to find versions that fit together.
    pip = [python, "-m", "pip", "install"]
    run("bringing .venv's pip up to date", *pip, "--quiet", "--upgrade", "pip")
    # Two of three modules are never imported; Python compiles the others when it needs them.
    install = [*pip, "--disable-pip-version-check", "--no-compile"]
    if not sys.stdout.isatty():
        install.append("--quiet")
    run("installing " + TORCH + ", the largest package", *install, TORCH)
    title = "installing the fleet, its models' tools and its tests"
    run(title, *install, "--editable", ".[" + EXTRAS + "]")
    (VENV / ".installed").touch()


main()
