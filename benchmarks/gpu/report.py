"""The files of results. Each section's process writes its findings to a file after every item. The suite's process collects
them in the final file."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.children import Child


def write_json(path: Path, found: Any) -> None:
    """Replace the file in one step, so that an interrupted run leaves the last complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


class Findings:
    """The results of one section: items (JSON objects) and problems (sentences). Written to `path` after each.

    until: by time.time(); `attempt` starts nothing later.
    """

    def __init__(self, path: Path, until: float):
        self._path, self._until = path, until
        self.items: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def add(self, say: str = "", **item: Any) -> None:
        """Add an item. say: printed in its place."""
        self.items.append(item)
        print(say or ", ".join(f"{k} {v}" for k, v in item.items()), flush=True)
        self.write()

    def attempt(self, what: str, run: Callable[[], Any]) -> None:
        """Run one part of a section, and note a failure as a problem, so that the next part still runs."""
        if time.time() >= self._until:
            self.problem(f"{what}: not run: the time was used up")
            return
        try:
            run()
        except Exception as error:  # noqa: BLE001  # noted, so that the next part still runs
            traceback.print_exc()
            self.problem(f"{what}: {type(error).__name__}: {str(error)[:600]}")

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"PROBLEM {text}", flush=True)
        self.write()

    def write(self) -> None:
        write_json(self._path, {"items": self.items, "problems": self.problems})


@dataclass
class Report:
    """The results of a run. deadline: by time.monotonic(); no section begins later. log: file for the whole output of every
    section's process."""

    path: Path
    deadline: float
    environment: dict[str, Any]
    log: Path
    about: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        return [name for name, s in self.sections.items() if not s["ok"]]

    @property
    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def write(self) -> None:
        found = {k: v for k, v in asdict(self).items() if k in ("about", "environment", "sections")}
        write_json(self.path, found)

    def section(self, name: str, limit: float, command: Callable[[Path, float], list[str]]) -> None:
        """Run one section in a process of its own, for at most `limit` seconds and not past the deadline.

        command: makes the section's command from the file for its findings and its end by time.time()."""
        limit = min(limit, self.seconds_left)
        print(f"\n== {name} (up to {limit:.0f} s, {self.seconds_left:.0f} s left)", flush=True)
        if limit < 1:
            entry: dict[str, Any] = {"ok": False, "error": "not run: the time was used up", "seconds": 0.0}
        else:
            entry = self._run(name, limit, command)
        self.sections[name] = entry
        self.write()
        problems = entry.get("problems", [])
        for text in [*([entry["error"]] if entry.get("error") else []), *problems][:8]:
            print(f"   {text[:400]}")
        print(f"-- {name}: {'ok' if entry['ok'] else 'FAILED'} in {entry['seconds']} s", flush=True)

    def _run(self, name: str, limit: float, command: Callable[[Path, float], list[str]]) -> dict[str, Any]:
        findings = self.path.with_name(f".{self.path.stem}-{name}.json")
        findings.unlink(missing_ok=True)
        began = time.monotonic()
        # The section's own end is a little earlier, so that it stops by itself.
        child = Child(command(findings, time.time() + limit * 0.95 - 2))
        status = child.wait(began + limit)
        output = child.text()
        with self.log.open("a") as log:
            log.write(f"\n===== {name}: exit status {status}\n{output}")
        found = json.loads(findings.read_text()) if findings.exists() else {"items": [], "problems": []}
        findings.unlink(missing_ok=True)
        entry = {"ok": status == 0 and not found["problems"], "seconds": round(time.monotonic() - began, 1), **found}
        if child.late:
            entry |= {"ok": False, "error": f"stopped after {limit:.0f} s"}
        elif status != 0 and not found["problems"]:
            entry["error"] = f"exit status {status}: {output[-1500:]}"
        print(output[-3000:], flush=True)
        return entry
