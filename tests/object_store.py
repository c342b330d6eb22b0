"""An S3 server on loopback for the tests: moto's, in a process of its own, on a port that the system chooses."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

ANNOUNCED = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server that runs while the context lasts."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := ANNOUNCED.search(line):
                break
        else:
            raise RuntimeError("the S3 server did not start:\n" + "".join(said))
        # It writes a line a request: somebody has to read them.
        reader = threading.Thread(target=server.stderr.read, daemon=True)
        reader.start()
        try:
            yield found[1]
        finally:
            server.terminate()
            reader.join()


def environment(address: str) -> dict[str, str]:
    """Where the store's tools find the server, and what they show it."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
