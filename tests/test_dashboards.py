"""Every dashboard in a real browser, JupyterLab and Voila: keys, mouse, states, broken files, no outside request.

One page runs always (windows, JupyterLab); the rest with --full. Without a browser the tests say SKIPPED."""
import json, re, subprocess, sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ROOT / "nbs" / "dashboards"
HANDLES = dict(windows="tone", patch_parameters="band", ablations="row", alias_lab="rate")  # a slider of each dashboard
STATES = dict(windows=dict(normalization="peak", tone=1.5, offset=-0.7),
              patch_parameters=dict(checkpoint="untrained", band=1),
              ablations=dict(table="VII", view="score", row=1),
              alias_lab=dict(rate=9.0, hop=8, channel="average"))
PRINTED = dict(windows="gradient at 0.70 rad", patch_parameters="untrained, this clip", ablations="K 127", alias_lab="above 6.25 Hz")
MODULES = dict(windows="window_dashboard", patch_parameters="patch_dashboard", ablations="ablation_dashboard",
               alias_lab="alias_lab")
pytestmark = pytest.mark.browser


def pages():
    "Every dashboard in both servers; all but one are slow."
    for server in (browser.Lab, browser.Voila):
        for name in HANDLES:
            first = server is browser.Lab and name == "windows"
            yield pytest.param(server, name, id=f"{name}-{server.name}", marks=() if first else pytest.mark.slow)


def open_page(page, server):
    "Runs the notebook where that is needed and waits for the first drawing."
    if server is browser.Lab: page.run_all()
    page.page.wait_for_selector(".aasp-dash canvas[data-frame]")
    return page.settle()


def numbers(page):
    "The tables of numbers as text."
    return "\n".join(page.page.locator(".aasp-numbers").all_inner_texts())


def readout(page, name):
    "The number beside a slider."
    return float(page.page.locator(f".aasp-field-{name} .widget-readout").inner_text().replace("\u2212", "-"))


def error(page):
    "The text in the error box; empty when it is hidden."
    box = page.page.locator(".aasp-error").first
    return box.inner_text() if box.is_visible() else ""


def wait_for(page, condition, seconds=20):
    "Polls until a function of the page is true."
    for _ in range(int(seconds * 10)):
        if condition(): return True
        page.page.wait_for_timeout(100)
    return False


def load_state(page, tmp_path, text, name="state.json"):
    "Loads a state through the button's file chooser."
    path = tmp_path / name
    path.write_text(text)
    with page.page.expect_file_chooser() as chooser: page.page.get_by_role("button", name="Load state").click()
    chooser.value.set_files(str(path))


@pytest.mark.parametrize("server,name", list(pages()))
def test_page(server, name, tmp_path):
    reason = browser.missing(voila=server is browser.Voila)
    if reason: pytest.skip(f"SKIPPED: {reason}")
    field = HANDLES[name]
    handle = f".aasp-field-{field} .noUi-handle"
    with server(BOOKS / f"{name}.ipynb", env=dict(OMP_NUM_THREADS="1")) as s, s.page(height=1500) as page:
        first = open_page(page, server)
        assert first and min(first) >= 1, "nothing was drawn"
        assert first == [1] * len(first), f"drawn more than once at the start: {first}"
        assert error(page) == "" and page.faults() == []
        old_numbers, old = numbers(page), readout(page, field)

        page.press(handle, "ArrowRight", 2)  # by key
        after_keys = page.settle()
        assert readout(page, field) > old and after_keys[0] > first[0], "a key did not move the drawing"
        page.drag(handle, -95)  # by mouse
        after_drag = page.settle()
        assert readout(page, field) != old and after_drag[0] > after_keys[0], "the mouse did not move the drawing"
        if name != "patch_parameters": assert numbers(page) != old_numbers, "the numbers did not follow"

        plot = page.page.locator(".aasp-over").first  # the cursor reads values, and the linked canvases follow
        box = plot.bounding_box()
        page.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
        assert wait_for(page, lambda: plot.get_attribute("data-cursor") not in (None, "")), "no cursor"
        if name == "windows":
            assert page.page.locator(".aasp-over").nth(1).get_attribute("data-cursor") == plot.get_attribute("data-cursor")
            assert re.search(r"\d dB", page.page.locator(".aasp-legend").first.inner_text()), "the legend reads no value"

        load_state(page, tmp_path, json.dumps(STATES[name]))
        assert wait_for(page, lambda: re.search(PRINTED[name],
                                                page.page.locator(".aasp-dash").inner_text())), "state not loaded"
        assert error(page) == ""
        loaded = page.settle()
        load_state(page, tmp_path, "RIFF not a state", "broken.json")
        assert wait_for(page, lambda: "not JSON" in error(page)), "no error for a broken file"
        load_state(page, tmp_path, json.dumps({list(STATES[name])[0] + "x": 1}))
        assert wait_for(page, lambda: "did you mean" in error(page)), "no error for an unknown name"
        page.page.get_by_role("button", name="Reset").click()
        assert wait_for(page, lambda: error(page) == "" and readout(page, field) == old), "reset did not restore"
        assert page.settle()[0] > loaded[0]

        with page.page.expect_download() as download: page.page.get_by_role("button", name="Save state").click()
        saved = json.loads(Path(download.value.path()).read_text())
        assert saved[field] == old
        take_tour(page)
        extra(name, page, tmp_path)
        assert page.errors == [], page.errors[:3]
        assert page.external == [], page.external[:3]


