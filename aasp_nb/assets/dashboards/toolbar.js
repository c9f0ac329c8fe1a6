function node(tag, parent, text, cls) { const e = document.createElement(tag); if (text) e.textContent = text;
  if (cls) e.className = cls; parent.append(e); return e; }
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
  const error = node('div', el, '', 'aasp-error'); error.setAttribute('role', 'alert');
  const show = () => { pick.value = model.get('preset');
    busy.textContent = model.get('busy') ? '\u23F3 ' + model.get('busy') : '';
    error.textContent = model.get('error'); error.style.display = model.get('error') ? '' : 'none'; };
  const saved = m => { if (m.kind !== 'saved') return;
    const a = document.createElement('a');
      a.href = URL.createObjectURL(new Blob([m.text], { type: 'application/json' }));
    a.download = m.name; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000); };
  model.on('change:preset', show); model.on('change:busy', show); model.on('change:error', show);
    model.on('msg:custom', saved);
  show();
}
export default { render };
