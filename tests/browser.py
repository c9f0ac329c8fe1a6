"""A real browser for the dashboards: JupyterLab or Voila on 127.0.0.1, headless Chromium, nothing fetched from outside.

    with Lab(notebook) as lab, lab.page() as page:
        page.run_all()                       # every cell, waits until the kernel is idle again
        page.press(".noUi-handle", "ArrowRight")
        assert page.errors == [] and page.external == []

`Voila(notebook)` has the same interface without `run_all`. The notebook is copied into a fresh folder,
  so the tree under
test is never written to; every server gets its own configuration, data and browser profile and is ended by its own
process id. `missing()` says why no browser can be had, or None.
"""
import ctypes, json, os, re, secrets, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]  # a microphone that beeps
NOISE = (  # console errors that are not ours: (pattern, why it is harmless)
    (r"favicon\.ico", "the server has no icon for this path"),
    (r"ResizeObserver loop", "Chromium's notice that a layout took two passes"),
    (r"removeChild[\s\S]*jlab_core", "JupyterLab takes its splash screen away twice when a theme follows another"),
)


def chromium():
    "Path of a Chromium, or None."
    named = os.environ.get("AASP_CHROMIUM")
    found = [named] if named else [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")]
    return next((p for p in found if p and Path(p).exists()), None)


def missing(voila=False):
    "Why a browser test cannot run here, or None."
    if chromium() is None: return "no chromium (Debian: apt-get install chromium; or set AASP_CHROMIUM)"
    for name in ("playwright", "jupyterlab") + (("voila",) if voila else ()):
        try: __import__(name)
        except ImportError: return f"no {name} (pip install {name})"
    return None


def free_port():
    "A TCP port on 127.0.0.1 that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end_with_parent():
    "Linux: a server whose test was killed gets SIGTERM and ends its kernels."
    if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server:
    "One notebook server in a folder of its own."
    name, title = "server", ""

    def __init__(self, *notebooks, env=None):
        self.notebooks, self.extra_env = [Path(n).resolve() for n in notebooks], env or {}

    def command(self): raise NotImplementedError
    def url(self, notebook=None): raise NotImplementedError

    def __enter__(self):
        self.home = Path(tempfile.mkdtemp(prefix=f"aasp-{self.name}-"))
        self.root = self.home / "work"
        self.root.mkdir()
        for n in self.notebooks: shutil.copy(n, self.root / n.name)
        settings = self.home / "config" / "labconfig"
        settings.mkdir(parents=True)
        off = {"@jupyterlab/apputils-extension:announcements": True}
        (settings / "page_config.json").write_text(json.dumps({"disabledExtensions": off}))
        self.port, self.token = free_port(), secrets.token_hex(16)
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
        self.env = {**keep, "JUPYTER_CONFIG_DIR": str(self.home / "config"),
                    "JUPYTER_DATA_DIR": str(self.home / "data"),
                    "JUPYTER_RUNTIME_DIR": str(self.home / "runtime"), "IPYTHONDIR": str(self.home / "ipython"),
                    **self.extra_env}
        self.log = open(self.home / "server.log", "w")
        self.process = subprocess.Popen(self.command(), cwd=self.root, env=self.env, stdout=self.log, stderr=self.log,
                                        start_new_session=True, preexec_fn=end_with_parent)
        self.wait()
        return self

    def wait(self, timeout=90):
        "Until the server answers, or an error with the end of its log."
        end = time.time() + timeout
        while time.time() < end:
            if self.process.poll() is not None: break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=2): return
            except urllib.error.HTTPError: return
            except OSError: time.sleep(0.1)
        tail = (self.home / "server.log").read_text()[-2000:]
        self.__exit__()
        raise RuntimeError(f"{self.name} did not start within {timeout} s:\n{tail}")

    def __exit__(self, *_):
        "Ends the server and its kernels: its own process group only."
        for sig, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            try: os.killpg(self.process.pid, sig)
            except ProcessLookupError: break
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired: continue
        self.log.close()
        shutil.rmtree(self.home, ignore_errors=True)

    @contextmanager
    def page(self, notebook=None, width=1280, height=1100, scale=1):
        "A fresh headless browser on one notebook."
        from playwright.sync_api import sync_playwright
        profile = tempfile.mkdtemp(prefix="aasp-profile-")
        with sync_playwright() as p:
            context = p.chromium.launch_persistent_context(
                profile, executable_path=chromium(), args=FLAGS, headless=True, accept_downloads=True,
                viewport=dict(width=width, height=height), device_scale_factor=scale)
            try: yield Page(self, context, self.url(notebook))
            finally:
                context.close()
                shutil.rmtree(profile, ignore_errors=True)


