"""Hostile TF-Hub modules, converted under an audit hook and, where it is installed, strace.

`python -m tests.attacks.audit` converts every case of `tests/tfhub_builder` that is a wrong or malicious module, in one
process; names select cases. What may be opened: the case's own folder or archive, the output and temporary folders
(the only ones that may be written to), and the installation. No socket, no process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .watch import INSTALLATION, ROOT, within

FILES = "openat,open,creat,unlink,unlinkat,rename,renameat2,mkdir,mkdirat,symlink,symlinkat,link,linkat,chmod"
STARTS = "socket,connect,execve,fork,vfork,clone,clone3"
BEGIN, END = "/audit-begins/", "/audit-ends"


def convert_all(work: Path, names: list[str]) -> dict[str, str]:
    """In the child: makes the cases, then converts each. Answers by name."""
    from tests.tfhub_builder import hostile, module, variants
    from weights_conversion.convert import convert
    from weights_conversion.errors import ConversionError

    from .watch import Watch

    good = module.build_module(work / "modules" / "good", variants.PLAIN).folder
    cases = {name: hostile.HOSTILE[name](good) for name in names or hostile.HOSTILE}
    temporary, out = work / "temporary", work / "out"
    temporary.mkdir()
    out.mkdir()  # beside a model folder are its temporary ones
    tempfile.tempdir = str(temporary)
    answers = {}
    for name, path in cases.items():
        os.access(f"{BEGIN}{name}", os.F_OK)  # seen by strace
        with Watch(reads=[path], writes=[out, temporary]) as seen:
            try:
                convert(path, out / name, report=lambda text: None)
                answer = "converted"
            except ConversionError:
                answer = "refused"
        os.access(END, os.F_OK)
        left = [str(entry) for entry in [*temporary.iterdir(), hostile.marker(path)] if os.path.lexists(entry)]
        left += [str(entry) for entry in out.iterdir() if answer == "refused" or entry.name != name]
        shutil.rmtree(out / name, ignore_errors=True)
        answers[name] = f"DID {seen.events} LEFT {left}" if seen.events or left else answer
    (work / "paths.json").write_text(json.dumps({name: str(path) for name, path in cases.items()}))
    return answers


def traced(log: Path, work: Path) -> list[str]:
    """System calls during a conversion that should not be, from strace's log."""
    paths, found, name = json.loads((work / "paths.json").read_text()), [], ""
    seen = set()
    writes = [work / "out", work / "temporary"]
    for line in log.read_text(errors="replace").splitlines():
        if marked := re.search(rf'"{BEGIN}([^"]+)"', line):
            name = marked[1]
            seen.add(name)
        elif f'"{END}"' in line:
            name = ""
        call = re.match(r"(?:\[?\w*\s*)?\d*\]?\s*(\w+)\((.*)", line)
        if not name or not call or "resumed>" in line:
            continue
        opened = re.match(r"\w+<([^>]*)>", call[2])  # the folder that a path is relative to
        quoted = [os.path.join(opened[1] if opened else ROOT, path) for path in re.findall(r'"([^"]*)"', call[2])]
        if call[1] in ("clone", "clone3") and "CLONE_THREAD" in line:
            continue
        if call[1] in STARTS.split(","):
            found.append(f"{name}: {line}")
        elif call[1].startswith("open"):
            writing = re.search(r"O_WRONLY|O_RDWR|O_CREAT", call[2])
            allowed: list[Path | str] = [*writes] if writing else [*writes, Path(paths[name]), *INSTALLATION]
            if not within(quoted[0], allowed) and "__pycache__" not in quoted[0]:
                found.append(f"{name}: {line}")
        elif call[1] not in ("access", "faccessat", "faccessat2") and not all(
            "__pycache__" in path or within(path, writes) for path in quoted
        ):
            found.append(f"{name}: {line}")
    assert seen == set(paths), "strace did not see every case"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.audit", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases (default: all)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        (args.child / "answers.json").write_text(json.dumps(convert_all(args.child, args.names)))
        return 0
    with tempfile.TemporaryDirectory(prefix="audit-") as temporary:
        work, log = Path(temporary).resolve(), Path(temporary, "strace.log")
        command = [sys.executable, "-m", "tests.attacks.audit", *args.names, "--child", str(work)]
        if tracer := shutil.which("strace"):
            options = f"trace={FILES},{STARTS},access,faccessat,faccessat2"
            command = [
                tracer,
                "-f",
                "-qq",
                "-y",
                "--seccomp-bpf",
                "-s",
                "4096",
                "-e",
                options,
                "-o",
                str(log),
                *command,
            ]
        subprocess.run(command, cwd=ROOT, check=True)
        answers = json.loads((work / "answers.json").read_text())
        found = traced(log, work) if tracer else []
    bad = {name: answer for name, answer in answers.items() if answer not in ("refused", "converted")}
    for text in [*(f"{name}: {answer}" for name, answer in bad.items()), *found]:
        print(text)
    counts = [f"{list(answers.values()).count(answer)} {answer}" for answer in ("refused", "converted")]
    print(f"{len(answers)} modules, {', '.join(counts)}; audit hook: {len(bad)} findings; ", end="")
    print(f"strace: {len(found)} findings" if tracer else "strace is not installed")
    return 1 if bad or found else 0


if __name__ == "__main__":
    sys.exit(main())