def take_tour(page):
    "Answers every question with the first option; each shows a setting of its own and marks one drawing."
    box, seen = page.page.locator(".aasp-tour"), []
    box.get_by_role("button", name="Start the tour").click()
    while True:
        assert page.page.locator(".aasp-look").count() == 0, "the answer stands before the guess"
        box.locator(".aasp-bar").first.get_by_role("button").first.click()
        assert wait_for(page, lambda: page.page.locator(".aasp-marked").count() == 1), "no drawing is marked"
        page.settle()
        assert re.match("Yes|Not quite", page.page.locator(".aasp-look").inner_text()) and error(page) == ""
        seen.append(page.page.locator(".aasp-bar select option:checked").inner_text())
        if not box.get_by_role("button", name="Next").count(): break
        box.get_by_role("button", name="Next").click()
    assert "own setting" not in seen and len(seen) >= 2 and page.faults() == []
    box.get_by_role("button", name="End the tour").click()
    assert wait_for(page, lambda: page.page.locator(".aasp-marked").count() == 0)
    page.page.get_by_role("button", name="Reset").click()
    page.settle()


def extra(name, page, tmp_path):
    "What only this dashboard does."
    if name == "windows":
        frames = page.settle()
        page.page.get_by_role("button", name="Run many chases").click()
        assert wait_for(page, lambda: "chasing" in page.page.locator(".aasp-busy").inner_text(), 5), "no busy sign"
        assert wait_for(page, lambda: "Wilson" in page.page.locator(".aasp-dash").inner_text(), 90), "no success rates"
        assert page.page.locator(".aasp-busy").inner_text() == "" and page.settle()[:4] == frames[:4]
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"neither audio\nnor a table\n")
    if name in ("patch_parameters", "ablations", "alias_lab"):
        page.upload(broken)
        words = "no column dataset" if name == "ablations" else "cannot be read as audio"
        assert wait_for(page, lambda: words in error(page)), f"no error for a broken upload: {error(page)!r}"
    if name == "patch_parameters":
        sound = page.page.locator(".aasp-sound button").first
        assert "Play" in sound.inner_text(), "sound must not play by itself"
        sound.click()
        assert wait_for(page, lambda: "Stop" in sound.inner_text(), 10), "the clip does not play"
        sound.click()
    if name == "alias_lab":
        page.page.get_by_role("button", name="Reset").click()
        assert wait_for(page, lambda: error(page) == "")
        page.settle()
        buttons = page.page.locator(".aasp-sound button")
        assert wait_for(page, lambda: all(b.is_enabled() for b in buttons.all()), 10), "the sounds did not follow"
        assert all("Play" in t for t in buttons.all_inner_texts()), "sound must not play by itself"
        player = page.page.locator(".aasp-sound")
        for i, track in ((1, "before"), (2, "after patching"), (4, "SBLU")):  # switched while one plays, never two at once
            buttons.nth(i).click()
            assert wait_for(page, lambda: player.get_attribute("data-playing") == track, 10), f"{track} does not play"
            assert sum("Stop" in t for t in buttons.all_inner_texts()) == 1
        plays = int(player.get_attribute("data-plays"))
        page.press(".aasp-field-carrier .noUi-handle", "ArrowRight", 3)  # what is heard follows the slider
        assert wait_for(page, lambda: int(player.get_attribute("data-plays")) > plays, 10), "the sound does not follow"
        assert player.get_attribute("data-playing") == "SBLU"
        buttons.nth(4).click()
        assert wait_for(page, lambda: player.get_attribute("data-playing") == "", 10), "the sound does not stop"
        page.page.locator(".aasp-over").first.scroll_into_view_if_needed()
        box = page.page.locator(".aasp-over").first.bounding_box()
        page.page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.6)
        assert wait_for(page, lambda: readout(page, "at") > 2), "the click chose no patch"
        assert wait_for(page, lambda: player.get_attribute("data-last") == "patch", 10), "the patch that was clicked does not play"
        assert readout(page, "band") >= 0, "the click chose no band"
        page.page.locator(".aasp-record").click()  # the browser's own microphone beeps
        assert wait_for(page, lambda: "microphone.wav#" in shows(page, "path"), 60), f"no recording: {error(page)}"
        assert wait_for(page, lambda: re.search(r"microphone\.wav: [56]\.\d\d s", page.page.locator(".aasp-notice").inner_text()))
    if name == "ablations":
        page.page.get_by_role("button", name="Reset").click()
        wait_for(page, lambda: error(page) == "")
        page.settle()
        box = page.page.locator(".aasp-over").first.bounding_box()
        page.page.mouse.click(box["x"] + box["width"] * 0.13, box["y"] + box["height"] * 0.6)  # the first bar
        assert wait_for(page, lambda: readout(page, "row") == 0), "a click chooses no bar"
        assert "Command line" in page.page.locator(".aasp-dash").inner_text()


