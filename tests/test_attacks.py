"""The command that attacks a server: its tables from invented measurements, and two attacks for real."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections import Counter

import pytest

from bench.attacks import connections, crowding, giving_up, gone, turns
from bench.attacks.__main__ import NAMES, SECTIONS, main
from bench.attacks.connections import Closings, HeldConnections, describe_closings, hold_connections
from bench.attacks.table import AttackTable, Cell, Latencies, format_cell, render_attack_table
from bench.attacks.target import HOST

TABLES = [
    (
        connections.BEFORE_THE_KEY,
        describe_closings(Closings(4, (1.0, 2.0, 9.5)), 12.345, Latencies((0.001, 0.003), 2)),
        ["4", "1", "2", "9.50", "12.3", "2", "2.98", "50"],
    ),
    (
        connections.BEFORE_THE_KEY,
        describe_closings(Closings(4, ()), 0.0, Latencies((), 3)),
        ["4", "4", "-", "-", "0", "-", "-", "0"],
    ),
    (
        turns.TURNS,
        turns.compare_latencies(Latencies((0.001, 0.001)), Latencies((0.002, 0.004), 1)),
        ["2", "1", "1", "3", "1", "3.98", "3.98"],
    ),
    (
        turns.TURNS,
        turns.compare_latencies(Latencies((0.001,)), Latencies((), 7)),
        ["0", "7", "1", "-", "1", "-", "-"],
    ),
    (
        crowding.CROWDING,
        crowding.describe_edges(Counter(verified=60, lost=20, captions=5)),
        ["10", "75", "5", "0"],
    ),
    (crowding.CROWDING, crowding.describe_edges(Counter()), ["0", "-", "0", "0"]),
]


@pytest.mark.parametrize(("section", "cells", "texts"), TABLES)
def test_a_table_shows_what_was_measured(section: AttackTable, cells: list[Cell], texts: list[str]) -> None:
    name = next(iter(section.attacks))
    shown = render_attack_table(section, {name: cells}).splitlines()
    assert shown[0] == f"## {section.title}"
    assert shown[4].removeprefix(section.attacks[name]).split() == texts
    assert len(section.headings) == len(texts)
    assert shown[-1] == section.note


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), ("error", "error"), (0, "0"), (0.125, "0.12"), (7.0, "7"), (12.34, "12.3"), (5201.3, "5201")],
)
def test_a_cell_has_as_many_digits_as_it_needs(cell: Cell, text: str) -> None:
    assert format_cell(cell) == text


def test_the_name_of_an_attack_is_unique_and_another_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(NAMES) == len(set(NAMES)) == sum(len(section.attacks) for section in SECTIONS)
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "silent,loud"])
    assert stopped.value.code == 2
    assert "--only: 'loud' is not one of silent, " in capsys.readouterr().err


@pytest.mark.parametrize("is_closing", [True, False])
def test_connections_that_the_server_closes_are_told_from_those_that_it_keeps(
    is_closing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HOLD_SECONDS", 0.05 if not is_closing else 5.0)
    monkeypatch.setattr(connections, "DRIP_SECONDS", 0.01)
    with socket.create_server((HOST, 0)) as listening:

        def accept() -> None:
            kept = [listening.accept()[0] for _ in range(3)]
            over.wait(0 if is_closing else 5)
            for connection in kept:
                connection.close()

        over, server = threading.Event(), threading.Thread(target=accept)
        server.start()
        closings = hold_connections(HeldConnections(3, b"GET", b"a"), listening.getsockname()[1])
        over.set()
        server.join()
    assert len(closings.seconds) == (3 if is_closing else 0)


@pytest.mark.parametrize("name", ["dead", "then-resets", "then-503"])
def test_a_faulty_cloud_has_its_fault(name: str) -> None:
    with giving_up.faulty_cloud(name, b"facts") as url:
        if name != "dead":
            with urllib.request.urlopen(f"{url}/v1/model", timeout=5) as answer:
                assert answer.read() == b"facts"
        with pytest.raises(OSError, match=r"503|reset|refused"):
            urllib.request.urlopen(f"{url}/v1/sessions", timeout=5)


@pytest.mark.slow
def test_two_attacks_run_for_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(connections, "HELD_CONNECTIONS", {"dripped-body": HeldConnections(20, connections.WRONG_KEY)})
    monkeypatch.setattr(gone, "MOST_IDS", 500)
    main(["--only", "dripped-body,one-open"])
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith(("a byte of a body", "one open"))]
    opened, held, *_, answered = rows[0].split("wrong key")[1].split()
    assert (opened, held, answered) == ("20", "0", "100")
    assert rows[1].split()[-1] == "0"  # no session is left
