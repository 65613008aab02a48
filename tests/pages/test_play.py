"""`saepatch play`: what its page shows is what the library computes, and nobody but its visitor can ask it."""

import asyncio
import contextlib
import http.client
import io
import json
import math
import shlex
import threading
import time
from urllib.parse import urlsplit

import pytest
import torch
from browsing import serious_findings

from saepatch.cli.main import main
from saepatch.errors import UserError
from saepatch.pages.play.desk import Desk
from saepatch.pages.play.queue import Queue
from saepatch.pages.play.server import open_door, page_server
from saepatch.reading.cards import logit_lens
from saepatch.report.text import token_text, visible
from saepatch.settings.play import PlayConfig

pytestmark = pytest.mark.whole

REQUEST = {"prompt": "How do I rent a museum?", "chat": True, "latent": "resid_post.3:966", "site": "resid_post.3"}
OTHER = {"other": "How do I rob a museum?", "positions": "last"}


@pytest.fixture(scope="module")
def desk(few_texts):
    return Desk(PlayConfig())


@pytest.fixture(scope="module")
def address(desk):
    """A page served from a thread of this process."""
    with open_door(0) as door:
        server, where = page_server(desk.questions, door)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        deadline = time.time() + 20
        while not server.started and time.time() < deadline:
            time.sleep(0.01)
        yield where
        server.should_exit = True
        thread.join(20)


def last(question, **asked):
    *_, message = question(asked)
    return message


