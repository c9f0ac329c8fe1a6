"""`make bench-dashboards`: start and slider step to redraw in a real browser, median over 30 steps, and a fast drag.

A start ends with the first drawing: from `Run all` in JupyterLab, where a kernel waits that has imported nothing; from
the page's address in Voila, ten seconds after the server began, so that the kernel which it keeps is ready. A step is one press of an arrow key on a slider's handle; it ends when the last canvas that it changes is drawn (time
taken inside the page). The drag makes 120 mouse moves as fast as they go and asks how long after letting go the last
drawing came. Writes figures/bench_dashboards.csv and prints it."""
import argparse, csv, os, platform, statistics, subprocess, sys, time
from datetime import datetime, UTC
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import browser

ROOT = Path(__file__).resolve().parent.parent
CASES = (  # dashboard, slider, key, what is redrawn, target in ms
    ("windows", "tone", "ArrowRight", "4 canvases of curves", 50),
    ("windows", "kernel_size", "ArrowRight", "4 canvases, widths solved anew", 50),
    ("patch_parameters", "time_patch", "ArrowRight", "128 x 608 picture and 5 canvases", 100),
    ("patch_parameters", "clip_index", "ArrowRight", "the same, with a new clip, log-mel and estimates", None),
    ("ablations", "row", "ArrowLeft", "bars and tables", 50),
    ("alias_lab", "decay", "ArrowRight", "2 canvases of curves and numbers", 50),
    ("alias_lab", "hop", "ArrowRight", "128 x 608 picture, 5 canvases and numbers", 100),
    ("alias_lab", "rate", "ArrowRight", "the same, a new sound and its log-mel", 100),
)
WATCH = """() => { window.bench = { t0: 0, last: 0 };
  document.addEventListener('keydown', () => { bench.t0 = performance.now(); bench.last = 0; }, true);
  new MutationObserver(ms => { for (const m of ms) if (m.target.dataset.time) bench.last = Math.max(bench.last,
    +m.target.dataset.time); })
    .observe(document.body, { subtree: true, attributes: true, attributeFilter: ['data-frame'] }); }"""


START_TARGET = 3000  # ms


def open_dashboard(page, server):
    "Runs the notebook and waits for its first drawing; how long that took, ms."
    start = page.started
    if server is browser.Lab:
        page.kernel_idle()
        start = time.time()
        page.run_all()
    page.page.wait_for_selector(".aasp-dash canvas[data-frame]")
    took = 1e3 * (time.time() - start)
    page.settle()
    page.page.evaluate(WATCH)
    return took


def delayed(s, server):
    "A page, opened when Voila has had time to make a kernel ready."
    if server is browser.Voila: time.sleep(10)
    return s.page(height=1500)


def steps(page, field, key, count):
    "Times of single steps in ms; the slider turns round at its end."
    handle, times = page.page.locator(f".aasp-field-{field} .noUi-handle"), []
    value = page.page.locator(f".aasp-field-{field} .widget-readout")
    back = {"ArrowRight": "ArrowLeft", "ArrowLeft": "ArrowRight"}
    handle.focus()
    for _ in range(20 * count):
        if len(times) == count: return times
        before = value.inner_text()
        page.page.keyboard.press(key)
        page.page.wait_for_timeout(30)
        if value.inner_text() == before:  # at the end of the slider
            key = back[key]
            continue
        last = -1.0
        for _ in range(100):
            page.page.wait_for_timeout(60)
            now = page.page.evaluate("() => bench.last")
            if now and now == last: break
            last = now
        times.append(page.page.evaluate("() => bench.last - bench.t0"))
    raise RuntimeError(f"the slider {field} does not move")


def fast_drag(page, field, moves=120):
    "Drags a slider; (ms from letting go to the last drawing, redraws, moves)."
    handle = page.page.locator(f".aasp-field-{field} .noUi-handle")
    count = "() => Math.max(...Array.from(document.querySelectorAll('canvas[data-frame]')).map(c => +c.dataset.frame))"
    first = page.page.evaluate(count)
    page.page.evaluate("() => { bench.up = 0; document.addEventListener('pointerup', () => { bench.up = performance.now(); }, { once: true, capture: true }); }")
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    for i in range(1, moves + 1): page.page.mouse.move(x + (60 * i / moves), y)
    page.page.mouse.up()
    page.settle(quiet=0.8)
    late = page.page.evaluate("() => Math.max(0, bench.last - (bench.up || bench.last))")
    return late, page.page.evaluate(count) - first, moves


def hardware():
    "What it ran on, in words."
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((l.split(":")[1].strip() for l in text.splitlines() if l.startswith("model name")),
                 platform.processor() or platform.machine())
    version = subprocess.run([browser.chromium(), "--version"], capture_output=True, text=True).stdout.strip()
    return f"{model}, {os.cpu_count()} cores; {' '.join(version.split()[:2])}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench_dashboards.csv")
    parser.add_argument("--servers", default="lab,voila")
    parser.add_argument("--only", default="", help="one dashboard; the file keeps the rows of the others")
    args = parser.parse_args()
    reason = browser.missing(voila="voila" in args.servers)
    if reason: sys.exit(f"cannot measure: {reason}")
    rows, where = [], hardware()

    def add(name, server, field, what, t, target, moves="", drawn="", late=""):
        rows.append(dict(dashboard=name, server=server.name, slider=field, redrawn=what, steps=len(t),
                         median_ms=round(statistics.median(t), 1), p90_ms=round(sorted(t)[int(0.9 * len(t))], 1),
                         target_ms=target or "", drag_moves=moves, drag_redraws=drawn, drag_last_redraw_ms=late,
                         load=round(os.getloadavg()[0], 1), hardware=where,
                         date=datetime.now(UTC).strftime("%Y-%m-%d")))
        print({k: v for k, v in rows[-1].items() if k not in ("hardware", "date")}, flush=True)

    for server in (s for s in (browser.Lab, browser.Voila) if s.name in args.servers.split(",")):
        for name in dict.fromkeys(c[0] for c in CASES if args.only in ("", c[0])):
            starts = []
            for left in reversed(range(args.starts)):
                with server(ROOT / "nbs" / "dashboards" / f"{name}.ipynb") as s, delayed(s, server) as page:
                    starts.append(open_dashboard(page, server))
                    if left: continue
                    add(name, server, "(start)", "first drawing", starts, START_TARGET)
                    for _, field, key, what, target in (c for c in CASES if c[0] == name):
                        steps(page, field, key, 3)  # warm-up
                        t = steps(page, field, key, args.steps)
                        late, drawn, moves = fast_drag(page, field)
                        add(name, server, field, what, t, target, moves, drawn, round(late, 1))
    args.out.parent.mkdir(exist_ok=True)
    kept = list(csv.DictReader(args.out.open(newline=""))) if args.only and args.out.exists() else []
    with open(args.out, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows([r for r in kept if r["dashboard"] != args.only] + rows)
    over = [r for r in rows if r["target_ms"] and r["median_ms"] > r["target_ms"]]
    print(f"\n{where}\n{'all medians within their targets' if not over else 'OVER the target: ' + ', '.join(r['dashboard'] + '/' + r['slider'] for r in over)}")
    return int(bool(over))


if __name__ == "__main__": sys.exit(main())
