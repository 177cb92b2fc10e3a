"""Results, written as they come: by each section's own process to a file of its own, and by the suite to the one that
stays."""

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
    """Whole or not at all: a run that is cut off leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


class Findings:
    """What one section finds: items, and what went wrong with others. Written to `path` after each.

    until: by time.time(): from then on `attempt` begins nothing.
    """

    def __init__(self, path: Path, until: float):
        self._path, self._until = path, until
        self.items: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def add(self, say: str = "", **item: Any) -> None:
        """Keep an item; print it, or what to `say` of it."""
        self.items.append(item)
        print(say or ", ".join(f"{k} {v}" for k, v in item.items()), flush=True)
        self.write()

    def attempt(self, what: str, run: Callable[[], Any]) -> None:
        """Run one part of a section. A failure is a problem; the next part is still wanted."""
        if time.time() >= self._until:
            self.problem(f"{what}: not run: the time was used up")
            return
        try:
            run()
        except Exception as error:  # noqa: BLE001  # whatever it is, the others' numbers are wanted
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
    """The results of a run. deadline: by time.monotonic(); no section begins later.

    log: the file to which the output of every section's process goes, whole."""

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
        """Run one section in a process of its own, for `limit` seconds or what is left of the time.

        command: from the file for findings and the time (by time.time()) until which it may run."""
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
        # Within the section the time is up a little earlier, so that it ends by itself.
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
