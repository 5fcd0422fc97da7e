"""The web service of the examples, by a real server and a real client."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from support.event_loops import HANG_TIMEOUT
from support.example_service import (  # finds the example, too
    EXAMPLES,
    EventData,
    connect_to_service,
    first,
    run_service,
    run_service_process,
)

# isort: split
import service.app
import service.records
import service.trainings
from service.feed import Feed, Message, permanent_text, replaceable_text
from service.server import main
from service.settings import BadRequestError, read_settings
from service.trainers import make_trainer
from service.trainings import Options

LASTING = ("submitted", "run_started", "epoch_ended", "prompt_asked", "prompt_answered")
ENDINGS = ("run_ended", "over")


@pytest.fixture(params=[pytest.param(("asyncio", {}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """uvicorn is for asyncio only; as a program it takes uvloop."""
    return request.param


def kinds(messages: list[EventData]) -> list[str]:
    """Return the kinds of the messages that always come."""
    return [one["kind"] for one in messages if one["kind"] in LASTING + ENDINGS]


def columns(messages: list[EventData], phase: str, name: str) -> list[float]:
    return [one["metrics"][phase][name] for one in messages if one["kind"] == "epoch_ended"]


# -- trainings -------------------------------------------------------------------------------------


async def test_training_when_started_then_its_events_tell_it_to_the_end() -> None:
    async with run_service() as service:
        begun = await service.start(name=" first ", epochs=2, lr=0.1)
        assert (begun["id"], begun["name"], begun["model"]) == (1, "first", "small")
        messages = await service.everything(1)
        found = await service.get("/trainings/1")
        listed = await service.get("/trainings")
    assert messages[0]["kind"] == "hello"
    assert kinds(messages) == ["submitted", "run_started", "epoch_ended", "epoch_ended", *ENDINGS]
    for phase in ("train", "valid"):
        for name in ("loss", "accuracy"):
            assert found["metrics"][phase][name] == columns(messages, phase, name)
            assert len(found["metrics"][phase][name]) == 2
    over = messages[-1]
    assert over["status"] == found["status"] == "done"
    assert over["result"]["stop_reason"] == "completed"
    assert over["result"]["epochs"] == found["epoch"] == 2
    assert over["result"]["best_score"] == max(found["metrics"]["valid"]["accuracy"]) > 0.5
    del found["metrics"]
    assert found["weights"] == "/trainings/1/weights"
    assert listed == [found]


@pytest.mark.parametrize("go_on", [True, False])
async def test_question_when_answered_then_the_training_does_so(go_on: bool) -> None:
    async with run_service() as service:
        await service.start(epochs=3, ask_every=2)
        asked = await service.until(1, "prompt_asked")
        assert (asked["epoch"], asked["epochs"]) == (2, 3)
        assert (await service.get("/trainings/1"))["question"]["epoch"] == 2
        assert (await service.answer(1, 2, go_on)).status_code == 202
        messages = await service.everything(1)
        late = await service.answer(1, 2, True)
    expected = ["epoch_ended"] if go_on else []
    assert kinds(messages)[4:] == ["prompt_asked", "prompt_answered", *expected, *ENDINGS]
    assert messages[-1]["result"]["stop_reason"] == ("completed" if go_on else "prompt")
    assert messages[-1]["question"] is None
    assert late.status_code == 409
    assert "asks nothing now" in late.text


async def test_question_when_answered_for_another_epoch_then_it_stays_open() -> None:
    async with run_service() as service:
        await service.start(epochs=2, ask_every=1)
        await service.until(1, "prompt_asked")
        other = await service.answer(1, 7, False)
        wrong = await service.client.post("/trainings/1/answer", json={"go_on": "perhaps"})
        assert (await service.get("/trainings/1"))["question"]["epoch"] == 1
        assert (await service.answer(1, 1, False)).status_code == 202
        assert (await service.everything(1))[-1]["result"]["epochs"] == 1
    assert other.status_code == 409
    assert "epoch is 7; expected 1" in other.text
    assert wrong.status_code == 422
    assert "perhaps" in wrong.text


async def test_cancel_when_running_or_waiting_then_it_ends_and_the_next_one_begins() -> None:
    async with run_service(max_concurrent=1) as service:
        await service.start(name="running", epochs=1000)
        assert (await service.start(name="waiting"))["status"] == "waiting"
        await service.start(name="next", epochs=1)
        await service.until(1, "epoch_ended")
        for number in (2, 1, 1):
            answer = await service.client.delete(f"/trainings/{number}")
            assert answer.status_code == 202
        running, waiting, following = [await service.everything(n) for n in (1, 2, 3)]
        done = await service.client.delete("/trainings/3")
    assert [one["status"] for one in (running[-1], waiting[-1])] == ["cancelled", "cancelled"]
    assert running[-2]["kind"] == "run_ended"
    assert running[-2]["stop_reason"] == "cancelled"
    assert [one["kind"] for one in running].count("cancelling") == 1
    assert [one["kind"] for one in waiting] == ["hello", "submitted", "cancelling", "over"]
    assert following[-1]["status"] == "done"
    assert (done.status_code, done.json()["status"]) == (202, "done")


async def test_cancel_when_more_end_at_once_than_a_stream_keeps_then_all_are_told_to_be_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def keep_nothing(*arguments: object) -> None:
        """Take no time for 4000 files."""

    monkeypatch.setattr(service.trainings, "MAX_TRAININGS", 3000)
    monkeypatch.setattr(service.records.Records, "write", keep_nothing)
    options = Options(save_path=tmp_path, at_once=1)
    async with service.trainings.open_trainings(options) as trainings:
        settings = read_settings({"epochs": 1000})  # the first one must not end by itself
        begun = [await trainings.submit(settings) for _ in range(2000)]
        for training in begun[1:]:  # the first one runs already
            trainings.cancel(training)
        for training in begun[1:]:
            await training.over.wait()
        assert trainings.dropped > 0
        assert {training.as_dict()["status"] for training in begun[1:]} == {"cancelled"}
        assert not begun[0].over.is_set()
        await trainings.close()
    assert begun[0].over.is_set()


async def test_cancel_when_a_question_is_open_then_the_question_is_closed() -> None:
    async with run_service() as service:
        await service.start(epochs=2, ask_every=1)
        await service.until(1, "prompt_asked")
        await service.client.delete("/trainings/1")
        over = (await service.everything(1))[-1]
    assert (over["status"], over["question"]) == ("cancelled", None)


async def test_resume_when_cancelled_then_it_goes_on_to_the_values_of_one_that_was_not() -> None:
    async with run_service(max_concurrent=1) as service:
        await service.start(epochs=3)
        await service.everything(1)
        await service.start(epochs=3, ask_every=2)
        await service.until(2, "prompt_asked")
        refused = await service.client.post("/trainings/2/resume")
        await service.client.delete("/trainings/2")
        assert (await service.everything(2))[-1]["status"] == "cancelled"
        resumed = await service.client.post("/trainings/2/resume")
        await service.until(2, "prompt_asked")
        await service.answer(2, 2, True)
        messages = await service.everything(2)
        done = await service.client.post("/trainings/2/resume")
        first, second = [await service.get(f"/trainings/{number}") for number in (1, 2)]
    assert (refused.status_code, done.status_code) == (409, 409)
    assert "is running; expected one that was cancelled" in refused.text
    assert (resumed.status_code, resumed.json()["epoch"]) == (202, 2)
    assert messages[-1]["status"] == second["status"] == "done"
    assert second["metrics"] == first["metrics"]


async def test_training_when_it_diverges_then_it_failed_and_says_why() -> None:
    async with run_service() as service:
        await service.start(lr=900, model="medium")
        over = (await service.everything(1))[-1]
        found = await service.get("/trainings/1")
    assert over["status"] == found["status"] == "failed"
    assert over["error"].startswith("The training diverged in epoch 1: ")
    assert over["error"].endswith("Try a learning rate below 900.")
    assert over["result"] is None


async def test_trainings_when_two_at_once_then_both_go_on_and_each_as_alone() -> None:
    async with run_service(max_concurrent=2) as service:
        await service.start(epochs=2)
        alone = await service.everything(1)
        for _ in range(2):
            await service.start(epochs=2, ask_every=1)
        async with service.events() as events:  # both ask, so both run
            for _ in range(2):
                await first(events, "prompt_asked")
        for number in (3, 2):
            await service.answer(number, 1, True)
        both = [await service.everything(number) for number in (2, 3)]
        counted = await service.get("/status")
    for messages in both:
        assert messages[-1]["status"] == "done"
        assert columns(messages, "train", "loss") == columns(alone, "train", "loss")
    assert counted["trainings"] == {"done": 3}
    assert counted["dropped_events"] == 0


async def test_question_when_nobody_answers_then_it_goes_on_and_keeps_no_place() -> None:
    async with run_service(max_concurrent=1, answer_seconds=0.01) as service:
        await service.start(epochs=2, ask_every=1)
        await service.start(name="waits for that one", epochs=1)
        messages, waiting = [await service.everything(number) for number in (1, 2)]
    (asked,) = [one for one in messages if one["kind"] == "prompt_asked"]
    (expired,) = [one for one in messages if one["kind"] == "prompt_expired"]
    assert asked["until"] > messages[0]["time"] - 60
    assert (asked["epoch"], expired["epoch"]) == (1, 1)
    assert messages[-1]["result"]["stop_reason"] == "completed"
    assert waiting[-1]["status"] == "done"


# -- a service that is started again ---------------------------------------------------------------


async def test_restart_when_some_are_over_then_they_are_listed_with_their_curves(
    tmp_path: Path,
) -> None:
    async with run_service(save_path=tmp_path, max_concurrent=1) as service:
        await service.start(name="<i>done</i>", epochs=2)
        await service.start(name="failed", lr=900, model="medium")
        await service.start(name="cancelled", epochs=1000)
        await service.everything(2)
        await service.until(3, "epoch_ended")
        await service.client.delete("/trainings/3")
        await service.everything(3)
        before = [await service.get(f"/trainings/{number}") for number in (1, 2, 3)]
    async with run_service(save_path=tmp_path) as service:
        after = [await service.get(f"/trainings/{number}") for number in (1, 2, 3)]
        messages = await service.everything(1)
        unchanged = await service.client.delete("/trainings/3")
        assert (await service.start(epochs=1))["id"] == 4
    assert after == before
    assert [one["status"] for one in after] == ["done", "failed", "cancelled"]
    assert len(after[0]["metrics"]["valid"]["loss"]) == 2
    assert [one["kind"] for one in messages] == ["hello", "submitted", "over"]
    assert messages[1]["metrics"] == after[0]["metrics"]
    assert unchanged.json()["status"] == "cancelled"


async def test_restart_when_some_were_not_over_then_they_go_on_to_the_same_values(
    tmp_path: Path,
) -> None:
    async with run_service(save_path=tmp_path, max_concurrent=1) as service:
        for name in ("alone", "interrupted", "waiting"):
            await service.start(name=name, epochs=4, ask_every=3 if name == "interrupted" else 0)
        await service.until(2, "prompt_asked")
    async with run_service(save_path=tmp_path, max_concurrent=1) as service:
        await service.until(2, "prompt_asked")  # as before
        await service.answer(2, 3, True)
        messages = await service.everything(2)
        await service.everything(3)
        found = [await service.get(f"/trainings/{number}") for number in (1, 2, 3)]
    assert messages[1]["epoch"] == len(messages[1]["metrics"]["valid"]["loss"]) == 3
    assert [one["epoch"] for one in messages if one["kind"] == "epoch_ended"] == [4]
    for one in found:
        assert (one["status"], one["epoch"]) == ("done", 4)
        assert one["metrics"] == found[0]["metrics"]
        assert one["best"] == found[0]["best"]


async def test_restart_when_a_record_is_damaged_then_the_others_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with run_service(save_path=tmp_path) as service:
        for number in (1, 2, 3):
            await service.start(epochs=1)
            await service.everything(number)
    (tmp_path / "1" / "weights.msgpack").write_bytes(b"")
    (tmp_path / "2" / "training.json").write_text('{"settings": {"lr": "fast"}}')
    (tmp_path / "3" / "training.json").write_text("{")
    async with run_service(save_path=tmp_path) as service:
        assert [one["id"] for one in await service.get("/trainings")] == [1]
        assert (await service.client.get("/trainings/1/weights")).status_code == 404
        assert (await service.start(epochs=1))["id"] == 4
    printed = capsys.readouterr().err
    assert "training 2 is left out" in printed
    assert "training.json cannot be read" in printed


async def test_start_when_the_disk_takes_nothing_then_it_is_refused(tmp_path: Path) -> None:
    async with run_service(save_path=tmp_path) as service:
        (tmp_path / "1").write_text("a file, where the directory of the training has to be")
        answer = await service.client.post("/trainings", json={})
        assert (answer.status_code, await service.get("/trainings")) == (507, [])
        assert (await service.start(epochs=1))["id"] == 2


async def test_start_when_the_service_ends_then_it_is_refused_and_not_started_later(
    tmp_path: Path,
) -> None:
    options = Options(save_path=tmp_path)
    async with service.trainings.open_trainings(options) as trainings:
        async with anyio.create_task_group() as group:

            async def submit() -> None:
                with pytest.raises(BadRequestError, match="about to end"):
                    await trainings.submit(read_settings({}))

            group.start_soon(submit)
            await anyio.lowlevel.checkpoint()  # it writes its record now
            trainings.interrupt()
        await submit()
    async with service.trainings.open_trainings(options) as trainings:
        assert list(trainings) == []


async def test_weights_when_done_then_they_can_be_loaded(tmp_path: Path) -> None:
    async with run_service() as running:
        await running.start(epochs=2)
        over = (await running.everything(1))[-1]
        answer = await running.client.get(over["weights"])
        await running.start(epochs=1000)
        early = await running.client.get("/trainings/2/weights")
    assert answer.headers["content-disposition"] == 'attachment; filename="training-1.safetensors"'
    (tmp_path / "weights.safetensors").write_bytes(answer.content)
    trainer = make_trainer(read_settings({}))
    await trainer.load_model("weights.safetensors", tmp_path)
    metrics = await trainer.test(trainer.valid_dl, verbose=False)
    assert metrics["accuracy"] == over["best"]["score"]
    assert early.status_code == 409


# -- requests that cannot be done ------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": "fast"}, "lr is 'fast'; expected a number above 0"),
    ({"lr": 0}, "lr is 0; expected a number above 0"),
    ({"lr": True}, "lr is True; expected a number above 0"),
    ({"epochs": 2.5}, "epochs is 2.5; expected a whole number from 1 to 1000"),
    ({"epochs": 10**9}, "epochs is 1000000000; expected a whole number from 1 to 1000"),
    ({"ask_every": -1}, "ask_every is -1; expected a whole number from 0"),
    ({"model": "huge"}, "model is 'huge'; expected one of small, medium, large"),
    ({"model": ["small"]}, "model is ['small']; expected one of small"),
    ({"name": "  "}, "name is '  '; expected a text of 1 to 60 printable characters"),
    ({"name": "n" * 61}, "; expected a text of 1 to 60 printable characters"),
    ({"batch": 3}, "'batch' is no setting; there are name, model, lr, epochs, ask_every"),
]


async def test_start_when_settings_are_wrong_then_it_says_what_was_expected() -> None:
    async with run_service() as service:
        for body, expected in WRONG:
            answer = await service.client.post("/trainings", json=body)
            assert answer.status_code == 422, body
            (problem,) = answer.json()["problems"]
            assert expected in problem["message"]
            assert problem["field"] == next(iter(body))
        answer = await service.client.post("/trainings", json={"lr": "a", "epochs": None})
        assert [one["field"] for one in answer.json()["problems"]] == ["lr", "epochs"]
        assert await service.get("/trainings") == []


async def test_request_when_it_is_none_then_it_is_refused() -> None:
    json_type = {"Content-Type": "application/json"}
    async with run_service() as service:
        post = service.client.post
        answers = [
            (400, "expected JSON", await post("/trainings", content=b"{", headers=json_type)),
            (422, "expected an object", await post("/trainings", json=[1])),
            (422, "'\\ud800'", await post("/trainings", content=rb'"\ud800"', headers=json_type)),
            (413, "send less", await post("/trainings", json={"name": "n" * 70_000})),
            (415, "expected application/json", await post("/trainings", content=b"{}")),
            (404, "no training '5'", await service.client.get("/trainings/5")),
            (404, "no training '1e3'", await service.client.delete("/trainings/1e3")),
            (404, "no training '99", await service.client.get(f"/trainings/{'9' * 5000}")),
            (404, "no training '9'", await service.client.get("/trainings/9/events")),
            (404, "Not Found", await service.client.get("/nowhere")),
            (404, "Not Found", await service.client.get("/page/%2e%2e/app.py")),
            (405, "Method Not Allowed", await service.client.put("/trainings", json={})),
        ]
    for status, expected, answer in answers:
        assert answer.status_code == status
        assert expected in answer.json()["problems"][0]["message"]


async def test_request_when_of_a_foreign_page_then_is_refused() -> None:
    async with run_service() as service:
        own = service.client.base_url.netloc.decode()
        for host, allowed in [
            *((name, True) for name in (own, "localhost", "LOCALHOST:1", "[::1]:8000")),
            *((name, False) for name in ("evil.example", "127.0.0.1.evil.example", "", "[::1")),
        ]:
            answer = await service.client.get("/status", headers={"Host": host})
            assert answer.status_code == (200 if allowed else 421), host
        for origin, status in [
            *((f"http://{own}", 201), (f"https://{own}", 201)),
            *(("http://evil.example", 403), ("null", 403), ("http://[", 403)),
        ]:
            headers = {"Origin": origin}
            answer = await service.client.post("/trainings", json={"epochs": 1}, headers=headers)
            assert answer.status_code == status, origin
        refused = await service.client.get("/events", headers={"Origin": "http://evil.example"})
        assert refused.status_code == 403
        assert "frame-ancestors 'none'" in refused.headers["content-security-policy"]


async def test_body_when_it_is_sent_by_half_then_it_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service.app, "BODY_SECONDS", 0.01)
    head = (
        b"POST /trainings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    async with run_service() as running:
        port = running.client.base_url.port
        assert port is not None
        async with await anyio.connect_tcp("127.0.0.1", port) as connection:
            await connection.send(head)
            assert (await connection.receive()).startswith(b"HTTP/1.1 408 ")
        monkeypatch.setattr(service.app, "BODY_SECONDS", 60)
        async with await anyio.connect_tcp("127.0.0.1", port) as connection:
            await connection.send(head)
        assert await running.get("/trainings") == []
    assert "Traceback" not in capsys.readouterr().err


async def test_request_when_it_is_nested_too_deeply_then_it_is_refused() -> None:
    """Too deep for the decoder, or only for a message that shows it."""
    async with run_service() as service:
        await service.start(epochs=1)
        for depth in (*range(700, 1000, 10), 20_000):
            for path in ("/trainings", "/trainings/1/answer"):
                body = b"[" * depth + b"]" * depth
                headers = {"Content-Type": "application/json"}
                answer = await service.client.post(path, content=body, headers=headers)
                assert answer.status_code in (400, 422)
                (problem,) = answer.json()["problems"]
                assert re.search("expected (JSON|an object)", problem["message"])


async def test_start_when_a_field_is_half_a_character_then_it_is_told_escaped() -> None:
    async with run_service() as service:
        answer = await service.client.post(
            "/trainings",
            content=b'{"\\ud800": 1, "\xc3\xa4": 2}',
            headers={"Content-Type": "application/json"},
        )
    assert answer.status_code == 422
    half, whole = answer.json()["problems"]
    assert half["field"] == "\\ud800"
    assert half["message"].startswith("'\\ud800' is no setting")
    assert whole["field"] == "\u00e4"


async def test_start_when_there_are_too_many_then_the_oldest_that_is_over_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service.trainings, "MAX_TRAININGS", 2)
    async with run_service() as running:
        await running.start(epochs=1)
        await running.everything(1)
        await running.start(epochs=1000)
        await running.start(epochs=1000)
        full = await running.client.post("/trainings", json={})
        assert [one["id"] for one in await running.get("/trainings")] == [2, 3]
        assert (await running.client.get("/trainings/1")).status_code == 404
        async with running.events() as events:
            assert (await first(events, "submitted"))["id"] == 2
    assert full.status_code == 429
    assert "cancel one" in full.text


async def test_page_when_asked_for_then_it_needs_nothing_from_elsewhere() -> None:
    async with run_service() as service:
        page = await service.client.get("/")
        files = {}
        for path in (EXAMPLES / "service" / "page").iterdir():
            answer = await service.client.get(f"/page/{path.name}")
            assert answer.status_code == 200
            files[path.name] = answer.text
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>fitloop: trainings</title>" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'; style-src 'self'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for text in (page.text, *files.values()):
        assert not re.search(r"<style|\bstyle[=:] ?[\"'`]|\bon\w+=[\"']", text)  # forbidden there
        assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}


# -- readers of events -----------------------------------------------------------------------------


async def test_reader_when_it_comes_back_then_it_gets_the_rest_and_nothing_twice() -> None:
    async with run_service() as service:
        await service.start(epochs=3, ask_every=2)
        async with service.events(1) as events:
            before = [await first(events, kind) for kind in ("submitted", "epoch_ended")]
        await service.until(1, "prompt_asked")
        await service.answer(1, 2, True)
        last = before[-1]["sse_id"]
        rest = await service.everything(1, last)
        everything = await service.everything(1)
        again = await service.client.get(
            "/trainings/1/events", headers={"Last-Event-ID": everything[-1]["sse_id"]}
        )
        foreign = await service.everything(1, f"0{last}")
    numbers = [one["sse_id"] for one in everything if "sse_id" in one]
    assert (rest[0]["goes_on"], rest[0]["service"]) == (True, everything[0]["service"])
    place = numbers.index(last) + 1
    assert [one["sse_id"] for one in rest if "sse_id" in one] == numbers[place:]
    assert again.status_code == 204  # which has a browser stay away
    assert [one["sse_id"] for one in foreign if "sse_id" in one] == numbers
    assert foreign[0]["goes_on"] is False


async def test_reader_when_it_goes_away_then_nothing_of_it_is_left_and_the_training_goes_on() -> (
    None
):
    async with run_service() as service:
        await service.start(epochs=2, ask_every=1)
        for number in (1, None, 1):
            async with service.events(number) as events:
                await first(events, "submitted")
                assert (await service.get("/status"))["readers"] >= 1
        while (await service.get("/status"))["readers"]:
            pass
        await service.until(1, "prompt_asked")
        await service.answer(1, 1, True)
        assert (await service.everything(1))[-1]["status"] == "done"


def lasting(number: int, training: int = 1) -> Message:
    return Message(number, training, permanent_text("life", number, {"number": number}))


def passing(number: int, training: int = 1) -> Message:
    return Message(number, training, replaceable_text({"number": number}))


async def test_feed_when_its_reader_is_slow_then_only_the_newest_progress_is_kept() -> None:
    feed = Feed("life")
    reader = feed.read()
    assert b'"goes_on": false' in await anext(reader)
    for number in range(1, 1000):
        feed.show(passing(number, number % 2))
    feed.add(lasting(1000))
    feed.show(passing(1001, 1))
    assert re.findall(rb'"number": (\d+)', await anext(reader)) == [b"998", b"1000", b"1001"]
    feed.add(lasting(1002))
    feed.end()
    assert [chunk async for chunk in reader] == [lasting(1002).text]
    assert feed.readers == 0


async def test_feed_when_a_reader_is_far_behind_then_it_gets_all_and_no_stale_progress() -> None:
    feed = Feed("life")
    for number in range(1, 600):
        feed.add(lasting(number))
        if number == 100:
            feed.show(passing(100))
    reader = feed.read(5)
    chunks = [await anext(reader) for _ in range(4)]  # a greeting, and what there is
    feed.end()
    chunks += [chunk async for chunk in reader]
    numbers = re.findall(rb'"number": (\d+)', b"".join(chunks))
    assert [int(number) for number in numbers] == list(range(6, 600))


def test_message_when_a_value_is_no_number_then_it_is_still_json() -> None:
    assert replaceable_text({"loss": [float("nan"), 1.0]}) == b'data: {"loss": [null, 1.0]}\n\n'


def test_settings_when_nothing_is_said_then_there_are_defaults() -> None:
    assert read_settings({}).as_dict() == {
        "name": "digits",
        "model": "small",
        "lr": 0.05,
        "epochs": 10,
        "ask_every": 0,
    }


# -- the command line and the end of the server ----------------------------------------------------


@pytest.mark.parametrize("port", ["-5", "65536", "99999"])
def test_program_when_the_port_is_none_then_it_says_so_before_anything_begins(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--port", port])
    assert ended.value.code == 2
    assert f"--port is {port}; expected 0 to 65535" in capsys.readouterr().err


async def test_server_when_it_ends_then_streams_and_trainings_end_whole() -> None:
    async with run_service(max_concurrent=1) as service:
        for _ in range(2):
            await service.start(epochs=1000)
        async with service.events() as events:
            await first(events, "epoch_ended")
            assert service.server is not None
            service.server.should_exit = True
            rest = [message async for message in events]
    over = {one["id"]: one["status"] for one in rest if one["kind"] == "over"}
    assert over == {1: "interrupted", 2: "interrupted"}
    (ended,) = [one for one in rest if one["kind"] == "run_ended"]
    assert ended["stop_reason"] == "cancelled"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("backend", "sign", "code"),
    [("thread", signal.SIGINT, 0), ("process", signal.SIGTERM, -signal.SIGTERM)],
    ids=["threads, SIGINT", "processes, SIGTERM"],
)
async def test_program_when_signalled_then_it_ends_whole_with_a_stream_open(
    backend: str, sign: signal.Signals, code: int, tmp_path: Path
) -> None:
    with run_service_process(tmp_path, "--backend", backend) as (program, port):
        async with connect_to_service(port) as service:
            await service.start(epochs=1000, model="large")
            async with service.events() as events:
                await first(events, "batch_progress")
                children = psutil.Process(program.pid).children(recursive=True)
                assert bool(children) == (backend == "process")
                program.send_signal(sign)
                rest = [message async for message in events]
        assert program.stdout is not None
        printed = program.stdout.read()
        assert program.wait() == code, printed
    assert rest[-1]["status"] == "interrupted"
    assert "Finished server process" in printed
    assert "Traceback" not in printed
    assert not psutil.wait_procs(children, timeout=HANG_TIMEOUT)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
async def test_program_when_killed_and_started_again_then_its_training_goes_on(
    tmp_path: Path,
) -> None:
    with run_service_process(tmp_path) as (program, port):
        async with connect_to_service(port) as running:
            await running.start(epochs=1000, name="long")
            async with running.events(1) as events:
                seen = [await first(events, "epoch_ended") for _ in range(3)]
            program.kill()
            program.wait()
    async with run_service(save_path=tmp_path) as running:
        async with running.events(1) as events:
            begun = await first(events, "submitted")
            await first(events, "epoch_ended")
        found = await running.get("/trainings/1")
        await running.client.delete("/trainings/1")
    assert begun["name"] == "long"
    assert found["metrics"]["train"]["loss"][:3] == columns(seen, "train", "loss")
    assert begun["metrics"]["train"]["loss"][:3] == columns(seen, "train", "loss")


@pytest.mark.slow
async def test_process_backend_when_used_then_question_cancel_and_error_cross() -> None:
    async with run_service("process", max_concurrent=1) as service:
        await service.start(epochs=2, ask_every=1)
        await service.until(1, "prompt_asked")
        await service.answer(1, 1, True)
        done = await service.everything(1)
        await service.start(lr=900, model="medium")
        failed = await service.everything(2)
        await service.start(epochs=1000)
        await service.until(3, "epoch_ended")
        await service.client.delete("/trainings/3")
        cancelled = await service.everything(3)
    assert kinds(done)[3:] == ["prompt_asked", "prompt_answered", "epoch_ended", *ENDINGS]
    assert done[-1]["status"] == "done"
    assert failed[-1]["error"].endswith("Try a learning rate below 900.")
    assert cancelled[-1]["status"] == "cancelled"