def shows(page, name):
    "The value of a control: the text of a field, the choice of a menu, the number of a slider."
    box = page.page.locator(f".aasp-field-{name}")
    if box.locator("select").count(): return box.locator("select option:checked").inner_text()
    return box.locator("input[type=text]").input_value() if box.locator("input[type=text]").count() else readout(page, name)


def saved_state(page):
    "What `Save state` stores."
    with page.page.expect_download() as download: page.page.get_by_role("button", name="Save state").click()
    return json.loads(Path(download.value.path()).read_text())


def sound_file(path, seconds, rate=16000, cut=None, channels=1):
    "A tone of 700 Hz that swings three times a second; `cut`: only so many bytes of the file."
    import numpy as np, soundfile
    t = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, np.repeat((0.3 * np.sin(4400 * t) * (1 + 0.5 * np.sin(19 * t)))[:, None], channels, 1), rate)
    if cut: path.write_bytes(path.read_bytes()[:cut])
    return path


UPLOADS = dict(alias_lab=("sound", "path", ("hop", "patch_frames", "decay", "band", "at", "carrier")),
               patch_parameters=("clip", "path", ("band", "unit", "time_patch")),
               ablations=(None, "results", ("row",)))  # menu, field of the path, sliders that act on the upload


@pytest.mark.slow
@pytest.mark.parametrize("name", UPLOADS)
def test_every_control_after_an_upload(name, tmp_path):
    "What is uploaded is shown, moved by every control, saved under its name, and gone after Reset; errors too."
    if (reason := browser.missing()): pytest.skip(f"SKIPPED: {reason}")
    menu, field, sliders = UPLOADS[name]
    with browser.Lab(BOOKS / f"{name}.ipynb", env=dict(OMP_NUM_THREADS="1")) as s, s.page(height=1500) as page:
        open_page(page, browser.Lab)
        first = {n: shows(page, n) for n in (menu, field, *sliders) if n}
        if name == "ablations":
            mine = tmp_path / "mine.csv"
            from aasp_nb.ablation_dashboard import EXAMPLE_RESULTS
            mine.write_text(EXAMPLE_RESULTS.read_text().replace("illustration", "my own runs"))
            other, words = tmp_path / "other.csv", "my own runs"
            other.write_text(mine.read_text().replace("my own", "your own"))
        else:
            mine = sound_file(tmp_path / "mine.wav", 90, 44100, channels=2)  # 16 MB: more than a server takes at once
            other = sound_file(tmp_path / "other.wav", 4, 8000)
            words = "90.00 s at 44100 Hz; the mean of its 2 channels; only the first 6.08 s"
        text = lambda: page.page.locator(".aasp-dash").inner_text()
        def uploaded():
            page.upload(mine)
            assert wait_for(page, lambda: f"{mine.name}#" in shows(page, field)), "the control does not name the upload"
            assert wait_for(page, lambda: words in text()) and error(page) == ""
            if menu: assert shows(page, menu) == "file"
            return page.settle()
        uploaded()
        assert "own setting" in page.page.locator(".aasp-bar select option:checked").inner_text() or name == "ablations"
        for slider in sliders:  # each moves what is drawn of the upload, or what is heard
            before, frames = shows(page, slider), page.settle()
            key = "ArrowLeft" if name == "ablations" else "ArrowRight"
            page.press(f".aasp-field-{slider} .noUi-handle", key, 15 if slider == "at" else 2)
            assert wait_for(page, lambda: shows(page, slider) != before), f"{slider} does not move"
            if slider != "carrier": assert page.settle() != frames, f"{slider} moves nothing"
            assert mine.name in shows(page, field) and words in text(), f"{slider} drops the upload"
        saved = saved_state(page)
        assert saved[field] == shows(page, field) and (not menu or saved[menu] == "file")
        assert all(saved[n] == shows(page, n) for n in sliders)
        for dead in ("rate", "depth", "clip_index"):
            if name == "alias_lab": assert page.page.locator(f".aasp-field-{dead} [disabled]").count(), f"{dead} looks alive"
        page.page.get_by_role("button", name="Reset").click()
        assert wait_for(page, lambda: {n: shows(page, n) for n in first} == first), "Reset does not restore the controls"
        assert wait_for(page, lambda: words not in text()), "the upload stays after Reset"

        uploaded()  # the same file once more
        page.page.locator(".aasp-bar select").select_option(index=2)
        if menu: assert wait_for(page, lambda: shows(page, menu) != "file" and words not in text()), "a preset keeps the upload"
        broken = tmp_path / "broken.wav"
        broken.write_bytes(b"no sound, no table")
        page.upload(broken)
        assert wait_for(page, lambda: "broken.wav" in error(page)), "no error names the broken file"
        page.page.get_by_role("button", name="Reset").click()
        assert wait_for(page, lambda: error(page) == "" and shows(page, field) == first[field]), "the error survives Reset"
        if menu:
            page.upload(sound_file(tmp_path / "short.wav", 3, cut=3564))
            assert wait_for(page, lambda: "short.wav: truncated" in error(page)), "a truncated file is taken for a short one"
            page.page.get_by_role("button", name="Reset").click()
            assert wait_for(page, lambda: error(page) == "")

        elsewhere = {**saved, field: saved[field].replace("mine", "theirs")}
        load_state(page, tmp_path, json.dumps(elsewhere))
        assert wait_for(page, lambda: "theirs." in error(page) and "is not here" in error(page)), "a missing upload is not named"
        assert page.page.locator(".aasp-stale").count() == 1, "drawings of another state do not look pale"
        page.upload(other)
        assert wait_for(page, lambda: f"{other.name}#" in shows(page, field) and error(page) == "")
        load_state(page, tmp_path, json.dumps(saved))
        assert wait_for(page, lambda: shows(page, field) == saved[field] and words in text() and error(page) == "")
        assert page.faults() == [] and page.errors == [] and page.external == []


