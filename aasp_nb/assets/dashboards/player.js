const sole = (window.__aasp_sound ??= { stop: null });  // never two sounds at once on a page
function render({ model, el }) {
  const box = document.createElement('div'); box.className = 'aasp-sound'; el.append(box);
  const audio = new Audio(), keys = {}; let url = '', track = '';
  const range = document.createElement('input'), name = document.createElement('label');
  range.type = 'range'; range.min = 0; range.max = 1; range.step = 0.01; range.value = audio.volume = 0.25;
  range.setAttribute('aria-label', 'volume'); range.oninput = () => { audio.volume = +range.value; };
  const held = t => { const v = model.get('wav' + model.get('tracks').indexOf(t)); return v && v.byteLength ? v : null; };
  const tell = t => { if (model.get('playing') === t) return; model.set('playing', t); model.save_changes(); };
  const show = () => { for (const t of model.get('tracks')) { const on = t === track && !audio.paused;
    keys[t].textContent = (on ? '\u25A0 Stop ' : '\u25B6 Play ') + t; keys[t].disabled = !held(t);
    keys[t].setAttribute('aria-pressed', on); }
    box.dataset.playing = audio.paused ? '' : track; tell(audio.paused ? '' : track); };
  const stop = () => { audio.pause(); show(); };
  const drop = () => { audio.pause();
    // the address lives a little longer: a browser that still reads it would complain
    if (url) { const old = url; url = ''; audio.removeAttribute('src'); audio.load();
      setTimeout(() => URL.revokeObjectURL(old), 2000); } };
  function start(t, at) {  // at: seconds into the sound, so that a change is heard where the last one was
    if (!held(t)) return;
    if (sole.stop && sole.stop !== stop) sole.stop();
    sole.stop = stop;
    drop(); track = t; url = URL.createObjectURL(new Blob([held(t)], { type: 'audio/wav' })); audio.src = url;
    audio.loop = !model.get('once').includes(t);
    audio.onloadedmetadata = () => { if (at && at < audio.duration) audio.currentTime = at; };
    audio.play().then(show, () => {});
    box.dataset.plays = 1 + +(box.dataset.plays || 0); box.dataset.last = t; show();
  }
  for (const t of model.get('tracks')) { const b = keys[t] = document.createElement('button'); box.append(b);
    b.onclick = () => { if (t === track && !audio.paused) stop();
      else start(t, audio.paused || model.get('once').includes(t) ? 0 : audio.currentTime); }; }
  for (const e of ['pause', 'ended']) audio.addEventListener(e, show);
  name.append('volume ', range); box.append(name);
  model.get('tracks').forEach((t, i) => model.on('change:wav' + i, () => {
    if (t === track && !audio.paused && !audio.ended) held(t) ? start(t, audio.currentTime) : stop();
    show(); }));
  model.on('change:asked', () => setTimeout(() => start(model.get('asked').track, 0), 0));
  show();
  return () => { drop(); if (sole.stop === stop) sole.stop = null; };
}
export default { render };
