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
  button.onclick = () => file.click();
  file.onchange = () => { if (!file.files[0]) return; chosen = file.files[0]; file.value = ''; id += 1; part(0); };
  model.on('msg:custom', next);
  label(model.get('label'));
}
export default { render };
