"""The report while it is served: its page follows the files of a run, on this machine alone."""

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import run_verb, write_jsonl
from mice_jax import report
from mice_jax.report_page import page
from mice_jax.report_page.live import LiveReport
from test_page import COVERED, browser, make_config, write_run  # noqa: F401  (a fixture)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[LiveReport]:
    write_run(tmp_path / "run", make_config(), steps=40)
    with LiveReport([tmp_path / "run"], 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def add_step(folder: Path, **values: Any) -> None:
    """Appends a line to a run's metrics, as the run does: a page may read the file at any time."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    line = last | {"step": last["step"] + 1, "samples": last["samples"] + 8} | values
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(line) + "\n")


def ask(server: LiveReport, path: str, **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read().decode()


# ---------------------------------------------------------------------------------------- the server
@pytest.mark.smoke
def test_served_content_is_read_again_and_sent_where_it_is_new(served: LiveReport) -> None:
    first, text = ask(served, "/content")
    assert first.status == 200 and json.loads(text)["runs"][0]["step"] == 40
    tag = first.headers["ETag"]
    assert ask(served, "/content", **{"If-None-Match": tag})[0].status == 304
    add_step(served.folders[0])
    second, text = ask(served, "/content", **{"If-None-Match": tag})
    assert second.status == 200 and json.loads(text)["runs"][0]["step"] == 41


@pytest.mark.smoke
def test_served_page_may_fetch_from_its_server_alone(served: LiveReport) -> None:
    _, html = ask(served, "/")
    assert "default-src 'none'" in html and "connect-src 'self'" in html
    assert "connect-src" not in page.render(page.collect(served.folders)), "a file fetches nothing"


@pytest.mark.smoke
def test_server_answers_neither_other_names_nor_other_paths(served: LiveReport) -> None:
    assert served.server_address[0] == "127.0.0.1"
    assert ask(served, "/", Host="report.example.com")[0].status == 403
    assert ask(served, "/content", Host=f"localhost:{served.server_port}")[0].status == 200
    for path in ("/metrics.jsonl", "/../run/config.json", "/content/"):
        assert ask(served, path)[0].status == 404


# ---------------------------------------------------------------------------------------- the command
@pytest.mark.smoke
def test_port_in_use_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", make_config(), steps=3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run_verb(report.main, [f"--workdir={tmp_path / 'run'}", "--serve", f"--port={port}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: --port={port} cannot be used on this machine: Address already in use.")
    assert "--port=0" in printed and printed.count("\n") == 1


@pytest.mark.smoke
@pytest.mark.parametrize(
    "arguments, message", [(["--serve", "--output=a.html"], "--serve writes no file"), (["--port=80"], "of --serve")]
)
def test_flags_that_exclude_each_other_are_an_error(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", make_config(), steps=3)
    assert run_verb(report.main, [f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.smoke
def test_interrupt_ends_the_server_with_code_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(server: LiveReport) -> None:
        raise KeyboardInterrupt

    write_run(tmp_path / "run", make_config(), steps=3)
    monkeypatch.setattr(LiveReport, "serve_forever", interrupt)
    assert run_verb(report.main, [f"--workdir={tmp_path / 'run'}", "--serve", "--port=0"]) == 0
    assert "report: http://127.0.0.1:" in capsys.readouterr().out


@pytest.mark.smoke
def test_run_is_running_while_its_process_lives(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, make_config(), steps=3, status="preempted", reason="SIGINT")

    def status(pid: int, *events: str) -> str:
        (folder / "lock").write_text(f"process {pid} on {socket.gethostname()}\n")
        write_jsonl(folder / "events.jsonl", [{"event": e, "step": 3, "time": 1.0} for e in events])
        return page.collect([folder])["runs"][0]["status"]

    assert status(os.getpid(), "started", "preempted", "resumed") == "running"
    assert status(os.getpid(), "started", "preempted") == "preempted", "the process lives on and has ended the run"
    assert status(2**22 + 1, "started", "preempted", "resumed") == "preempted", "no process has this number"


# ---------------------------------------------------------------------------------------- in a browser
# The number of labels of vertical axes that begin above the end of the one before.
OVERLAPS = """() => [...document.querySelectorAll("#charts .plot")].flatMap(plot => {
  const places = [...plot.querySelectorAll(".ytick text")].map(t => t.getBoundingClientRect());
  places.sort((a, b) => a.top - b.top);
  return places.slice(1).filter((place, i) => place.top < places[i].bottom - 1);
}).length"""
TICKS = "plot => [...plot.querySelectorAll('.ytick text')].map(t => t.textContent)"


@pytest.mark.slow
@pytest.mark.chromium
def test_open_page_follows_a_run_and_keeps_what_its_reader_did(
    served: LiveReport,
    browser: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "REFRESH_S", 0.2)
    [folder] = served.folders
    long = f"a reason that is {'long ' * 40}"
    for step in range(200):
        add_step(folder, grad_norm=10.0 ** (step % 5 - 2), update_norm=20.0 ** (step % 3 / 2))
    report_file = json.loads((folder / "data_report.json").read_text()) | {"warnings": ["take care"]}
    report_file["sources"]["chats"]["dropped"] = {long: 2}
    (folder / "data_report.json").write_text(json.dumps(report_file))
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(served.address)
    drawn = "html[data-drawn]:not([data-drawn='{}'])"
    tab.wait_for_selector(drawn.format(0), state="attached", timeout=60e3)

    # The tool bar has a place of its own, log ticks are whole numbers, and long cells are broken into lines.
    assert tab.evaluate(COVERED) == 0
    ticks = [float(t) for t in tab.query_selector_all("#charts .plot")[1].evaluate(TICKS)]
    assert 4 <= len(ticks) <= 9 and ticks == sorted(set(ticks)) and ticks[-1] >= 10 * ticks[0]
    assert tab.evaluate(OVERLAPS) == 0
    [cell] = [c for c in tab.query_selector_all("#data-body td") if long.strip() in c.text_content()]
    assert cell.bounding_box()["width"] < 600
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280

    # What is new is drawn in place.
    tab.select_option("#x", "step")
    tab.wait_for_selector(drawn.format(1), state="attached")
    tab.evaluate("window.mark = document.querySelector('#charts .plot'); scrollTo({top: 700, behavior: 'instant'})")
    place = "Math.round(window.mark.getBoundingClientRect().top)"  # on the screen; what is above it may grow
    before = tab.evaluate(place)
    add_step(folder, **{"eval/other/loss": 1.5, "device_memory_peak_bytes": 12.3e9})
    tab.wait_for_selector("#tiles dd:has-text('241')", timeout=60e3)
    assert tab.evaluate(place) == before and tab.input_value("#x") == "step"
    assert tab.evaluate("window.mark === document.querySelector('#charts .plot')")
    assert "12.3 GB" in tab.text_content("#tiles") and tab.text_content("#made").startswith("live")
    assert "eval/other/loss" in tab.text_content("#best") and "eval/other/loss" in tab.text_content("#evaluation")
    last = "Math.max(...document.querySelector('#charts .plot').data[0].x)"
    tab.wait_for_function(f"{last} > 235")

    served.shutdown()  # The page says so and keeps what it shows.
    served.server_close()
    tab.wait_for_selector("#made:has-text('does not answer')", timeout=60e3)
    assert complaints == [] and "241" in tab.text_content("#tiles")
    tab.close()