@pytest.mark.slow
@pytest.mark.parametrize("server", (browser.Lab, browser.Voila), ids=("lab", "voila"))
@pytest.mark.parametrize("name", HANDLES)
def test_widths_themes_and_presets(server, name):
    "At every width, in both themes and for every preset all words are whole, apart and dark enough, and all canvases wide."
    if (reason := browser.missing(voila=server is browser.Voila)): pytest.skip(f"SKIPPED: {reason}")
    with server(BOOKS / f"{name}.ipynb", env=dict(OMP_NUM_THREADS="1")) as s, s.page(width=800) as page:
        open_page(page, server)
        menu, found = page.page.locator(".aasp-bar select"), {}
        for width in (800, 1280, 1920):
            page.width(width)
            card, sheet = (page.page.locator(q).first.bounding_box()["width"] for q in (".aasp-dash", "body"))
            assert card > 0.72 * sheet, f"a card of {card} pixels at {width}"
            for theme in ("Dark", "Light") if server is browser.Lab else ("",):
                if theme: page.theme(theme)
                found[width, theme] = page.faults()
            for preset in menu.locator("option").all_inner_texts()[1:]:
                menu.select_option(label=preset)
                assert wait_for(page, lambda: menu.locator("option:checked").inner_text() == preset)
                page.settle()
                found[width, preset] = page.faults()
        assert not any(found.values()), {k: v[:4] for k, v in found.items() if v}
        assert page.errors == [] and page.external == []


