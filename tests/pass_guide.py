"""What docs/writing-a-pass.md shows, and the package that its reader would make of it."""

import re
import tomllib
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "writing-a-pass.md"


def blocks(language):
    """The code of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def modules():
    """Each module of the guide's package to its code."""
    names = ("scores", "", "masks", "allocations", "repairs", "steps")
    found = dict(zip(names, blocks("python"), strict=True))
    return {name: code for name, code in found.items() if name}


def points():
    """Group to the entry points that the guide registers, by name."""
    return tomllib.loads("".join(blocks("toml")))["project"]["entry-points"]


def install(folder, modules, groups):
    """Put a package `mylib` and its entry points into a folder, as pip would leave them there."""
    package, info = folder / "mylib", folder / "mylib-1.0.dist-info"
    for made in (package, info):
        made.mkdir()
    (package / "__init__.py").touch()
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylib\nVersion: 1.0\n")
    lines = (f"[{g}]\n" + "".join(f"{n} = {v}\n" for n, v in e.items()) for g, e in groups.items())
    (info / "entry_points.txt").write_text("".join(lines))
    return package, info
