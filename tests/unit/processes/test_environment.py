from __future__ import annotations

import pytest

from rbee.processes import child_environment


def test_secrets_of_ours_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBEE_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    assert "secret" not in " ".join(child_environment({}).values())


def test_what_a_model_needs_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "HOME": "/home/bee",
        "LC_ALL": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "1",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "HIP_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "2",
        "SSL_CERT_FILE": "/etc/ca.pem",
        "LD_LIBRARY_PATH": "/opt/lib",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert given.items() <= child_environment({}).items()


def test_extra_wins_and_python_writes_unbuffered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/bee")
    made = child_environment({"HOME": "/elsewhere", "JOB_ID": "job-1"})
    assert (made["HOME"], made["JOB_ID"], made["PYTHONUNBUFFERED"]) == ("/elsewhere", "job-1", "1")