@pytest.mark.slow
def test_one_page_for_all(tmp_path):
    "`aasp dashboards` answers before Voila does, asks nobody outside, opens a dashboard by itself and ends with its server."
    if (reason := browser.missing(voila=True)): pytest.skip(f"SKIPPED: {reason}")
    import os, signal, urllib.request
    from playwright.sync_api import sync_playwright
    port, asked = browser.free_port(), []
    run = subprocess.Popen([sys.executable, "-m", "aasp_nb.cli", "dashboards", "--port", str(port)], stdout=subprocess.PIPE,
                           stderr=(tmp_path / "log").open("w"), text=True, env={**os.environ, "HOME": str(tmp_path)})
    try:
        assert run.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        with sync_playwright() as p, p.chromium.launch(executable_path=browser.chromium(), args=browser.FLAGS) as chrome:
            page = chrome.new_page()
            page.on("request", lambda r: asked.append(r.url))
            page.set_default_timeout(120_000)
            for _ in range(300):  # the line is printed a moment before the port is open
                try: page.goto(f"http://127.0.0.1:{port}/"); break
                except Exception: page.wait_for_timeout(100)
            assert page.locator("a.card img").count() == 4
            assert page.locator("a.card img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 300)")
            page.locator("a.card").first.click()
            page.wait_for_selector(".aasp-dash canvas[data-frame]")  # through the page that waits, and web sockets
            assert not page.locator(".aasp-run").is_visible(), "a page needs no advice about cells"
            page.goto(f"http://127.0.0.1:{port}/voila/tree")
            assert page.locator("a.card").count() == 4 and "Choose one" in page.locator("main").inner_text()
        assert [u for u in asked if not u.startswith((f"http://127.0.0.1:{port}", "data:", "blob:"))] == []
        run.send_signal(signal.SIGTERM)
        run.wait(30)
        with pytest.raises(OSError): urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
    finally:
        if run.poll() is None: run.kill()
        run.wait()


@pytest.mark.parametrize("name", HANDLES)
def test_parameters_are_the_fields(name):
    "The cell tagged `parameters` declares every field with its default."
    import importlib
    fields = importlib.import_module(f"aasp_nb.{MODULES[name]}").FIELDS
    cells = json.loads((BOOKS / f"{name}.ipynb").read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs one cell tagged `parameters`"
    scope = {}
    exec("".join(tagged[0]["source"]), scope)
    assert {k: scope[k] for k in fields} == {k: f.default for k, f in fields.items()}
    assert set(scope) - set(fields) - {"__builtins__", "__annotations__"} == {"picture"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "ablations" else pytest.mark.slow) for n in HANDLES])
def test_papermill_takes_a_state(name, tmp_path):
    "A state as the dashboard saves it, through papermill, to a picture."
    state = tmp_path / "state.json"
    state.write_text(json.dumps(STATES[name]))
    picture = tmp_path / "picture.png"
    subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(BOOKS / f"{name}.ipynb"),
                    str(tmp_path / "out.ipynb"),
                    "-f", str(state), "-p", "picture", str(picture), "-k", "python3"], check=True, cwd=tmp_path,
                    timeout=300)
    assert picture.stat().st_size > 10_000
    bad = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(BOOKS / f"{name}.ipynb"),
                          str(tmp_path / "bad.ipynb"),
                          "-p", "tabel", "V"], cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert bad.returncode != 0 and "unknown name 'tabel'" in bad.stdout + bad.stderr
