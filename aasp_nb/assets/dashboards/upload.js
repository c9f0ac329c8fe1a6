function wav(samples, rate) {  // 16-bit mono
  const v = new DataView(new ArrayBuffer(44 + 2 * samples.length)), put = (at, s) => [...s].forEach((c, i) => v.setUint8(at + i, c.charCodeAt(0)));
  put(0, 'RIFF'); v.setUint32(4, 36 + 2 * samples.length, true); put(8, 'WAVEfmt '); v.setUint32(16, 16, true);
  v.setUint16(20, 1, true); v.setUint16(22, 1, true); v.setUint32(24, rate, true); v.setUint32(28, 2 * rate, true);
  v.setUint16(32, 2, true); v.setUint16(34, 16, true); put(36, 'data'); v.setUint32(40, 2 * samples.length, true);
  samples.forEach((s, i) => v.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, s))), true));
  return new Blob([v.buffer], { type: 'audio/wav' });
}
async function record(seconds, tell) {  // what the microphone hears, as a wav
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  try {
    const tape = new MediaRecorder(stream), parts = [], start = performance.now();
    tape.ondataavailable = e => parts.push(e.data);
    const ended = new Promise(done => { tape.onstop = done; });
    const clock = setInterval(() => tell(Math.max(0, seconds - (performance.now() - start) / 1000)), 100);
    tape.start(); setTimeout(() => tape.stop(), 1000 * seconds);
    await ended; clearInterval(clock);
    const context = new AudioContext(), heard = await context.decodeAudioData(await new Blob(parts).arrayBuffer());
    context.close();
    const mono = new Float32Array(heard.length);
    for (let c = 0; c < heard.numberOfChannels; c++) heard.getChannelData(c).forEach((s, i) => { mono[i] += s / heard.numberOfChannels; });
    return wav(mono, heard.sampleRate);
  } finally { stream.getTracks().forEach(t => t.stop()); }
}
function render({ model, el }) {  // a file goes in parts: a server closes the connection on one message of its size
  const button = document.createElement('button'), file = document.createElement('input');
  button.className = 'aasp-upload'; file.type = 'file'; file.accept = model.get('accept'); file.style.display = 'none';
  el.append(button, file);
  let chosen = null, id = 0;
  const label = text => { button.textContent = text; };
  const part = async at => { const end = Math.min(chosen.size, at + model.get('part'));
    label(`${chosen.name}: ${Math.round(100 * at / Math.max(1, chosen.size))} %`);
    model.send({ id, at, name: chosen.name, size: chosen.size }, undefined, [await chosen.slice(at, end).arrayBuffer()]); };
  const next = m => { if (!chosen || m.id !== id) return;
    if (m.done) { chosen = null; label(model.get('label')); } else part(m.at); };
  const send = what => { chosen = what; id += 1; part(0); };
  button.onclick = () => file.click();
  file.onchange = () => { if (!file.files[0]) return; const f = file.files[0]; file.value = ''; send(f); };
  model.on('msg:custom', next);
  label(model.get('label'));
  const seconds = model.get('record');
  if (!seconds) return;
  const mic = document.createElement('button'), text = `Record ${Math.round(seconds)} s with the microphone`;
  mic.className = 'aasp-upload aasp-record'; mic.textContent = text; el.append(mic);
  mic.onclick = async () => { mic.disabled = true;
    try { send(new File([await record(seconds, left => { mic.textContent = `Recording\u2026 ${left.toFixed(1)} s`; })], 'microphone.wav')); }
    catch (e) { model.send({ failed: `no recording: ${e.message || e}; allow the microphone for this page` }); }
    mic.disabled = false; mic.textContent = text; };
}
export default { render };
