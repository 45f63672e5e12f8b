"""A real images worker in a process of its own, whose resolver says what the test wants. One JSON document in, one out.

    {"settings": {…}, "tasks": [{…}, …], "names": {"rebinding.test": [["127.0.1.9"], ["127.0.0.1"]], …}}

A name has a list of answers; each lookup takes the next, the last one stays.
"""

import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Names:
    """In place of `socket.getaddrinfo`."""

    def __init__(self, answers: dict[str, list[list[str]]]) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._real = socket.getaddrinfo

    def look_up(self, host: Any, port: Any, *arguments: Any, **settings: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name.replace(".", "").isdigit() or ":" in name:
            return self._real(host, port, *arguments, **settings)
        with self._lock:
            answers = self._answers.get(name.rstrip("."))
            if answers is None:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in addresses]


def main() -> None:
    wanted = json.load(sys.stdin)
    socket.getaddrinfo = Names(wanted["names"]).look_up
    from ingest.images import ImagesWorker

    worker = ImagesWorker(wanted["settings"])
    worker.setup()
    tasks = wanted["tasks"]
    with ThreadPoolExecutor(len(tasks)) as threads:
        results = list(threads.map(worker.process, tasks))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
