function render({ model, el }) {
  const box = document.createElement('div'); box.className = 'aasp-sound'; el.append(box);
  const audio = new Audio(); let url = '';
  const button = document.createElement('button'), range = document.createElement('input'),
    name = document.createElement('label');
  range.type = 'range'; range.min = 0; range.max = 1; range.step = 0.01; range.value = audio.volume = 0.25;
    range.setAttribute('aria-label', 'volume');
  range.oninput = () => { audio.volume = +range.value; };
  const held = () => { const v = model.get('wav'); return v && v.byteLength ? v : null; };
  const show = () => { button.textContent = (audio.paused ? '\u25B6 Play ' : '\u25A0 Stop ') + model.get('label');
    button.disabled = !held(); };
  const drop = () => { audio.pause();
    // the address lives a little longer: a browser that still reads it would complain
    if (url) { const old = url; url = ''; audio.removeAttribute('src'); audio.load();
      setTimeout(() => URL.revokeObjectURL(old), 2000); } };
  const start = () => { if (!held()) return;
    if (!url) { url = URL.createObjectURL(new Blob([held()], { type: 'audio/wav' })); audio.src = url; }
    audio.currentTime = 0; audio.play().catch(() => {}); };
  const load = () => { drop(); show(); };
  button.onclick = () => { if (audio.paused) start(); else { audio.pause(); audio.currentTime = 0; } };
  for (const e of ['play', 'pause', 'ended']) audio.addEventListener(e, show);
  audio.addEventListener('play', () => { box.dataset.plays = 1 + +(box.dataset.plays || 0); });
  name.append('volume ', range); box.append(button, name);
  model.on('change:wav', load); model.on('change:label', show); model.on('change:plays', () => setTimeout(start, 0));
  load();
  return drop;
}
export default { render };
