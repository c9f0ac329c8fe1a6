function niceTicks(lo, hi, count) {
  const raw = (hi - lo) / Math.max(1, count), mag = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * mag).find(s => s >= raw * 0.999), out = [];
  for (let k = Math.ceil(lo / step - 1e-9); k * step <= hi + 1e-9 * step; k++) out.push(k * step);
  return out;
}
function logTicks(lo, hi) {
  const out = [];
  for (let k = Math.floor(Math.log10(lo)); 10 ** k <= hi * 1.001; k++)
    for (const m of hi / lo > 1e3 ? [1] : [1, 2, 5]) { const v = m * 10 ** k;
      if (v >= lo * .999 && v <= hi * 1.001) out.push(v); }
  return out;
}
function text(v) {
  if (v == null || !isFinite(v)) return '–';
  const a = Math.abs(v);
  const s = a && (a < 1e-3 || a >= 1e5) ? v.toExponential(1) : String(+v.toPrecision(4));
  return s.replace('-', '\u2212');
}
function scaleOf(axis, a, b) {
  const log = axis.scale === 'log', f = log ? Math.log10 : v => v, g = log ? v => 10 ** v : v => v;
  const [lo, hi] = axis.lim.map(f), k = (b - a) / (hi - lo);
  const s = v => a + (f(v) - lo) * k;
  s.inv = p => g(lo + (p - a) / k);
  return s;
}
function ticksOf(axis, count) {
  if (axis.ticks) return axis.ticks;
  const [lo, hi] = axis.lim;
  if (axis.scale !== 'log') return niceTicks(lo, hi, count).map(v => [v, text(v)]);
  const digits = '\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079';
  const up = k => String(k).split('').map(c => digits[c] ?? '\u207b').join('');
  return logTicks(lo, hi).map(v => [v, hi / lo > 1e3 ? '10' + up(Math.round(Math.log10(v))) : text(v)]);
}