def said(code):
    """What a piece of Python prints, as lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "exported", "exec"), {})
    return out.getvalue()


STATES = {
    "begin": {**REQUEST, "strength": 1.5, "positions": "last"},
    "drawn": {"prompt": 'It\'s "a" $HOME\n- the', "latent": "resid_post.3:281,966", "act": "clamp", "strength": 2,
              "positions": "1,3", "temperature": 0.9, "seed": 3, "max_new_tokens": 12, "decay": 0.5},
    "sites": {"prompt": "-Anna and Tom went", "latent": "resid_post.3:281 | resid_post.4: 5", "strength": -1.25,
              "max_new_tokens": 10},
    "ablated": {"prompt": "Anna and Tom went to the café", "latent": "resid_post.2:7", "act": "ablate",
                "positions": "at: Tom", "max_new_tokens": 6},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_command_and_python_give_the_pages_answer(desk, name, capsys):
    *shown, end = desk.answer(STATES[name])
    assert main([*shlex.split(end["command"])[1:], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    texts = [printed["before"], printed["after"]]
    assert shown[-1]["texts"] == [visible(text) for text in texts]
    assert said(end["python"]) == "".join(f"{text}\n" for text in texts)
    assert [len(step["texts"]) for step in shown] == [2] * len(shown)
    if name == "begin":
        assert texts[1] == " I cannot help with that."
        assert len(end["coloured"][1]) == len(shown[-1]["texts"][1].split()) + 1  # the stop is a token of its own


def test_a_patch_moves_the_answer_as_its_command_and_its_python_say(desk, capsys, tmp_path):
    patched = last(desk.patch, **REQUEST, **OTHER)
    here, moved, there = (dict(map(tuple, column)) for column in patched["next"])
    answer, counter = patched["pair"]
    assert (answer, counter) == (max(there, key=there.get), max(here, key=here.get))
    gaps = [math.log(column[answer] / column[counter]) for column in (here, moved, there)]
    assert patched["share"] == pytest.approx((gaps[1] - gaps[0]) / (gaps[2] - gaps[0]), abs=2e-3)
    assert 0.3 < patched["share"] < 1
    assert said(patched["python"]) == "".join(f"{text}\n" for text in patched["texts"][:2])
    command = [word if word != "runs/play" else str(tmp_path / "run") for word in shlex.split(patched["command"])[1:]]
    assert main([*command, "--json"]) == 0
    facts = capsys.readouterr().out
    assert f"{patched['share']:.3f}" in facts or f"{patched['share']:.2f}" in facts
    nothing = last(desk.patch, **REQUEST, other=REQUEST["prompt"], positions="last")
    assert (nothing["share"], nothing["command"]) == (None, "")
    assert nothing["next"][0] == nothing["next"][1]
    with pytest.raises(UserError, match=r"has 6 tokens and the prompt 11"):
        last(desk.patch, **REQUEST, other="x", positions="last")


def test_reading_lists_what_the_dictionary_encodes(desk):
    read = last(desk.read, **REQUEST)
    model = desk.model
    ids = torch.tensor([model.encode(model.chat(REQUEST["prompt"]))])
    sae = next(d for site, d in desk.dictionaries.items() if str(site) == "resid_post.3").sae
    with torch.no_grad():
        acts = sae.encode(model.hf(ids, output_hidden_states=True).hidden_states[4])[0]
    acts[0] = 0  # at BOS
    assert read["tokens"] == [token_text(token) for token in model.token_texts(ids[0].tolist())]
    assert read["acts"] == pytest.approx(acts[:, 966].tolist(), abs=1e-3)
    order = acts.amax(0).argsort(descending=True)
    assert [row["latent"] for row in read["latents"]] == order[: len(read["latents"])].tolist()
    for at, row in enumerate(read["at"]):
        assert [each["act"] for each in row] == pytest.approx(acts[at].topk(8).values[: len(row)].tolist(), abs=1e-3)
    assert read["at"][0] == []
    probabilities = model.logits(model.tokenize([model.chat(REQUEST["prompt"])]))[0, -1].softmax(-1)
    assert read["next"][0][1] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_search_finds_latents_by_the_tokens_they_raise(desk):
    found = last(desk.search, site="resid_post.3", text=" Cannot ")
    dictionary = next(d for site, d in desk.dictionaries.items() if str(site) == "resid_post.3")
    raised = logit_lens(desk.model, dictionary, range(dictionary.d_sae)).raises
    wanted = {latent for latent, tokens in enumerate(raised) if any("cannot" in t.strip().lower() for t, _ in tokens)}
    assert found["found"] == len(wanted)
    assert {row["latent"] for row in found["latents"]} <= wanted
    assert found["latents"][0]["names"][0] == "␣cannot"
    assert last(desk.search, site="resid_post.3", text="966")["latents"][0]["latent"] == 966
    assert last(desk.search, site="resid_post.3", text="no such token")["latents"] == []


def test_cards_are_escaped_and_link_to_their_neighbours(desk):
    html = last(desk.card, **REQUEST)["html"]
    assert "Latent 966 at resid_post.3" in html
    assert "&lt;|assistant|&gt;" in html
    assert "<|" not in html
    assert 'href="#latent-resid_post.3-' in html
    last(desk.card, **{**REQUEST, "latent": "resid_post.3:17"}, beside=[281, -1, "x", 10**9])
    assert {latent for _, latent in desk._cards} >= {966, 17, 281}


@pytest.mark.parametrize(
    ("question", "asked", "message"),
    [
        ("answer", {"prompt": "a", "latent": ""}, "no latent"),
        ("answer", {"prompt": "a", "latent": "resid_post.9:1"}, "no dictionary at resid_post.9"),
        ("answer", {"prompt": "a", "latent": "resid_post.3:1", "strength": "1"}, "give a float"),
        ("answer", {"prompt": "a", "latent": "resid_post.3:1", "act": "melt"}, "use one of"),
        ("answer", {"prompt": "a", "latent": "resid_post.3:1", "max_new_tokens": 10**6}, "1 to 400"),
        ("answer", {"prompt": "a", "latent": "resid_post.3:1", "model": "gpt2", "positions": "nowhere"}, "positions"),
        ("read", {"site": "resid_post.3", "prompt": 3, "latent": ""}, "give a text"),
        ("read", {"prompt": "a"}, "site"),
        ("card", {"site": "resid_post.3", "latent": "resid_post.3:4096"}, "out of range"),
    ],
)
def test_a_visitors_mistakes_are_told(desk, question, asked, message):
    with pytest.raises(UserError, match=message):
        last(desk.questions[question], **asked)


def test_without_texts_strengths_are_activations_and_cards_read_the_prompt():
    from saepatch import organism

    own = organism.path("organism")
    desk = Desk(PlayConfig(model=str(own)))
    end = last(desk.answer, prompt="Anna and Tom went", latent="resid_post.3:281", max_new_tokens=3)
    assert end["unit"] == [1.0]
    assert "--unit 1" in end["command"]
    assert f"--model {own}" in end["command"]
    assert f"load_model({str(own)!r})" in end["python"]
    assert "over 1 texts" in last(desk.card, **{**REQUEST, "chat": False})["html"]
    assert next(desk.about({}))["unit"] == ""


# The server


def fetch(address, path="", method="GET", body=None, host=None):
    where = urlsplit(address)
    with contextlib.closing(http.client.HTTPConnection(where.hostname, where.port, timeout=30)) as connection:
        connection.putrequest(method, path if path.startswith("/") else where.path + path, skip_host=True)
        connection.putheader("Host", host or where.netloc)
        connection.putheader("Connection", "close")
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        with connection.getresponse() as answer:
            return answer.status, dict(answer.getheaders()), answer.read()


def test_files_are_served_behind_the_token_to_this_machine_alone(address):
    status, headers, text = fetch(address)
    assert status == 200
    assert b"saepatch play" in text
    assert "script-src 'self';" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert urlsplit(address).hostname == "127.0.0.1"
    assert len(urlsplit(address).path) > 30
    assert [fetch(address, name)[0] for name in ("play.js", "play.css", "palette.css")] == [200] * 3
    token = urlsplit(address).path.strip("/")
    for path in ("/", "/x/", f"/{token[:-1]}/", f"/{token}", f"/{token}x/", "/%C3%A9/", f"//{token}/"):
        status, headers, text = fetch(address, path)
        assert (status, b"<html" in text) == (404, False), path
        assert "content-security-policy" in headers
    assert fetch(address, "../../settings/play.py")[0] == 404
    assert fetch(address, "%2e%2e%2fdesk.py")[0] == 404
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        assert fetch(address, host=host)[0] == 400
    assert fetch(address, host=f"localhost:{urlsplit(address).port}")[0] == 200


def test_questions_are_objects_of_a_bounded_size(address):
    assert fetch(address, "ask/about")[0] == 405
    assert fetch(address, "ask/nothing", "POST", b"{}")[0] == 404
    for body in (b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b'{"a": "' + b"x" * (1 << 20) + b'"}'):
        status, _, text = fetch(address, "ask/about", "POST", body)
        assert (status, bool(text)) == (400, True), body[:20]
    status, headers, text = fetch(address, "ask/about", "POST", b"{}")
    assert status == 200
    assert headers["content-type"].startswith("application/x-ndjson")
    assert json.loads(text.splitlines()[-1])["model"].startswith("organism")
    _, _, text = fetch(address, "ask/read", "POST", json.dumps({"site": "nowhere"}).encode())
    assert "nowhere" in json.loads(text.splitlines()[-1])["error"]


def test_a_port_that_is_taken_is_named():
    with open_door(0) as door, pytest.raises(UserError, match="cannot be used"):
        taken = door.getsockname()[1]
        door.listen()
        open_door(taken)
    with pytest.raises(UserError, match="port"):
        PlayConfig(port=70000)


def test_visitors_wait_in_line_and_those_who_leave_are_passed_over():
    async def visits():
        line, began, heard = Queue(), [], {name: [] for name in "abcd"}
        go = threading.Event()

        def job(name, steps=2):
            def run():
                began.append(name)
                for step in range(steps):
                    go.wait(10)
                    yield {"step": step}

            return run

        async def visit(name):
            async for message in line.run(job(name)):
                heard[name].append(message)

        tasks = {}
        for name in "abcd":
            tasks[name] = asyncio.create_task(visit(name))
            await asyncio.sleep(0.05)
        places = {name: [m["place"] for m in messages] for name, messages in heard.items()}
        tasks["b"].cancel()
        await asyncio.sleep(0.05)
        moved = [m["place"] for m in heard["c"]]
        go.set()
        await asyncio.gather(tasks["a"], tasks["c"], tasks["d"])
        line.close()
        return began, places, moved, heard

    began, places, moved, heard = asyncio.run(visits())
    assert began == ["a", "c", "d"]
    assert places == {"a": [0], "b": [1], "c": [2], "d": [3]}
    assert moved == [2, 1]
    assert [m for m in heard["d"] if "place" not in m] == [{"step": 0}, {"step": 1}]
    assert [m["place"] for m in heard["d"] if "place" in m] == [3, 2, 1, 0]


def test_mistakes_and_bugs_end_a_visit_and_not_the_line(caplog):
    def mistaken():
        yield {"step": 0}
        raise UserError("no such latent")

    def broken():
        raise RuntimeError("a bug")
        yield

    async def visits():
        line = Queue()
        heard = []
        for job in (mistaken, broken, mistaken):
            heard.append([message async for message in line.run(job)])
        line.close()
        return heard

    first, second, third = asyncio.run(visits())
    assert first == third == [{"place": 0}, {"step": 0}, {"error": "no such latent"}]
    assert "saepatch itself" in second[-1]["error"]
    assert "a bug" not in second[-1]["error"]
    assert "a bug" in caplog.text


# In a browser


def settle(browser, seconds=30):
    """Wait until the page has asked all it wants to and shows the answers."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        time.sleep(0.1)
        if browser.execute_script("return document.documentElement.dataset.state") == "idle":
            return
    raise AssertionError("the page is still asking")


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def enter(browser, name, value):
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input', {bubbles: true}))",
        name, value,
    )  # fmt: skip
    settle(browser)


