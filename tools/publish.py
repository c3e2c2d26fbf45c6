"""Writes into pyproject.toml where this repository is, as the registry wants to know it: what only whoever publishes
knows, and what a copy elsewhere would have wrong.

python -m tools.publish --repository https://HOST/OWNER/NAME --tag v0.1.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tomlkit

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {"Icon": "docs/icon.png", "Banner": "docs/banner.png"}  # of [tool.comfy]


def addressed(text: str, repository: str, tag: str) -> str:
    """A pyproject.toml with the addresses of the repository, its pages, and its pictures as they are at this tag.

    Raises ValueError where the tag is not the version's.
    """
    document = tomlkit.parse(text)
    version = document["project"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag!r} and pyproject.toml's version {version!r}: it takes the tag 'v{version}'")
    repository = repository.rstrip("/")
    document["project"]["urls"] = {
        "Repository": repository,
        "Documentation": f"{repository}/blob/{tag}/README.md",
        "Issues": f"{repository}/issues",
    }
    for name, file in PICTURES.items():
        document["tool"]["comfy"][name] = f"{repository}/raw/{tag}/{file}"
    return tomlkit.dumps(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", required=True)
    parser.add_argument("--tag", required=True)
    args = parser.parse_args()
    file = ROOT / "pyproject.toml"
    file.write_text(addressed(file.read_text(), args.repository, args.tag))


if __name__ == "__main__":
    main()
