"""What the committed models are, by their content."""

import hashlib
import json
from pathlib import Path


def digest(folder: Path) -> str:
    """The SHA-256 of all files of a model, with their names."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def write_hashes(folder: Path) -> dict[str, str]:
    """Write the digest of every model in a folder to `hashes.json` there."""
    hashes = {one.name: digest(one) for one in sorted(folder.iterdir()) if one.is_dir()}
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    return hashes
