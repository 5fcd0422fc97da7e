"""A job leaves the settings of its process as it has found them."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fitloop.backends.remote.job_isolation import job_isolation


def pairs(tmp_path: Path) -> dict[str, tuple[Callable[[], Any], Callable[[], object]]]:
    """Return functions that read and change each setting."""
    logger = logging.getLogger("fitloop.test.isolation")
    return {
        "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
        "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
        "deterministic": (
            torch.get_deterministic_debug_mode,
            lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        ),
        "precision": (
            torch.get_float32_matmul_precision,
            lambda: torch.set_float32_matmul_precision("medium"),
        ),
        "threads": (torch.get_num_threads, lambda: torch.set_num_threads(7)),
        "anomaly": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
        "grad": (torch.is_grad_enabled, lambda: torch._C._set_grad_enabled(False)),
        "benchmark": (
            lambda: torch.backends.cudnn.benchmark,
            lambda: setattr(torch.backends.cudnn, "benchmark", True),
        ),
        "directory": (os.getcwd, lambda: os.chdir(tmp_path)),
        "environment": (
            lambda: dict(os.environ),
            lambda: (os.environ.pop("PATH"), os.environ.setdefault("FITLOOP_TEST", "1")),
        ),
        "path": (lambda: list(sys.path), lambda: sys.path.insert(0, "nowhere")),
        "stdout": (lambda: sys.stdout, lambda: setattr(sys, "stdout", sys.stderr)),
        "filters": (
            lambda: list(warnings.filters),
            lambda: warnings.filterwarnings("ignore", "nothing"),
        ),
        "errors of numpy": (np.geterr, lambda: np.seterr(all="raise")),
        "root logger": (
            lambda: (logging.root.level, list(logging.root.handlers)),
            lambda: logging.basicConfig(level=1, handlers=[logging.NullHandler()], force=True),
        ),
        "logger": (
            lambda: (logger.level, list(logger.handlers), logger.isEnabledFor(1)),
            lambda: vars(logger).update(level=1, handlers=[logging.NullHandler()]),
        ),
        "logging": (lambda: logging.root.manager.disable, lambda: logging.disable()),
        "signal": (
            lambda: signal.getsignal(signal.SIGTERM),
            lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        ),
        "recursion": (sys.getrecursionlimit, lambda: sys.setrecursionlimit(4321)),
        "collector": (gc.isenabled, gc.disable),
        "excepthook": (
            lambda: threading.excepthook,
            lambda: setattr(threading, "excepthook", print),
        ),
    }


def test_settings_when_a_job_changes_them_then_are_put_back(tmp_path: Path) -> None:
    settings = pairs(tmp_path)
    before = {name: read() for name, (read, _change) in settings.items()}
    unchanged: list[str] = []

    def job() -> None:
        with job_isolation():
            for name, (read, change) in settings.items():
                change()
                if read() == before[name]:
                    unchanged.append(name)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert unchanged == []
    assert {name: read() for name, (read, _change) in settings.items()} == before


def test_generators_when_a_job_seeds_them_then_the_next_job_has_other_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with job_isolation():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        after = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seeded = draw()
    random.setstate(after[0])
    np.random.set_state(after[1])
    torch.set_rng_state(after[2])
    with job_isolation():
        drawn = draw()
    assert all(one != other for one, other in zip(drawn, seeded, strict=True))


def test_directory_when_a_job_removes_its_own_then_is_the_one_before(tmp_path: Path) -> None:
    before = os.getcwd()
    with job_isolation():
        (tmp_path / "of the job").mkdir()
        os.chdir(tmp_path / "of the job")
        (tmp_path / "of the job").rmdir()
    assert os.getcwd() == before
