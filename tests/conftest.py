"""Test session: eight simulated CPU devices, no network, a temporary Hugging Face cache."""

import atexit
import os
import shutil
import socket
import tempfile

import pytest

# Read by jax and huggingface_hub when they are first imported, which pytest itself never does.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="jaxtune-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"]  # tokenized data
os.environ["TOKENIZERS_PARALLELISM"] = "false"

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a connection to any other machine an error that names the address."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        is_internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if is_internet and isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach {address[0]}:{address[1]}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)