const LAYERS = {
  line(c, l, X, Y, R) {
    const x = R(l.x), y = R(l.y);
    c.strokeStyle = l.color; c.lineWidth = l.width; c.setLineDash(l.dash); c.lineJoin = 'round'; c.beginPath();
    let pen = false;
    for (let i = 0; i < x.length; i++) {
      const q = Y(y[i]);
      if (!isFinite(q)) { pen = false; continue; }
      const p = X(x[i]), v = Math.max(-1e5, Math.min(1e5, q));
      pen ? c.lineTo(p, v) : c.moveTo(p, v); pen = true;
    }
    c.stroke(); c.setLineDash([]);
  },
  band(c, l, X, Y, R) {
    const x = R(l.x), lo = R(l.lo), hi = R(l.hi), n = x.length;
    c.globalAlpha = l.alpha; c.fillStyle = l.color; c.beginPath();
    for (let i = 0; i < n; i++) c.lineTo(X(x[i]), Y(hi[i]));
    for (let i = n - 1; i >= 0; i--) c.lineTo(X(x[i]), Y(lo[i]));
    c.closePath(); c.fill(); c.globalAlpha = 1;
  },
  points(c, l, X, Y, R) {
    const x = R(l.x), y = R(l.y), s = l.size;
    c.globalAlpha = l.alpha; c.fillStyle = c.strokeStyle = l.color; c.lineWidth = 1.5;
    for (let i = 0; i < x.length; i++) {
      const p = X(x[i]), q = Y(y[i]);
      c.beginPath();
      if (l.marker === 'd') { c.moveTo(p, q - s); c.lineTo(p + s, q); c.lineTo(p, q + s); c.lineTo(p - s, q); c.fill();
        }
      else if (l.marker === 'x') { c.moveTo(p - s, q - s); c.lineTo(p + s, q + s); c.moveTo(p - s, q + s);
        c.lineTo(p + s, q - s); c.stroke(); }
      else { c.arc(p, q, s, 0, 7); c.fill(); }
    }
    c.globalAlpha = 1;
  },

  bars(c, l, X, Y, R, p, u, box) {
    const x = R(l.x), y = R(l.y), lo = R(l.lo), hi = R(l.hi);
    for (let i = 0; i < x.length; i++) {
      const a = X(x[i] - l.width / 2), b = X(x[i] + l.width / 2), q = Y(y[i]), z = Y(l.base), m = (a + b) / 2;
      c.fillStyle = l.color; c.fillRect(a, Math.min(q, z), Math.max(1, b - a), Math.abs(q - z));
      if (l.outline) { c.strokeStyle = l.outline; c.lineWidth = 2;
        c.strokeRect(a, Math.min(q, z), b - a, Math.abs(q - z)); }
      if (!isFinite(lo[i])) continue;
      const w = Math.min(6, (b - a) / 3), inside = v => Math.max(box.t + 2, Math.min(box.b - 2, v));
      c.strokeStyle = '#222'; c.lineWidth = 1.4; c.beginPath(); c.moveTo(m, inside(Y(lo[i]))); c.lineTo(m, inside(Y(hi[i])));
      for (const v of [Y(lo[i]), Y(hi[i])]) {  // a cap where the interval ends, a head where it goes on
        const e = inside(v), back = e === v ? 0 : Math.sign(e - v) * 6;
        c.moveTo(m - w, e + back); if (back) c.lineTo(m, e); c.lineTo(m + w, e + back);
      }
      c.stroke();
    }
  },
  picture(c, l, X, Y, R, pixels, lut) {
    const [h, w] = l.shape, off = document.createElement('canvas'); off.width = w; off.height = h;
    const g = off.getContext('2d'), im = g.createImageData(w, h), d = im.data, o = l.data[0];
    for (let r = 0, k = 0; r < h; r++) for (let q = o + (h - 1 - r) * w, e = q + w; q < e; q++, k += 4) {
      const v = 3 * pixels[q]; d[k] = lut[v]; d[k + 1] = lut[v + 1]; d[k + 2] = lut[v + 2]; d[k + 3] = 255;
    }
    g.putImageData(im, 0, 0);
    const [x0, x1, y0, y1] = l.extent;
    c.imageSmoothingEnabled = false; c.drawImage(off, X(x0), Y(y1), X(x1) - X(x0), Y(y0) - Y(y1));
  },

  mark(c, l, X, Y, R, p, u, box) {
    c.strokeStyle = l.color; c.lineWidth = l.width; c.setLineDash(l.dash); c.beginPath();
    if (l.way === 'v') { const x = X(l.at); c.moveTo(x, box.t); c.lineTo(x, box.b); }
    else { const y = Y(l.at); c.moveTo(box.l, y); c.lineTo(box.r, y); }
    c.stroke(); c.setLineDash([]);
  },
  span(c, l, X, Y, R, p, u, box) {
    c.globalAlpha = l.alpha; c.fillStyle = l.color; c.fillRect(X(l.x0), box.t, X(l.x1) - X(l.x0), box.b - box.t);
      c.globalAlpha = 1;
  },
  frame(c, l, X, Y) {
    const [x0, x1, y0, y1] = l.box; c.strokeStyle = l.color; c.lineWidth = l.width;
    c.strokeRect(X(x0), Y(y1), X(x1) - X(x0), Y(y0) - Y(y1));
  },
  text(c, l, X, Y, R, p, u, box, texts) {
    c.font = `${l.size}px system-ui, sans-serif`;
    const w = c.measureText(l.text).width, h = 1.25 * l.size, shift = { left: 0, center: .5, right: 1 }[l.align];
    const x = Math.max(box.l + 3, Math.min(box.r - 3 - w, X(l.at[0]) - shift * w)), y0 = Y(l.at[1]) - 2;
    const free = y => y - h >= box.t && y <= box.b && !texts.some(t => apart(t, [x, y - h, x + w, y]) === false);
    const tries = [0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5].map(k => y0 + k * (h + 1));
    write(c, texts, l.text, x, tries.find(free) ?? Math.max(box.t + h, Math.min(box.b, y0)), 'left', 'bottom', l.color);
  },
};

