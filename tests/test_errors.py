"""Expected failures in one line with an exit status; bugs with their traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgecloud_sd.cloud.retry import AttemptFailed, PatienceEnded
from edgecloud_sd.data.prompts import format_task
from edgecloud_sd.host.errors import (
    EXIT_CLOSED_PIPE,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    ExpectedError,
    errors_to_exit,
    explain_error,
    explain_out_of_memory,
    is_out_of_memory,
)
from edgecloud_sd.host.stderr import silent_stderr
from edgecloud_sd.measure import quality
from edgecloud_sd.models import devices, memory
from edgecloud_sd.models.frontend import one_line_errors
from edgecloud_sd.verifier import CloudFault
from tests.support.suite import ROOT

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
)
EXPECTED = [
    (ValueError("--k: bad\nvalue"), EXIT_FAILURE, ["--k: bad value"]),
    (ValueError(), EXIT_FAILURE, ["ValueError"]),
    (OSError(28, "No space left on device", "a.json"), EXIT_FAILURE, ["a.json: No space left on device"]),
    (FloatingPointError("not finite"), EXIT_FAILURE, ["not finite"]),
    (CloudFault("no answer"), EXIT_FAILURE, ["no answer"]),
    (MemoryError(), EXIT_FAILURE, ["memory is used up:", "choose a smaller model"]),
    (RuntimeError(ALLOCATOR), EXIT_FAILURE, ["memory is used up (", "choose a smaller model"]),
    (OSError(12, "Cannot allocate memory"), EXIT_FAILURE, ["memory is used up (", "choose a smaller model"]),
    (torch.OutOfMemoryError(CUDA), EXIT_FAILURE, ["the GPU is used up (CUDA", "--cloud-dtype float16", "nvidia-smi"]),
    (RuntimeError("CUDA error: out of memory"), EXIT_FAILURE, ["the GPU is used up", "nvidia-smi"]),
    (ModuleNotFoundError("No module", name="fastapi.routing"), EXIT_FAILURE, ["fastapi", "edgecloud_sd[cloud]"]),
    (ModuleNotFoundError("No module", name="strange"), EXIT_FAILURE, ["pip install strange"]),
    (RuntimeError("could not create a primitive"), EXIT_FAILURE, ["memory is used up (could not create a primitive)"]),
    (SystemError("error return without exception set"), EXIT_FAILURE, ["memory is used up (error return"]),
    (RuntimeError("can't start new thread"), EXIT_FAILURE, ["memory is used up (can't start new thread)"]),
    (KeyboardInterrupt(), EXIT_INTERRUPTED, ["interrupted"]),
    (BrokenPipeError(), EXIT_CLOSED_PIPE, ["has closed it"]),
]
BUGS = [
    *(KeyError("klingon"), IndexError("9"), TypeError("x"), AttributeError("x"), AssertionError(), ZeroDivisionError()),
    *(SystemError("a bug"), RuntimeError("could not create a primitive descriptor for a softmax")),
    *(RuntimeError("the engine died"), ImportError("cannot import name 'x'"), RecursionError()),
    *(ModuleNotFoundError("No module", name="edgecloud_sd.nothing"), ModuleNotFoundError("No module")),
]


@pytest.mark.parametrize(("error", "status", "texts"), EXPECTED, ids=lambda value: repr(value)[:40])
def test_an_expected_failure_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgecloud_sd.host.errors._drop_output", lambda: None)
    with pytest.raises(SystemExit) as caught, errors_to_exit():
        raise error
    is_failure = status == EXIT_FAILURE  # the interpreter then prints the text and exits with 1
    line = str(caught.value.code) if is_failure else capsys.readouterr().err
    assert is_failure or caught.value.code == status
    assert line.startswith("error: ")
    assert "\n" not in line.strip()
    assert all(text in line for text in texts), line


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert explain_error(error) is None
    with pytest.raises(type(error)), errors_to_exit():
        raise error


def test_the_reason_of_a_library_that_cannot_import_a_module_counts() -> None:
    error = ModuleNotFoundError("Could not import module 'Model'. Are this object's requirements defined correctly?")
    error.__cause__ = MemoryError()
    assert explain_error(error) == explain_error(MemoryError())


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("the engine ran out of memory slots")])
def test_only_a_failure_of_the_allocator_is_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (OSError(12, "Cannot allocate memory"), "12"),
    ],
)
@pytest.mark.parametrize("is_explicit", [True, False])
def test_lack_of_memory_is_known_behind_the_error_of_a_library(
    cause: Exception, reason: str, is_explicit: bool
) -> None:
    error = KeyError("a field")
    setattr(error, "__cause__" if is_explicit else "__context__", cause)
    explained = explain_error(error, 0.5)
    assert explained is not None
    assert explained.line.startswith("--max-memory-gb: 0.5 is used up (")
    assert reason in explained.line
    error.__suppress_context__ = True
    assert is_out_of_memory(error) == is_explicit
    assert not is_out_of_memory(SystemExit(explained.line))


def test_the_words_of_a_server_about_its_memory_are_not_about_the_edge() -> None:
    attempt = AttemptFailed("the cloud answered 503 cannot allocate memory")
    fault = PatienceEnded(f"the cloud failed: {attempt}")
    fault.__cause__ = attempt
    assert explain_error(fault, 0.5) == ExpectedError(str(fault))


def test_lack_of_memory_in_a_load_names_the_checkpoint_and_the_limit() -> None:
    with pytest.raises(MemoryError) as caught, one_line_errors("a"):
        raise ValueError("Unable to allocate 9 GiB")
    explained = explain_error(caught.value, 16)
    assert explained is not None
    assert explained.line.startswith("--max-memory-gb: 16 is used up (checkpoint 'a' cannot be loaded: Unable to alloc")


def test_lack_of_gpu_memory_names_no_limit() -> None:
    assert "--max-memory-gb" not in explain_out_of_memory(torch.OutOfMemoryError(CUDA), 16)


def test_a_command_without_stdout_ends_as_if_its_reader_had_closed_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit, match=str(EXIT_CLOSED_PIPE)), errors_to_exit():
        pytest.fail("the command ran")
    assert "has closed it" in capsys.readouterr().err


def test_a_closed_pipe_ends_a_command_with_its_status() -> None:
    code = "from edgecloud_sd.host.errors import *\nwith errors_to_exit():\n    print('x' * 10**6, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "error: the reader of the output has closed it\n"
    process.stderr.close()
    assert process.wait() == EXIT_CLOSED_PIPE


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float16", "choose float32"),
        ("bfloat16", "choose float32"),
        ("float32", "its weights or the audio are at fault"),
        ("float64", "its weights or the audio are at fault"),
    ],
)
def test_the_advice_for_logits_that_are_not_finite_fits_the_number_format(dtype: str, advice: str) -> None:
    assert advice in devices.explain_not_finite(dtype)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "no GPU that torch can use (nvidia-smi): choose cpu"), (1, "cpu or cuda:0"), (4, "cpu or cuda:0 to cuda:3")],
)
def test_a_device_that_is_not_there_names_the_devices_of_the_machine(
    count: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=r"device 'cuda:9' cannot be used here: .*; .*") as caught:
        devices.check_device("cuda:9")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda: format_task("klingon", "default"),
        lambda: quality.tokenize("a", "klingon"),
        lambda: quality.is_in_language("a", "klingon"),
        lambda: quality.score([], [], "klingon"),
    ],
)
def test_an_unknown_language_is_refused_with_the_known_ones(use: object) -> None:
    with pytest.raises(ValueError, match="unknown language 'klingon': choose one of chinese, english"):
        use()  # type: ignore[operator]


def test_an_unknown_name_of_another_table_is_refused_too() -> None:
    with pytest.raises(ValueError, match="unknown normalisation 'x': choose one of none"):
        quality.score(["a"], [["a"]], "english", normalisation="x")
    with pytest.raises(ValueError, match="unknown dtype 'float8': choose one of float64"):
        memory.count_loaded_bytes({"weight": (2, 3)}, "float8")


def test_an_unknown_prompt_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown prompt_type 'x': choose one of default, detailed, concise"):
        format_task("english", "x")


def test_a_library_that_writes_past_python_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with silent_stderr(), silent_stderr():
        os.write(2, b"noise")
    os.write(2, b"kept")
    assert capfd.readouterr().err == "kept"


def test_a_process_without_stderr_reads_audio_too(tmp_path: Path) -> None:
    code = "import os; os.close(2)\nfrom edgecloud_sd.host.stderr import *\nwith silent_stderr():\n    print('ok')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True, check=True)
    assert done.stdout == "ok\n"
