function node(tag, parent, text, cls) { const e = document.createElement(tag); if (text) e.textContent = text;
  if (cls) e.className = cls; parent.append(e); return e; }
function named(dash) {  // ipywidgets' sliders and readouts carry no name of their own
  for (const box of dash.querySelectorAll('[class*="aasp-field-"]')) {
    const name = (box.querySelector('.widget-label, .widget-label-basic') || box).textContent.trim();
    for (const e of box.querySelectorAll('.noUi-handle, .widget-readout, select, input, textarea'))
      if (name && e.getAttribute('aria-label') !== name) e.setAttribute('aria-label', name);
  }
}
function land(dash) {  // JupyterLab scrolls to the last cell that ran; the dashboard is what was asked for
  if (!dash.closest('.jp-NotebookPanel')) return () => {};
  const stop = new AbortController(), watch = new ResizeObserver(() => align());
  const align = () => { if (!stop.signal.aborted) dash.scrollIntoView({ block: 'start' }); };
  const done = () => { stop.abort(); watch.disconnect(); };
  for (const e of ['wheel', 'pointerdown', 'keydown', 'touchstart'])
    window.addEventListener(e, done, { capture: true, passive: true, signal: stop.signal });
  watch.observe(dash);
  for (const t of [0, 100, 300, 700, 1500]) setTimeout(align, t);
  setTimeout(done, 3000);
  return done;
}
function guide(model, el) {  // a short tour: a question, a guess, then the setting that answers it and where to look
  const steps = model.get('tour'), box = node('div', el, '', 'aasp-tour');
  if (!steps.length) { box.style.display = 'none'; return; }
  const button = (parent, text, fn) => { const b = node('button', parent, text); b.onclick = fn; return b; };
  const go = (i, open) => { box.replaceChildren(); box.dataset.step = i; box.dataset.open = open ? 1 : 0;
    if (i < 0) { node('span', box, 'New here? '); button(box, `Start the tour: ${steps.length} questions`, () => go(0)); return; }
    const s = steps[i], head = node('div', box), row = node('div', box, '', 'aasp-bar');
    node('b', head, `${i + 1} of ${steps.length}  `); node('span', head, s.ask);
    s.options.forEach((text, k) => { const b = button(row, text, () => { model.send({ kind: 'tour', step: i }); go(i, k + 1); });
      if (open) { b.disabled = true; b.textContent = (k === s.answer ? '\u2713 ' : open === k + 1 ? '\u2717 ' : '') + text; } });
    if (open) { const said = node('div', box, '', 'aasp-look'); said.setAttribute('role', 'status');
      node('b', said, open === s.answer + 1 ? 'Yes. ' : 'Not quite. '); node('span', said, 'Look at the marked drawing: ' + s.look); }
    const foot = node('div', box, '', 'aasp-bar');
    if (i) button(foot, 'Back', () => go(i - 1));
    if (i + 1 < steps.length) button(foot, 'Next', () => go(i + 1));
    button(foot, 'End the tour', () => { model.send({ kind: 'tour', step: -1 }); go(-1); });
  };
  go(-1);
}
function render({ model, el }) {
  const bar = node('div', el, '', 'aasp-bar');
  node('h2', bar, model.get('title'));
  const label = node('label', bar, 'Preset '), pick = node('select', label);
  pick.setAttribute('aria-label', 'preset');
  const own = node('option', pick, 'own setting'); own.value = '';
  for (const n of model.get('presets')) { const o = node('option', pick, n); o.value = n; }
  pick.onchange = () => { if (pick.value) model.send({ kind: 'preset', name: pick.value }); };
  const button = (text, fn, tip) => { const b = node('button', bar, text); b.onclick = fn; b.title = tip; return b; };
  button('Reset', () => model.send({ kind: 'reset' }), 'Back to the first state');
  button('Save state', () => model.send({ kind: 'save' }), 'Save the state as JSON; papermill takes it with -f');
  const file = node('input', bar); file.type = 'file'; file.accept = '.json'; file.style.display = 'none';
  file.onchange = async () => { const f = file.files[0];
    if (f) model.send({ kind: 'load', name: f.name, text: await f.slice(0, 1e6).text() }); file.value = ''; };
  button('Load state\u2026', () => file.click(), 'Load a state saved before');
  const busy = node('span', bar, '', 'aasp-busy'); busy.setAttribute('aria-live', 'polite');
  guide(model, el);
  const notice = node('div', el, '', 'aasp-notice'); notice.setAttribute('role', 'status');
  const error = node('div', el, '', 'aasp-error'); error.setAttribute('role', 'alert');
  const say = (box, text) => { box.textContent = text; box.style.display = text ? '' : 'none'; };
  const show = () => { pick.value = model.get('preset');
    busy.textContent = model.get('busy') ? '\u23F3 ' + model.get('busy') : '';
    say(notice, model.get('notice')); say(error, model.get('error')); };
  const saved = m => { if (m.kind !== 'saved') return;
    const a = document.createElement('a');
      a.href = URL.createObjectURL(new Blob([m.text], { type: 'application/json' }));
    a.download = m.name; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000); };
  for (const n of ['preset', 'busy', 'error', 'notice']) model.on('change:' + n, show);
  model.on('msg:custom', saved);
  show();
  let watch, landed = () => {};
  const inside = requestAnimationFrame(function look() {
    const dash = el.closest('.aasp-dash');
    if (!dash) { if (el.isConnected) requestAnimationFrame(look); return; }
    named(dash); landed = land(dash);
    watch = new MutationObserver(() => named(dash)); watch.observe(dash, { childList: true, subtree: true });
  });
  return () => { cancelAnimationFrame(inside); if (watch) watch.disconnect(); landed(); };
}
export default { render };