const FONT = '11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif', INK = '#444', GRID = '#e6e8eb';
function apart(t, [x0, y0, x1, y1]) { return t.x1 < x0 || x1 < t.x0 || t.y1 <= y0 || y1 <= t.y0; }
function write(c, texts, s, x, y, align, base, color = INK, px = 11) {  // what stands on the canvas is kept in `texts`
  c.fillStyle = color; c.textAlign = align; c.textBaseline = base; c.fillText(s, x, y);
  const w = c.measureText(s).width, h = px * 1.1, x0 = x - w * { left: 0, center: .5, right: 1 }[align];
  const y0 = y - h * { top: 0, middle: .5, bottom: 1 }[base];
  texts.push({ text: s, color, x0, x1: x0 + w, y0, y1: y0 + h });
}
function wrapped(c, s, width) {  // lines of words, each as wide as there is room for
  const rows = [];
  for (const part of String(s).split('\n')) {
    let row = '';
    for (const word of part.split(' ')) {
      if (row && c.measureText(row + ' ' + word).width > width) { rows.push(row); row = word; }
      else row = row ? row + ' ' + word : word;
    }
    rows.push(row);
  }
  return rows;
}
function plan(c, axis, left, right) {  // texts along x: names are wrapped, numbers left out where they would touch
  c.font = FONT;
  const X = scaleOf(axis, left, right), all = ticksOf(axis, (right - left) / 80).map(([v, s]) => [X(v), String(s)]);
  if (axis.ticks && all.some(([, s]) => /[a-z]/i.test(s))) {
    const room = all.slice(1).reduce((m, [x], i) => Math.min(m, x - all[i][0]), right - left) - 6;
    return all.map(([x, s]) => [x, wrapped(c, s, room)]);
  }
  const kept = [];
  for (const [x, s] of all) { const half = c.measureText(s).width / 2;
    if (!kept.length || x - half > kept.at(-1)[2] + 5) kept.push([x, [s], x + half]); }
  return kept;
}
function boxOf(c, spec, w, h) {
  const box = { l: 58, r: w - 14, t: spec.x.second ? 38 : 8 };
  box.ticks = plan(c, spec.x, box.l, box.r);
  box.rows = Math.max(1, ...box.ticks.map(t => t[1].length));
  box.b = h - (spec.x.label ? 27 : 11) - 12 * box.rows;
  return box;
}
function grid(c, spec, X, Y, box) {
  c.strokeStyle = GRID; c.lineWidth = 1; c.beginPath();
  for (const [v] of ticksOf(spec.x, (box.r - box.l) / 80)) { const p = Math.round(X(v)) + .5; c.moveTo(p, box.t);
    c.lineTo(p, box.b); }
  for (const [v] of ticksOf(spec.y, (box.b - box.t) / 36)) { const p = Math.round(Y(v)) + .5; c.moveTo(box.l, p);
    c.lineTo(box.r, p); }
  c.stroke();
}
function axes(c, spec, X, Y, box, texts) {
  c.strokeStyle = '#9aa0a8'; c.lineWidth = 1; c.strokeRect(box.l + .5, box.t + .5, box.r - box.l, box.b - box.t);
  c.font = FONT;
  for (const [x, rows] of box.ticks) rows.forEach((row, i) => write(c, texts, row, x, box.b + 7 + 12 * i, 'center', 'top'));
  if (spec.x.label) write(c, texts, spec.x.label, (box.l + box.r) / 2, box.b + 11 + 12 * box.rows, 'center', 'top');
  if (spec.x.second) {
    const f = spec.x.second.factor, top = { lim: spec.x.lim.map(v => v * f), scale: spec.x.scale };
    c.strokeStyle = '#9aa0a8'; c.beginPath();
    for (const [p, [s]] of plan(c, top, box.l, box.r)) { write(c, texts, s, p, box.t - 5, 'center', 'bottom');
      c.moveTo(p, box.t - 4); c.lineTo(p, box.t); }
    c.stroke(); write(c, texts, spec.x.second.label, (box.l + box.r) / 2, box.t - 20, 'center', 'bottom');
  }
  let last = Infinity;
  for (const [v, s] of ticksOf(spec.y, (box.b - box.t) / 36)) { const y = Y(v);
    if (last - y > 12) { write(c, texts, s, box.l - 6, y, 'right', 'middle'); last = y; } }
  const long = c.measureText(spec.y.label).width, room = box.b - box.t + 20, px = Math.max(9, Math.min(11, 11 * room / long));
  c.save(); c.font = FONT.replace('11px', px + 'px'); c.translate(13, (box.t + box.b) / 2); c.rotate(-Math.PI / 2);
  c.fillStyle = INK; c.textAlign = 'center'; c.textBaseline = 'middle'; c.fillText(spec.y.label, 0, 0); c.restore();
  const half = long * px / 22, m = (box.t + box.b) / 2;
  texts.push({ text: spec.y.label, color: INK, x0: 13 - px / 2, x1: 13 + px / 2, y0: m - half, y1: m + half });
}

