"""What was paid for or computed once, kept by the hash of everything that went into it: replies of judges, rewards.

One SQLite file for all studies; several processes may use it at once, and a write is there whole or not at all.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from harness.records import UsageError


class Cache:
    """A store of JSON objects, by key.

    Args:
        path: the SQLite file; made where it is not there.

    Raises:
        UsageError: for a file that is damaged or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS found (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UsageError(
                f"{path}: not usable as a cache ({error}); delete it (what it holds is asked for or computed again) or "
                "make its folder writable"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the value of a key, or None."""
        with self._lock:
            row = self._database.execute("SELECT value FROM found WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a value; the first one stays where two processes have found it."""
        with self._lock:
            self._database.execute("INSERT OR IGNORE INTO found VALUES (?, ?)", (key, json.dumps(value)))

    def close(self) -> None:
        """Close the file."""
        self._database.close()
