"""Packages that are not those the project is tested with: named, or refused where they give wrong numbers."""

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

from support.usage import UsageError

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
MODULES = {"opencv-python-headless": "cv2", "opencv": "cv2"}  # where the name is another
# {package: (the first that is right, what others do)}
WRONG = {"gymnasium": ((1, 4), "leaves the first step of a game out of its return")}


def installed(package: str) -> str:
    """The version of the code that runs."""
    module = importlib.import_module(MODULES.get(package, package.replace("-", "_")))
    return getattr(module, "__version__", None) or importlib.metadata.version(package)


def release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; (0, 0) where there are no numbers."""
    numbers = [*re.findall(r"\d+", version), "0", "0"]
    return int(numbers[0]), int(numbers[1])


def unsupported_versions() -> list[str]:
    """A line per package that is older than what requirements.txt has, or of a later major version."""
    if not REQUIREMENTS.exists():
        return []
    pins = re.findall(r"^([\w.-]+)==(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    remarks = []
    for package, tested in pins:
        major, minor = release(tested)
        version = installed(package)
        if not (major, minor) <= release(version) < (major + 1, 0):
            supported = f"supported is {major}.{minor} up to {major + 1}"
            remarks.append(f"{package} is {version}, {supported}: {installation()}")
    return remarks


def installation() -> str:
    """What to type where packages are not those in requirements.txt."""
    return f"pip install -r {REQUIREMENTS.name}, in {REQUIREMENTS.resolve().parent}"


def refuse_wrong_versions() -> None:
    """Raises UsageError where a package is of a version that is known to give wrong numbers."""
    for package, (right, mistake) in WRONG.items():
        version = installed(package)
        if release(version) < right:
            raise UsageError(f"{package} {version} {mistake}: {installation()}")


def exit_with_wrong_versions() -> None:
    """Ends a program in one line where a version is wrong, before it imports what that does not have."""
    try:
        refuse_wrong_versions()
    except UsageError as error:
        sys.exit(f"error: {error}")