@pytest.mark.browser
def test_page_searches_steers_patches_and_is_shared(browser, address, record_property):
    browser.get(address)
    settle(browser)
    paint = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert text(browser, "after") == " I cannot help with that."
    assert text(browser, "before").startswith(" Sure")
    assert "62" in text(browser, "moved")
    enter(browser, "strength", "0")
    assert text(browser, "after") == text(browser, "before")
    times = browser.execute_script("return performance.getEntriesByName('answer').map((e) => e.duration)")
    record_property("first_contentful_paint_ms", paint)
    record_property("change_answered_ms", times[-1])
    enter(browser, "query", "cannot")
    assert "raise “cannot”" in text(browser, "list-title")
    browser.execute_script("document.querySelector('#list .pick').click()")
    settle(browser)
    chosen = browser.execute_script("return document.getElementById('latent').value")
    assert chosen.startswith("resid_post.3:")
    assert chosen != "resid_post.3:966"
    assert f"Latent {chosen.split(':')[1]} at" in text(browser, "card")
    enter(browser, "query", "")
    browser.execute_script("document.querySelectorAll('#tokens button')[5].click()")
    settle(browser)
    assert "Active at token 5" in text(browser, "list-title")
    browser.execute_script("document.querySelector('#card a').click()")
    settle(browser)
    shared = browser.current_url
    shown = {name: text(browser, name) for name in ("after", "moved", "list-title", "answer-command")}
    browser.get("about:blank")
    browser.get(shared)
    settle(browser)
    assert {name: text(browser, name) for name in shown} == shown
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 420)])
def test_page_is_accessible(browser, address, scheme, width):
    browser.get(address)
    settle(browser)
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert serious_findings(browser, scheme, width) == []


@pytest.mark.browser
def test_texts_are_never_markup(browser, address):
    hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    browser.get(address)
    settle(browser)
    enter(browser, "other", hostile)
    enter(browser, "query", hostile)
    enter(browser, "prompt", hostile)
    enter(browser, "latent", f"resid_post.3:966,{hostile}")
    assert browser.title == "saepatch play"
    assert browser.execute_script("return document.querySelectorAll('main img, main script, aside img').length") == 0
    assert "<img" in text(browser, "answer-error")
    assert "img" in text(browser, "tokens")