const bus = (window.__aasp_bus ??= new EventTarget());
function node(tag, cls, parent) { const e = document.createElement(tag); if (cls) e.className = cls;
  if (parent) parent.append(e); return e; }
function valueAt(x, y, at) {
  if (!x.length || at < Math.min(x[0], x[x.length - 1]) || at > Math.max(x[0], x[x.length - 1])) return NaN;
  let a = 0, b = x.length - 1;
  const up = x[b] >= x[a];
  while (b - a > 1) { const m = (a + b) >> 1; (x[m] <= at) === up ? a = m : b = m; }
  return x[b] === x[a] ? y[a] : y[a] + (y[b] - y[a]) * (at - x[a]) / (x[b] - x[a]);
}
function swatch(l) {
  const d = (l.dash || []).join(' ');
  const fill = ['bars', 'band', 'span'].includes(l.kind)
    ? `<rect y="1" width="22" height="8" fill="${l.color}" fill-opacity="${Math.max(.25, l.alpha ?? 1)}"/>`
    : l.kind === 'points' ? (l.marker === 'd'
      ? `<path d="M11 0l5 5-5 5-5-5z" fill="${l.color}"/>` : `<circle cx="11" cy="5" r="4" fill="${l.color}"/>`)
    : `<line x1="0" y1="5" x2="22" y2="5" stroke="${l.color}" stroke-width="${l.width}" stroke-dasharray="${d}"/>`;
  return `<svg width="22" height="10" aria-hidden="true">${fill}</svg>`;
}
function hit(spec, R, X, Y, px, py) {
  let best = null, near = 14;
  for (const l of spec.layers) {
    if (!l.pick) continue;
    const x = R(l.x), y = R(l.y);
    for (let i = 0; i < x.length; i++) {
      const wide = l.kind === 'bars' ? Math.abs(X(x[i] + l.width / 2) - X(x[i])) : 0;
      const d = l.kind === 'bars' ? Math.max(0, Math.abs(px - X(x[i])) - wide) * 20 : Math.hypot(px - X(x[i]),
        py - Y(y[i]));
      if (d < near) { near = d; best = { pick: l.pick, index: i }; }
    }
  }
  return best;
}