class Lab(Server):
    "JupyterLab in single-document mode."
    name = "lab"

    def command(self):
        return [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--allow-root",
                f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", f"--ServerApp.root_dir={self.root}"]

    def url(self, notebook=None):
        return f"http://127.0.0.1:{self.port}/doc/tree/{Path(notebook or self.notebooks[0]).name}?token={self.token}"


class Voila(Server):
    "The notebook as an application."
    name = "voila"

    def command(self):
        from aasp_nb.pages import voila_command
        command, env = voila_command(self.root, self.home / "share", self.port, self.token)
        self.env["JUPYTER_PATH"] = env["JUPYTER_PATH"]
        return command

    def url(self, notebook=None):
        return f"http://127.0.0.1:{self.port}/voila/render/{Path(notebook or self.notebooks[0]).name}?token={self.token}"


FAULTS = r"""() => {  // what cannot be seen or read on the dashboard, one line each
  const out = [], dash = document.querySelector('.aasp-dash');
  const seen = e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden';
  const rgba = c => (c.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .9) return c; } return [255, 255, 255]; };
  const faint = (what, ink, on) => { const c = contrast(ink, on);
    if (c < 4.5) out.push(`contrast ${c.toFixed(1)}: ${what.trim().slice(0, 40)}`); };
  const words = document.createTreeWalker(dash, NodeFilter.SHOW_TEXT);
  for (let n; (n = words.nextNode());) {
    const e = n.parentElement;
    if (!n.data.trim() || !seen(e) || ['OPTION', 'STYLE', 'SCRIPT'].includes(e.tagName)) continue;
    faint(n.data, rgba(getComputedStyle(e).color), ground(e));
    const range = document.createRange(); range.selectNodeContents(n);
    const r = range.getBoundingClientRect(), d = dash.getBoundingClientRect();
    if (r.left < d.left - 1 || r.right > d.right + 1) out.push(`outside the card: ${n.data.trim().slice(0, 40)}`);
    for (let p = e; p && p !== dash; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') {
      const q = p.getBoundingClientRect();
      if (r.left < q.left - 1 || r.right > q.right + 1) out.push(`cut: ${n.data.trim().slice(0, 40)}`); }
  }
  for (const e of dash.querySelectorAll('select, input[type=text]')) if (seen(e))
    faint(e.value || 'input', rgba(getComputedStyle(e).color), ground(e));
  for (const e of dash.querySelectorAll('select, input:not([type=file]), button, canvas[role], .noUi-handle, .widget-readout')) {
    const name = e.getAttribute('aria-label') || (e.labels && e.labels[0] ? e.labels[0].textContent : '') || e.title || e.textContent;
    if (seen(e) && !name.trim()) out.push(`without a name: ${e.outerHTML.slice(0, 80)}`);
  }
  for (const c of dash.querySelectorAll('canvas.aasp-canvas')) {
    const w = c.clientWidth, h = c.clientHeight, texts = c.texts || [];
    if (w < 200 || h < 100 || !texts.length) { out.push(`a canvas of ${w} x ${h} with ${texts.length} texts`); continue; }
    texts.forEach((t, i) => {
      const ink = document.createElement('i'); ink.style.color = t.color; dash.append(ink);
      faint('canvas: ' + t.text, rgba(getComputedStyle(ink).color), [255, 255, 255]); ink.remove();
      if (t.x0 < -1 || t.y0 < -1 || t.x1 > w + 1 || t.y1 > h + 1) out.push(`outside its canvas: ${t.text}`);
      for (const u of texts.slice(i + 1)) if (t.x0 < u.x1 - 1 && u.x0 < t.x1 - 1 && t.y0 < u.y1 - 1 && u.y0 < t.y1 - 1)
        out.push(`overprinted: ${t.text} | ${u.text}`);
    });
  }
  return out; }"""


class Page:
    "A page with what it complained about (`errors`) and whom it asked outside 127.0.0.1 (`external`)."

    def __init__(self, server, context, url):
        self.server, self.context, self.errors, self.external = server, context, [], []
        self.page = context.pages[0] if context.pages else context.new_page()
        self.page.set_default_timeout(90_000)
        self.page.on("console", lambda m: self.complain(m.text, m.location) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.complain(f"{e} {(e.stack or '')[:600]}", {}))
        home = re.compile(rf"^(https?|wss?)://127\.0\.0\.1:{server.port}/")
        def guard(route):
            if home.match(route.request.url): return route.continue_()
            self.external.append(route.request.url)
            route.abort()
        context.route(lambda u: not u.startswith(("data:", "blob:")), guard)
        self.page.on("websocket", lambda w: None if home.match(w.url) else self.external.append(w.url))
        self.started = time.time()
        self.page.goto(url, wait_until="domcontentloaded", timeout=180_000)

    def complain(self, text, location):
        where = location.get("url", "") if isinstance(location, dict) else ""
        if not any(re.search(p, text + " " + where) for p, _ in NOISE): self.errors.append(f"{text} [{where}]")

    def kernel_idle(self, timeout=60):
        "Waits until JupyterLab's kernel is connected and idle."
        self.page.wait_for_function("""() => { const a = window.jupyterapp; const w = a && a.shell.currentWidget;
            const k = w && w.sessionContext && w.sessionContext.session && w.sessionContext.session.kernel;
            return k && k.status === 'idle' && k.connectionStatus === 'connected'; }""", timeout=timeout * 1000)

    def run_all(self, timeout=120):
        "Runs every cell and waits for the last one; raises when one of them failed."
        self.kernel_idle(timeout)
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.kernel_idle(timeout)
        bad = self.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea-output "
                                "pre:has-text('Traceback')").all_inner_texts()
        if bad: raise AssertionError("cell failed: " + "\n".join(bad)[-2000:])

    def faults(self):
        "What is faint, cut, overprinted, of no width or without a name, one line each."
        return self.page.evaluate(FAULTS)

    def theme(self, name):
        "JupyterLab's Light or Dark theme."
        self.page.evaluate("t => window.jupyterapp.commands.execute('apputils:change-theme', { theme: t })", f"JupyterLab {name}")
        self.page.wait_for_function("t => document.body.dataset.jpThemeName === t", arg=f"JupyterLab {name}")

    def width(self, pixels, height=1100):
        "Another width of the window; waits until every canvas has been drawn anew for it."
        self.page.set_viewport_size(dict(width=pixels, height=height))
        self.page.wait_for_function("""() => Array.from(document.querySelectorAll('canvas.aasp-canvas')).every(c =>
            Math.abs(c.width - c.parentElement.clientWidth * devicePixelRatio) < 2)""")
        self.settle()

    def upload(self, path):
        "Hands a file to the dashboard's upload button."
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("button.aasp-upload").first.click()
        chooser.value.set_files(str(path))

    def hide_chrome(self):
        "Closes JupyterLab's side bars so that a picture shows the notebook."
        self.page.evaluate("""async () => { const c = window.jupyterapp.commands;
            for (const n of ['application:toggle-left-area', 'application:toggle-right-area'])
                if (c.hasCommand(n) && c.isToggled(n)) await c.execute(n); }""")

    def press(self, selector, key, times=1, nth=0):
        "Focuses an element and presses a key."
        self.page.locator(selector).nth(nth).focus()
        for _ in range(times): self.page.keyboard.press(key)

    def drag(self, selector, dx, steps=20, nth=0):
        "Drags an element by dx pixels with the mouse, in many small moves."
        box = self.page.locator(selector).nth(nth).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for i in range(1, steps + 1): self.page.mouse.move(x + dx * i / steps, y)
        self.page.mouse.up()

    def settle(self, quiet=0.4, timeout=30):
        "Waits until no drawing has changed for `quiet` seconds; returns every drawing's counter."
        read = "() => Array.from(document.querySelectorAll('[data-frame]')).map(e => +e.dataset.frame)"
        end, last, since = time.time() + timeout, None, time.time()
        while time.time() < end:
            now = self.page.evaluate(read)
            if now != last: last, since = now, time.time()
            elif now and time.time() - since > quiet: return now
            self.page.wait_for_timeout(50)
        return last

    def shot(self, path, selector=None):
        "Screenshot of the page or of one element."
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        target = self.page.locator(selector).first if selector else self.page
        target.screenshot(path=str(path))