function render({ model, el }) {
  const root = node('div', 'aasp-plot', el), head = node('div', 'aasp-head', root), title = node('span', 'aasp-title',
    head);
  const legend = node('span', 'aasp-legend', head), stack = node('div', 'aasp-stack', root);
  const canvas = node('canvas', 'aasp-canvas', stack), over = node('canvas', 'aasp-over', stack);
  canvas.tabIndex = 0; canvas.setAttribute('role', 'img');
  let spec, X, Y, R, box, high, at = null, known = '', chips = [];
  function fit(c, w, h) {
    const r = window.devicePixelRatio || 1;
    if (c.width !== Math.round(w * r) || c.height !== Math.round(h * r)) { c.width = Math.round(w * r);
      c.height = Math.round(h * r); c.style.height = h + 'px'; }
    const g = c.getContext('2d'); g.setTransform(r, 0, 0, r, 0, 0); g.clearRect(0, 0, w, h); return g;
  }
  function block(name, type) { const v = model.get(name);
    return new type(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength)); }
  function draw() {
    spec = model.get('spec');
    const w = stack.clientWidth;
    if (!spec.layers || w < 40) return;
    const numbers = block('data', Float32Array), pixels = block('pixels', Uint8Array), lut = block('lut', Uint8Array);
    R = ref => numbers.subarray(ref[0], ref[0] + ref[1]);
    high = Math.round(spec.height * Math.max(1, Math.min(1.5, w / 800)));  // a wide drawing is higher, too
    const c = fit(canvas, w, high), texts = [];
    box = boxOf(c, spec, w, high); X = scaleOf(spec.x, box.l, box.r); Y = scaleOf(spec.y, box.b, box.t);
    grid(c, spec, X, Y, box);
    c.save(); c.beginPath(); c.rect(box.l, box.t, box.r - box.l, box.b - box.t); c.clip();
    for (const l of spec.layers) LAYERS[l.kind](c, l, X, Y, R, pixels, lut, box, texts);
    c.restore();
    axes(c, spec, X, Y, box, texts); canvas.texts = texts;
    title.textContent = spec.title; canvas.setAttribute('aria-label', spec.aria);
    names(); cursor(at, false);
    canvas.dataset.frame = model.get('frame'); canvas.dataset.time = performance.now();
  }

  function names() {
    const shown = spec.layers.filter(l => l.name), sign = JSON.stringify(shown.map(l => [l.name, l.color, l.dash,
      l.kind]));
    if (sign === known) return;
    known = sign; legend.innerHTML = ''; chips = [];
    for (const l of shown) { const s = node('span', 'aasp-chip', legend); s.innerHTML = swatch(l);
      node('span', '', s).textContent = l.name; const b = node('b', l.kind === 'line' ? 'aasp-value' : '', s);
        chips.push([l.name, b]); }
  }
  function cursor(x, tell = true) {
    at = x;
    if (!spec || !box) return;
    const c = fit(over, stack.clientWidth, high), shown = spec.layers.filter(l => l.name);
    const inside = x != null && x >= spec.x.lim[0] && x <= spec.x.lim[1];
    if (inside) { c.strokeStyle = '#111'; c.lineWidth = 1; c.setLineDash([2, 2]); c.beginPath(); c.moveTo(X(x), box.t);
      c.lineTo(X(x), box.b); c.stroke(); }
    shown.forEach((l, i) => { if (chips[i]) chips[i][1].textContent = inside && l.kind === 'line'
      ? ' ' + text(valueAt(R(l.x), R(l.y), x)) + (l.unit || '') : ''; });
    over.dataset.cursor = inside ? x : '';
    if (tell && spec.group) bus.dispatchEvent(new CustomEvent(spec.group, { detail: { x, from: canvas } }));
    if (tell && inside && model.get('report')) { model.set('cursor', x); model.save_changes(); }
  }
  const place = e => { const b = canvas.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
  const within = p => box && p[0] >= box.l && p[0] <= box.r;
  function click(px, py) {
    if (!spec) return;
    model.set('clicked', { n: (model.get('clicked').n || 0) + 1, x: X.inv(px), y: Y.inv(py), ...(hit(spec, R, X, Y, px,
      py) || {}) });
    model.save_changes();
  }

  let pulled = null;
  over.addEventListener('pointermove', e => { const p = place(e); cursor(within(p) ? X.inv(p[0]) : null);
    if (!model.get('drag') || !(e.buttons & 1) || !within(p)) return;
    if (pulled === null) requestAnimationFrame(() => { click(...pulled); pulled = null; });  // one message for a drawing
    pulled = p; });
  over.addEventListener('pointerleave', () => cursor(null));
  over.addEventListener('click', e => { click(...place(e)); canvas.focus({ preventScroll: true }); });
  canvas.addEventListener('keydown', e => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (way) { const [lo, hi] = spec.x.lim, s = model.get('stride') || (hi - lo) / 100; e.preventDefault();
      e.stopPropagation();
      cursor(Math.max(lo, Math.min(hi, (at ?? (lo + hi) / 2) + way * s))); }
    else if (e.key === 'Enter' && at != null) { e.stopPropagation(); click(X(at), (box.t + box.b) / 2); }
  });
  const follow = e => { if (e.detail.from !== canvas) cursor(e.detail.x, false); };
  let heard = '';
  const listen = () => { const g = (model.get('spec') || {}).group || '';
    if (g !== heard) { if (heard) bus.removeEventListener(heard, follow); if (g) bus.addEventListener(g, follow);
    heard = g; } };
  const redraw = () => { listen(); draw(); };
  model.on('change:frame', redraw);
  const watch = new ResizeObserver(() => draw()); watch.observe(stack);
  const mark = () => root.classList.toggle('aasp-marked', model.get('marked'));
  model.on('change:marked', mark); mark();
  if (model.get('drag')) over.style.cursor = 'ew-resize';
  redraw();
  return () => { watch.disconnect(); model.off('change:frame', redraw); model.off('change:marked', mark);
    if (heard) bus.removeEventListener(heard, follow); };
}
export default { render };
